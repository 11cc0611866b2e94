//! Runs fio on a job file of `fio-jobs/` and parses its JSON report.

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

/// A running fio, killed when dropped.
pub struct Running {
    claim: String,
    child: Child,
}

/// Result of a job, reads and writes together.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Errno, or 0 without an error.
    pub error: i64,
    /// Requests counted by fio, without those of the ramp time.
    pub requests: u64,
    /// Bytes of those requests, and of the requests that were under way at the end.
    pub bytes: u64,
    /// Time from the end of the ramp time to the last completion.
    pub runtime: Duration,
    /// Latency of the direction with more requests, if the job measures it.
    pub latency: Option<Latency>,
}

/// Percentiles of the time from submission to completion, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latency {
    /// Median.
    pub p50_ns: u64,
    /// 90th percentile.
    pub p90_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// 99.9th percentile.
    pub p999_ns: u64,
}

impl Job {
    /// Requests a second, if each has `request_bytes` bytes.
    ///
    /// Computed from bytes and runtime. fio's own `iops` divides the requests completed in time by
    /// a runtime that reaches to the last completion: at depth 32 and 500/s, 32 of 4000 requests
    /// are missing, 0.8 %.
    pub fn rate(&self, request_bytes: u64) -> f64 {
        self.bytes as f64 / request_bytes as f64 / self.runtime.as_secs_f64()
    }
}

impl Fio {
    /// A job file `fio-jobs/CLAIM.fio`.
    pub fn new(claim: &str) -> Fio {
        Fio { claim: claim.to_owned(), parameters: Vec::new() }
    }

    /// Sets the value of `${name}` in the job file.
    pub fn with(mut self, name: &str, value: &OsStr) -> Fio {
        self.parameters.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts fio.
    pub fn start(self) -> Result<Running> {
        let file = workspace::root().join("fio-jobs").join(format!("{}.fio", self.claim));
        let child = Command::new("fio")
            .arg("--output-format=json")
            .arg(&file)
            .envs(self.parameters)
            // fio writes state files to its working directory.
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
    /// Process ID of fio. Its jobs are child processes.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends fio early with SIGINT; fio then reports the results so far.
    pub fn interrupt(&self) -> Result<()> {
        kill(Pid::from_raw(self.child.id().try_into()?), Signal::SIGINT).context("cannot interrupt fio")
    }

    /// Waits up to `limit` for fio's end and returns the results of its jobs.
    pub fn finish(mut self, limit: Duration) -> Result<Vec<Job>> {
        // Reads the output while fio runs, because a full pipe would block fio.
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

/// Parses a report. fio writes notes before its JSON, to the same stream.
fn parse(report: &str) -> Result<Vec<Job>> {
    let start = report.find('{').context("fio wrote no JSON")?;
    // Only the first JSON value: text may follow it.
    let mut values = serde_json::Deserializer::from_str(&report[start..]).into_iter::<Value>();
    let report = values.next().context("fio wrote no JSON")?.context("fio's JSON is damaged")?;
    let jobs = report["jobs"].as_array().context("fio's JSON has no jobs")?;
    jobs.iter().map(job).collect()
}

fn job(value: &Value) -> Result<Job> {
    let error = value["error"].as_i64().context("a job without \"error\"")?;
    let mut job = Job { error, requests: 0, bytes: 0, runtime: Duration::ZERO, latency: None };
    let mut most = 0;
    for direction in ["read", "write"] {
        let number =
            |key: &str| value[direction][key].as_u64().with_context(|| format!("a job without {direction}.{key}"));
        let requests = number("total_ios")?;
        job.requests += requests;
        job.bytes += number("io_bytes")?;
        job.runtime = job.runtime.max(Duration::from_millis(number("runtime")?));
        if requests > most {
            (most, job.latency) = (requests, latency(&value[direction]["clat_ns"]["percentile"]));
        }
    }
    Ok(job)
}

fn latency(percentiles: &Value) -> Option<Latency> {
    let at = |percentile: &str| percentiles[percentile].as_u64();
    Some(Latency {
        p50_ns: at("50.000000")?,
        p90_ns: at("90.000000")?,
        p99_ns: at("99.000000")?,
        p999_ns: at("99.900000")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_with_notes_around_it_is_read() {
        // fio 3.33 writes "note: …" lines to the same stream.
        let report = r#"note: both iodepth >= 1 and synchronous I/O engine are selected
            {"fio version":"fio-3.33","jobs":[
              {"jobname":"a","error":0,"read":{"total_ios":3999,"io_bytes":16510976,"runtime":8065},
                                       "write":{"total_ios":0,"io_bytes":0,"runtime":0}},
              {"jobname":"b","error":5,"read":{"total_ios":0,"io_bytes":0,"runtime":0},
                                       "write":{"total_ios":2,"io_bytes":8192,"runtime":1000,
                                        "clat_ns":{"percentile":{"50.000000":5,"90.000000":6,"99.000000":7,"99.900000":8}}}}]}
            fio: end"#;
        let jobs = parse(report).unwrap();
        let latency = Some(Latency { p50_ns: 5, p90_ns: 6, p99_ns: 7, p999_ns: 8 });
        let second = Job { error: 5, requests: 2, bytes: 8192, runtime: Duration::from_secs(1), latency };
        assert_eq!((jobs.len(), &jobs[1]), (2, &second));
        assert_eq!((jobs[0].error, jobs[0].requests), (0, 3999));
    }

    #[test]
    fn rate_counts_the_requests_under_way_at_the_end() {
        // A real report at depth 32: 3999 requests in 8.000 s, and 32 more until 8.065 s.
        let job =
            Job { error: 0, requests: 3999, bytes: 4031 * 4096, runtime: Duration::from_millis(8065), latency: None };
        assert_eq!((job.rate(4096) * 10.0).round(), 4998.0);
    }

    #[test]
    fn report_without_jobs_is_an_error() {
        // Without a readable job file fio still ends with text on its output.
        assert!(parse("fio: unable to open 'x.fio' job file").is_err());
        assert!(parse(r#"{"jobs":[{"error":0}]}"#).unwrap_err().to_string().contains("read.total_ios"));
    }
}
