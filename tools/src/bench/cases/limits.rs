//! Limits that never bind: six of them far above the load, against none.

use anyhow::Result;

use super::{Finding, as_fast_as, loaded};
use crate::bench::bench::Bench;
use crate::bench::load::Load;
use crate::bench::peers::Ours;

/// More than a device does under emulation or on hardware, by a factor of ten at least.
pub const FAR_ABOVE: &str = "{ iops-total: 50000000, iops-read: 50000000, iops-write: 50000000, \
                             bps-total: 400GB/s, bps-read: 400GB/s, bps-write: 400GB/s }";

/// Runs the case.
pub fn run(bench: &Bench) -> Result<Finding> {
    let queues = bench.plan.queues;
    let start = |name: &str, limits: &str| {
        Ours::start(name, &format!("devices:\n  {name}: {{ backend: {{ null: 1GiB }}, queues: {queues}{limits} }}\n"))
    };
    let (with, without) = (start("six-limits", &format!(", limits: {FAR_ABOVE}"))?, start("no-limits", "")?);
    let load = Load { rw: "randread", block: 4096, seconds: bench.plan.seconds, rate: None };
    let sides = loaded(bench, vec![("six limits", Box::new(with)), ("no limits", Box::new(without))], load)?;
    Ok(Finding::Measured { sides, bars: as_fast_as(0.98, 1.03), notes: Vec::new() })
}
