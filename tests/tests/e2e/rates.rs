//! Each of the six limits by itself: the measured rate is the configured one, within 1 %.
//!
//! Several devices are measured together, each with its own limit and its own job, as long as their
//! sum takes a fraction of the CPU (a request takes about 60 us). A load that needs more is
//! measured alone.

use std::time::Duration;

use anyhow::{Result, ensure};
use ublk_throttle_tests::fio::Job;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;

use crate::measure::{expect_all, expect_near};
use crate::{Case, cases};

const MIB: u64 = 1 << 20;
const OPERATIONS: [&str; 3] = ["iops-total", "iops-read", "iops-write"];
const BYTES: [&str; 3] = ["bps-total", "bps-read", "bps-write"];

/// Time of the longest job with its ramp. At 1 MiB/s and depth 32 of 64 KiB, the requests in flight
/// at the end take 2 s more.
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

/// A share of the limit, as in the job files.
const TOLERANCE: f64 = 0.01;

/// A device, its only limit and the load on it.
#[derive(Clone, Copy)]
struct Load {
    kind: &'static str,
    limit: u64,
    block: u64,
    depth: u32,
}

fn each_iops_limit_of_100_is_met(scene: &Scene) -> Result<()> {
    // 3 kinds x 4 KiB and 64 KiB x depth 1 and 32 = 12 devices together: 1200 operations a second.
    measure(scene, &product(&OPERATIONS, 100, &[4096, 65536], &[1, 32]))
}

fn each_iops_limit_of_1000_is_met(scene: &Scene) -> Result<()> {
    // Depth 32. 4 KiB: 3 devices together, 3000 operations a second. 64 KiB: together 200 MB/s, so
    // each alone.
    measure(scene, &product(&OPERATIONS, 1000, &[4096], &[32]))?;
    measure_each_alone(scene, &product(&OPERATIONS, 1000, &[65536], &[32]))
}

fn each_iops_limit_of_1000_is_met_by_one_request_at_a_time(scene: &Scene) -> Result<()> {
    // Each request must take less than 1 ms, so each device is measured alone.
    measure_each_alone(scene, &product(&OPERATIONS, 1000, &[4096], &[1]))
}

fn each_iops_limit_of_1000_is_met_by_one_large_request_at_a_time(scene: &Scene) -> Result<()> {
    // Each request of 64 KiB, including its copy, must take less than 1 ms.
    measure_each_alone(scene, &product(&OPERATIONS, 1000, &[65536], &[1]))
}

fn each_bps_limit_of_1_mib_is_met(scene: &Scene) -> Result<()> {
    // 4 KiB: 256 operations a second, 64 KiB: 16. 12 devices together: 1632 operations a second.
    measure(scene, &product(&BYTES, MIB, &[4096, 65536], &[1, 32]))
}

fn each_bps_limit_of_10_mib_is_met(scene: &Scene) -> Result<()> {
    // 64 KiB: 160 operations a second, 6 devices together. 4 KiB: 2560 operations a second, so each
    // alone.
    measure(scene, &product(&BYTES, 10 * MIB, &[65536], &[1, 32]))?;
    measure_each_alone(scene, &product(&BYTES, 10 * MIB, &[4096], &[32]))
}

fn limit_on_reads_leaves_writes_alone(scene: &Scene) -> Result<()> {
    // Reads and writes have separate buckets: a writer beside a held reader keeps its own speed.
    let daemon = scene.start(
        "version: 1\n\
         devices:\n  d: { backend: { null: 1GiB }, limits: { iops-read: 50 } }\n",
    )?;
    let job = Job::new("read-limit-leaves-writes-alone").set("DEVICE", scene.device("d")?.node());
    let report = scene.fio(job)?.finish(Duration::from_secs(6))?;
    expect_all([
        expect_near("reader", report.job("reader")?.iops(4096), 50.0, 0.02),
        expect_near("writer", report.job("writer")?.iops(4096), 1000.0, 0.02),
    ])?;
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

/// Runs the loads one after another.
fn measure_each_alone(scene: &Scene, loads: &[Load]) -> Result<()> {
    loads.iter().try_for_each(|&load| measure(scene, &[load]))
}

/// Runs all loads together, each on a device of its own, and compares each rate with its limit.
fn measure(scene: &Scene, loads: &[Load]) -> Result<()> {
    let mut config = String::from("version: 1\ndevices:\n");
    for (number, Load { kind, limit, .. }) in loads.iter().enumerate() {
        config += &format!("  d{number}: {{ backend: {{ null: 1GiB }}, limits: {{ {kind}: {limit} }} }}\n");
    }
    let daemon = scene.start(&config)?;
    let mut jobs = Vec::new();
    for (number, load) in loads.iter().enumerate() {
        jobs.push(load.job().set("DEVICE", scene.device(&format!("d{number}"))?.node()));
    }
    let report = scene.fio_together(&jobs)?.finish(RUNTIME)?;
    daemon.stop()?;
    ensure!(report.jobs().len() == loads.len(), "{} jobs reported of {}", report.jobs().len(), loads.len());
    expect_all(loads.iter().zip(report.jobs()).map(|(load, job)| {
        let rate = if load.is_iops() { job.iops(load.block) } else { job.bps() };
        let what = format!("{} of {} bytes, depth {}", load.kind, load.block, load.depth);
        expect_near(what, rate, load.limit as f64, TOLERANCE)
    }))
}

impl Load {
    fn is_iops(&self) -> bool {
        self.kind.starts_with("iops")
    }

    /// The job with the claim for this load; the limit counts each of its requests.
    fn job(&self) -> Job {
        let claim = if self.is_iops() { "iops-limit-is-met-to-one-percent" } else { "bps-limit-is-met-to-one-percent" };
        let operations = match self.kind.rsplit('-').next() {
            Some("read") => "randread",
            Some("write") => "randwrite",
            _ => "randrw",
        };
        let requests_a_second = if self.is_iops() { self.limit } else { self.limit / self.block };
        // 1 % is 5 of 500 requests; at high rates at least 10 in 1 s; at 1 MiB/s one request of 64
        // KiB in 8 s.
        let seconds = 500_u64.div_ceil(requests_a_second).clamp(1, 8);
        let job = Job::new(claim).set("RW", operations).set("SECONDS", seconds);
        job.set("BLOCK", self.block).set("DEPTH", self.depth)
    }
}
