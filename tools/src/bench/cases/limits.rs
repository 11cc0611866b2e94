//! Cost of limits that never bind: six limits far above the load, against no limits.

use anyhow::Result;

use super::{Finding, as_fast_as, loaded};
use crate::bench::bench::Bench;
use crate::bench::load::Load;
use crate::bench::peers::{Ours, Peer};

/// At least ten times the rate of a device, under emulation or on hardware.
pub const FAR_ABOVE: &str = "{ iops-total: 50000000, iops-read: 50000000, iops-write: 50000000, \
                             bps-total: 400GB/s, bps-read: 400GB/s, bps-write: 400GB/s }";

/// Runs the case with `queues` queues a device.
pub fn run(bench: &Bench, queues: u32) -> Result<Finding> {
    let start = |name: &str, limits: &str| -> Result<Box<dyn Peer>> {
        let config = format!("devices:\n  {name}: {{ backend: {{ null: 1GiB }}, queues: {queues}{limits} }}\n");
        Ok(Box::new(Ours::start(name, &config)?))
    };
    let load = Load { rw: "randread", block: 4096, seconds: bench.plan.seconds, rate: None };
    let sides = loaded(
        bench,
        &[
            ("six limits", Box::new(|| start("six-limits", &format!(", limits: {FAR_ABOVE}")))),
            ("no limits", Box::new(|| start("no-limits", ""))),
        ],
        load,
    )?;
    Ok(Finding::Measured { sides, bars: as_fast_as(0, 1, 0.98, 1.03), notes: Vec::new() })
}
