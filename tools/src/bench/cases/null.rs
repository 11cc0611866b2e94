//! The path itself: a null device without limits, against rublk's.

use anyhow::Result;

use super::{Finding, as_fast_as, loaded};
use crate::bench::bench::Bench;
use crate::bench::load::Load;
use crate::bench::peers::{Ours, Rublk};

/// Runs the case with so many queues a device.
pub fn run(bench: &Bench, queues: u32) -> Result<Finding> {
    let config = format!("devices:\n  free: {{ backend: {{ null: 1GiB }}, queues: {queues} }}\n");
    let load = Load { rw: "randread", block: 4096, seconds: bench.plan.seconds, rate: None };
    let sides = loaded(
        bench,
        &[
            ("ours null", Box::new(|| Ok(Box::new(Ours::start("free", &config)?)))),
            ("rublk null", Box::new(|| Ok(Box::new(Rublk::null(100, queues)?)))),
        ],
        load,
    )?;
    Ok(Finding::Measured { sides, bars: as_fast_as(0, 1, 1.0, 1.0), notes: Vec::new() })
}
