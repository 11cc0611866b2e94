//! Removal under load: by our own command, by SIGTERM and SIGINT, by another client of the driver.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use ublk_throttle_tests::command::Started;
use ublk_throttle_tests::daemon::{Daemon, STOP_LIMIT};
use ublk_throttle_tests::disks::{self, Mount};
use ublk_throttle_tests::fio::Fio;
use ublk_throttle_tests::mode::{Times, to_measure};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::{Device, Scene};
use ublk_throttle_tests::{sysfs, wait};

use crate::measure::{Unmeasured, expect_all, expect_limit_held, expect_near, expect_within};
use crate::{Case, READS, WRITES, cases, completions, foreign, load, now_ms};

/// Bound of a removal under load.
const REMOVAL_LIMIT: Duration = Duration::from_secs(2);

pub(crate) fn cases() -> Vec<Case> {
    let fio = cases![[Need::Ublk, Need::Fio];
        f01_forced_del_under_load_leaves_the_neighbour_unhurt,
        f03_del_of_an_open_device_is_refused_and_names_the_process,
        f01_forced_del_lets_requests_held_at_one_a_second_go_at_once,
        f34_two_dels_of_one_device_at_once_both_get_an_answer,
        f10_sigterm_ends_a_daemon_that_holds_requests_at_one_a_second,
        f10_sigterm_ends_a_daemon_under_full_load,
        f10_sigint_ends_the_daemon_as_sigterm_does,
    ];
    let rublk = cases![[Need::Ublk, Need::Fio, Need::Rublk];
        f02_removal_by_another_client_under_load_leaves_the_neighbour_unhurt,
        f02_removal_by_another_client_does_not_wait_for_requests_held_at_one_a_second,
    ];
    let own = cases![[Need::Ublk]; f02_a_client_that_stops_and_then_deletes_succeeds_at_both];
    let ext4 = cases![[Need::Ublk, Need::Ext4]; f03_del_of_a_mounted_device_is_refused_and_names_the_mount_point];
    fio.into_iter().chain(rublk).chain(own).chain(ext4).collect()
}

/// Two busy devices of a group of 400 operations a second.
struct Pair {
    daemon: Daemon,
    victim: Device,
    neighbour: Device,
    victims_load: Fio,
    neighbours_load: Fio,
}

impl Pair {
    fn start(scene: &Scene) -> Result<Self> {
        let daemon = scene.start(
            "version: 1\n\
             groups:\n  g: { limits: { iops-total: 400 } }\n\
             devices:\n  victim: { backend: { null: 1GiB }, group: g, queues: 2 }\n  \
               neighbour: { backend: { null: 1GiB }, group: g }\n",
        )?;
        let (victim, neighbour) = (scene.device("victim")?, scene.device("neighbour")?);
        let neighbours_load = load(scene, READS, &neighbour)?;
        let victims_load = load(scene, WRITES, &victim)?;
        // 1.5 s to settle and 2.5 s to measure.
        sleep(Duration::from_millis(1500) + to_measure(Duration::from_millis(2500)));
        Ok(Self { daemon, victim, neighbour, victims_load, neighbours_load })
    }

    /// Checks the claims of the neighbour's job; `begin_ms` and `end_ms` bound the removal.
    fn expect_neighbour_unhurt(self, scene: &Scene, begin_ms: u64, end_ms: u64) -> Result<()> {
        let Self { daemon, neighbour, victims_load, neighbours_load, .. } = self;
        victims_load.finish_any(Duration::ZERO).context("the load of the removed device")?;
        // 0.5 s to settle and 3 s to measure.
        let measured_by_ms = end_ms + 3700;
        sleep(to_measure(Duration::from_millis(measured_by_ms.saturating_sub(now_ms()?))));
        neighbours_load.stop().context("the neighbour")?;
        let done = completions(scene, &neighbour)?;
        let (count, seconds) = done.in_all();
        let gap = done.longest_gap(begin_ms - 2500, end_ms + 3500);
        expect_all([
            expect_near("neighbour before", done.rate(begin_ms - 2500, begin_ms), 200.0, 0.04),
            expect_near("neighbour after", done.rate(end_ms + 500, end_ms + 3500), 400.0, 0.02),
            expect_limit_held("neighbour over all", count, 400.0, seconds, 32),
            expect_within("longest gap of the neighbour", gap, Duration::from_secs(1)),
        ])?;
        daemon.stop().map(drop)
    }
}

/// A device limited to 1 operation a second, and fio with 32 requests in flight, most of them held.
pub(crate) fn held_at_one_a_second(scene: &Scene) -> Result<(Daemon, Device, Fio)> {
    let daemon = scene.start(
        "version: 1\n\
         devices:\n  slow: { backend: { null: 1GiB }, limits: { iops-total: 1 } }\n",
    )?;
    let device = scene.device("slow")?;
    let fio = load(scene, WRITES, &device)?;
    Ok((daemon, device, fio))
}

/// Kills the daemon during a forced `del`, at several delays after the first step. At least one
/// kill has to hit the removal; otherwise the trial is unmeasured.
///
/// `check` receives the device, its load, the running command and the time of the kill.
pub(crate) fn kill_during_dels(
    scene: &Scene,
    times: Times,
    begin: impl Fn() -> Result<(Daemon, Device, Fio)>,
    check: impl Fn(Device, Fio, Started, Instant) -> Result<()>,
) -> Result<()> {
    let mut inside = 0;
    for delay in [20, 0, 50, 100, 200].into_iter().take(times.get()).map(Duration::from_millis) {
        let (mut daemon, device, fio) = begin()?;
        let del = scene.begin_ask(&["del", "--force", device.node()])?;
        daemon.wait_for_log(" state=stopping", REMOVAL_LIMIT)?;
        sleep(delay);
        let killed = Instant::now();
        daemon.signal(Signal::SIGKILL)?;
        daemon.wait_for_end(STOP_LIMIT)?;
        inside += usize::from(!daemon.log()?.contains(" state=gone"));
        check(device, fio, del, killed).with_context(|| format!("killed {delay:?} after the first step"))?;
    }
    eprintln!("          {inside} of {} kills were inside the removal", times.get());
    if inside > 0 { Ok(()) } else { bail!(Unmeasured::Missed("each removal had ended before the kill".into())) }
}

fn f01_forced_del_under_load_leaves_the_neighbour_unhurt(scene: &Scene) -> Result<()> {
    // 200 operations a second each; after the victim's removal 400 for the neighbour, without an
    // error or a gap.
    let pair = Pair::start(scene)?;
    let begin = now_ms()?;
    let del = scene.ask(&["del", "--force", "victim"])?.expect_code(0)?;
    let end = now_ms()?;
    expect_within("del", del.took, REMOVAL_LIMIT)?;
    ensure!(!pair.victim.node.exists(), "{} is still there after del", pair.victim.node());
    pair.expect_neighbour_unhurt(scene, begin, end)
}

fn f03_del_of_an_open_device_is_refused_and_names_the_process(scene: &Scene) -> Result<()> {
    // Exit 5 with fio's name while requests are held at 1 operation a second; the requests stay
    // held.
    let (daemon, device, mut fio) = held_at_one_a_second(scene)?;
    let refused = scene.ask(&["del", "slow"])?.expect_code(5)?.expect_stderr(&["error[E-BUSY]", "fio"])?;
    expect_within("the refusal", refused.took, REMOVAL_LIMIT)?;
    ensure!(device.node.exists() && fio.is_running()?, "a refused del has changed something");
    let held = sysfs::in_flight(&device.disk)?;
    ensure!(held >= 20, "{held} requests in flight after a refused del, 30 before it");
    daemon.stop()?;
    fio.finish_any(Duration::ZERO).map(drop)
}

fn f01_forced_del_lets_requests_held_at_one_a_second_go_at_once(scene: &Scene) -> Result<()> {
    // At the limit's rate, 30 held requests would take half a minute.
    let (daemon, device, fio) = held_at_one_a_second(scene)?;
    let del = scene.ask(&["del", "--force", device.node()])?.expect_code(0)?;
    expect_within("del", del.took, REMOVAL_LIMIT)?;
    fio.finish_any(Duration::ZERO)?;
    daemon.stop().map(drop)
}

fn f34_two_dels_of_one_device_at_once_both_get_an_answer(scene: &Scene) -> Result<()> {
    // The first `del` removes the device; the second joins (0) or is refused, as a removal is under
    // way (5).
    let (daemon, device, fio) = held_at_one_a_second(scene)?;
    let dels = [(); 2].map(|()| scene.begin_ask(&["del", "--force", "slow"]));
    let mut codes = Vec::new();
    for del in dels {
        codes.push(del?.finish(STOP_LIMIT)?.expect_no_panic()?.code);
    }
    ensure!(codes.contains(&Some(0)), "no del succeeded: {codes:?}");
    ensure!(codes.iter().all(|code| matches!(code, Some(0 | 5))), "exit codes {codes:?}, expected 0 or 5");
    ensure!(!device.node.exists(), "{} is still there", device.node());
    fio.finish_any(Duration::ZERO)?;
    daemon.stop().map(drop)
}

fn f10_sigterm_ends_a_daemon_that_holds_requests_at_one_a_second(scene: &Scene) -> Result<()> {
    // Exit 0 in bounded time with 30 requests held (R42 of QEMU's groups), and every request ends.
    let (daemon, _, fio) = held_at_one_a_second(scene)?;
    expect_within("SIGTERM to exit", daemon.stop()?, STOP_LIMIT)?;
    fio.finish_any(Duration::ZERO).map(drop)
}

fn f10_sigterm_ends_a_daemon_under_full_load(scene: &Scene) -> Result<()> {
    // Two devices without limits, under full load.
    let daemon = scene.start(
        "version: 1\n\
         devices:\n  a: { backend: { null: 1GiB }, queues: 2 }\n  b: { backend: { memory: 16MiB } }\n",
    )?;
    let mut loads = Vec::new();
    for name in ["a", "b"] {
        loads.push(load(scene, WRITES, &scene.device(name)?)?);
    }
    expect_within("SIGTERM to exit", daemon.stop()?, STOP_LIMIT)?;
    for load in loads {
        load.finish_any(Duration::ZERO)?;
    }
    Ok(())
}

fn f10_sigint_ends_the_daemon_as_sigterm_does(scene: &Scene) -> Result<()> {
    // SIGINT is the signal of ^C.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?;
    daemon.signal(Signal::SIGINT)?;
    daemon.expect_end(STOP_LIMIT)
}

fn f02_removal_by_another_client_under_load_leaves_the_neighbour_unhurt(scene: &Scene) -> Result<()> {
    // The claims of our own `del`, and besides: a warning in the log, and the id is free again.
    let pair = Pair::start(scene)?;
    let id = pair.victim.id.to_string();
    let begin = now_ms()?;
    let del = scene.begin_tool("rublk", &["del", "-n", &id])?.finish(STOP_LIMIT)?.expect_code(0)?;
    let end = now_ms()?;
    eprintln!("          rublk del: {:?}", del.took);
    pair.daemon.wait_for_log("W-REMOVED-EXTERNALLY", Duration::from_secs(2))?;
    ensure!(!pair.victim.node.exists(), "{} is still there after rublk del", pair.victim.node());
    expect_id_is_free(scene, &id)?;
    pair.expect_neighbour_unhurt(scene, begin, end)
}

fn f02_removal_by_another_client_does_not_wait_for_requests_held_at_one_a_second(scene: &Scene) -> Result<()> {
    // STOP waits for held requests: the daemon must notice the removal by itself and dispatch them.
    let (mut daemon, device, fio) = held_at_one_a_second(scene)?;
    let id = device.id.to_string();
    let del = scene.begin_tool("rublk", &["del", "-n", &id])?.finish(STOP_LIMIT)?.expect_code(0)?;
    eprintln!("          rublk del: {:?}", del.took);
    daemon.wait_for_log("W-REMOVED-EXTERNALLY", Duration::from_secs(2))?;
    fio.finish_any(Duration::ZERO)?;
    ensure!(daemon.is_running()?, "the daemon ended with its device:\n{}", daemon.log()?);
    expect_id_is_free(scene, &id)?;
    daemon.stop().map(drop)
}

fn f02_a_client_that_stops_and_then_deletes_succeeds_at_both(scene: &Scene) -> Result<()> {
    // For 1 s the daemon leaves DEL to the client that sent STOP; a client on a busy host sends it
    // within 300 ms. If the client sends no DEL within that second, the daemon does, and nothing is
    // left behind. Our own `del` does not wait for the client.
    let patient = Duration::from_millis(300);
    let never = Duration::from_secs(60);
    let daemon = scene.start(
        "version: 1\n\
         devices:\n  a: { backend: { null: 1MiB } }\n  b: { backend: { null: 1MiB } }\n  c: { backend: { null: 1MiB } }\n",
    )?;
    let [a, b, c] = ["a", "b", "c"].map(|name| scene.device(name));
    let (a, b, c) = (a?, b?, c?);
    foreign::begin_stop_and_delete(scene.dir(), a.id, patient)?.finish(STOP_LIMIT)?.expect_code(0)?;
    let begin = Instant::now();
    let stop_only = foreign::begin_stop_and_delete(scene.dir(), b.id, never)?;
    let is_deleted = |device: &Device| !Path::new("/sys/class/ublk-char").join(format!("ublkc{}", device.id)).exists();
    wait::until("DEL of b by the daemon", Duration::from_secs(10), || Ok(is_deleted(&b).then_some(())))?;
    expect_within("STOP to DEL by the daemon", begin.elapsed(), Duration::from_millis(1500))?;
    stop_only.signal(Signal::SIGKILL)?;
    let stop_only = foreign::begin_stop_and_delete(scene.dir(), c.id, never)?;
    daemon.wait_for_log("device=c state=draining", Duration::from_secs(2))?;
    let del = scene.ask(&["del", "c"])?.expect_code(0)?;
    expect_within("del of a stopped device", del.took, Duration::from_millis(500))?;
    ensure!(is_deleted(&c), "device c is still there after del");
    stop_only.signal(Signal::SIGKILL)?;
    daemon.stop().map(drop)
}

/// Fails unless rublk can take the id and give it back.
fn expect_id_is_free(scene: &Scene, id: &str) -> Result<()> {
    let begin = Instant::now();
    scene.tool("rublk", &["add", "null", "-n", id]).with_context(|| format!("id {id} is not free"))?;
    scene.remove_device_of_rublk(id)?;
    eprintln!("          id {id} taken and given back: {:?}", begin.elapsed());
    Ok(())
}

fn f03_del_of_a_mounted_device_is_refused_and_names_the_mount_point(scene: &Scene) -> Result<()> {
    // Exit 5, no change, and the file system still works. After the unmount `del` succeeds.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 32MiB } }\n")?;
    let device = scene.device("d")?;
    let mount = Mount::new(&device.node, &scene.dir().join("mount"))?;
    let point = mount.point().display().to_string();
    scene.ask(&["del", "d"])?.expect_code(5)?.expect_stderr(&["error[E-BUSY]", &point])?;
    let file = mount.point().join("file");
    fs::write(&file, "written after the refusal")?;
    fs::File::open(&file)?.sync_all()?;
    ensure!(device.node.exists(), "{} is gone after a refused del", device.node());
    mount.unmount()?;
    disks::fsck(&device.node)?;
    scene.ask(&["del", "d"])?.expect_code(0)?;
    ensure!(!device.node.exists(), "{} is still there after del", device.node());
    daemon.stop().map(drop)
}
