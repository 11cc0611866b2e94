//! Cost of the path itself: a null device without limits, against the null targets of kublk and
//! rublk.

use anyhow::Result;

use super::{Finding, Start, as_fast_as, loaded, without_batches};
use crate::bench::bench::Bench;
use crate::bench::load::Load;
use crate::bench::peers::{Commands, Kublk, Ours, Rublk};

/// Runs the case with `queues` queues a device.
pub fn run(bench: &Bench, queues: u32) -> Result<Finding> {
    let config = format!("devices:\n  free: {{ backend: {{ null: 1GiB }}, queues: {queues} }}\n");
    let load = Load { rw: "randread", block: 4096, seconds: bench.plan.seconds, rate: None };
    let mut starts: Vec<(&str, Start<'_>)> = vec![
        ("ours null", Box::new(|| Ok(Box::new(Ours::start("free", &config)?)))),
        ("rublk null", Box::new(|| Ok(Box::new(Rublk::null(100, queues)?)))),
        ("kublk null", Box::new(|| Ok(Box::new(Kublk::null(103, queues, Commands::EachTag)?)))),
    ];
    let without_batches = without_batches()?;
    if without_batches.is_none() {
        starts.push(("kublk null -b", Box::new(|| Ok(Box::new(Kublk::null(104, queues, Commands::Batched)?)))));
    }
    let sides = loaded(bench, &starts, load)?;
    let bars = (1..sides.len()).flat_map(|peer| as_fast_as(0, peer, 1.0, 1.0)).collect();
    Ok(Finding::Measured { sides, bars, notes: without_batches.into_iter().collect() })
}
