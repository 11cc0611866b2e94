//! The log: a line on stderr for each change of state, none for a request.
//!
//! ```text
//!   device=vol0 state=started queues=2 depth=128
//!   warning[W-REMOVED-EXTERNALLY]: device=vol0 state=draining
//! ```
//!
//! Where stderr is systemd's journal each line begins with its priority, `<4>` for a warning (sd-daemon(3)), so that
//! `journalctl -p warning` finds it.
//!
//! Nobody waits for the log and nobody dies of it: what a closed, full or unread stderr does not take is counted, and told
//! once it takes lines again. Queue threads never log.

use std::fmt;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;

/// Serialises lines, and protects file descriptor 2 while [`quietly`] has it turned away.
static STDERR: Mutex<()> = Mutex::new(());
/// How long a line may wait for its reader: a command has nothing better to do.
static WAIT_MS: AtomicI32 = AtomicI32::new(5000);
static LOST: AtomicU64 = AtomicU64::new(0);
/// How many of them have been told of.
static TOLD: AtomicU64 = AtomicU64::new(0);

/// Whether stderr is the journal. Found out by the first line, with [`STDERR`] locked: before [`quietly`] turns it away, or after.
static IS_JOURNAL: LazyLock<bool> = LazyLock::new(|| {
    let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    fstat(std::io::stderr()).is_ok_and(|stderr| is_named(&named, stderr.st_dev, stderr.st_ino))
});

/// What an operator wants to find in a week.
pub fn info(line: impl fmt::Display) {
    write(Priority::Info, &line.to_string());
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
        write(Priority::Warning, &self.to_string());
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "warning[{}]: {}", self.code, self.line)
    }
}

/// Someone has to act.
pub fn error(failure: &crate::error::Failure) {
    write(Priority::Error, &failure.render());
}

/// From now on a line is dropped rather than waited for: a daemon whose log nobody reads has disks to serve.
pub fn never_wait() {
    WAIT_MS.store(0, Ordering::Relaxed);
}

/// Lines that were lost, since the start.
pub fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// Of a line, in the numbers of syslog.
#[derive(Clone, Copy, Debug)]
enum Priority {
    Error,
    Warning,
    Info,
}

impl Priority {
    /// What the journal takes off the head of a line.
    const fn mark(self) -> &'static str {
        match self {
            Self::Error => "<3>",
            Self::Warning => "<4>",
            Self::Info => "<6>",
        }
    }
}

/// Whether `stream`, the value of JOURNAL_STREAM (`8:21543`), names this device and inode: a service that was given another stderr
/// has the variable as well.
fn is_named(stream: &str, device: u64, inode: u64) -> bool {
    stream.split_once(':').is_some_and(|(of, number)| (of.parse(), number.parse()) == (Ok(device), Ok(inode)))
}

/// What a pipe or a socket that is ready takes at once, `PIPE_BUF`: more would wait for its reader, with [`STDERR`] locked.
const PIECE_MAX: usize = 4096;
/// The end of a line that goes on in the next one.
const CUT: &str = " …\n";

fn write(priority: Priority, text: &str) {
    let _serial = STDERR.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mark = |priority: Priority| if *IS_JOURNAL { priority.mark() } else { "" };
    let lost = LOST.load(Ordering::Relaxed);
    let told = || format!("{}warning[W-LOG]: lines lost since the start: {lost}\n", mark(Priority::Warning));
    if lost > TOLD.load(Ordering::Relaxed) && put(&told()) {
        TOLD.store(lost, Ordering::Relaxed);
    }
    for piece in pieces(text, mark(priority)) {
        if !put(&piece) {
            LOST.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Whole lines in pieces of [`PIECE_MAX`] bytes at most. A longer line is cut; each line and each part of one begins with `mark`.
fn pieces(text: &str, mark: &str) -> Vec<String> {
    let mut pieces = vec![String::new()];
    for line in text.trim_end_matches('\n').split('\n').flat_map(|line| parts(line, PIECE_MAX - mark.len() - CUT.len()))
    {
        let line = format!("{mark}{line}");
        match pieces.last_mut() {
            Some(last) if last.len() + line.len() <= PIECE_MAX => last.push_str(&line),
            _ => pieces.push(line),
        }
    }
    pieces
}

/// A line in parts of `length_max` bytes and an end.
fn parts(line: &str, length_max: usize) -> Vec<String> {
    let (mut parts, mut rest) = (Vec::new(), line);
    while rest.len() > length_max {
        let cut = (0..=length_max).rev().find(|at| rest.is_char_boundary(*at)).unwrap_or(length_max);
        parts.push(format!("{}{CUT}", &rest[..cut]));
        rest = &rest[cut..];
    }
    parts.push(format!("{rest}\n"));
    parts
}

/// One write per piece, so that lines of several processes on one stderr do not mix.
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
        let pieces = pieces(&line, "");
        assert!(pieces.iter().all(|piece| piece.len() <= 4096 && piece.ends_with('\n')));
        assert_eq!(pieces.concat().replace(CUT, "").trim_end(), line);
        assert_eq!(super::pieces("short", ""), ["short\n"]);
    }

    #[test]
    fn f91_each_line_and_each_part_of_one_has_the_priority() {
        // The journal takes a line without a mark for `info`, whatever stood on the line before.
        assert_eq!(pieces("two\nlines", "<3>"), ["<3>two\n<3>lines\n"]);
        let text = format!("head\n{}\ntail", "ä→x".repeat(3000));
        let pieces = pieces(&text, "<4>");
        assert!(pieces.iter().all(|piece| piece.len() <= 4096 && piece.ends_with('\n')), "{pieces:?}");
        let lines: Vec<String> = pieces.concat().lines().map(str::to_owned).collect();
        assert!(lines.len() > 6 && lines.iter().all(|line| line.starts_with("<4>")), "{lines:?}");
        assert_eq!(pieces.concat().replace(" …\n<4>", "").replace("<4>", "").trim_end(), text);
    }

    #[test]
    fn f91_the_journal_is_known_by_device_and_inode() {
        assert!(is_named("8:21543", 8, 21543));
        for stream in ["", "8", "8:", "8:2154", "21543:8", "8:21543:1", "-8:21543", "8:21543 "] {
            assert!(!is_named(stream, 8, 21543), "{stream:?}");
        }
    }
}
