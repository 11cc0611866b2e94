//! What the kernel tells about block devices.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// An attribute of a block device, trimmed: `attribute("ublkb0", "queue/scheduler")`.
pub fn attribute(disk: &str, name: &str) -> Result<String> {
    let path = Path::new("/sys/block").join(disk).join(name);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.trim().to_owned())
}

/// A numeric attribute of a block device.
pub fn number(disk: &str, name: &str) -> Result<u64> {
    let text = attribute(disk, name)?;
    text.parse().with_context(|| format!("/sys/block/{disk}/{name} is {text:?}"))
}

/// Requests, reads and writes, that a block device has not answered yet.
pub fn in_flight(disk: &str) -> Result<u64> {
    Ok(numbers(disk, "inflight")?.iter().sum())
}

/// What a block device has done since it is there, in the order of Documentation/block/stat.rst: the first number counts reads, the
/// 16th flushes.
pub fn stat(disk: &str) -> Result<Vec<u64>> {
    numbers(disk, "stat")
}

/// An attribute of several numbers.
fn numbers(disk: &str, name: &str) -> Result<Vec<u64>> {
    let text = attribute(disk, name)?;
    let numbers = text.split_whitespace().map(str::parse).collect::<Result<_, _>>();
    numbers.with_context(|| format!("/sys/block/{disk}/{name} is {text:?}"))
}

/// For each hardware queue of a block device, in order, the CPUs whose requests go there.
pub fn queue_cpus(disk: &str) -> Result<Vec<Vec<u32>>> {
    let folder = Path::new("/sys/block").join(disk).join("mq");
    let mut queues = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let queue: u32 = entry?.file_name().to_string_lossy().parse()?;
        let list = attribute(disk, &format!("mq/{queue}/cpu_list"))?;
        let cpus = list.split(',').map(|cpu| cpu.trim().parse()).collect::<Result<Vec<u32>, _>>()?;
        queues.push((queue, cpus));
    }
    queues.sort();
    Ok(queues.into_iter().map(|(_, cpus)| cpus).collect())
}

/// Every node that a ublk device has now: block, character, and the stable names of our own daemon.
pub fn ublk_nodes() -> BTreeSet<PathBuf> {
    let entries = |folder: &str, wanted: fn(&str) -> bool| {
        fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter(move |entry| wanted(&entry.file_name().to_string_lossy()))
            .map(|entry| entry.path())
            .collect::<Vec<_>>()
    };
    let kernel = entries("/dev", |name| name.starts_with("ublkb") || name.starts_with("ublkc"));
    kernel.into_iter().chain(entries("/dev/ublk-throttle", |_| true)).collect()
}

/// The pids of all processes that run the program at `binary`.
pub fn processes_of(binary: &Path) -> BTreeSet<u32> {
    let runs_it = |pid: u32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == binary);
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .filter(|&pid| runs_it(pid))
        .collect()
}
