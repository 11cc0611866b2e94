//! Signals without a handler: SIGKILL in the middle of a removal, SIGSTOP under load.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use ublk_throttle_tests::command::Started;
use ublk_throttle_tests::disks::RamDisk;
use ublk_throttle_tests::fio::Fio;
use ublk_throttle_tests::mode::Times;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::{Device, Scene};
use ublk_throttle_tests::wait;

use crate::measure::{expect_limit_held, expect_near, expect_within};
use crate::removal::{held_at_one_a_second, kill_during_dels};
use crate::{Case, READS, WRITES, cases, completions, let_run, load, now_ms};

/// Bound on the end of all processes and devices after SIGKILL.
const GONE_LIMIT: Duration = Duration::from_secs(10);

/// Kills during a removal, at one delay each.
const KILLS: Times = Times { ci: 2, thorough: 5 };
const ONCE: Times = Times { ci: 1, thorough: 1 };

pub(crate) fn cases() -> Vec<Case> {
    let rublk = cases![[Need::Ublk, Need::Fio, Need::Rublk];
        daemon_killed_during_a_del_with_held_requests_leaves_no_process_behind,
    ];
    let slow = cases![[Need::Ublk, Need::Fio, Need::Rublk, Need::NullBlk];
        daemon_killed_while_its_helper_stops_a_device_leaves_no_process_behind,
    ];
    let fio = cases![[Need::Ublk, Need::Fio]; f07_daemon_stopped_for_a_while_serves_on_without_a_burst];
    rublk.into_iter().chain(slow).chain(fio).collect()
}

fn daemon_killed_during_a_del_with_held_requests_leaves_no_process_behind(scene: &Scene) -> Result<()> {
    // A daemon killed during its own STOP can never die and blocks all ublk devices of the host. A
    // helper's STOP has no such cycle. The daemon is killed at several points of a removal, as the
    // window is narrow.
    kill_during_dels(
        scene,
        KILLS,
        || held_at_one_a_second(scene),
        |device, fio, del, killed| expect_gone(scene, &device, fio, del, killed),
    )
}

fn daemon_killed_while_its_helper_stops_a_device_leaves_no_process_behind(scene: &Scene) -> Result<()> {
    // A window of 1 s: the backend takes 1 s for each request, and STOP waits for all of them. The
    // backend is opened with O_DIRECT: a buffered write would end in the page cache at once, and
    // the last close of the disk at the daemon's end would write everything back, at 64 pages a
    // second.
    let disk = RamDisk::slow(16, Duration::from_secs(1))?;
    let config =
        format!("version: 1\ndevices:\n  d: {{ backend: {{ block: {}, direct: true }} }}\n", disk.node().display());
    let begin = || {
        let daemon = scene.start(&config)?;
        let device = scene.device("d")?;
        let fio = load(scene, WRITES, &device)?;
        Ok((daemon, device, fio))
    };
    kill_during_dels(scene, ONCE, begin, |device, fio, del, killed| expect_gone(scene, &device, fio, del, killed))
}

fn expect_gone(scene: &Scene, device: &Device, fio: Fio, del: Started, killed: Instant) -> Result<()> {
    // The effect on users of the device is claimed elsewhere (`on-crash`). Here another client
    // deletes the device if it still exists.
    let character_node = format!("/dev/ublkc{}", device.id);
    wait::until("a device or none", GONE_LIMIT, || {
        if !Path::new(&character_node).exists() {
            return Ok(Some(()));
        }
        let id = device.id.to_string();
        let answer = scene.begin_tool("rublk", &["del", "-n", &id])?.finish(GONE_LIMIT)?;
        Ok((answer.code == Some(0)).then_some(()))
    })?;
    del.finish(GONE_LIMIT).context("the del whose daemon was killed")?;
    fio.finish_any(GONE_LIMIT).context("the load of the device whose daemon was killed")?;
    wait::until("end of helpers", GONE_LIMIT, || Ok(scene.processes().is_empty().then_some(())))?;
    expect_within("end of everything after the kill", killed.elapsed(), GONE_LIMIT)?;
    // The locks of the driver and of the daemon are free: the same device starts again.
    scene.start("version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?.stop()?;
    scene.expect_nothing_left()
}

fn f07_daemon_stopped_for_a_while_serves_on_without_a_burst(scene: &Scene) -> Result<()> {
    // SIGSTOP for 2 s: no error. After SIGCONT at most the capacity (10 operations) beyond the
    // rate, not the 200 of 2 s.
    let mut daemon = scene.start(
        "version: 1\n\
         devices:\n  d: { backend: { null: 1GiB }, queues: 2, limits: { iops-total: 100 } }\n",
    )?;
    let device = scene.device("d")?;
    let fio = load(scene, READS, &device)?;
    let_run(1);
    daemon.signal(Signal::SIGSTOP)?;
    let_run(2);
    let stopped_for = fs::read_to_string(format!("/proc/{}/stat", daemon.pid()))?;
    ensure!(stopped_for.contains(") T "), "the daemon is not stopped: {stopped_for}");
    // Read the clock before SIGCONT: after it, the daemon may complete requests before the clock is
    // read.
    let continued = now_ms()?;
    daemon.signal(Signal::SIGCONT)?;
    let_run(3);
    fio.stop()?;
    ensure!(daemon.is_running()?, "the daemon ended:\n{}", daemon.log()?);
    let done = completions(scene, &device)?;
    // fio counts whole milliseconds from its own start, so its log may lag our clock by 1 or 2 ms.
    ensure!(done.count(continued - 1500, continued - 2) == 0, "requests completed while the daemon was stopped");
    let next_second = done.count(continued, continued + 1000);
    // At most 100 for the second, 10 of the capacity and one beyond it. Requests that completed
    // before the stop are no longer in flight.
    expect_near("operations in the second after SIGCONT", next_second as f64, 103.0, 8.0 / 103.0)?;
    let (count, seconds) = done.in_all();
    expect_limit_held("operations in all", count, 100.0, seconds, 32)?;
    daemon.stop().map(drop)
}
