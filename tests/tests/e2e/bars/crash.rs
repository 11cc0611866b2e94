//! Daemons that are killed repeatedly, and the effect on the users of their devices.
//!
//! ```text
//!   SIGKILL ─► run ─► SIGKILL ─► run …       fio: writes and verifies          each block of the stampers holds
//!                                            stampers: read, compare, write    the last stamp that was acknowledged
//! ```
//!
//! A pause begins before the signal is sent and ends when the first waiting request is answered.
//! Like a user's wait, it contains the time to notice the death and to start the next daemon.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::libc::EIO;
use ublk_throttle_tests::daemon::Daemon;
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::disks::{self, Mount};
use ublk_throttle_tests::mode::Times;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::wait;

use crate::measure::expect_within;
use crate::{VERIFIED, WRITES, foreign, load};

/// From SIGKILL until every device serves again.
const BACK_LIMIT: Duration = Duration::from_secs(2);
/// From SIGKILL until the last request of a device with `on-crash: fail` has ended.
const FAIL_LIMIT: Duration = Duration::from_secs(5);

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;
/// Pages of one stamper.
const PAGES: u64 = 64;

fn kill(daemon: Daemon) -> Result<()> {
    daemon.kill(FAIL_LIMIT).map(drop)
}

/// A configuration with a device of 64 MiB on a file of its own.
fn in_a_file(scene: &Scene, more: &str) -> String {
    let image = scene.dir().join("d.img");
    format!(
        "version: 1\ndevices:\n  d: {{ backend: {{ file: {}, size: 64MiB, create: true }}, {more} }}\n",
        image.display()
    )
}

/// Writes stamps to its pages in turn, one at a time. Before it writes a page again, it compares
/// the page with the last acknowledged stamp.
struct Stamper {
    ends: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

impl Stamper {
    fn start(node: &Path, begin: u64) -> Result<Self> {
        let (direct, ends) = (Direct::open(node)?, Arc::new(AtomicBool::new(false)));
        let until = Arc::clone(&ends);
        let thread = std::thread::spawn(move || stamp(&direct, begin, &until));
        Ok(Self { ends, thread })
    }

    /// Ends the stamper; returns the number of acknowledged writes. Each was found on its page.
    fn stop(self) -> Result<u64> {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("a stamper's thread")?
    }
}

fn stamp(direct: &Direct, begin: u64, ends: &AtomicBool) -> Result<u64> {
    // 251 and the number of pages have no common factor, so a page gets a different stamp in each
    // round.
    let value = |number: u64| 1 + (number % 251) as u8;
    let place = |number: u64| begin + number % PAGES * PAGE as u64;
    let check = |number: u64| {
        let is_there = direct.holds(place(number), PAGE, value(number))?;
        ensure!(is_there, "write {number} was acknowledged, and is not at {}", place(number));
        Ok(())
    };
    let mut number = 0_u64;
    while !ends.load(Ordering::Relaxed) {
        if let Some(before) = number.checked_sub(PAGES) {
            check(before)?;
        }
        direct.write(place(number), PAGE, value(number)).with_context(|| format!("write {number}"))?;
        number += 1;
    }
    (number.saturating_sub(PAGES)..number).try_for_each(check)?;
    Ok(number)
}

/// Kills, each at a different moment of the load. A lost write or an error shows only with requests
/// in flight and held at the kill; every kill here has both.
const KILLS: Times = Times { ci: 6, thorough: 30 };

pub(super) fn f04_kills_under_verified_writes_lose_nothing_and_show_no_error(scene: &Scene) -> Result<()> {
    // The limit keeps requests held at each kill. fio uses the first 8 MiB, the stampers areas
    // behind them.
    let config = in_a_file(scene, "queues: 2, limits: { iops-total: 1500 }");
    let mut daemon = scene.start(&config)?;
    let device = scene.device("d")?;
    let mut fio = load(scene, VERIFIED, &device)?;
    let stampers: Vec<_> =
        (1..5).map(|number| Stamper::start(&device.node, number * 8 * MIB)).collect::<Result<_>>()?;
    let mut longest = Duration::ZERO;
    for round in 0..KILLS.get() as u64 {
        // A different moment of the load in each round.
        sleep(Duration::from_millis(150 + round * 37 % 500));
        let begin = Instant::now();
        kill(daemon)?;
        daemon = scene.start(&config)?;
        Direct::open(&device.node)?.read(63 * MIB, PAGE)?;
        longest = longest.max(begin.elapsed());
        ensure!(fio.is_running()?, "fio has ended:\n{:?}", fio.finish_any(Duration::ZERO)?.errors());
        ensure!(scene.device("d")?.id == device.id, "another id");
    }
    let stamps = stampers.into_iter().map(Stamper::stop).sum::<Result<u64>>()?;
    fio.stop()?;
    ensure!(stamps >= KILLS.get() as u64, "{stamps} stamps over {} kills", KILLS.get());
    eprintln!("          {stamps} stamps, each found again");
    daemon.stop()?;
    expect_within("longest pause", longest, BACK_LIMIT)
}

pub(super) fn f04_sixteen_devices_of_a_killed_daemon_are_back_in_two_seconds(scene: &Scene) -> Result<()> {
    // From SIGKILL until the last of 16 waiting readers has its answer.
    let mut config = "version: 1\ndevices:\n".to_owned();
    for number in 0..16 {
        let _ = writeln!(config, "  d{number}: {{ backend: {{ null: 1GiB }} }}");
    }
    let daemon = scene.start(&config)?;
    let devices: Vec<_> = (0..16).map(|number| scene.device(&format!("d{number}"))).collect::<Result<_>>()?;
    let disks: Vec<_> = devices.iter().map(|device| Direct::open(&device.node)).collect::<Result<_, _>>()?;
    let begin = Instant::now();
    kill(daemon)?;
    let readers: Vec<_> =
        disks.into_iter().map(|disk| std::thread::spawn(move || disk.read(0, PAGE).map(|_| Instant::now()))).collect();
    let daemon = scene.start(&config)?;
    let answered =
        readers.into_iter().map(|reader| Ok(reader.join().ok().context("a reader")??)).collect::<Result<Vec<_>>>()?;
    let last = answered.into_iter().max().context("no reader")?;
    for (number, device) in devices.iter().enumerate() {
        ensure!(scene.device(&format!("d{number}"))?.id == device.id, "d{number} has another id");
    }
    daemon.stop()?;
    expect_within("SIGKILL to service of 16 devices", last - begin, BACK_LIMIT)
}

/// Kills under a mounted file system, each with one file before and one file during an fsync.
const EXT4_KILLS: Times = Times { ci: 3, thorough: 10 };

pub(super) fn f04_ext4_over_kills_is_clean_and_has_all_that_fsync_promised(scene: &Scene) -> Result<()> {
    // The fsync of one file ends before the kill; the fsync of a second file waits for the next
    // daemon. At the end both are read through a new mount and a new daemon, past any cache of the
    // writes.
    let config = in_a_file(scene, "limits: { iops-total: 2000 }");
    let mut daemon = scene.start(&config)?;
    let device = scene.device("d")?;
    let mount = Mount::new(&device.node, &scene.dir().join("mount"))?;
    let point = mount.point().to_owned();
    let names = |round: u8| ["before", "during"].map(|when| point.join(format!("{when}-{round}")));
    let content = |round: u8| -> Vec<u8> { (0..300_000_u32).map(|at| (at % 241) as u8 ^ round).collect() };
    let rounds = EXT4_KILLS.get() as u8;
    for round in 0..rounds {
        let [before, during] = names(round);
        fs::write(&before, content(round))?;
        File::open(&before)?.sync_all()?;
        // In the page cache only; its write-back happens without a server.
        fs::write(&during, content(round))?;
        kill(daemon)?;
        let promised = std::thread::spawn(move || File::open(&during)?.sync_all());
        daemon = scene.start(&config)?;
        promised.join().ok().context("a thread")?.context("fsync over a restart")?;
    }
    mount.unmount()?;
    disks::fsck(&device.node)?;
    daemon.stop()?;
    let daemon = scene.start(&config)?;
    let mount = Mount::existing(&scene.device("d")?.node, &point)?;
    for path in (0..rounds).flat_map(|round| names(round).map(|path| (round, path))) {
        ensure!(fs::read(&path.1)? == content(path.0), "{} has changed", path.1.display());
    }
    mount.unmount()?;
    daemon.stop().map(drop)
}

/// Processes (without kernel threads) in uninterruptible sleep.
fn stuck() -> Vec<String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| fs::read_link(entry.path().join("exe")).is_ok())
        .filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok())
        .filter(|stat| stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('D')))
        .collect()
}

pub(super) fn f04_on_crash_fail_ends_everything_in_five_seconds_and_lets_it_be_deleted(scene: &Scene) -> Result<()> {
    // Held writes end with EIO, no process stays in state D, and another client deletes the device.
    let config = "version: 1\ndevices:\n  d: { backend: { null: 1GiB }, limits: { iops-total: 10 }, on-crash: fail }\n";
    let daemon = scene.start(config)?;
    let device = scene.device("d")?;
    let fio = load(scene, WRITES, &device)?;
    let begin = Instant::now();
    kill(daemon)?;
    let report = fio.finish_any(Duration::ZERO)?;
    let ended = begin.elapsed();
    ensure!(report.errors() == [i64::from(EIO)], "errors: {:?}", report.errors());
    wait::until("no process in D", FAIL_LIMIT, || Ok(stuck().is_empty().then_some(())))
        .with_context(|| stuck().join(""))?;
    let del = foreign::begin_delete(scene.dir(), device.id)?.finish(FAIL_LIMIT)?.expect_code(0)?;
    ensure!(!device.node.exists(), "{} is still there", device.node());
    // The next daemon finds the state file of the device, and makes the device anew.
    let daemon = scene.start(config)?;
    Direct::open(&scene.device("d")?.node)?.read(0, PAGE)?;
    daemon.stop()?;
    eprintln!("          DEL by another client: {:?}", del.took);
    expect_within("SIGKILL to the end of the load", ended, FAIL_LIMIT)
}
