//! The binary: reads the command line and exits with the code of the command.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(ublk_target::command::main())
}
