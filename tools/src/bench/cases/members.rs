//! A group with 3000 idle members, against the same group with none.
//!
//! 3000 real devices do not fit the VM: each needs a disk in the kernel and a thread in the daemon.
//! To the throttle a member is a child of a tree node, be it a device or a group. 3000 idle groups
//! therefore stand in for devices, beside 48 real idle devices.

use std::fmt::Write as _;

use anyhow::Result;

use super::limits::FAR_ABOVE;
use super::{Finding, loaded};
use crate::bench::bar::{Bar, Bound};
use crate::bench::bench::Bench;
use crate::bench::load::Load;
use crate::bench::peers::{Ours, Peer};
use crate::bench::sample::Metric;

/// Idle groups below the group `all`.
const GROUPS: usize = 3000;

/// Idle devices in the group, besides the busy one.
const DEVICES: usize = 48;

/// Runs the case.
pub fn run(bench: &Bench) -> Result<Finding> {
    let queues = bench.plan.queues;
    let start = |name: &str, groups: usize, devices: usize| -> Result<Box<dyn Peer>> {
        Ok(Box::new(Ours::start(name, &config(name, queues, groups, devices))?))
    };
    let load = Load { rw: "randread", block: 4096, seconds: bench.plan.seconds, rate: None };
    let sides = loaded(
        bench,
        &[
            ("3000 idle members", Box::new(|| start("crowded", GROUPS, DEVICES))),
            ("alone", Box::new(|| start("alone", 0, 0))),
        ],
        load,
    )?;
    let bars = vec![
        Bar::ratio(Metric::Iops, 0, 1, Bound::AtLeast(0.98)),
        Bar::ratio(Metric::CpuOwn, 0, 1, Bound::Shown),
        Bar::ratio(Metric::CpuAll, 0, 1, Bound::Shown),
    ];
    let notes = vec![format!(
        "not 3000 devices, which the VM cannot hold: {GROUPS} idle groups, which are children of the group as devices are, and \
         {DEVICES} idle devices"
    )];
    Ok(Finding::Measured { sides, bars, notes })
}

/// Configuration with a busy device and idle members of one group. The group's six limits never
/// bind.
fn config(name: &str, queues: u32, groups: usize, devices: usize) -> String {
    let mut text = format!("groups:\n  all: {{ limits: {FAR_ABOVE} }}\n");
    for number in 0..groups {
        let _ = writeln!(text, "  idle-{number}: {{ parent: all }}");
    }
    let _ = writeln!(text, "devices:\n  {name}: {{ backend: {{ null: 1GiB }}, group: all, queues: {queues} }}");
    for number in 0..devices {
        let _ = writeln!(text, "  {name}-idle-{number}: {{ backend: {{ null: 1MiB }}, group: all, depth: 1 }}");
    }
    text
}
