//! Runs the daemon as a user does: as a child, with its log passed on or kept, until its end.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::process;

/// Time limit for the daemon to become ready. A device takes about 0.5 s to start under emulation;
/// a bench starts dozens.
const READY: Duration = Duration::from_secs(60);

/// Time limit for the daemon's end after SIGTERM. The removal of a bench's 64 devices takes 11 s on
/// an emulated machine, and twice that on a busy host.
const END: Duration = Duration::from_secs(120);

/// Use of the daemon's log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Log {
    /// Printed below the output of this program, each after `|`.
    Shown,
    /// Kept, and shown only if the daemon does not become ready.
    Kept,
}

/// A running daemon, stopped when dropped.
pub struct Daemon {
    child: Child,
    binary: PathBuf,
    socket: PathBuf,
    ready: Receiver<()>,
    kept: Arc<Mutex<Vec<String>>>,
}

impl Daemon {
    /// Starts the daemon. [`Daemon::wait_until_ready`] must follow.
    pub fn spawn(binary: &Path, config: &Path, folder: &Path, log: Log) -> Result<Daemon> {
        let socket = folder.join("control.sock");
        let mut child = Command::new(binary)
            .arg("run")
            .arg(config)
            .arg("--socket")
            .arg(&socket)
            .arg("--state-dir")
            .arg(folder.join("state"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", binary.display()))?;
        let (tell, ready) = mpsc::channel();
        let kept = Arc::new(Mutex::new(Vec::new()));
        let sink = (log == Log::Kept).then(|| Arc::clone(&kept));
        pass_on(child.stdout.take().expect("piped"), tell.clone(), sink.clone());
        pass_on(child.stderr.take().expect("piped"), tell, sink);
        Ok(Daemon { child, binary: binary.to_owned(), socket, ready, kept })
    }

    /// Waits for the daemon's line `ready`.
    pub fn wait_until_ready(&self) -> Result<()> {
        // Disconnected: both output streams are closed, so the daemon has ended.
        match self.ready.recv_timeout(READY) {
            Ok(()) => Ok(()),
            Err(RecvTimeoutError::Disconnected) => bail!("the daemon ended before it was ready{}", self.last_words()),
            Err(RecvTimeoutError::Timeout) => {
                bail!("the daemon was not ready within {} s{}", READY.as_secs(), self.last_words())
            }
        }
    }

    /// Process ID of the daemon.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a command to the daemon and returns its output: `ask(&["stats", "--json"])`.
    pub fn ask(&self, words: &[&str]) -> Result<String> {
        process::output(Command::new(&self.binary).args(words).arg("--socket").arg(&self.socket))
    }

    fn last_words(&self) -> String {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.is_empty() {
            return " (its log is above)".to_owned();
        }
        format!(":\n{}", process::last_lines(&kept.join("\n"), 15))
    }

    /// `ublk-throttle del --force NAME`. `--force`, because fio has the device open.
    pub fn del(&self, name: &str) -> Result<()> {
        self.ask(&["del", "--force", name]).map(drop)
    }

    /// Sends SIGTERM, expects exit code 0, and returns the time until the end.
    pub fn stop(mut self) -> Result<Duration> {
        let start = Instant::now();
        self.terminate()?;
        match self.ended_within(END)? {
            Some(status) if status.success() => Ok(start.elapsed()),
            Some(status) => bail!("after SIGTERM the daemon ended with {status}; expected exit code 0"),
            None => bail!("{} s after SIGTERM the daemon is still running", END.as_secs()),
        }
    }

    fn terminate(&self) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().try_into()?);
        kill(pid, Signal::SIGTERM).context("cannot send SIGTERM to the daemon")
    }

    fn ended_within(&mut self, limit: Duration) -> Result<Option<std::process::ExitStatus>> {
        let until = Instant::now() + limit;
        loop {
            let ended = self.child.try_wait().context("cannot wait for the daemon")?;
            if ended.is_some() || Instant::now() > until {
                return Ok(ended);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // SIGTERM first, so that the daemon removes its devices. A step has failed already, so
        // further errors are ignored.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.terminate();
            if !matches!(self.ended_within(END), Ok(Some(_))) {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }
    }
}

/// Keeps or prints the daemon's lines, and sends a message when a line is `ready`.
fn pass_on(from: impl Read + Send + 'static, tell: Sender<()>, keep: Option<Arc<Mutex<Vec<String>>>>) {
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if line.trim() == "ready" {
                let _ = tell.send(());
            }
            match &keep {
                Some(kept) => kept.lock().unwrap_or_else(PoisonError::into_inner).push(line),
                None => println!("   | {line}"),
            }
        }
    });
}
