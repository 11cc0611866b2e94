//! The log: a line on stderr for each change of state, none for a request.
//!
//! ```text
//!   device=vol0 state=started queues=2 depth=128
//!   warning[W-REMOVED-EXTERNALLY]: device=vol0 state=draining
//! ```
//!
//! Nobody waits for the log and nobody dies of it: what a closed, full or unread stderr does not take is counted, and told
//! once it takes lines again. Queue threads never log.

use std::fmt;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Serialises lines, and protects file descriptor 2 while [`quietly`] has it turned away.
static STDERR: Mutex<()> = Mutex::new(());
/// How long a line may wait for its reader: a command has nothing better to do.
static WAIT_MS: AtomicI32 = AtomicI32::new(5000);
static LOST: AtomicU64 = AtomicU64::new(0);
/// How many of them have been told of.
static TOLD: AtomicU64 = AtomicU64::new(0);

/// What an operator wants to find in a week.
pub fn info(line: impl fmt::Display) {
    write(format!("{line}\n"));
}

/// Something went wrong and was coped with. `code` is stable.
pub fn warn(code: &'static str, line: impl fmt::Display) {
    Warning::new(code, line).log();
}

/// What [`warn`] says, where somebody else is told too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    code: &'static str,
    line: String,
}

impl Warning {
    /// With a stable code.
    pub fn new(code: &'static str, line: impl fmt::Display) -> Self {
        Self { code, line: line.to_string() }
    }

    /// What is allowed in a configuration and probably not meant; its words are those of the configuration.
    pub fn of_config(line: impl fmt::Display) -> Self {
        Self::new("W-CONFIG", line)
    }

    /// On stderr.
    pub fn log(&self) {
        write(format!("{self}\n"));
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "warning[{}]: {}", self.code, self.line)
    }
}

/// Someone has to act.
pub fn error(failure: &crate::error::Failure) {
    write(format!("{}\n", failure.render()));
}

/// From now on a line is dropped rather than waited for: a daemon whose log nobody reads has disks to serve.
pub fn never_wait() {
    WAIT_MS.store(0, Ordering::Relaxed);
}

/// Lines that were lost, since the start.
pub fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// Of a piece: `PIPE_BUF` is 4096, and " …" and a line feed follow.
const PIECE_MAX: usize = 4096 - 5;

fn write(line: String) {
    let _serial = STDERR.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let lost = LOST.load(Ordering::Relaxed);
    if lost > TOLD.load(Ordering::Relaxed) && put(&format!("warning[W-LOG]: lines lost since the start: {lost}\n")) {
        TOLD.store(lost, Ordering::Relaxed);
    }
    for piece in pieces(&line) {
        if !put(&piece) {
            LOST.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A line in pieces that a pipe or a socket which is ready takes at once: more would wait for its reader, with the lock above.
fn pieces(line: &str) -> Vec<String> {
    let mut pieces = Vec::new();
    let mut rest = line.trim_end_matches('\n');
    while rest.len() > PIECE_MAX {
        let cut = (0..=PIECE_MAX).rev().find(|at| rest.is_char_boundary(*at)).unwrap_or(PIECE_MAX);
        pieces.push(format!("{} …\n", &rest[..cut]));
        rest = &rest[cut..];
    }
    pieces.push(format!("{rest}\n"));
    pieces
}

/// One write per line, so that lines of several processes on one stderr do not mix.
fn put(line: &str) -> bool {
    let mut stderr = std::io::stderr();
    // What takes anything takes a line: a pipe has room for a page then, a socket for a datagram.
    let is_ready = {
        let mut ready = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
        let wait = PollTimeout::try_from(WAIT_MS.load(Ordering::Relaxed)).unwrap_or(PollTimeout::ZERO);
        poll(&mut ready, wait) == Ok(1)
    };
    is_ready && stderr.write_all(line.as_bytes()).is_ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f59_a_line_is_written_in_pieces_that_a_pipe_takes_at_once() {
        // A pipe that is ready has room for 4096 bytes; a longer write waits for its reader.
        let line: String = "ä→x".repeat(3000);
        let pieces = pieces(&line);
        assert!(pieces.iter().all(|piece| piece.len() <= 4096 && piece.ends_with('\n')));
        assert_eq!(pieces.concat().replace(" …\n", "").trim_end(), line);
        assert_eq!(super::pieces("short\n"), ["short\n"]);
    }
}
