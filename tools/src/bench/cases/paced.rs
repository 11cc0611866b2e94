//! Cost of a held request, against one from a client that paces itself at the same rate: half the
//! natural rate of this boot, and 1000 a second.
//!
//! `throttled-cpu` compares with a device at its natural rate. The queue threads of such a device
//! hardly sleep and find many requests each turn. At a lower rate each turn costs more, with or
//! without a throttle; here both sides run at the same rate.

use anyhow::Result;

use super::{Finding, natural_rate};
use crate::bench::bar::{Bar, Bound};
use crate::bench::bench::Bench;
use crate::bench::load::Load;
use crate::bench::peers::{Ours, Peer};
use crate::bench::sample::Metric;

/// Runs the case.
pub fn run(bench: &Bench) -> Result<Finding> {
    let queues = bench.plan.queues;
    let start = |name: &str, limits: &str| {
        Ours::start(name, &format!("devices:\n  {name}: {{ backend: {{ null: 1GiB }}, queues: {queues}{limits} }}\n"))
    };
    let load = Load { rw: "randread", block: 4096, seconds: bench.plan.seconds, rate: None };
    let free = start("free", "")?;
    let natural = natural_rate(load, &free)?;
    let half = (natural / 2.0).round() as u64;
    let held = start("held-at-half", &format!(", limits: {{ iops-total: {half} }}"))?;
    let slow = start("held-at-1000", ", limits: { iops-total: 1000 }")?;
    let names = ["held at half", "half by itself", "held at 1000/s", "1000/s by itself"];
    let sides = bench.alternate(&names, |place| {
        let (peer, rate) = [(&held, None), (&free, Some(half)), (&slow, None), (&free, Some(1000))][place];
        Load { rate, ..load }.run(peer.node(), peer.server())
    })?;
    for peer in [free, held, slow] {
        Box::new(peer).stop()?;
    }
    let bars = vec![
        Bar::ratio(Metric::CpuOwn, 0, 1, Bound::AtMost(1.3)),
        Bar::ratio(Metric::CpuAll, 0, 1, Bound::AtMost(1.3)),
        Bar::ratio(Metric::CpuOwn, 2, 3, Bound::AtMost(1.3)),
        Bar::ratio(Metric::CpuAll, 2, 3, Bound::AtMost(1.3)),
        Bar::ratio(Metric::Iops, 0, 1, Bound::Shown),
        Bar::ratio(Metric::Iops, 2, 3, Bound::Shown),
    ];
    let notes = vec![format!("the natural rate of this boot is {natural:.0}/s, half of it {half}/s")];
    Ok(Finding::Measured { sides, bars, notes })
}
