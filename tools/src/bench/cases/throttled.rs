//! Cost of a throttled request, held at half the natural rate of this boot and at 1000 a second,
//! against a request without a limit.

use anyhow::Result;

use super::{Finding, loaded, natural_rate};
use crate::bench::bar::{Bar, Bound};
use crate::bench::bench::Bench;
use crate::bench::load::Load;
use crate::bench::peers::{Ours, Peer};
use crate::bench::sample::Metric;

/// Runs the case.
pub fn run(bench: &Bench) -> Result<Finding> {
    let queues = bench.plan.queues;
    let start = |name: &str, limits: &str| -> Result<Box<dyn Peer>> {
        let config = format!("devices:\n  {name}: {{ backend: {{ null: 1GiB }}, queues: {queues}{limits} }}\n");
        Ok(Box::new(Ours::start(name, &config)?))
    };
    let load = Load { rw: "randread", block: 4096, seconds: bench.plan.seconds, rate: None };
    let free = start("not-held", "")?;
    let natural = natural_rate(load, &*free)?;
    free.stop()?;
    let half = (natural / 2.0).round() as u64;
    let sides = loaded(
        bench,
        &[
            ("not held", Box::new(|| start("not-held", ""))),
            ("held at half", Box::new(|| start("held-at-half", &format!(", limits: {{ iops-total: {half} }}")))),
            ("held at 1000/s", Box::new(|| start("held-at-1000", ", limits: { iops-total: 1000 }"))),
        ],
        load,
    )?;
    let bars = vec![
        Bar::ratio(Metric::CpuOwn, 1, 0, Bound::AtMost(1.3)),
        Bar::ratio(Metric::CpuAll, 1, 0, Bound::AtMost(1.3)),
        Bar::ratio(Metric::CpuOwn, 2, 0, Bound::Shown),
        Bar::ratio(Metric::CpuAll, 2, 0, Bound::Shown),
        Bar::ratio(Metric::Iops, 1, 0, Bound::Shown),
    ];
    let notes = vec![format!("the natural rate of this boot is {natural:.0}/s, the limit {half}/s")];
    Ok(Finding::Measured { sides, bars, notes })
}
