//! What zero copy is worth: 64k on a file, with the key `zero-copy` on and off.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::file::written;
use super::{Finding, loaded};
use crate::bench::bar::{Bar, Bound};
use crate::bench::bench::Bench;
use crate::bench::load::Load;
use crate::bench::peers::Ours;
use crate::bench::sample::Metric;
use crate::{build, process};

/// The kernel's name for it.
const FEATURE: &str = "AUTO_BUF_REG";

/// Runs the case, where the kernel can do it.
pub fn run(bench: &Bench) -> Result<Finding> {
    if !is_offered()? {
        return Ok(Finding::Skipped(format!("this kernel's ublk has no {FEATURE} (Linux 6.16 or newer)")));
    }
    let start = |key: &str| -> Result<_> {
        let file = written(key)?;
        let (name, path, queues) = (format!("copy-{key}"), file.path.display(), bench.plan.queues);
        let device = format!("{name}: {{ backend: {{ file: {path} }}, queues: {queues}, zero-copy: '{key}' }}");
        Ok((file, Ours::start(&name, &format!("devices:\n  {device}\n"))?))
    };
    let ((_on, with), (_off, without)) = (start("on")?, start("off")?);
    let load = Load { rw: "randread", block: 65536, seconds: bench.plan.seconds, rate: None };
    let sides = loaded(bench, vec![("zero-copy: on", Box::new(with)), ("zero-copy: off", Box::new(without))], load)?;
    let bars = vec![
        Bar::ratio(Metric::Iops, 0, 1, Bound::AtLeast(1.5)),
        Bar::ratio(Metric::CpuOwn, 0, 1, Bound::Shown),
        Bar::ratio(Metric::CpuAll, 0, 1, Bound::Shown),
    ];
    Ok(Finding::Measured { sides, bars, notes: Vec::new() })
}

fn is_offered() -> Result<bool> {
    let said = process::output(Command::new(build::daemon_path()).args(["features", "--json"]))?;
    let said: Value = serde_json::from_str(&said).context("ublk-throttle features --json")?;
    let features = said["features"].as_array().context("ublk-throttle features --json names no features")?;
    Ok(features.iter().any(|feature| feature["name"] == FEATURE && feature["offered"] == true))
}
