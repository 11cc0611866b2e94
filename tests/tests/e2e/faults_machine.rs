//! Faults of the machine below everything: a wall clock that jumps, CPUs that others have.
//!
//! Each trial begins with the number of its row in `FAULTS.md`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use ublk_throttle_tests::fio::{Completions, Job};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::sysfs;

use crate::fairness::expect_jain;
use crate::measure::{expect, expect_all, expect_near, repeat_if_void};
use crate::{Case, cases, let_run, now_ms, wait_until_busy};

pub(crate) fn cases() -> Vec<Case> {
    let clock = cases![[Need::Ublk, Need::Fio, Need::OwnMachine]; f41_a_wall_clock_that_jumps_by_years_changes_no_rate];
    let cpu = cases![[Need::Ublk, Need::Fio]; f43_without_cpu_the_limit_holds_and_shares_stay_fair];
    clock.into_iter().chain(cpu).collect()
}

/// The wall clock, moved by whole years until dropped.
struct Jump {
    real: SystemTime,
    since: Instant,
}

impl Jump {
    fn begin() -> Self {
        Self { real: SystemTime::now(), since: Instant::now() }
    }

    /// Sets the clock `years` beside what it would be.
    fn to(&self, years: i64) -> Result<()> {
        let now = (self.real + self.since.elapsed()).duration_since(UNIX_EPOCH)?;
        let seconds = i64::try_from(now.as_secs())? + years * 365 * 86_400;
        clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, now.subsec_nanos().into()))?;
        Ok(())
    }
}

impl Drop for Jump {
    fn drop(&mut self) {
        let _ = self.to(0);
    }
}

fn f41_a_wall_clock_that_jumps_by_years_changes_no_rate(scene: &Scene) -> Result<()> {
    // Ten years ahead, then ten years back: 100 a second before, between and after, and no request more.
    repeat_if_void(|| {
        let daemon = scene.start(
            "version: 1\n\
             devices:\n  d: { backend: { null: 1GiB }, limits: { iops-total: 100 } }\n",
        )?;
        let device = scene.device("d")?;
        let log = scene.dir().join("clock");
        let job = Job::new("neighbour-keeps-its-rate-through-a-removal")
            .set("DEVICE", device.node())
            .set("LOG", log.display());
        let load = scene.fio(job)?;
        wait_until_busy(&device)?;
        let_run(1);
        let begin = now_ms()?;
        let jump = Jump::begin();
        for years in [10, -10, 0] {
            let_run(2);
            jump.to(years)?;
        }
        let_run(1);
        load.interrupt()?;
        let report = load.finish_any(Duration::ZERO)?;
        ensure!(report.errors().is_empty(), "errors: {:?}", report.errors());
        drop(jump);
        daemon.stop()?;
        // fio took the wall clock once, at its start, and counts on from there by the monotonic one.
        let done = Completions::read(&log)?;
        expect_all(
            [0, 2000, 4000]
                .map(|at| expect_near(format!("from {at} ms"), done.rate(begin + at, begin + at + 2000), 100.0, 0.02)),
        )
    })
}

fn f43_without_cpu_the_limit_holds_and_shares_stay_fair(scene: &Scene) -> Result<()> {
    // The daemon at nice 19 beside twice as many busy loops as CPUs: never above 400 a second, both get about the same.
    let daemon = scene.start_under(
        &["nice", "-n", "19"],
        "version: 1\n\
         groups:\n  g: { limits: { iops-total: 400 } }\n\
         devices:\n  a: { backend: { null: 1GiB }, group: g }\n  b: { backend: { null: 1GiB }, group: g }\n",
    )?;
    let cpus = std::thread::available_parallelism()?.get();
    let busy =
        (0..2 * cpus).map(|_| scene.begin_tool("sh", &["-c", "while :; do :; done"])).collect::<Result<Vec<_>>>()?;
    let job = Job::new("two-devices-share-one-limit")
        .set("DEVICE_A", scene.device("a")?.node())
        .set("DEVICE_B", scene.device("b")?.node());
    let disks = [scene.device("a")?.disk, scene.device("b")?.disk];
    let is_over = AtomicBool::new(false);
    let (report, spell) = thread::scope(|scope| {
        let looks = scope.spawn(|| spell_of_reads(&disks, &is_over));
        let report = scene.fio(job).and_then(|fio| fio.finish(Duration::from_secs(60)));
        is_over.store(true, Ordering::Release);
        (report, looks.join().expect("it does not panic"))
    });
    let (report, (all, seconds)) = (report?, spell?);
    drop(busy);
    let shares = [report.job("a")?.iops(4096), report.job("b")?.iops(4096)];
    let sum: f64 = shares.iter().sum();
    eprintln!("          {sum:.1} of 400 a second without CPU, in all {all} in {seconds:.2} s");
    // From the first to the last: the rate, 0.1 s of credit, a sixteenth of that (leases), and one request.
    let most = 400.0 * seconds + 40.0 + 2.5 + 1.0;
    // fio counts 8 s, and what it sees in them: the credit, and up to 2 x 32 that were let go before, if it had no CPU to see it.
    let most_seen = 400.0 + (40.0 + 64.0) / 8.0;
    expect_all([
        expect(all as f64 <= most, || format!("{all} in {seconds:.2} s, above the limit of 400 a second")),
        expect(sum <= most_seen, || format!("{sum:.1} a second, above {most_seen}")),
        expect(sum >= 40.0, || format!("{sum:.1} a second of 400: hardly anything goes")),
        expect_jain(&shares, 0.9),
    ])?;
    daemon.stop().map(drop)
}

/// Reads of these disks together, from none to the last, and the seconds between: a little more than true, by a look at either end.
fn spell_of_reads(disks: &[String], is_over: &AtomicBool) -> Result<(u64, f64)> {
    let completed = || disks.iter().map(|disk| Ok(sysfs::stat(disk)?[0])).sum::<Result<u64>>();
    let (before, mut began) = (completed()?, Instant::now());
    let (mut last, mut ended) = (before, began);
    loop {
        // Looked at first: what comes after it is in the next look.
        let is_last = is_over.load(Ordering::Acquire);
        let looked = Instant::now();
        let count = completed()?;
        if count == before {
            began = looked;
        } else if count > last {
            (last, ended) = (count, Instant::now());
        }
        if is_last {
            return Ok((last - before, ended.duration_since(began).as_secs_f64()));
        }
        thread::sleep(Duration::from_millis(10));
    }
}
