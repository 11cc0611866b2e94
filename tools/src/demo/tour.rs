//! Steps of the demo in order, and the verdict.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::leftovers;
use super::table::{Row, print};
use crate::blockstat::{self, Sampler};
use crate::daemon::{Daemon, Log};
use crate::fio::Fio;
use crate::workspace;

/// `groups.shared.limits.iops-total` of quickstart.yaml.
const LIMIT: f64 = 1000.0;

/// Request size (`bs`) of the fio jobs.
const REQUEST_BYTES: u64 = 4096;

/// Reads after which a device counts as busy and the group's burst credit as spent. The bucket's
/// capacity is avg/10, so 100 requests pass at once, and then the rate holds.
const WELL_UNDER_WAY: u64 = 200;

/// Time limit for fio to start and to complete these reads, on a busy machine under emulation.
const FIO_START: Duration = Duration::from_secs(20);

/// Length of a window over the kernel's counters: 1 % of 4 s is 40 requests, far more than the few
/// by which the window's edges are uncertain.
const WINDOW: Duration = Duration::from_secs(4);

/// Time limit of a removal under load, in a VM that shares its processors. `del` itself waits 4.5 s
/// by default.
const REMOVAL: Duration = Duration::from_secs(10);

/// Time limit for fio to end and to report, under emulation.
const FIO_END: Duration = Duration::from_secs(15);

/// Runs all steps; returns the exit code.
pub fn run(binary: &Path) -> Result<u8> {
    let (vol0, vol1) = (node("vol0"), node("vol1"));
    for node in [&vol0, &vol1] {
        if node.exists() {
            bail!("{} exists: a daemon that uses this name is running; stop it first", node.display());
        }
    }
    let before = leftovers::look(binary)?;
    let config = workspace::root().join("config/examples/quickstart.yaml");
    let scratch = Scratch::create()?;

    println!("\n1. ublk-throttle run {}", config.display());
    let daemon = Daemon::spawn(binary, &config, &scratch.path, Log::Shown)?;
    daemon.wait_until_ready()?;

    let mut rows = share(&vol0, &vol1)?;
    rows.extend(remove_under_load(&daemon, &vol0, &vol1, &scratch.path)?);

    println!("\n4. SIGTERM");
    let took = daemon.stop()?;
    println!("   exit 0 after {:.2} s", took.as_secs_f64());
    drop(scratch);
    let left = leftovers::since(&before, &leftovers::look(binary)?);
    if left.is_empty() {
        println!("   left behind: nothing (devices, nodes and processes are as before)");
    }

    println!();
    print(&rows);
    let missed = rows.iter().filter(|row| !row.is_met()).count();
    if !left.is_empty() {
        bail!("left behind after the daemon's end: {}", left.join(", "));
    }
    if missed > 0 {
        bail!("{missed} of {} rates missed their number by more than allowed (see the table)", rows.len());
    }
    println!("\nEverything as configured.");
    Ok(0)
}

/// Both devices are busy; fio measures the rates.
fn share(vol0: &Path, vol1: &Path) -> Result<Vec<Row>> {
    println!("\n2. fio on vol0 and vol1 at the same time: fio-jobs/two-devices-share-one-limit.fio");
    // The job's ramp_time excludes the burst credit.
    let jobs = Fio::new("two-devices-share-one-limit")
        .with("DEVICE_A", vol0.as_os_str())
        .with("DEVICE_B", vol1.as_os_str())
        .start()?
        .finish(Duration::from_secs(60))?;
    let rates: Vec<f64> = jobs.iter().map(|job| job.rate(REQUEST_BYTES)).collect();
    if rates.len() != 2 || jobs.iter().any(|job| job.error != 0) {
        bail!("fio was to report two jobs without error; it reported {jobs:?}");
    }
    Ok(vec![
        Row::judged("vol0 + vol1, both busy", LIMIT, rates.iter().sum()),
        Row::shown("  vol0", LIMIT / 2.0, rates[0]),
        Row::shown("  vol1", LIMIT / 2.0, rates[1]),
    ])
}

/// Removes vol0 while both devices are busy. The kernel's counters give the rates in a window
/// before and a window after.
fn remove_under_load(daemon: &Daemon, vol0: &Path, vol1: &Path, scratch: &Path) -> Result<Vec<Row>> {
    println!("\n3. fio on both again, and ublk-throttle del --force vol0");
    let (first, second) = (blockstat::name(vol0)?, blockstat::name(vol1)?);
    let leaver = Fio::new("reader-ends-with-an-error-when-its-device-goes").with("DEVICE", vol0.as_os_str()).start()?;
    let stayer = Fio::new("neighbour-keeps-its-rate-through-a-removal")
        .with("DEVICE", vol1.as_os_str())
        .with("LOG", scratch.join("vol1").as_os_str())
        .start()?;
    for disk in [&first, &second] {
        blockstat::wait_for_reads(disk, WELL_UNDER_WAY, FIO_START)?;
    }
    let sampler = Sampler::start(&first, &second);
    let both = Instant::now();
    thread::sleep(WINDOW);
    let asked = Instant::now();
    daemon.del("vol0")?;
    let gone = Instant::now();
    println!("   removed in {:.2} s", gone.duration_since(asked).as_secs_f64());
    if gone.duration_since(asked) > REMOVAL {
        bail!("the removal of vol0 took longer than {} s", REMOVAL.as_secs());
    }
    if vol0.exists() || Path::new("/sys/block").join(&first).exists() {
        bail!("vol0 was removed, yet {} or /sys/block/{first} is still there", vol0.display());
    }
    // The removal dispatched vol0's held requests and charged them to the group: give the debt 1 s.
    thread::sleep(Duration::from_secs(1));
    let alone = Instant::now();
    thread::sleep(WINDOW);
    let end = Instant::now();
    let samples = sampler.stop();
    println!("   longest time without a completion on vol1: {} ms", samples.longest_gap(both, end).as_millis());

    stayer.interrupt()?;
    let left = leaver.finish(FIO_END).context("fio on the removed device")?;
    let stayed = stayer.finish(FIO_END).context("fio on the neighbour")?;
    let errors: i64 = stayed.iter().map(|job| job.error).sum();
    println!("   fio on vol0 ended with errno {} (its device is gone)", left.first().map_or(0, |job| job.error));
    println!("   fio on vol1: {} requests, {errors} errors", stayed.iter().map(|job| job.requests).sum::<u64>());
    if errors != 0 || stayed.is_empty() {
        bail!("fio on vol1 was to end without error; it reported {stayed:?}");
    }
    Ok(vec![
        Row::judged("vol0 + vol1, before the removal", LIMIT, samples.rate(both, asked, |sample| sample.both())),
        Row::shown("  vol1", LIMIT / 2.0, samples.rate(both, asked, |sample| sample.second)),
        Row::judged("vol1 alone, after the removal", LIMIT, samples.rate(alone, end, |sample| sample.second)),
    ])
}

fn node(name: &str) -> PathBuf {
    Path::new("/dev/ublk-throttle").join(name)
}

/// Folder for the socket, the state and fio's logs, apart from those of a daemon of this host.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn create() -> Result<Scratch> {
        let path = PathBuf::from(format!("/run/ublk-throttle-demo-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Scratch { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
