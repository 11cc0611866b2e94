//! Shares of a group's limit: four devices of unequal depth, by Jain's index, beside a throttle
//! group of QEMU, the model of ours.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};

use super::Finding;
use crate::bench::bar::{Bar, Bound};
use crate::bench::bench::Bench;
use crate::bench::load;
use crate::bench::peers::{Ours, Peer, Qsd};
use crate::bench::sample::{Metric, Sample};
use crate::bench::statistics::jain;
use crate::fio::Fio;

/// Limit of the group in operations a second.
const RATE: u32 = 1000;

/// Parameters of the fio job, one for each device.
const DEVICES: [&str; 4] = ["DEVICE_1", "DEVICE_4", "DEVICE_16", "DEVICE_32"];

/// Runs the case.
pub fn run(bench: &Bench) -> Result<Finding> {
    let mut config = format!("groups:\n  shared: {{ limits: {{ iops-total: {RATE} }} }}\ndevices:\n");
    for number in 0..DEVICES.len() {
        let _ = writeln!(config, "  share-{number}: {{ backend: {{ null: 1GiB }}, group: shared }}");
    }
    let ours = Ours::start("share-0", &config)?;
    let our_nodes = (0..DEVICES.len()).map(|number| Path::new("/dev/ublk-throttle").join(format!("share-{number}")));
    let mut names = vec!["ours"];
    let mut nodes: Vec<Vec<PathBuf>> = vec![our_nodes.collect()];
    let mut notes = vec!["io.max and nbdkit have no limit over several devices".to_owned()];
    let qsd = match Qsd::start(4, DEVICES.len() as u32, RATE) {
        Ok(qsd) => {
            names.push("qemu-storage-daemon");
            nodes.push(qsd.nodes());
            Some(qsd)
        }
        Err(error) => {
            notes.push(format!("qemu-storage-daemon is left out: {error:#}"));
            None
        }
    };
    let seconds = bench.plan.seconds_of_rates;
    let sides = bench.alternate(&names, |place| measure(&nodes[place], seconds))?;
    Box::new(ours).stop()?;
    if let Some(qsd) = qsd {
        Box::new(qsd).stop()?;
    }
    let mut bars = Vec::new();
    for side in 0..sides.len() {
        bars.push(Bar::plain(Metric::Jain, side, Bound::Shown));
        bars.push(Bar::plain(Metric::Rate, side, Bound::Shown));
    }
    Ok(Finding::Measured { sides, bars, notes })
}

fn measure(nodes: &[PathBuf], seconds: u32) -> Result<Sample> {
    let mut fio = Fio::new("depths-share-a-limit-equally").with("SECONDS", seconds.to_string().as_ref());
    for (name, node) in DEVICES.iter().zip(nodes) {
        load::quiet(node)?;
        fio = fio.with(name, node.as_os_str());
    }
    let jobs = fio.start()?.finish(Duration::from_secs(u64::from(seconds) + 60))?;
    if jobs.len() != DEVICES.len() || jobs.iter().any(|job| job.error != 0) {
        bail!("fio was to report {} jobs without error; it reported {jobs:?}", DEVICES.len());
    }
    let rates: Vec<f64> = jobs.iter().map(|job| job.rate(4096)).collect();
    let mut sample = Sample::default();
    sample.set(Metric::Jain, jain(&rates));
    sample.set(Metric::Rate, rates.iter().sum::<f64>() / f64::from(RATE));
    Ok(sample)
}
