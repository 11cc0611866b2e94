//! The log: a line on stderr for each change of state, none for a request.
//!
//! ```text
//!   device=vol0 state=started queues=2 depth=128
//!   warning[W-REMOVED-EXTERNALLY]: device=vol0 state=draining
//! ```
//!
//! Nobody waits for the log and nobody dies of it: a closed or full stderr is ignored. Queue threads never log.

use std::fmt;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Mutex;

/// Serialises lines, and protects file descriptor 2 while [`quietly`] has it turned away.
static STDERR: Mutex<()> = Mutex::new(());

/// What an operator wants to find in a week.
pub fn info(line: impl fmt::Display) {
    write(format!("{line}\n"));
}

/// Something went wrong and was coped with. `code` is stable.
pub fn warn(code: &str, line: impl fmt::Display) {
    write(format!("warning[{code}]: {line}\n"));
}

/// Someone has to act.
pub fn error(failure: &crate::error::Failure) {
    write(format!("{}\n", failure.render()));
}

fn write(line: String) {
    let _serial = STDERR.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // One write per line, so that lines of several processes on one stderr do not mix.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Runs `work` with file descriptor 2 on /dev/null.
///
/// libublk prints "device reload json failed" on stderr for each device that has no json file, and ours never have one.
/// Our own lines wait meanwhile, so only what libraries print is lost.
pub fn quietly<T>(work: impl FnOnce() -> T) -> T {
    let _serial = STDERR.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let stderr = std::io::stderr();
    let Ok(kept) = stderr.as_fd().try_clone_to_owned() else { return work() };
    let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") else { return work() };
    if nix::unistd::dup2_stderr(&null).is_err() {
        return work();
    }
    let result = work();
    // Cannot fail: `kept` is open and descriptor 2 exists.
    let _ = nix::unistd::dup2_stderr(&kept);
    result
}
