//! fio: jobs of `fio-jobs/`, their reports, and the completion time of each operation.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::command::{self, Started};
use crate::needs;

/// Time that fio needs beside the job's runtime: start, requests in flight at the end, report.
const OVERHEAD: Duration = Duration::from_secs(30);

/// A job file and its parameters.
#[derive(Clone, Debug)]
pub struct Job {
    file: PathBuf,
    parameters: Vec<(String, String)>,
    section: Option<&'static str>,
}

impl Job {
    /// The job file `fio-jobs/CLAIM.fio`.
    pub fn new(claim: &str) -> Self {
        let file = crate::workspace().join("fio-jobs").join(format!("{claim}.fio"));
        Self { file, parameters: Vec::new(), section: None }
    }

    /// Sets a parameter: an environment variable that the file refers to.
    #[must_use]
    pub fn set(mut self, name: &str, value: impl ToString) -> Self {
        self.parameters.push((name.into(), value.to_string()));
        self
    }

    /// The text of the file. An unset parameter is an error: fio would replace it by an empty
    /// string and run a different job.
    fn text(&self) -> Result<String> {
        let text = fs::read_to_string(&self.file).with_context(|| self.file.display().to_string())?;
        for name in text.split("${").skip(1).filter_map(|rest| rest.split('}').next()) {
            let is_set = self.parameters.iter().any(|(known, _)| known == name);
            ensure!(is_set, "{}: {name} is not set", self.file.display());
        }
        Ok(text)
    }

    /// The only section of the file, renamed, with the parameters filled in.
    fn section_named(&self, name: &str) -> Result<String> {
        let text = self.text()?;
        let (_, options) = text.split_once("\n[").and_then(|(_, rest)| rest.split_once("]\n")).context("no section")?;
        ensure!(!options.contains("\n["), "{} has several sections", self.file.display());
        let put_in = |text: String, (name, value): &(String, String)| text.replace(&format!("${{{name}}}"), value);
        Ok(format!("[{name}]\n{}", self.parameters.iter().fold(options.to_owned(), put_in)))
    }

    /// Runs only this section of the file.
    #[must_use]
    pub fn section(mut self, name: &'static str) -> Self {
        self.section = Some(name);
        self
    }
}

/// A running job.
#[derive(Debug)]
pub struct Fio {
    started: Started,
    report: PathBuf,
}

impl Fio {
    pub(crate) fn start(dir: &Path, job: Job) -> Result<Self> {
        job.text()?;
        let mut command = Command::new(needs::program("fio").context("no program fio")?);
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let report = dir.join(format!("fio-{}.json", NUMBER.fetch_add(1, Ordering::Relaxed)));
        command.arg("--output-format=json").arg("--eta=never").arg(format!("--output={}", report.display()));
        command.args(job.section.map(|section| format!("--section={section}"))).arg(&job.file);
        command.envs(job.parameters);
        Ok(Self { started: command::start(dir, &mut command)?, report })
    }

    /// Starts several jobs of one section each in one process; the report keeps their order.
    ///
    /// A fio process needs up to 1 s of CPU time to start. A dozen processes would still be
    /// starting while the first one already measures.
    pub(crate) fn start_together(dir: &Path, jobs: &[Job]) -> Result<Self> {
        let sections = jobs.iter().enumerate().map(|(number, job)| job.section_named(&format!("job-{number}")));
        let text = sections.collect::<Result<Vec<_>>>()?.join("\n");
        let file = dir.join("together.fio");
        fs::write(&file, text).with_context(|| file.display().to_string())?;
        Self::start(dir, Job { file, parameters: Vec::new(), section: None })
    }

    /// Waits for the end of a job of length `runtime` and for its report. An error of fio is an
    /// error here.
    pub fn finish(self, runtime: Duration) -> Result<Report> {
        let report = self.finish_any(runtime)?;
        ensure!(
            report.code == Some(0) && report.errors().is_empty(),
            "fio failed: {:?}\n{}",
            report.errors(),
            report.text
        );
        Ok(report)
    }

    /// Like [`Fio::finish`], for a job whose requests may fail: fio must still end and write a
    /// report.
    pub fn finish_any(self, runtime: Duration) -> Result<Report> {
        let outcome = self.started.finish(runtime + OVERHEAD)?;
        let text = format!("{outcome}{}", fs::read_to_string(&self.report).unwrap_or_default());
        let jobs = parse(&text).with_context(|| format!("fio's report\n{text}"))?;
        Ok(Report { code: outcome.code, jobs, text })
    }

    /// Ends the job now; an error if a request of the job failed.
    pub fn stop(self) -> Result<Report> {
        self.interrupt()?;
        let report = self.finish_any(Duration::ZERO)?;
        ensure!(report.errors().is_empty(), "errors: {:?}\n{}", report.errors(), report.text);
        Ok(report)
    }

    /// Sends SIGINT: fio waits for the requests in flight, writes its report and ends.
    pub fn interrupt(&self) -> Result<()> {
        self.started.signal(Signal::SIGINT)
    }

    /// Whether the job still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        self.started.is_running()
    }
}

/// The report of a finished fio process.
#[derive(Clone, Debug)]
pub struct Report {
    /// Exit code of fio.
    pub code: Option<i32>,
    jobs: Vec<JobReport>,
    text: String,
}

impl Report {
    /// The jobs, in the order of the file.
    pub fn jobs(&self) -> &[JobReport] {
        &self.jobs
    }

    /// The job of a file with a single job.
    pub fn only(&self) -> Result<&JobReport> {
        ensure!(self.jobs.len() == 1, "expected one job, got {}", self.jobs.len());
        Ok(&self.jobs[0])
    }

    /// The job with this name.
    pub fn job(&self, name: &str) -> Result<&JobReport> {
        self.jobs.iter().find(|job| job.name == name).with_context(|| format!("no job {name} in fio's report"))
    }

    /// The error numbers of the jobs that failed.
    pub fn errors(&self) -> Vec<i64> {
        self.jobs.iter().map(|job| job.error).filter(|&error| error != 0).collect()
    }
}

/// A job of a report; counts of reads and writes are added up.
#[derive(Clone, Debug)]
pub struct JobReport {
    /// The section's name.
    pub name: String,
    /// The first error number; 0 if none.
    pub error: i64,
    /// Bytes of completed requests.
    pub bytes: u64,
    /// The interval over which fio counted the bytes.
    pub window: Duration,
}

impl JobReport {
    /// Operations of `block` bytes per second.
    ///
    /// Computed from bytes, as fio's `total_ios` counts operations *submitted* after the ramp: it
    /// leaves out the requests in flight at the end of the ramp, although the interval ends with
    /// the last completion. At 100/s and depth 32 that is 4 % too low.
    pub fn iops(&self, block: u64) -> f64 {
        self.bps() / block as f64
    }

    /// Bytes per second.
    pub fn bps(&self) -> f64 {
        self.bytes as f64 / self.window.as_secs_f64()
    }
}

fn parse(text: &str) -> Result<Vec<JobReport>> {
    // Warnings of fio may precede the report.
    let begin = text.find("\n{").context("no JSON object")?;
    let mut values = serde_json::Deserializer::from_str(&text[begin..]).into_iter::<Value>();
    let report = values.next().context("no JSON object")??;
    let jobs = report["jobs"].as_array().context("no jobs")?;
    jobs.iter().map(parse_job).collect()
}

fn parse_job(job: &Value) -> Result<JobReport> {
    let number = |direction: &str, key: &str| {
        job[direction][key].as_u64().with_context(|| format!("no number {direction}.{key}"))
    };
    let sum = |key| Ok::<_, anyhow::Error>(number("read", key)? + number("write", key)?);
    let window_ms = number("read", "runtime")?.max(number("write", "runtime")?);
    Ok(JobReport {
        name: job["jobname"].as_str().context("no job name")?.to_owned(),
        error: job["error"].as_i64().context("no error number")?,
        bytes: sum("io_bytes")?,
        window: Duration::from_millis(window_ms),
    })
}

/// Milliseconds since 1970, the unit of the logs of a job with `log_unix_epoch=1`.
pub fn unix_ms(time: SystemTime) -> Result<u64> {
    Ok(u64::try_from(time.duration_since(UNIX_EPOCH)?.as_millis())?)
}

/// The time and size of each completion, from the latency log of a job with one line per operation.
#[derive(Clone, Debug)]
pub struct Completions {
    /// Sorted by time.
    done: Vec<Completion>,
}

#[derive(Clone, Copy, Debug)]
struct Completion {
    at_ms: u64,
    bytes: u64,
}

impl Completions {
    /// Reads `PREFIX_lat.1.log`; `prefix` is the `write_lat_log` of a file with one job.
    pub fn read(prefix: &Path) -> Result<Self> {
        Self::read_numbered(prefix, 1)
    }

    /// Reads the logs of a file with several jobs, in the order of the jobs.
    pub fn read_all(prefix: &Path, jobs: usize) -> Result<Vec<Self>> {
        (1..=jobs).map(|number| Self::read_numbered(prefix, number)).collect()
    }

    /// Reads `PREFIX_lat.NUMBER.log`: the log of one job of several, numbered from 1.
    pub fn read_numbered(prefix: &Path, number: usize) -> Result<Self> {
        let path = PathBuf::from(format!("{}_lat.{number}.log", prefix.display()));
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let read_line = |line| Completion::read(line).with_context(|| format!("{}: {line:?}", path.display()));
        let mut done = text.lines().map(read_line).collect::<Result<Vec<_>>>()?;
        done.sort_by_key(|completion| completion.at_ms);
        ensure!(!done.is_empty(), "{} is empty", path.display());
        Ok(Self { done })
    }

    /// The time of the first completion.
    pub fn first_ms(&self) -> u64 {
        self.done[0].at_ms
    }

    /// The time of the last completion.
    pub fn last_ms(&self) -> u64 {
        self.done[self.done.len() - 1].at_ms
    }

    /// The number of completions, and the seconds from the first to the last.
    pub fn in_all(&self) -> (u64, f64) {
        (self.done.len() as u64, (self.last_ms() + 1 - self.first_ms()) as f64 / 1000.0)
    }

    /// The number of completions from `from_ms` (inclusive) to `to_ms` (exclusive).
    pub fn count(&self, from_ms: u64, to_ms: u64) -> usize {
        self.within(from_ms, to_ms).len()
    }

    /// The bytes completed from `from_ms` (inclusive) to `to_ms` (exclusive).
    pub fn bytes(&self, from_ms: u64, to_ms: u64) -> u64 {
        self.within(from_ms, to_ms).iter().map(|completion| completion.bytes).sum()
    }

    fn within(&self, from_ms: u64, to_ms: u64) -> &[Completion] {
        let place = |ms| self.done.partition_point(|completion| completion.at_ms < ms);
        &self.done[place(from_ms)..place(to_ms)]
    }

    /// Completions per second in a window.
    pub fn rate(&self, from_ms: u64, to_ms: u64) -> f64 {
        self.count(from_ms, to_ms) as f64 * 1000.0 / (to_ms - from_ms) as f64
    }

    /// The longest interval without a completion inside a window.
    pub fn longest_gap(&self, from_ms: u64, to_ms: u64) -> Duration {
        let inside = self.within(from_ms, to_ms).iter().map(|completion| completion.at_ms);
        let (mut longest_ms, mut last) = (0, from_ms);
        for at in inside.chain([to_ms]) {
            longest_ms = longest_ms.max(at - last);
            last = at;
        }
        Duration::from_millis(longest_ms)
    }
}

impl Completion {
    /// Parses a line of the log: time, latency, direction, bytes, offset; later versions append
    /// fields.
    fn read(line: &str) -> Result<Self> {
        let mut fields = line.split(',').map(str::trim);
        let at_ms = fields.next().context("no time")?.parse()?;
        let bytes = fields.nth(2).context("no size")?.parse()?;
        Ok(Self { at_ms, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_is_found_behind_fios_complaints() {
        // fio writes warnings into the file of the report, before and after the JSON.
        let text = "$ fio\n--- stderr\nfio: multiple writers\n\n{\"jobs\": [{\"jobname\": \"a\", \"error\": 5,\n\
            \"read\": {\"total_ios\": 100, \"io_bytes\": 409600, \"runtime\": 2000},\n\
            \"write\": {\"total_ios\": 60, \"io_bytes\": 245760, \"runtime\": 1900}}]}\nfio: more\n";
        let jobs = parse(text).unwrap();
        assert_eq!((jobs[0].name.as_str(), jobs[0].error), ("a", 5));
        assert!((jobs[0].iops(4096) - 80.0).abs() < 1e-9 && (jobs[0].bps() - 327_680.0).abs() < 1e-9);
    }

    #[test]
    fn section_gets_its_name_and_parameters_and_loses_the_comment() {
        // The job that runs is the section of the file; only its name and its parameters differ.
        let job = Job::new("iops-limit-is-met-to-one-percent").set("DEVICE", "/dev/ublkb7").set("RW", "randread");
        assert!(job.section_named("x").is_err(), "BLOCK, DEPTH and SECONDS are not set");
        let text = job.set("BLOCK", 4096).set("DEPTH", 1).set("SECONDS", 8).section_named("x").unwrap();
        assert!(text.starts_with("[x]\nfilename=/dev/ublkb7\nrw=randread\nbs=4096\niodepth=1\n"), "{text}");
        assert!(!text.contains("${"), "{text}");
    }

    fn pages_at(instants_ms: &[u64]) -> Completions {
        Completions { done: instants_ms.iter().map(|&at_ms| Completion { at_ms, bytes: 4096 }).collect() }
    }

    #[test]
    fn line_of_the_log_has_its_time_first_and_its_size_fourth() {
        // With log_unix_epoch=1 the first field is the wall clock in milliseconds.
        let done = Completion::read("1789000123456, 1833021, 1, 65536, 131072, 0").unwrap();
        assert_eq!((done.at_ms, done.bytes), (1_789_000_123_456, 65_536));
        assert!(Completion::read("1789000123456, 1833021").is_err());
    }

    #[test]
    fn window_counts_its_first_millisecond_and_not_its_last() {
        // The interval is half-open, so adjacent windows count each completion once.
        let done = pages_at(&[10, 20, 20, 30]);
        assert_eq!((done.count(10, 20), done.count(20, 30), done.count(30, 31)), (1, 2, 1));
        assert_eq!((done.bytes(10, 20), done.bytes(20, 30)), (4096, 8192));
        assert!((done.rate(10, 30) - 150.0).abs() < 1e-9);
    }

    #[test]
    fn gap_reaches_to_both_ends_of_the_window() {
        // The gap between a completion and an end of the window counts like a gap between two
        // completions.
        let done = pages_at(&[10, 20, 60]);
        assert_eq!(done.longest_gap(0, 70), Duration::from_millis(40));
        assert_eq!(done.longest_gap(0, 200), Duration::from_millis(140));
        assert_eq!(done.longest_gap(0, 55), Duration::from_millis(35));
    }
}
