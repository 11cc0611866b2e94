//! Removals wait neither for tokens, nor for a stalled backend, nor for processes that have the
//! device open.
//!
//! ```text
//!   dmsetup suspend   requests to the disk wait in the kernel, without a limit and without an error
//!   dmsetup resume    the kernel passes the waiting requests on
//! ```

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use ublk_throttle_tests::daemon::Daemon;
use ublk_throttle_tests::fio::Fio;
use ublk_throttle_tests::mapper::Mapped;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::{Device, Scene};
use ublk_throttle_tests::{sysfs, wait};

use crate::measure::{Unmeasured, expect_within};
use crate::{Case, WRITES, cases, has_zero_copy, let_run, load};

/// Bound of an answer, also while a backend is stalled.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Bound of a removal under full load.
const LOAD_LIMIT: Duration = Duration::from_secs(2);
/// Bound of a command without anything to wait for.
const AT_ONCE: Duration = Duration::from_secs(1);

pub(crate) fn cases() -> Vec<Case> {
    let fio = cases![[Need::Ublk, Need::Fio];
        removals_under_load_one_after_the_other_take_two_seconds_each,
        forced_removal_of_an_open_device_says_who_keeps_its_id,
    ];
    let stall = cases![[Need::Ublk, Need::Fio, Need::RamDisk, Need::Mapper];
        forced_removal_does_not_wait_for_a_backend_that_does_not_answer,
        removal_that_writes_back_to_a_stalled_backend_answers_and_goes_on,
        f69_del_waits_as_long_as_its_timeout_says,
        f71_a_removal_that_fails_gives_the_backend_its_time_back,
        removal_of_a_zero_copy_device_waits_for_a_stalled_backend_and_says_so,
        sigterm_takes_a_device_down_whose_backend_does_not_answer,
    ];
    let foreign = cases![[Need::Ublk, Need::Fio, Need::RamDisk, Need::Mapper, Need::Rublk];
        removal_by_another_client_does_not_wait_for_a_stalled_backend,
    ];
    fio.into_iter().chain(stall).chain(foreign).collect()
}

fn removals_under_load_one_after_the_other_take_two_seconds_each(scene: &Scene) -> Result<()> {
    // Six devices of one group. Each removal happens with 32 requests of the device in flight.
    let names: Vec<String> = (0..6).map(|number| format!("d{number}")).collect();
    let devices: String =
        names.iter().map(|name| format!("  {name}: {{ backend: {{ null: 1GiB }}, group: g }}\n")).collect();
    let daemon =
        scene.start(&format!("version: 1\ngroups:\n  g: {{ limits: {{ iops-total: 2000 }} }}\ndevices:\n{devices}"))?;
    let mut longest = Duration::ZERO;
    for name in &names {
        let device = scene.device(name)?;
        let fio = load(scene, WRITES, &device)?;
        let del = scene.ask(&["del", "--force", name])?.expect_code(0)?;
        longest = longest.max(del.took);
        fio.finish_any(ANSWER_LIMIT)?;
    }
    expect_within("longest del", longest, LOAD_LIMIT)?;
    daemon.stop().map(drop)
}

fn forced_removal_of_an_open_device_says_who_keeps_its_id(scene: &Scene) -> Result<()> {
    // A process has the device open, and nothing more. The disk goes; its id stays reserved for the
    // process, and the log names both.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 4MiB } }\n")?;
    let device = scene.device("d")?;
    let holder = fs::File::open(&device.node)?;
    let del = scene.ask(&["del", "--force", "d"])?.expect_code(0)?;
    expect_within("del", del.took, AT_ONCE)?;
    let note = format!("id {} stays reserved until it is closed: open by e2e", device.id);
    daemon.wait_for_log(&note, AT_ONCE)?;
    drop(holder);
    daemon.stop().map(drop)
}

/// A device with requests in flight on a suspended disk, and an independent device.
fn stalled(scene: &Scene, zero_copy: &str) -> Result<(Mapped, Daemon, Device, Fio)> {
    let disk = Mapped::on_ram(32)?;
    let daemon = scene.start(&stuck_and_other(&disk, zero_copy))?;
    let device = scene.device("stuck")?;
    let fio = load(scene, WRITES, &device)?;
    disk.suspend()?;
    let_run(1);
    ensure!(sysfs::in_flight(&device.disk)? >= 20, "the disk is suspended, and few requests are in flight");
    Ok((disk, daemon, device, fio))
}

fn stuck_and_other(disk: &Mapped, zero_copy: &str) -> String {
    format!(
        "version: 1\n\
         devices:\n  stuck: {{ backend: {{ block: {}, direct: true }}, zero-copy: {zero_copy} }}\n  \
         other: {{ backend: {{ memory: 4MiB }} }}\n",
        disk.node().display()
    )
}

/// Fails unless `list` and a read of the independent device take at most 1 s each.
fn others_are_served(scene: &Scene) -> Result<()> {
    expect_within("list meanwhile", scene.ask(&["list"])?.expect_code(0)?.took, AT_ONCE)?;
    let begin = Instant::now();
    fs::read(scene.device("other")?.node).context("reading the other device")?;
    expect_within("reading the other device meanwhile", begin.elapsed(), AT_ONCE)
}

fn forced_removal_does_not_wait_for_a_backend_that_does_not_answer(scene: &Scene) -> Result<()> {
    // Requests that the backend has had for 3 s end with EIO. The disk goes; the backend stays
    // locked until it has answered.
    let (disk, daemon, device, fio) = stalled(scene, "off")?;
    let del = scene.begin_ask(&["del", "--force", "stuck"])?;
    others_are_served(scene)?;
    let del = del.finish(ANSWER_LIMIT)?.expect_code(0)?;
    expect_within("del", del.took, ANSWER_LIMIT)?;
    ensure!(!device.node.exists(), "{} is still there", device.node());
    fio.finish_any(ANSWER_LIMIT)?;
    daemon.wait_for_log("W-BACKEND-STUCK", AT_ONCE)?;
    others_are_served(scene)?;
    disk.resume()?;
    daemon.wait_for_log("state=released", ANSWER_LIMIT)?;
    daemon.stop().map(drop)
}

fn removal_that_writes_back_to_a_stalled_backend_answers_and_goes_on(scene: &Scene) -> Result<()> {
    // `del` without `--force` does not give up dirty data: the answer names in time the wait for
    // the backend. A forced `del` that joins the removal does not wait.
    for force in [false, true] {
        let disk = Mapped::on_ram(32)?;
        let daemon = scene.start(&stuck_and_other(&disk, "off"))?;
        let device = scene.device("stuck")?;
        disk.suspend()?;
        // dd closes the device with dirty pages, and close waits for their write-back. No process
        // has the device open any more, but its dirty data could be lost.
        let to = format!("of={}", device.node());
        let writer = scene.begin_tool("dd", &["if=/dev/zero", &to, "bs=64k", "count=4", "conv=notrunc"])?;
        let_run(1);
        let told = scene.ask(&["del", "stuck"])?.expect_code(7)?;
        let told = told.expect_stderr(&["error[E-TIMEOUT]", "writing back: the backend does not answer"])?;
        expect_within("the answer", told.took, ANSWER_LIMIT)?;
        others_are_served(scene)?;
        if force {
            let del = scene.ask(&["del", "--force", "stuck"])?.expect_code(0)?;
            expect_within("the forced one that joins", del.took, ANSWER_LIMIT)?;
            del.expect_stderr(&["what was not written back is lost"])?;
            daemon.wait_for_log("W-UNWRITTEN", ANSWER_LIMIT)?;
        }
        disk.resume()?;
        wait::until("end of the device", ANSWER_LIMIT, || Ok((!device.node.exists()).then_some(())))?;
        writer.finish(ANSWER_LIMIT)?;
        daemon.stop()?;
    }
    Ok(())
}

fn f69_del_waits_as_long_as_its_timeout_says(scene: &Scene) -> Result<()> {
    // The limit is shorter (1 s) and longer (8 s) than the default of 4.5 s. Each answer names the
    // wait.
    let disk = Mapped::on_ram(32)?;
    let daemon = scene.start(&stuck_and_other(&disk, "off"))?;
    let device = scene.device("stuck")?;
    disk.suspend()?;
    let to = format!("of={}", device.node());
    let writer = scene.begin_tool("dd", &["if=/dev/zero", &to, "bs=64k", "count=4", "conv=notrunc"])?;
    let_run(1);
    for patience in [1, 8] {
        let limit = Duration::from_secs(patience);
        let told = scene.ask(&["del", "--timeout", &format!("{patience}s"), "stuck"])?.expect_code(7)?;
        let words = format!("is not gone after {patience}s: writing back: the backend does not answer");
        let told = told.expect_stderr(&["error[E-TIMEOUT]", &words])?;
        ensure!(told.took >= limit, "the answer came after {:?}, before {limit:?}", told.took);
        expect_within("the answer", told.took, limit + AT_ONCE)?;
    }
    // The backend answers during this `del`: it ends with 0, and the device is gone.
    let del = scene.begin_ask(&["del", "--timeout", "20s", "stuck"])?;
    let_run(6);
    disk.resume()?;
    del.finish(Duration::from_secs(20))?.expect_code(0)?;
    ensure!(!device.node.exists(), "{} is still there", device.node());
    writer.finish(ANSWER_LIMIT)?;
    daemon.stop().map(drop)
}

fn f71_a_removal_that_fails_gives_the_backend_its_time_back(scene: &Scene) -> Result<()> {
    // The helper dies before STOP, when the queues no longer wait for their backend. The device lives
    // on, and a write that stays at its backend for 6 s succeeds.
    let disk = Mapped::on_ram(32)?;
    let daemon = scene.start_crashing(&stuck_and_other(&disk, "off"))?;
    daemon.wait_for_log("ready", ANSWER_LIMIT)?;
    let device = scene.device("stuck")?;
    let crash = scene.write("crash", "helper-stopping/helper")?;
    let del = scene.ask(&["del", "stuck"])?;
    ensure!(del.code != Some(0) && !crash.exists(), "removed, or no helper died:\n{del}");
    disk.suspend()?;
    let to = format!("of={}", device.node());
    let writer = scene.begin_tool("dd", &["if=/dev/zero", &to, "bs=4k", "count=1", "oflag=direct", "conv=notrunc"])?;
    let_run(6);
    disk.resume()?;
    writer.finish(ANSWER_LIMIT)?.expect_code(0)?;
    daemon.stop().map(drop)
}

fn removal_of_a_zero_copy_device_waits_for_a_stalled_backend_and_says_so(scene: &Scene) -> Result<()> {
    // With zero copy the backend works on the client's own pages, which no kernel can take away
    // from it. The answer to `del` names in time the wait for the backend, the independent device
    // is served, and the removal ends as soon as the backend answers.
    if !has_zero_copy(scene)? {
        bail!(Unmeasured::Kernel("this kernel has no zero copy".into()));
    }
    let (disk, daemon, device, fio) = stalled(scene, "on")?;
    let told = scene.ask(&["del", "--force", "stuck"])?.expect_code(7)?;
    let told = told
        .expect_stderr(&["error[E-TIMEOUT]", "the kernel waits for the backend, which has the pages of the clients"])?;
    expect_within("the answer", told.took, ANSWER_LIMIT)?;
    others_are_served(scene)?;
    disk.resume()?;
    wait::until("end of the device", ANSWER_LIMIT, || Ok((!device.node.exists()).then_some(())))?;
    fio.finish_any(ANSWER_LIMIT)?;
    daemon.stop().map(drop)
}

fn sigterm_takes_a_device_down_whose_backend_does_not_answer(scene: &Scene) -> Result<()> {
    // The disk is gone in time. The process ends later, as it waits for the kernel, which still has
    // its requests.
    let (disk, daemon, device, fio) = stalled(scene, "off")?;
    let begin = Instant::now();
    daemon.signal(Signal::SIGTERM)?;
    wait::until("end of the disk", ANSWER_LIMIT, || Ok((!device.node.exists()).then_some(())))?;
    expect_within("end of the disk", begin.elapsed(), ANSWER_LIMIT)?;
    fio.finish_any(ANSWER_LIMIT)?;
    disk.resume()?;
    daemon.expect_end(ANSWER_LIMIT)
}

fn removal_by_another_client_does_not_wait_for_a_stalled_backend(scene: &Scene) -> Result<()> {
    // DEL by another client holds a lock of all ublk devices: it must end even if our backend never
    // answers.
    let (disk, daemon, device, fio) = stalled(scene, "off")?;
    let begin = Instant::now();
    let del = scene.begin_tool("rublk", &["del", "-n", &device.id.to_string()])?;
    daemon.wait_for_log("W-REMOVED-EXTERNALLY", Duration::from_secs(2))?;
    eprintln!("          noticed: {:?}", begin.elapsed());
    let del = del.finish(ANSWER_LIMIT)?;
    expect_within("rublk del", del.took, ANSWER_LIMIT)?;
    fio.finish_any(ANSWER_LIMIT)?;
    others_are_served(scene)?;
    disk.resume()?;
    daemon.wait_for_log("state=released", ANSWER_LIMIT)?;
    daemon.stop().map(drop)
}
