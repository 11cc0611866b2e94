//! The log: a line on stderr for each change of state, none for a request.
//!
//! ```text
//!   device=vol0 state=started queues=2 depth=128
//!   warning[W-REMOVED-EXTERNALLY]: device=vol0 state=draining
//! ```
//!
//! If stderr is systemd's journal, each line begins with its priority, `<4>` for a warning
//! (sd-daemon(3)), so that `journalctl -p warning` finds it.
//!
//! The daemon neither waits for the log nor ends because of it. Lines that stderr does not accept
//! (closed, full, not read) are dropped and counted; `W-LOG` reports the count once stderr accepts
//! lines again. A queue thread does not log while it serves.

use std::fmt;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;

/// Serialises lines, and protects file descriptor 2 while [`quietly`] has redirected it.
static STDERR: Mutex<()> = Mutex::new(());
/// How long a write waits until stderr is writable, in ms: 5 s in a command, which has no work
/// besides; 0 in the daemon, from [`never_wait`] on.
static WAIT_MS: AtomicI32 = AtomicI32::new(5000);
/// The number of writes that stderr did not accept.
static LOST: AtomicU64 = AtomicU64::new(0);
/// The value of [`LOST`] that `W-LOG` has last reported.
static TOLD: AtomicU64 = AtomicU64::new(0);

/// Whether stderr is the journal. The first line evaluates this with [`STDERR`] locked, hence not while
/// [`quietly`] has redirected stderr.
static IS_JOURNAL: LazyLock<bool> = LazyLock::new(|| {
    let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    fstat(std::io::stderr()).is_ok_and(|stderr| is_named(&named, stderr.st_dev, stderr.st_ino))
});

/// Logs a change of state that an operator may look for a week later.
pub fn info(line: impl fmt::Display) {
    write(Priority::Info, &line.to_string());
}

/// Logs a problem that the program has handled by itself, with a stable `code`.
pub fn warn(code: &'static str, line: impl fmt::Display) {
    Warning::new(code, line).log();
}

/// A warning as [`warn`] logs it, for code that also puts it into an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    code: &'static str,
    line: String,
}

impl Warning {
    /// A warning with a stable `code`.
    pub fn new(code: &'static str, line: impl fmt::Display) -> Self {
        Self { code, line: line.to_string() }
    }

    /// A warning about settings that are allowed but probably not meant. `line` uses the words of the
    /// configuration.
    pub fn of_config(line: impl fmt::Display) -> Self {
        Self::new("W-CONFIG", line)
    }

    /// Writes the warning to stderr.
    pub fn log(&self) {
        write(Priority::Warning, &self.to_string());
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "warning[{}]: {}", self.code, self.line)
    }
}

/// Logs a failure that the operator has to act on.
pub fn error(failure: &crate::error::Failure) {
    write(Priority::Error, &failure.render());
}

/// From now on a line that stderr does not accept at once is dropped. The daemon calls this, because it
/// must serve its disks even if its log is not read.
pub fn never_wait() {
    WAIT_MS.store(0, Ordering::Relaxed);
}

/// The number of writes that were dropped since the start: mostly one line each, at most [`PIECE_MAX`]
/// bytes of lines.
pub fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// The priority of a line.
#[derive(Clone, Copy, Debug)]
enum Priority {
    Error,
    Warning,
    Info,
}

impl Priority {
    /// The prefix with the number of syslog, which the journal removes from the line.
    const fn mark(self) -> &'static str {
        match self {
            Self::Error => "<3>",
            Self::Warning => "<4>",
            Self::Info => "<6>",
        }
    }
}

/// Whether `stream`, the value of JOURNAL_STREAM (`8:21543`), names this device and inode. The variable
/// alone proves nothing: a service whose stderr was redirected to a file has it as well.
fn is_named(stream: &str, device: u64, inode: u64) -> bool {
    stream.split_once(':').is_some_and(|(of, number)| (of.parse(), number.parse()) == (Ok(device), Ok(inode)))
}

/// The most bytes (`PIPE_BUF`) that a writable pipe or socket accepts without blocking. A longer write
/// could block until the reader reads, with [`STDERR`] locked.
const PIECE_MAX: usize = 4096;
/// The end of each part of a cut line but the last.
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

/// Groups whole lines into pieces of at most [`PIECE_MAX`] bytes. A longer line is cut into parts. Each
/// line and each part begins with `mark`.
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

/// Cuts a line into parts of at most `length_max` bytes, not counting [`CUT`] or the line feed at the
/// end of each.
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

/// Writes a piece by a single write, so that lines of several processes on one stderr do not mix. False if
/// stderr did not accept it.
fn put(line: &str) -> bool {
    let mut stderr = std::io::stderr();
    // POLLOUT means room for a whole piece: for a page (4096 bytes) in a pipe, for a datagram in a socket.
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
/// Lines of this module wait for the lock until `work` returns, so only the output of libraries is lost.
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
        // A writable pipe has room for 4096 bytes; a longer write waits for the reader.
        let line: String = "ä→x".repeat(3000);
        let pieces = pieces(&line, "");
        assert!(pieces.iter().all(|piece| piece.len() <= 4096 && piece.ends_with('\n')));
        assert_eq!(pieces.concat().replace(CUT, "").trim_end(), line);
        assert_eq!(super::pieces("short", ""), ["short\n"]);
    }

    #[test]
    fn f91_each_line_and_each_part_of_one_has_the_priority() {
        // The journal takes a line without a mark for `info`, even after a line with one.
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
