//! The binary: reads the command line and exits with the code of the command.

use std::panic;
use std::process::{self, ExitCode};

fn main() -> ExitCode {
    abort_after_a_panic();
    ExitCode::from(ublk_target::command::main())
}

/// Makes a panic in any thread end the process, in a debug build as in a release build. Without its
/// queue thread a device would never answer again, while the process that holds it would live on.
fn abort_after_a_panic() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        print(info);
        process::abort();
    }));
}
