//! The daemon under test, from its start to its end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait;

/// Limit for the start of all devices: a start that takes longer counts as a hang.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// Limit for the exit after SIGTERM. (Row 71 of `FAULTS.md` gives 10 s to a `del` after the death
/// of its helper.)
pub const STOP_LIMIT: Duration = Duration::from_secs(10);

/// A running `ublk-throttle run`.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    config: PathBuf,
    log: PathBuf,
    socket: PathBuf,
}

impl Daemon {
    /// Starts `run`, the command line of a daemon that listens on `socket` and reads `config`, and
    /// waits for its line `ready`. The log goes to `log`.
    pub fn start(run: &mut Command, config: &Path, socket: &Path, log: &Path) -> Result<Self> {
        let mut daemon = Self::spawn(run, config, socket, log)?;
        wait::until("the daemon's line `ready`", READY_LIMIT, || {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("the daemon ended ({status}) before it was ready:\n{}", daemon.log()?);
            }
            Ok(daemon.log()?.lines().any(|line| line.trim() == "ready").then_some(()))
        })?;
        Ok(daemon)
    }

    /// Starts the daemon without waiting for its line `ready`.
    pub fn spawn(run: &mut Command, config: &Path, socket: &Path, log: &Path) -> Result<Self> {
        let output = File::create(log)?;
        let child = run
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("starting {run:?}"))?;
        Ok(Self { child, config: config.to_owned(), log: log.to_owned(), socket: socket.to_owned() })
    }

    /// The log so far.
    pub fn log(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.log)?).into_owned())
    }

    /// The configuration file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the daemon still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits until the log contains `text`, at most for `limit`.
    pub fn wait_for_log(&self, text: &str, limit: Duration) -> Result<()> {
        wait::until(&format!("{text:?} in the daemon's log"), limit, || Ok(self.log()?.contains(text).then_some(())))
            .with_context(|| self.log().unwrap_or_default())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.pid())?), signal).with_context(|| format!("{signal} to the daemon"))
    }

    /// Sends SIGTERM. The daemon must exit with 0 within [`STOP_LIMIT`], without a panic, and its
    /// socket must be gone. Returns the time to the exit.
    pub fn stop(mut self) -> Result<Duration> {
        let begin = Instant::now();
        self.signal(Signal::SIGTERM)?;
        let status = wait::for_exit("the daemon after SIGTERM", &mut self.child, STOP_LIMIT)?;
        let took = begin.elapsed();
        ensure!(status.code() == Some(0), "SIGTERM: expected exit code 0, got {status}:\n{}", self.log()?);
        ensure!(!self.log()?.contains("panicked at"), "the daemon panicked:\n{}", self.log()?);
        ensure!(!self.socket.exists(), "the daemon left its socket {}", self.socket.display());
        Ok(took)
    }

    /// Waits at most `limit` for the exit; returns the exit code, or `None` after death by a
    /// signal.
    pub fn wait_for_end(&mut self, limit: Duration) -> Result<Option<i32>> {
        Ok(wait::for_exit("the daemon", &mut self.child, limit)?.code())
    }

    /// Waits at most `limit` for the exit; an error with the log unless the exit code is 0.
    pub fn expect_end(mut self, limit: Duration) -> Result<()> {
        let code = self.wait_for_end(limit)?;
        ensure!(code == Some(0), "the daemon ended with {code:?}:\n{}", self.log()?);
        Ok(())
    }

    /// Sends SIGKILL and waits at most `limit` for the end of the process; returns the time to
    /// that.
    pub fn kill(mut self, limit: Duration) -> Result<Duration> {
        let begin = Instant::now();
        self.signal(Signal::SIGKILL)?;
        wait::for_exit("the daemon after SIGKILL", &mut self.child, limit)?;
        Ok(begin.elapsed())
    }
}

impl Drop for Daemon {
    /// Ends the daemon of a trial that failed early: first by SIGTERM, which removes its devices
    /// too, and by SIGKILL if the exit takes longer than [`STOP_LIMIT`].
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.signal(Signal::SIGTERM);
            if wait::for_exit("the daemon", &mut self.child, STOP_LIMIT).is_err() {
                wait::kill(&mut self.child);
            }
        }
    }
}
