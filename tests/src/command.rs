//! Runs short-lived programs with a time limit, and checks their exit codes and output.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::wait;

/// Exit code, output and duration of a program that has ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    what: String,
    /// Exit code; `None` after death by a signal.
    pub code: Option<i32>,
    /// Complete standard output.
    pub stdout: String,
    /// Complete standard error.
    pub stderr: String,
    /// Time from the start of the program to its end.
    pub took: Duration,
}

impl Outcome {
    /// Fails unless the program ended with `code`.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        ensure!(self.code == Some(code), "expected exit code {code}\n{self}");
        Ok(self)
    }

    /// Fails unless standard error contains each of `parts`.
    pub fn expect_stderr(self, parts: &[&str]) -> Result<Self> {
        for part in parts {
            ensure!(self.stderr.contains(part), "expected {part:?} on stderr\n{self}");
        }
        Ok(self)
    }

    /// Fails unless standard output contains each of `parts`.
    pub fn expect_stdout(self, parts: &[&str]) -> Result<Self> {
        for part in parts {
            ensure!(self.stdout.contains(part), "expected {part:?} on stdout\n{self}");
        }
        Ok(self)
    }

    /// Fails where standard error shows that the program panicked.
    pub fn expect_no_panic(self) -> Result<Self> {
        ensure!(!self.stderr.contains("panicked at"), "panicked\n{self}");
        Ok(self)
    }

    /// Standard output as one JSON value.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("standard output is not JSON\n{self}"))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "$ {}\nexit code {:?} after {:?}", self.what, self.code, self.took)?;
        writeln!(f, "--- stdout\n{}--- stderr\n{}", self.stdout, self.stderr)
    }
}

/// A running program. Standard output and standard error go to two files of the scene.
#[derive(Debug)]
pub struct Started {
    what: String,
    child: Child,
    begin: Instant,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Started {
    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits at most `limit` for the end of the program; kills it after that. The error then
    /// contains the output so far.
    pub fn finish(mut self, limit: Duration) -> Result<Outcome> {
        let ended = wait::for_exit(&self.what, &mut self.child, limit);
        let read = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        let mut outcome = Outcome {
            what: self.what.clone(),
            code: None,
            stdout: read(&self.stdout),
            stderr: read(&self.stderr),
            took: self.begin.elapsed(),
        };
        outcome.code = ended.with_context(|| format!("{outcome}"))?.code();
        Ok(outcome)
    }

    /// Whether the program still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid())?);
        nix::sys::signal::kill(pid, signal).with_context(|| format!("{signal} to {}", self.what))
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            wait::kill(&mut self.child);
        }
    }
}

/// Starts a program in `dir`; its output goes to numbered files there.
pub fn start(dir: &Path, command: &mut Command) -> Result<Started> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let words: Vec<_> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(OsStr::to_string_lossy).collect();
    let what = words.join(" ");
    let [stdout, stderr] = ["stdout", "stderr"].map(|stream| dir.join(format!("{number}.{stream}.log")));
    let child = command
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(File::create(&stdout)?)
        .stderr(File::create(&stderr)?)
        .spawn()
        .with_context(|| format!("starting {what}"))?;
    Ok(Started { what, child, begin: Instant::now(), stdout, stderr })
}
