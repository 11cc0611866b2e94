//! Runs fio on a device and reads the kernel's counters during the run.
//!
//! ```text
//!   fio    start ─► ramp ─►├──────────── runs ───────────────┤─► report: latencies
//!   window                 └ look ─────────────────── look ┘     requests, processor time, time
//! ```

use std::fs;
use std::ops::AddAssign;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::cgroup::Cgroup;
use super::machine;
use super::sample::{Metric, Sample};
use crate::blockstat;
use crate::fio::{Fio, Latency, Running};

/// Time limit for fio to start under emulation.
const START: Duration = Duration::from_secs(30);

/// Wait between fio's first requests and the first look: the jobs' `ramp_time` of 1 s, and 0.2 s
/// more.
const RAMP: Duration = Duration::from_millis(1200);

/// Time between the second look and fio's end.
const MARGIN: Duration = Duration::from_millis(400);

/// A load of two fio jobs with 32 requests each under way.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// `randread` or `randwrite`.
    pub rw: &'static str,
    /// Bytes a request.
    pub block: u32,
    /// Duration after the ramp time.
    pub seconds: u32,
    /// Requests a second of both jobs together, at which fio paces itself; `None`: as fast as
    /// possible.
    pub rate: Option<u64>,
}

impl Load {
    /// Runs the load on the device `node`, served by the processes in the control group `server`.
    pub fn run(self, node: &Path, server: &Cgroup) -> Result<Sample> {
        let disk = quiet(node)?;
        let before = blockstat::completed(&disk).context("the device is gone")?;
        let fio = self.start(node, self.seconds)?;
        started(&disk, before)?;
        thread::sleep(RAMP);
        let first = Look::now(&disk, server)?;
        thread::sleep(Duration::from_secs(self.seconds.into()).saturating_sub(MARGIN));
        let second = Look::now(&disk, server)?;
        let jobs = fio.finish(Duration::from_secs(60))?;
        if let Some(job) = jobs.iter().find(|job| job.error != 0) {
            bail!("fio on {} ended with errno {}", node.display(), job.error);
        }
        let mut sample = first.until(&second).sample()?;
        if let Some(latency) = jobs.first().and_then(|job| job.latency) {
            set_latency(&mut sample, latency);
        }
        Ok(sample)
    }

    /// Starts the load for `seconds` after its ramp time.
    pub fn start(self, node: &Path, seconds: u32) -> Result<Running> {
        let job = match self.rate {
            // `RATE` is the rate of each of the two jobs.
            Some(rate) => Fio::new("client-paces-itself").with("RATE", (rate / 2).to_string().as_ref()),
            None => Fio::new("path-is-as-fast-as-the-peers"),
        };
        job.with("DEVICE", node.as_os_str())
            .with("RW", self.rw.as_ref())
            .with("BLOCK", self.block.to_string().as_ref())
            .with("SECONDS", seconds.to_string().as_ref())
            .start()
    }
}

/// Snapshot of the kernel's counters.
pub struct Look {
    at: Instant,
    requests: u64,
    own: Duration,
    all: machine::Times,
}

impl Look {
    /// Takes a snapshot.
    pub fn now(disk: &str, server: &Cgroup) -> Result<Look> {
        let requests = blockstat::completed(disk).with_context(|| format!("{disk} is gone"))?;
        Ok(Look { at: Instant::now(), requests, own: server.usage()?, all: machine::times()? })
    }

    /// Difference between this snapshot and a later one.
    pub fn until(&self, later: &Look) -> Spell {
        let time = later.at.duration_since(self.at);
        let machine::Spent { busy, stolen } = self.all.until(&later.all);
        Spell {
            time,
            requests: later.requests.saturating_sub(self.requests),
            own: later.own.saturating_sub(self.own),
            busy,
            stolen: time.mul_f64(stolen),
        }
    }
}

/// Requests and processor time between two snapshots, or the sum over several pairs of snapshots.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spell {
    time: Duration,
    requests: u64,
    /// Processor time of the server's processes.
    own: Duration,
    /// Processor time of all threads.
    busy: Duration,
    /// `time`, multiplied by the share of processor time that the host stole.
    stolen: Duration,
}

impl AddAssign for Spell {
    fn add_assign(&mut self, more: Spell) {
        let Spell { time, requests, own, busy, stolen } = more;
        self.time += time;
        self.requests += requests;
        self.own += own;
        self.busy += busy;
        self.stolen += stolen;
    }
}

impl Spell {
    /// IOPS, and processor time a request.
    pub fn sample(self) -> Result<Sample> {
        let Spell { time, requests, own, busy, stolen } = self;
        if requests == 0 {
            bail!("not one request was completed in {time:?}");
        }
        let each = |time: Duration| time.as_secs_f64() * 1e6 / requests as f64;
        let mut sample = Sample { stolen: stolen.div_duration_f64(time), ..Sample::default() };
        sample.set(Metric::Iops, requests as f64 / time.as_secs_f64());
        sample.set(Metric::CpuOwn, each(own));
        sample.set(Metric::CpuAll, each(busy));
        Ok(sample)
    }
}

/// Adds fio's latency percentiles to `sample`, in microseconds.
pub fn set_latency(sample: &mut Sample, latency: Latency) {
    let Latency { p50_ns, p90_ns, p99_ns, p999_ns } = latency;
    let all = [(Metric::P50, p50_ns), (Metric::P90, p90_ns), (Metric::P99, p99_ns), (Metric::P999, p999_ns)];
    for (metric, ns) in all {
        sample.set(metric, ns as f64 / 1000.0);
    }
}

/// Sets the I/O scheduler to `none` and disables merging, so that neither is measured. Returns the
/// name of the disk.
pub fn quiet(node: &Path) -> Result<String> {
    let disk = blockstat::name(node)?;
    let queue = PathBuf::from("/sys/block").join(&disk).join("queue");
    for (file, text) in [("scheduler", "none"), ("nomerges", "2")] {
        // The device node appears shortly before the attributes in sysfs.
        let until = Instant::now() + Duration::from_secs(5);
        while !queue.join(file).exists() && Instant::now() < until {
            thread::sleep(Duration::from_millis(10));
        }
        fs::write(queue.join(file), text).with_context(|| format!("cannot set {file} of {disk}"))?;
    }
    Ok(disk)
}

/// Waits until 50 requests have completed since the count `before`.
pub fn started(disk: &str, before: u64) -> Result<()> {
    let until = Instant::now() + START;
    while blockstat::completed(disk).unwrap_or(0) < before + 50 {
        if Instant::now() > until {
            bail!("fio did not begin to use {disk} within {} s", START.as_secs());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
