//! Block devices in sysfs, ublk nodes and processes.

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

/// Reads and writes in flight at a block device.
pub fn in_flight(disk: &str) -> Result<u64> {
    Ok(numbers(disk, "inflight")?.iter().sum())
}

/// Statistics of a block device since its creation, in the order of Documentation/block/stat.rst:
/// element 0 is the number of reads, element 15 the number of flushes.
pub fn stat(disk: &str) -> Result<Vec<u64>> {
    numbers(disk, "stat")
}

/// An attribute with several numbers.
fn numbers(disk: &str, name: &str) -> Result<Vec<u64>> {
    let text = attribute(disk, name)?;
    let numbers = text.split_whitespace().map(str::parse).collect::<Result<_, _>>();
    numbers.with_context(|| format!("/sys/block/{disk}/{name} is {text:?}"))
}

/// The CPUs of each hardware queue of a block device, in the order of the queues.
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

/// The present nodes of all ublk devices (block and character), and the stable names of our daemon.
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

/// The pids of the processes that run the program at `binary`.
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
