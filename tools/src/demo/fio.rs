//! fio, run on a file of `fio-jobs/`, and what of its JSON report is of interest.

use std::ffi::{OsStr, OsString};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::process::last_lines;
use crate::workspace;

/// A job file and its parameters.
pub struct Fio {
    claim: String,
    parameters: Vec<(String, OsString)>,
}

/// fio at work; killed when dropped.
pub struct Running {
    claim: String,
    child: Child,
}

/// One job's result, reads and writes together.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// An errno, 0 if all went well.
    pub error: i64,
    /// Requests a second, without the ramp time.
    pub iops: f64,
    /// Requests counted.
    pub requests: u64,
}

impl Fio {
    /// The job file `fio-jobs/CLAIM.fio`.
    pub fn new(claim: &str) -> Fio {
        Fio { claim: claim.to_owned(), parameters: Vec::new() }
    }

    /// A value for `${name}` in the job file.
    pub fn with(mut self, name: &str, value: &OsStr) -> Fio {
        self.parameters.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts it.
    pub fn start(self) -> Result<Running> {
        let file = workspace::root().join("fio-jobs").join(format!("{}.fio", self.claim));
        let child = Command::new("fio")
            .arg("--output-format=json")
            .arg(&file)
            .envs(self.parameters)
            // It keeps state files in its working directory.
            .current_dir("/tmp")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start fio")?;
        Ok(Running { claim: self.claim, child })
    }
}

impl Running {
    /// Ends it before its time, by SIGINT: it then reports on what it has done.
    pub fn interrupt(&self) -> Result<()> {
        kill(Pid::from_raw(self.child.id().try_into()?), Signal::SIGINT).context("cannot interrupt fio")
    }

    /// Its jobs' results, once it has ended; it must within `limit`.
    pub fn finish(mut self, limit: Duration) -> Result<Vec<Job>> {
        // Its reports are read while it runs: a full pipe would stop it.
        let stdout = drain(self.child.stdout.take().expect("piped"));
        let stderr = drain(self.child.stderr.take().expect("piped"));
        let until = Instant::now() + limit;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > until {
                bail!("fio-jobs/{}.fio did not end within {} s", self.claim, limit.as_secs());
            }
            thread::sleep(Duration::from_millis(20));
        }
        let (report, said) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
        parse(&report).with_context(|| format!("fio-jobs/{}.fio; fio said:\n{}", self.claim, last_lines(&said, 10)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn drain(mut from: impl std::io::Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// fio writes notes before its JSON, on the same stream.
fn parse(report: &str) -> Result<Vec<Job>> {
    let start = report.find('{').context("fio wrote no JSON")?;
    // The first value only: something may follow it as well.
    let mut values = serde_json::Deserializer::from_str(&report[start..]).into_iter::<Value>();
    let report = values.next().context("fio wrote no JSON")?.context("fio's JSON is damaged")?;
    let jobs = report["jobs"].as_array().context("fio's JSON has no jobs")?;
    jobs.iter().map(job).collect()
}

fn job(value: &Value) -> Result<Job> {
    let mut job = Job { error: value["error"].as_i64().context("a job without \"error\"")?, iops: 0.0, requests: 0 };
    for direction in ["read", "write"] {
        let part = &value[direction];
        job.iops += part["iops"].as_f64().with_context(|| format!("a job without {direction}.iops"))?;
        job.requests += part["total_ios"].as_u64().with_context(|| format!("a job without {direction}.total_ios"))?;
    }
    Ok(job)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_with_notes_around_it_is_read() {
        // fio 3.33 writes "note: …" lines to the same stream.
        let report = r#"note: both iodepth >= 1 and synchronous I/O engine are selected
            {"fio version":"fio-3.33","jobs":[
              {"jobname":"a","error":0,"read":{"iops":499.5,"total_ios":3996},"write":{"iops":0.5,"total_ios":4}},
              {"jobname":"b","error":5,"read":{"iops":0,"total_ios":0},"write":{"iops":0.0,"total_ios":0}}]}
            fio: end"#;
        let expected = [Job { error: 0, iops: 500.0, requests: 4000 }, Job { error: 5, iops: 0.0, requests: 0 }];
        assert_eq!(parse(report).unwrap(), expected);
    }

    #[test]
    fn report_without_jobs_is_an_error() {
        // A fio that could not read its job file still ends with text on its output.
        assert!(parse("fio: unable to open 'x.fio' job file").is_err());
        assert!(parse(r#"{"jobs":[{"error":0}]}"#).unwrap_err().to_string().contains("read.iops"));
    }
}
