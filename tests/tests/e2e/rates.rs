//! Each of the six limits, alone: the configured rate is the measured one, within 1 %.
//!
//! Several devices are measured at once, each with its own limit and its own job, where all of them together stay below
//! what emulation can do (some thousands of operations a second). Where one needs more, it is measured alone.

use std::fmt::{self, Display};
use std::time::Duration;

use anyhow::{Result, ensure};
use ublk_throttle_tests::fio::{Job, JobReport};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;

use crate::measure::{Void, expect, expect_all, expect_near, is_slow, repeat_with_less_if_void};
use crate::{Case, cases};

const MIB: u64 = 1 << 20;
const OPERATIONS: [&str; 3] = ["iops-total", "iops-read", "iops-write"];
const BYTES: [&str; 3] = ["bps-total", "bps-read", "bps-write"];

/// The jobs' runtime and ramp; at 1 MiB/s and depth 32 of 64 KiB, 2 s more for what is in flight at the end.
const RUNTIME: Duration = Duration::from_secs(11);

pub(crate) fn cases() -> Vec<Case> {
    cases![[Need::Ublk, Need::Fio];
        each_iops_limit_of_100_is_met,
        each_iops_limit_of_1000_is_met,
        each_iops_limit_of_1000_is_met_by_one_request_at_a_time,
        each_iops_limit_of_1000_is_met_by_one_large_request_at_a_time,
        each_bps_limit_of_1_mib_is_met,
        each_bps_limit_of_10_mib_is_met,
        limit_on_reads_leaves_writes_alone,
    ]
    .into()
}

/// Of a limit, as the jobs say.
const TOLERANCE: f64 = 0.01;

/// How many times a limit a device must do without it, if what it does behind it is to say anything. A request that was held
/// costs the daemon up to half as much again as one that was not, by instructions.
const ROOM: f64 = 1.5;

/// One device, its only limit and the load on it.
#[derive(Clone, Copy)]
struct Load {
    kind: &'static str,
    limit: u64,
    block: u64,
    depth: u32,
}

fn each_iops_limit_of_100_is_met(scene: &Scene) -> Result<()> {
    // 3 kinds x 4k and 64k x depth 1 and 32 = 12 devices at once: 1200 operations a second.
    measure(scene, &product(&OPERATIONS, 100, &[4096, 65536], &[1, 32]))
}

fn each_iops_limit_of_1000_is_met(scene: &Scene) -> Result<()> {
    // Depth 32: of 4 KiB 3 at once, 3000 operations a second; of 64 KiB that would be 200 MB/s, so one at a time.
    measure(scene, &product(&OPERATIONS, 1000, &[4096], &[32]))?;
    measure_each_alone(scene, &product(&OPERATIONS, 1000, &[65536], &[32]))
}

fn each_iops_limit_of_1000_is_met_by_one_request_at_a_time(scene: &Scene) -> Result<()> {
    // Each request must take less than 1 ms; one device at a time, nothing beside it.
    measure_each_alone(scene, &product(&OPERATIONS, 1000, &[4096], &[1]))
}

fn each_iops_limit_of_1000_is_met_by_one_large_request_at_a_time(scene: &Scene) -> Result<()> {
    // The same, copying of 64 KiB included.
    measure_each_alone(scene, &product(&OPERATIONS, 1000, &[65536], &[1]))
}

fn each_bps_limit_of_1_mib_is_met(scene: &Scene) -> Result<()> {
    // 4 KiB: 256 operations a second, 64 KiB: 16. 12 devices at once: 1632.
    measure(scene, &product(&BYTES, MIB, &[4096, 65536], &[1, 32]))
}

fn each_bps_limit_of_10_mib_is_met(scene: &Scene) -> Result<()> {
    // 64 KiB: 160 operations a second, 6 devices at once. 4 KiB: 2560 a second, so one at a time, and at depth 32 only: at
    // depth 1 a request would have to take less than 390 us, which emulation does not promise.
    measure(scene, &product(&BYTES, 10 * MIB, &[65536], &[1, 32]))?;
    measure_each_alone(scene, &product(&BYTES, 10 * MIB, &[4096], &[32]))
}

fn limit_on_reads_leaves_writes_alone(scene: &Scene) -> Result<()> {
    // Two buckets, not one: a writer beside a held reader goes at the device's own speed.
    let daemon = scene.start(
        "version: 1\n\
         devices:\n  d: { backend: { null: 1GiB }, limits: { iops-read: 50 } }\n",
    )?;
    let job = Job::new("read-limit-leaves-writes-alone").set("DEVICE", scene.device("d")?.node());
    let report = scene.fio(job)?.finish(Duration::from_secs(6))?;
    expect_near("reader", report.job("reader")?.iops(4096), 50.0, 0.02)?;
    let writer = report.job("writer")?.iops(4096);
    expect(writer >= 500.0, || {
        format!("the writer did {writer:.0} operations a second beside a reader limited to 50")
    })?;
    daemon.stop().map(drop)
}

fn product(kinds: &[&'static str], limit: u64, blocks: &[u64], depths: &[u32]) -> Vec<Load> {
    let mut loads = Vec::new();
    for &block in blocks {
        for &depth in depths {
            loads.extend(kinds.iter().map(|&kind| Load { kind, limit, block, depth }));
        }
    }
    loads
}

/// Runs one load after the other.
fn measure_each_alone(scene: &Scene, loads: &[Load]) -> Result<()> {
    loads.iter().try_for_each(|&load| measure(scene, &[load]))
}

/// Runs all loads at the same time, each on a device of its own, and compares each rate with its limit; all again if void.
///
/// With less load that is a quarter of each limit: a machine that cannot do 1000 a second without a throttle tells nothing about
/// one of 1000, and the claim is the same for 250. Where a rate is too low, the same devices without limits tell whether it can.
fn measure(scene: &Scene, loads: &[Load]) -> Result<()> {
    repeat_with_less_if_void(|with_less| {
        let loads = loads.iter().map(|load| if with_less { load.quartered() } else { *load }).collect::<Vec<_>>();
        let rates = run(scene, &loads, |Load { kind, limit, .. }| format!(", limits: {{ {kind}: {limit} }}"))?;
        let checks =
            loads.iter().zip(&rates).map(|(load, &rate)| expect_near(load, rate, load.limit as f64, TOLERANCE));
        let Err(missed) = expect_all(checks) else { return Ok(()) };
        let is_too_low = loads.iter().zip(&rates).all(|(load, rate)| *rate <= load.limit as f64 * (1.0 + TOLERANCE));
        if with_less || !is_too_low || is_slow() {
            return Err(missed);
        }
        let free = run(scene, &loads, |_| String::new())?;
        let lacks = loads.iter().zip(free).find(|(load, free)| *free < ROOM * load.limit as f64);
        Err(match lacks {
            Some((load, free)) => {
                Void { missed, because: format!("without its limit {load} did {free:.1} a second") }.into()
            }
            None => missed,
        })
    })
}

/// The rate of each load, when all run at the same time, each on a device of its own with these `limits`.
fn run(scene: &Scene, loads: &[Load], limits: impl Fn(&Load) -> String) -> Result<Vec<f64>> {
    let mut config = String::from("version: 1\ndevices:\n");
    for (number, load) in loads.iter().enumerate() {
        config += &format!("  d{number}: {{ backend: {{ null: 1GiB }}{} }}\n", limits(load));
    }
    let daemon = scene.start(&config)?;
    let mut jobs = Vec::new();
    for (number, load) in loads.iter().enumerate() {
        jobs.push(load.job().set("DEVICE", scene.device(&format!("d{number}"))?.node()));
    }
    let report = scene.fio_together(&jobs)?.finish(RUNTIME)?;
    daemon.stop()?;
    ensure!(report.jobs().len() == loads.len(), "{} jobs reported of {}", report.jobs().len(), loads.len());
    let rate = |(load, job): (&Load, &JobReport)| if load.is_iops() { job.iops(load.block) } else { job.bps() };
    Ok(loads.iter().zip(report.jobs()).map(rate).collect())
}

impl Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes, depth {}", self.kind, self.block, self.depth)
    }
}

impl Load {
    fn is_iops(&self) -> bool {
        self.kind.starts_with("iops")
    }

    /// With a quarter of the limit, if 1 % of what that lets through in the 8 s of a job is still two requests.
    fn quartered(self) -> Self {
        let limit = self.limit / 4;
        let requests = 8 * limit / if self.is_iops() { 1 } else { self.block };
        if requests >= 200 { Self { limit, ..self } } else { self }
    }

    /// The job whose claim this load is: only requests that the limit counts.
    fn job(&self) -> Job {
        let claim = if self.is_iops() { "iops-limit-is-met-to-one-percent" } else { "bps-limit-is-met-to-one-percent" };
        let operations = match self.kind.rsplit('-').next() {
            Some("read") => "randread",
            Some("write") => "randwrite",
            _ => "randrw",
        };
        Job::new(claim).set("RW", operations).set("BLOCK", self.block).set("DEPTH", self.depth)
    }
}
