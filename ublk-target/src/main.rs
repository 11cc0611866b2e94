//! The binary: reads the command line and exits with the code of the command.

use std::panic;
use std::process::{self, ExitCode};

fn main() -> ExitCode {
    abort_after_a_panic();
    ExitCode::from(ublk_target::command::main())
}

/// A panic in one thread ends the process, in a debug build as in a release build: a device whose queue thread is gone would
/// never answer again, and the process that holds it would live on.
fn abort_after_a_panic() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        print(info);
        process::abort();
    }));
}
