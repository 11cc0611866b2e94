//! The daemon as a user runs it: a child of ours, its log passed on, its end awaited.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::process;

/// A device takes about half a second to come up under emulation.
const READY: Duration = Duration::from_secs(30);

/// Two devices are gone in about a second; the daemon's own bounds are shorter than this.
const END: Duration = Duration::from_secs(15);

/// A running daemon; stopped when dropped.
pub struct Daemon {
    child: Child,
    binary: PathBuf,
    socket: PathBuf,
}

impl Daemon {
    /// Starts it and waits for its line `ready`.
    pub fn start(binary: &Path, config: &Path, folder: &Path) -> Result<Daemon> {
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
        pass_on(child.stdout.take().expect("piped"), tell.clone());
        pass_on(child.stderr.take().expect("piped"), tell);
        let daemon = Daemon { child, binary: binary.to_owned(), socket };
        // Both ends of its output closed: it has ended. Its last words are on the screen already.
        match ready.recv_timeout(READY) {
            Ok(()) => Ok(daemon),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                bail!("the daemon ended before it was ready (its log is above)")
            }
            Err(mpsc::RecvTimeoutError::Timeout) => bail!("the daemon was not ready within {} s", READY.as_secs()),
        }
    }

    /// `ublk-throttle del --force NAME`: by force, because fio has the device open.
    pub fn del(&self, name: &str) -> Result<()> {
        process::output(Command::new(&self.binary).args(["del", "--force", name]).arg("--socket").arg(&self.socket))
            .map(drop)
    }

    /// SIGTERM; how long it took to end, with 0.
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
        // Kindly first, so that its devices go too; a step has failed already, so its errors are not of interest.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.terminate();
            if !matches!(self.ended_within(END), Ok(Some(_))) {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }
    }
}

/// Prints the daemon's lines below ours; says when one of them is `ready`.
fn pass_on(from: impl Read + Send + 'static, tell: Sender<()>) {
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            println!("   | {line}");
            if line.trim() == "ready" {
                let _ = tell.send(());
            }
        }
    });
}
