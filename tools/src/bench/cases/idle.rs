//! CPU time and memory of a daemon with 64 idle devices of two queues each.
//!
//! The devices use files without zero copy: the buffers of a null device are never written, and
//! zero copy needs no buffers.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::Finding;
use crate::bench::bar::{Bar, Bound};
use crate::bench::bench::Bench;
use crate::bench::machine;
use crate::bench::peers::{Ours, Peer};
use crate::bench::sample::{Metric, Sample};

/// Devices of the daemon.
const DEVICES: usize = 64;

/// Queues of each device.
const QUEUES: usize = 2;

/// Bytes read at once from each queue of each device: 16 requests of the largest size.
const LARGE: usize = 8 << 20;

/// Idle time after which a device has released the memory of its used buffers.
const LEFT_ALONE: Duration = Duration::from_secs(5);

/// Runs the case.
pub fn run(bench: &Bench) -> Result<Finding> {
    let files = Path::new("/dev/shm/bench-idle");
    fs::create_dir_all(files).with_context(|| files.display().to_string())?;
    let mut config = "devices:\n".to_owned();
    for number in 0..DEVICES {
        // Each file is a hole: tmpfs allocates no memory for reads of it.
        let file = format!("{{ file: {}/{number}.img, size: 16MiB, create: true }}", files.display());
        let _ = writeln!(config, "  idle-{number}: {{ backend: {file}, queues: {QUEUES}, zero-copy: 'off' }}");
    }
    let ours = Ours::start("idle-0", &config)?;
    // Waits for the state files of the start and for the first second of each device.
    thread::sleep(LEFT_ALONE);
    let (mut processes, mut fresh) = (0, None);
    let sides = bench.alternate(&["64 devices x 2 queues"], |_| {
        let mut sample = Sample::default();
        processes = ours.server().pids()?.len();
        let fresh = *fresh.get_or_insert(ours.server().resident()?);
        sample.set(Metric::Resident, mib_each(fresh));
        sample.set(Metric::IdleCpu, idle(&ours, bench.plan.seconds_of_rates)?);
        for number in 0..DEVICES {
            read_all_queues(&Path::new("/dev/ublk-throttle").join(format!("idle-{number}")))?;
        }
        thread::sleep(LEFT_ALONE);
        sample.set(Metric::ResidentUsed, mib_each(ours.server().resident()?));
        Ok(sample)
    })?;
    Box::new(ours).stop()?;
    fs::remove_dir_all(files).with_context(|| files.display().to_string())?;
    let bars = vec![
        Bar::plain(Metric::IdleCpu, 0, Bound::AtMost(1.0)),
        Bar::plain(Metric::Resident, 0, Bound::AtMost(4.0)),
        Bar::plain(Metric::ResidentUsed, 0, Bound::AtMost(4.0)),
    ];
    let notes = vec![format!(
        "files on tmpfs, zero-copy: off; memory and CPU of the daemon's processes ({processes}); used: {} MiB at once on each queue of each device",
        LARGE >> 20
    )];
    Ok(Finding::Measured { sides, bars, notes })
}

/// CPU time of the idle daemon in milliseconds a second.
fn idle(ours: &Ours, seconds: u32) -> Result<f64> {
    let (start, before) = (Instant::now(), ours.server().usage()?);
    thread::sleep(Duration::from_secs(seconds.into()));
    let used = ours.server().usage()?.saturating_sub(before);
    Ok(used.as_secs_f64() * 1000.0 / start.elapsed().as_secs_f64())
}

fn mib_each(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64 / DEVICES as f64
}

/// Reads a large block from every processor: a request goes to the queue of the processor that
/// submits it.
fn read_all_queues(node: &Path) -> Result<()> {
    let (mut memory, mut everywhere) = (vec![0; LARGE + 4096], CpuSet::new());
    let aligned = memory.as_ptr().align_offset(4096);
    let file = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(node);
    let file = file.with_context(|| format!("cannot open {}", node.display()))?;
    for processor in 0..machine::processors() as usize {
        let mut one = CpuSet::new();
        one.set(processor)?;
        everywhere.set(processor)?;
        sched_setaffinity(Pid::from_raw(0), &one).context("cannot choose a processor")?;
        let read = file.read_exact_at(&mut memory[aligned..aligned + LARGE], 0);
        read.with_context(|| format!("cannot read {}", node.display()))?;
    }
    sched_setaffinity(Pid::from_raw(0), &everywhere).context("cannot choose all processors")
}
