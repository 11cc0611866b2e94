//! Gain of zero copy: requests of 64k on a file and on memory, with the key `zero-copy` on and off.

use anyhow::Result;

use super::file::{Written, fill, written};
use super::{COPIES, Finding, is_offered, loaded};
use crate::bench::bar::{Bar, Bound};
use crate::bench::bench::Bench;
use crate::bench::load::Load;
use crate::bench::peers::{Ours, Peer};
use crate::bench::sample::Metric;

/// Name of the ublk feature that zero copy needs.
pub const FEATURE: &str = "AUTO_BUF_REG";

/// Runs the case if the kernel offers the feature.
pub fn run(bench: &Bench) -> Result<Finding> {
    if !is_offered(FEATURE)? {
        return Ok(Finding::Skipped(format!("this kernel's ublk has no {FEATURE} (Linux 6.16 or newer)")));
    }
    let start = |name: &str, backend: &str, key: &str| -> Result<Box<dyn Peer>> {
        let queues = bench.plan.queues;
        let device = format!("{name}: {{ backend: {{ {backend} }}, queues: {queues}, zero-copy: '{key}' }}");
        Ok(Box::new(Ours::start(name, &format!("devices:\n  {device}\n"))?))
    };
    let on_file =
        |file: &Written, key: &str| start(&format!("file-{key}"), &format!("file: {}", file.path.display()), key);
    let on_memory = |key: &str| {
        let ours = start(&format!("memory-{key}"), "memory: 128MiB", key)?;
        fill(ours.node(), 128)?;
        Ok(ours)
    };
    let (for_on, for_off) = (written("on")?, written("off")?);
    let load = Load { rw: "randread", block: 65536, seconds: bench.plan.seconds, rate: None };
    let sides = loaded(
        bench,
        &[
            ("file, zero-copy: on", Box::new(|| on_file(&for_on, "on"))),
            ("file, zero-copy: off", Box::new(|| on_file(&for_off, "off"))),
            ("memory, zero-copy: on", Box::new(|| on_memory("on"))),
            ("memory, zero-copy: off", Box::new(|| on_memory("off"))),
        ],
        load,
    )?;
    let bars = [(0, 1), (2, 3)].into_iter().flat_map(|(on, off)| {
        [
            Bar::ratio(Metric::Iops, on, off, Bound::AtLeast(1.5)).not_in_instructions(COPIES),
            Bar::ratio(Metric::CpuOwn, on, off, Bound::Shown),
            Bar::ratio(Metric::CpuAll, on, off, Bound::Shown),
        ]
    });
    let bars = bars.collect();
    Ok(Finding::Measured { sides, bars, notes: Vec::new() })
}
