//! Helper processes that give no answer: they are stopped (SIGSTOP) before, during or after their step.
//!
//! ```text
//!   del, SIGTERM    in-use check, write-back, STOP, DEL     E-TIMEOUT with the step; the removal goes on with the helper
//!   add             ADD                                     refused after 30 s; a device that is added later is deleted
//!   add, recovery   START, END_RECOVERY                     killed after 30 s: undone, or tried again
//!   set size        UPDATE_SIZE                             killed after 4 s; the reported size is that of the disk
//! ```
//!
//! A helper that waits in the kernel looks the same to the daemon.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ublk_target::ublk::control::{Control, NewDevice};
use ublk_target::ublk::{Owner, Transfer};
use ublk_throttle_tests::daemon::Daemon;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::{sysfs, wait};

use crate::helpers::{
    ANSWER_LIMIT, IOPS, REMOVING, config, ends, expect_gone, expect_limited, expect_nothing_left, ids, ready, state,
};
use crate::measure::expect_in_time;
use crate::{Case, cases, has_feature};

/// The daemon waits 30 s for ADD, START or END_RECOVERY.
const STARTED_LIMIT: Duration = Duration::from_secs(30).saturating_add(ANSWER_LIMIT);
/// Time to sleep before the first `list`. It ends within these 30 s, even after the 10 s of an add.
/// Each `list` is a process that the host has to emulate.
const MOST_OF_IT: Duration = Duration::from_secs(18);

pub(crate) fn cases() -> Vec<Case> {
    cases![[Need::Ublk];
        f97_a_removal_whose_helper_is_silent_is_answered_and_goes_on_with_it,
        f97_a_forced_removal_does_not_wait_for_the_silent_helper_of_another,
        f97_a_reload_whose_helper_is_silent_is_answered_and_goes_on_with_it,
        f97_a_daemon_that_ends_says_what_it_waits_for,
        f97_an_add_whose_helper_is_silent_is_undone,
        f97_a_recovery_whose_helper_is_silent_is_tried_again,
        f97_a_resize_whose_helper_is_silent_tells_the_size_that_the_disk_has,
        f98_an_add_that_does_not_return_is_refused_and_leaves_nothing,
        f98_a_start_whose_add_does_not_return_ends_and_leaves_nothing,
        f98_a_start_waits_for_an_id_that_the_helper_of_a_dead_daemon_deletes,
    ]
    .into()
}

/// The next helper that comes to this crash point stops.
fn arm(scene: &Scene, point: &str) -> Result<()> {
    scene.write("crash", &format!("{point}/stop")).map(drop)
}

/// The helper of the daemon that has stopped.
fn stopped_helper(daemon: &Daemon) -> Result<Pid> {
    let parent = daemon.pid().to_string();
    wait::until("a helper that is stopped", ANSWER_LIMIT, || {
        let stopped = fs::read_dir("/proc")?.flatten().find_map(|entry| {
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // `12 (name) T 1 …`: pid, name, state, parent.
            let (_, fields) = stat.rsplit_once(") ")?;
            let is_ours = fields.split(' ').take(2).eq(["T", parent.as_str()]);
            is_ours.then(|| entry.file_name().to_str()?.parse().ok()).flatten()
        });
        Ok(stopped.map(Pid::from_raw))
    })
}

fn add(scene: &Scene, name: &str) -> Result<()> {
    let limit = format!("iops-total={IOPS}");
    scene.ask(&["add", name, "--null", "4MiB", "--limit", &limit])?.expect_code(0).map(drop)
}

fn f97_a_removal_whose_helper_is_silent_is_answered_and_goes_on_with_it(scene: &Scene) -> Result<()> {
    let daemon = ready(scene, &config(scene, &["n"]))?;
    for force in [&[][..], &["--force"]] {
        for point in REMOVING {
            add(scene, "a").with_context(|| format!("before {point}"))?;
            arm(scene, point)?;
            let del = scene.ask(&[&["del", "a"], force].concat())?.expect_code(7)?.expect_stderr(&["E-TIMEOUT"])?;
            expect_in_time(format!("del with a silent helper at {point}"), del.took, ANSWER_LIMIT)?;
            let helper = stopped_helper(&daemon)?;
            expect_limited(scene, "n")?;
            if point == "helper-claiming" {
                expect_limited(scene, "a").context("before the drain")?;
            }
            kill(helper, Signal::SIGCONT)?;
            expect_gone(scene, "a").with_context(|| point.to_owned())?;
        }
    }
    ends(scene, daemon)
}

fn f97_a_forced_removal_does_not_wait_for_the_silent_helper_of_another(scene: &Scene) -> Result<()> {
    let daemon = ready(scene, &config(scene, &["a", "n"]))?;
    arm(scene, "helper-claiming")?;
    scene.ask(&["del", "a"])?.expect_code(7)?;
    scene.ask(&["del", "a", "--force"])?.expect_code(0)?;
    expect_gone(scene, "a")?;
    expect_limited(scene, "n")?;
    ends(scene, daemon)
}

fn f97_a_reload_whose_helper_is_silent_is_answered_and_goes_on_with_it(scene: &Scene) -> Result<()> {
    // The reload adds `c`, then removes `a`; `n` stays. Without `c` nothing is removed.
    let (before, after) = (config(scene, &["a", "n"]), config(scene, &["n", "c"]));
    let path = scene.write("after.yaml", &after)?;
    let path = path.to_str().context("path")?;
    for point in ["helper-claiming", "helper-stopping", "helper-adding", "helper-starting"] {
        let daemon = ready(scene, &before)?;
        arm(scene, point)?;
        let reload = scene.ask(&["reload", path])?.expect_code(7)?.expect_stderr(&["E-TIMEOUT"])?;
        expect_in_time(format!("reload with a silent helper at {point}"), reload.took, ANSWER_LIMIT * 2)?;
        expect_limited(scene, "n").with_context(|| point.to_owned())?;
        kill(stopped_helper(&daemon)?, Signal::SIGCONT)?;
        let is_removal_silent = ["helper-claiming", "helper-stopping"].contains(&point);
        if is_removal_silent {
            expect_gone(scene, "a").with_context(|| point.to_owned())?;
        }
        // A start that the reload did not wait for is undone. The device may be live for an instant before
        // its removal.
        let end = if is_removal_silent { Some("live") } else { None };
        wait::until("end of the start of c", ANSWER_LIMIT, || Ok((state(scene, "c")?.as_deref() == end).then_some(())))
            .with_context(|| format!("{point}:\n{}", scene.logs()))?;
        scene.ask(&["reload", path])?.expect_code(0).with_context(|| point.to_owned())?;
        expect_gone(scene, "a").with_context(|| point.to_owned())?;
        for name in ["n", "c"] {
            expect_limited(scene, name).with_context(|| format!("after {point}"))?;
        }
        ends(scene, daemon).with_context(|| point.to_owned())?;
    }
    Ok(())
}

fn f97_a_daemon_that_ends_says_what_it_waits_for(scene: &Scene) -> Result<()> {
    // A dead helper is replaced, a silent one is waited for: its STOP may be in the kernel. One
    // point for each of the waits.
    for point in ["helper-claiming", "helper-writing", "helper-stopping", "helper-deleting"] {
        let mut daemon = ready(scene, &config(scene, &["a"]))?;
        arm(scene, point)?;
        daemon.signal(Signal::SIGTERM)?;
        let helper = stopped_helper(&daemon)?;
        daemon.wait_for_log("W-SLOW", ANSWER_LIMIT * 2).with_context(|| point.to_owned())?;
        ensure!(daemon.is_running()?, "{point}: it did not wait:\n{}", daemon.log()?);
        kill(helper, Signal::SIGKILL)?;
        daemon.expect_end(ANSWER_LIMIT).with_context(|| point.to_owned())?;
        expect_nothing_left(scene).with_context(|| point.to_owned())?;
    }
    Ok(())
}

fn f97_an_add_whose_helper_is_silent_is_undone(scene: &Scene) -> Result<()> {
    let daemon = ready(scene, &config(scene, &["n"]))?;
    for point in ["helper-starting", "helper-started"] {
        arm(scene, point)?;
        // The answer comes after 10 s, and the end of the device after 30 s.
        scene.ask(&["add", "x", "--null", "64MiB"])?.expect_code(7)?.expect_stderr(&["E-TIMEOUT"])?;
        expect_limited(scene, "n")?;
        sleep(MOST_OF_IT);
        wait::until("end of x", STARTED_LIMIT, || Ok(state(scene, "x")?.is_none().then_some(())))
            .with_context(|| format!("{point}:\n{}", scene.logs()))?;
        ensure!(ids() == 1, "{point}: the kernel has {} devices", ids());
        add(scene, "x").with_context(|| format!("after {point}"))?;
        scene.ask(&["del", "x"])?.expect_code(0)?;
    }
    ends(scene, daemon)
}

fn f97_a_recovery_whose_helper_is_silent_is_tried_again(scene: &Scene) -> Result<()> {
    let text = config(scene, &["a", "n"]);
    for (point, takes_over) in [("helper-recovering", false), ("helper-recovered", false), ("helper-recovering", true)]
    {
        let old = ready(scene, &text)?;
        let daemon = if takes_over {
            arm(scene, point)?;
            let new = scene.start_crashing_with(&["--takeover"], &text)?;
            old.expect_end(ANSWER_LIMIT)?;
            new
        } else {
            old.kill(ANSWER_LIMIT)?;
            arm(scene, point)?;
            scene.start_crashing(&text)?
        };
        stopped_helper(&daemon)?;
        wait::until("an answer", ANSWER_LIMIT, || Ok(scene.listing().ok().map(drop)))?;
        sleep(MOST_OF_IT);
        for name in ["a", "n"] {
            wait::until(name, STARTED_LIMIT, || Ok((state(scene, name)?.as_deref() == Some("live")).then_some(())))
                .with_context(|| format!("{point}:\n{}", scene.logs()))?;
            expect_limited(scene, name)?;
        }
        ends(scene, daemon).with_context(|| point.to_owned())?;
    }
    Ok(())
}

fn f97_a_resize_whose_helper_is_silent_tells_the_size_that_the_disk_has(scene: &Scene) -> Result<()> {
    // On a kernel without UPDATE_SIZE no resize is tried.
    let daemon = ready(scene, &config(scene, &["a"]))?;
    let points = if has_feature(scene, "UPDATE_SIZE")? { &["helper-resizing", "helper-resized"][..] } else { &[] };
    let disk = scene.device("a")?.disk;
    for (point, mib) in points.iter().zip([8, 12]) {
        arm(scene, point)?;
        let set = scene.ask(&["set", "device", "a", &format!("size={mib}MiB")])?;
        expect_in_time(format!("a resize with a silent helper at {point}"), set.took, ANSWER_LIMIT)?;
        let size = sysfs::number(&disk, "size")? * 512;
        ensure!(scene.listed("a")?["size"] == size, "{point}: the disk has {size}: {}", scene.listed("a")?);
        ensure!((set.code == Some(0)) == (size == mib << 20), "{point}: the disk has {size}:\n{set}");
        expect_limited(scene, "a")?;
    }
    ends(scene, daemon)
}

fn f98_an_add_that_does_not_return_is_refused_and_leaves_nothing(scene: &Scene) -> Result<()> {
    // Before ADD the helper stands for an ADD that never returns; after ADD, for one that returns late.
    let daemon = ready(scene, &config(scene, &["n"]))?;
    for point in ["helper-adding", "helper-added"] {
        arm(scene, point)?;
        scene.ask(&["add", "x", "--null", "64MiB"])?.expect_code(7)?.expect_stderr(&["E-TIMEOUT"])?;
        let helper = stopped_helper(&daemon)?;
        expect_limited(scene, "n")?;
        sleep(MOST_OF_IT);
        wait::until("end of x", STARTED_LIMIT, || Ok(state(scene, "x")?.is_none().then_some(())))
            .with_context(|| format!("{point}:\n{}", scene.logs()))?;
        daemon.wait_for_log("ADD has not returned within 30s", ANSWER_LIMIT).with_context(|| point.to_owned())?;
        add(scene, "x").with_context(|| format!("beside an ADD without an end, {point}"))?;
        kill(helper, Signal::SIGCONT)?;
        wait::until("one id for each device", ANSWER_LIMIT, || Ok((ids() == 2).then_some(())))
            .with_context(|| format!("{point}: {} ids", ids()))?;
        sleep(ANSWER_LIMIT / 2);
        ensure!(ids() == 2, "{point}: the kernel has {} devices, and not n and x", ids());
        expect_limited(scene, "x").with_context(|| format!("after {point}"))?;
        scene.ask(&["del", "x"])?.expect_code(0)?;
    }
    ends(scene, daemon)
}

fn f98_a_start_whose_add_does_not_return_ends_and_leaves_nothing(scene: &Scene) -> Result<()> {
    for point in ["helper-adding", "helper-added"] {
        arm(scene, point)?;
        let mut daemon = scene.start_crashing(&config(scene, &["a"]))?;
        let helper = stopped_helper(&daemon)?;
        let code = daemon.wait_for_end(STARTED_LIMIT).with_context(|| format!("{point}:\n{}", scene.logs()))?;
        ensure!(code.is_some_and(|code| code != 0), "{point}: it ended with {code:?}:\n{}", daemon.log()?);
        // Fails if the helper has ended: the kernel continues it when its daemon ends.
        let _ = kill(helper, Signal::SIGCONT);
        expect_nothing_left(scene).with_context(|| point.to_owned())?;
    }
    Ok(())
}

fn f98_a_start_waits_for_an_id_that_the_helper_of_a_dead_daemon_deletes(scene: &Scene) -> Result<()> {
    // The daemon has died during ADD, and the trial stands for its helper.
    const ID: u32 = 7;
    let mut control = Control::open()?;
    let device =
        NewDevice { queues: 1, depth: 8, request_bytes_max: 1 << 19, is_recoverable: true, transfer: Transfer::Copied };
    control.add(Some(ID), Owner::ours(1), std::process::id(), &device)?;
    let next = scene.start_without_waiting("version: 1\ndevices:\n  d: { backend: { null: 4MiB }, id: 7 }\n")?;
    next.wait_for_log("W-UNKNOWN-DEVICE", ANSWER_LIMIT)?;
    sleep(Duration::from_millis(200));
    control.stop(ID)?;
    control.delete(ID)?;
    next.wait_for_log("ready", ANSWER_LIMIT)?;
    ensure!(scene.device("d")?.id == ID, "another id");
    ends(scene, next)
}
