//! START, STOP and DEL, each in a short-lived process of its own: this binary, executed again.
//!
//! ```text
//!   daemon                                  helper
//!     ├─ spawn __stop ID NONCE ────────────► opens the disk O_EXCL, looks for users
//!     │ ◄──────────────── "claimed" or "busy mounted at /srv" ┘
//!     ├─ lets go of held requests
//!     ├─ "go" ─────────────────────────────► writes back, STOP
//!     │ ◄───────────────────────────── exit 0, or "failed …" and exit 1
//! ```
//!
//! Why a process: these commands can wait, uninterruptibly, for requests that the daemon holds. A daemon killed during
//! its own STOP can never die: its exit waits for the command, the command for the requests, the requests for the exit to
//! close the ring. With the command in another process the kill ends everything within a second.
//!
//! Every helper checks that the device is still the one it was sent for (the nonce that ADD stored with it): the id may
//! have been freed and given to somebody else in between.

use std::io::{BufRead, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Class, Failure, OrFail, Outcome};
use crate::in_use;
use crate::ublk::Owner;
use crate::ublk::control::Control;

/// What a helper is sent to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// START, for the server process given.
    Start {
        /// Who has the character device open.
        server: u32,
    },
    /// The in-use check, then, when told to go on, STOP.
    Stop {
        /// Go on although somebody uses it.
        is_forced: bool,
    },
    /// STOP if need be, and DEL.
    Delete,
}

/// Which device, and that it is really that one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// What ADD stored.
    pub nonce: u32,
}

const CLAIMED: &str = "claimed";
const DELETED: &str = "deleted";
const BUSY: &str = "busy ";
const FAILED: &str = "failed ";
const GO: &str = "go\n";

/// How often the id of a deleted device is looked at.
const FREE_LOOK: Duration = Duration::from_millis(10);

/// What a helper said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The disk is ours alone, or the removal is forced: `go` may follow.
    Claimed,
    /// The device is deleted; the helper stays until the id is free.
    Deleted,
    /// Somebody uses it, in words.
    Busy(String),
    /// It could not be done, in words.
    Failed(String),
}

/// A helper at work.
pub struct Helper {
    child: Child,
    input: Option<ChildStdin>,
    output: ChildStdout,
    heard: Vec<u8>,
}

impl Helper {
    /// Sends one out.
    pub fn spawn(target: Target, errand: Errand) -> Outcome<Self> {
        // The file this process runs, even if it was replaced on disk meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("ublk-throttle");
        match errand {
            Errand::Start { .. } => command.arg("__start"),
            Errand::Stop { .. } => command.arg("__stop"),
            Errand::Delete => command.arg("__del"),
        };
        command.arg(target.id.to_string()).arg(target.nonce.to_string());
        match errand {
            Errand::Start { server } => {
                command.arg(server.to_string());
            }
            Errand::Stop { is_forced: true } => {
                command.arg("--force");
            }
            Errand::Stop { is_forced: false } | Errand::Delete => {}
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Control-C on a terminal goes to the whole process group; a helper must see its errand through.
            .process_group(0)
            .current_dir("/")
            .spawn()
            .or_fail(Class::Resource, "cannot start a helper process (/proc/self/exe)")?;
        let input = child.stdin.take();
        let output = child.stdout.take().expect("asked for a pipe");
        Ok(Self { child, input, output, heard: Vec::new() })
    }

    /// Tells a claiming helper to go on.
    pub fn go(&mut self) {
        if let Some(mut input) = self.input.take() {
            // If it died, its exit status tells.
            let _ = input.write_all(GO.as_bytes());
        }
    }

    /// What it has said since, without waiting.
    pub fn heard(&mut self) -> Option<Answer> {
        let mut ready = [PollFd::new(self.output.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PollTimeout::ZERO) == Ok(1) {
            let mut chunk = [0; 4096];
            let count = self.output.read(&mut chunk).unwrap_or(0);
            self.heard.extend_from_slice(&chunk[..count]);
        }
        let end = self.heard.iter().position(|byte| *byte == b'\n')?;
        let line: Vec<u8> = self.heard.drain(..=end).collect();
        Some(Answer::parse(&String::from_utf8_lossy(&line[..end])))
    }

    /// Its exit, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        // An error means that it is no child of ours any more: it has ended, in a way we cannot see.
        self.child.try_wait().unwrap_or(Some(ExitStatus::default()))
    }

    /// Calls it off. Only for one that has done its errand and waits for the id to be free.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Answer {
    fn parse(line: &str) -> Self {
        if line == CLAIMED {
            Self::Claimed
        } else if line == DELETED {
            Self::Deleted
        } else if let Some(users) = line.strip_prefix(BUSY) {
            Self::Busy(users.to_owned())
        } else {
            Self::Failed(line.strip_prefix(FAILED).unwrap_or(line).to_owned())
        }
    }
}

/// The other side: what a helper process does. Its one line of output is for the daemon.
pub fn run(target: Target, errand: Errand) -> u8 {
    let result = match errand {
        Errand::Start { server } => start(target, server),
        Errand::Stop { is_forced } => stop(target, is_forced),
        Errand::Delete => delete(target),
    };
    match result {
        Ok(()) => 0,
        Err(line) => {
            say(&line);
            1
        }
    }
}

fn start(target: Target, server: u32) -> Result<(), String> {
    let mut control = open(target)?.ok_or_else(|| format!("{FAILED}the device is gone"))?;
    control.start(target.id, server).map_err(|errno| told("START", errno))
}

fn stop(target: Target, is_forced: bool) -> Result<(), String> {
    // Forced, it does not matter who is there, only whether file systems have to be written back.
    let looks = if is_forced { 1 } else { in_use::LOOKS };
    let claim = match in_use::claim(target.id, looks) {
        Ok(disk) => Some(disk),
        Err(_) if is_forced => None,
        Err(users) => return Err(format!("{BUSY}{users}")),
    };
    say(CLAIMED);
    let mut order = String::new();
    let _ = std::io::stdin().lock().read_line(&mut order);
    if order != GO {
        // The daemon called it off, or died: its devices die with it.
        return Ok(());
    }
    match &claim {
        // A failure is the disk's: what could not be written back has been reported to its users.
        Some(disk) => drop(disk.sync_all()),
        None => in_use::sync_mounts(target.id),
    }
    let Some(mut control) = open(target)? else { return Ok(()) };
    gone_is_fine(control.stop(target.id)).map_err(|errno| told("STOP", errno))
}

fn delete(target: Target) -> Result<(), String> {
    let Some(mut control) = open(target)? else { return Ok(()) };
    // DEL would do the work of STOP under a lock that all ublk devices of the host share.
    gone_is_fine(control.stop(target.id)).map_err(|errno| told("STOP", errno))?;
    gone_is_fine(control.delete(target.id)).map_err(|errno| told("DEL", errno))?;
    say(DELETED);
    // As long as somebody has it open, the driver still answers for it.
    while control.info(target.id).is_ok_and(|info| info.owner == Owner::ours(target.nonce)) {
        std::thread::sleep(FREE_LOOK);
    }
    Ok(())
}

/// The driver, if the device is still the one we were sent for.
fn open(target: Target) -> Result<Option<Control>, String> {
    let mut control = Control::open().map_err(|failure| format!("{FAILED}{}", failure.message))?;
    match control.info(target.id) {
        Ok(info) if info.owner == Owner::ours(target.nonce) => Ok(Some(control)),
        Ok(_) | Err(Errno::ENODEV) => Ok(None),
        Err(errno) => Err(told("GET_INFO", errno)),
    }
}

/// Somebody else may have deleted it meanwhile.
fn gone_is_fine(result: Result<(), Errno>) -> Result<(), Errno> {
    if result == Err(Errno::ENODEV) { Ok(()) } else { result }
}

fn told(command: &str, errno: Errno) -> String {
    format!("{FAILED}{command}: {}", errno.desc())
}

fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    let _ = writeln!(output, "{}", line.replace('\n', " "));
    let _ = output.flush();
}

/// The failure of a helper that did not do its errand.
pub fn failure(what: &str, said: Option<Answer>, status: ExitStatus) -> Failure {
    let cause = match said {
        Some(Answer::Failed(text) | Answer::Busy(text)) => text,
        Some(Answer::Claimed | Answer::Deleted) | None => format!("the helper process ended with {status}"),
    };
    Failure::new(Class::Failed, format!("{what}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_helper_says_is_understood() {
        // Daemon and helper are the same binary, so the words only have to agree with themselves.
        assert_eq!(Answer::parse("claimed"), Answer::Claimed);
        assert_eq!(Answer::parse("deleted"), Answer::Deleted);
        assert_eq!(Answer::parse("busy mounted at /srv"), Answer::Busy("mounted at /srv".into()));
        assert_eq!(Answer::parse("failed STOP: no"), Answer::Failed("STOP: no".into()));
        assert_eq!(Answer::parse("Segmentation fault"), Answer::Failed("Segmentation fault".into()));
    }
}
