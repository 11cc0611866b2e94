//! The daemon is killed between any two of its steps; the next daemon finishes or undoes the
//! interrupted work.
//!
//! ```text
//!   for each point   a daemon that dies there ─► add, del, reload, recover ─► dies ─► a daemon that does not
//!                    every device of the configuration serves, with its data; every id has an owner; the log names
//!                    the device of the interrupted work
//! ```
//!
//! The build under test lists the points (`__crash-points`), so no point is left out.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ublk_throttle_tests::daemon::Daemon;
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::mode::Times;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::{Scene, crashing_binary};
use ublk_throttle_tests::wait;

use crate::{Case, cases};

/// Bound of an answer, and of the end of a daemon.
const LIMIT: Duration = Duration::from_secs(10);

pub(crate) fn cases() -> Vec<Case> {
    cases![[Need::Ublk];
        f05_an_add_killed_between_any_two_steps_is_finished_or_undone,
        f05_a_disk_started_after_its_daemon_died_is_made_anew,
        f05_a_removal_killed_between_any_two_steps_is_finished_or_undone,
        f05_a_reload_killed_between_any_two_steps_is_finished_or_undone,
        f06_a_recovery_killed_between_any_two_steps_and_then_at_another_ends_well,
    ]
    .into()
}

/// Names of the points of these kinds of work. A point in a helper counts twice: helper and daemon
/// die, or the daemon alone.
fn points(works: &[&str]) -> Result<Vec<String>> {
    let listed = Command::new(crashing_binary()?).arg("__crash-points").output()?;
    let mut points = Vec::new();
    for line in String::from_utf8(listed.stdout)?.lines() {
        let [name, work, place] = line.split(' ').collect::<Vec<_>>()[..] else { continue };
        if works.contains(&work) {
            points.push(name.to_owned());
            points.extend((place == "helper").then(|| format!("{name}/daemon")));
        }
    }
    ensure!(points.len() > 1 || works == ["Reloading"], "no points of {works:?}");
    Ok(points)
}

fn config(scene: &Scene, devices: &[&str], iops: u32) -> String {
    let mut text = format!("version: 1\ngroups: {{ g: {{ limits: {{ iops-total: {iops} }} }} }}\ndevices:\n");
    for name in devices {
        let path = scene.dir().join(format!("{name}.img"));
        text += &format!(
            "  {name}: {{ backend: {{ file: {}, size: 4MiB, create: true }}, group: g, queues: 2 }}\n",
            path.display()
        );
    }
    text
}

fn arm(scene: &Scene, point: &str) -> Result<()> {
    scene.write("crash", point).map(drop)
}

/// Starts a daemon with crash points and waits until it is ready.
fn ready(scene: &Scene, config: &str) -> Result<Daemon> {
    let daemon = scene.start_crashing(config)?;
    daemon.wait_for_log("ready", LIMIT)?;
    Ok(daemon)
}

/// Fails unless the daemon has been killed at the armed point.
fn died(mut daemon: Daemon, scene: &Scene, point: &str) -> Result<()> {
    let code = daemon.wait_for_end(LIMIT).with_context(|| format!("nothing came by {point}"))?;
    ensure!(
        code.is_none() && !scene.dir().join("crash").exists(),
        "{point}: it ended with {code:?}:\n{}",
        daemon.log()?
    );
    Ok(())
}

/// Writes the data that `ends_well` expects.
fn mark(scene: &Scene, name: &str) -> Result<()> {
    Ok(Direct::open(&scene.device(name)?.node)?.write(4096, 4096, 0x5a)?)
}

/// Starts the next daemon: it serves `served` with their data, its list has every ublk device of
/// the host, and its log names `half_done`. Then it stops, and nothing is left.
fn ends_well(scene: &Scene, config: &str, served: &[&str], half_done: &str) -> Result<()> {
    let daemon = scene.start(config)?;
    // A helper that outlived its daemon may still be removing a device.
    wait::until("every ublk device in the list", LIMIT, || Ok((ids()? == listed(scene)?).then_some(())))
        .with_context(|| format!("the kernel has {:?}, the list {:?}", ids(), listed(scene)))?;
    for name in served {
        wait::until(&format!("{name} live"), LIMIT, || Ok(is_live(scene, name)?.then_some(())))?;
        let direct = Direct::open(&scene.device(name)?.node)?;
        ensure!(direct.holds(4096, 4096, 0x5a)?, "{name} has lost its data");
        direct.write(8192, 4096, 0x11)?;
    }
    let log = daemon.log()?;
    ensure!(log.contains(&format!("device={half_done} ")), "no line about {half_done}:\n{log}");
    daemon.stop()?;
    scene.expect_nothing_left()?;
    let left: Vec<_> = fs::read_dir(scene.state_dir())?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|name| name.ends_with(".device.json"))
        .collect();
    ensure!(left.is_empty(), "state files of devices that are gone: {left:?}");
    ensure!(ids()?.is_empty(), "ids that are nobody's: {:?}", ids()?);
    Ok(())
}

fn ids() -> Result<BTreeSet<u64>> {
    let Ok(entries) = fs::read_dir("/sys/class/ublk-char") else { return Ok(BTreeSet::new()) };
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().to_string_lossy().strip_prefix("ublkc")?.parse().ok())
        .collect())
}

fn listed(scene: &Scene) -> Result<BTreeSet<u64>> {
    Ok(scene.devices()?.iter().filter_map(|device| device["id"].as_u64()).collect())
}

fn is_live(scene: &Scene, name: &str) -> Result<bool> {
    Ok(scene.devices()?.iter().any(|device| device["name"] == name && device["state"] == "live"))
}

/// Goes through the points, each with a new state directory.
fn at_each(scene: &Scene, points: &[String], mut go: impl FnMut(&str) -> Result<()>) -> Result<()> {
    let begin = Instant::now();
    for point in points {
        let _ = fs::remove_dir_all(scene.state_dir());
        go(point).with_context(|| format!("killed at {point}"))?;
    }
    eprintln!("          {} points, {:.1?} each", points.len(), begin.elapsed() / points.len() as u32);
    Ok(())
}

fn f05_an_add_killed_between_any_two_steps_is_finished_or_undone(scene: &Scene) -> Result<()> {
    // Depending on the step, the new device exists afterwards or not; it never exists in part.
    let text = config(scene, &["a"], 10_000);
    at_each(scene, &points(&["Making"])?, |point| {
        let daemon = ready(scene, &text)?;
        mark(scene, "a")?;
        arm(scene, point)?;
        let image = scene.dir().join("b.img");
        let add = scene.ask(&["add", "b", "--file", &image.display().to_string(), "--size", "4MiB", "--create"])?;
        died(daemon, scene, point)?;
        ensure!(add.code != Some(0), "answered, and then died");
        let half_done = if point == "state-beside" { "a" } else { "b" };
        ends_well(scene, &text, &["a"], half_done)
    })
}

/// Rounds with a START that ends after its daemon.
const LATE_STARTS: Times = Times { ci: 1, thorough: 3 };

fn f05_a_disk_started_after_its_daemon_died_is_made_anew(scene: &Scene) -> Result<()> {
    // The kernel had begun START, and made the disk only after the queues had gone. Linux 6.12 then
    // calls the disk live, never notices the dead server, and accepts no new one.
    let text = config(scene, &["a"], 10_000);
    let point = "helper-starting/late";
    for _ in 0..LATE_STARTS.get() {
        let _ = fs::remove_dir_all(scene.state_dir());
        arm(scene, point)?;
        died(scene.start_crashing(&text)?, scene, point)?;
        let daemon = scene.start(&text)?;
        mark(scene, "a")?;
        wait::until("every ublk device in the list", LIMIT, || Ok((ids()? == listed(scene)?).then_some(())))?;
        daemon.stop()?;
        scene.expect_nothing_left()?;
    }
    Ok(())
}

fn f05_a_removal_killed_between_any_two_steps_is_finished_or_undone(scene: &Scene) -> Result<()> {
    // The configuration contains both devices, so both exist afterwards: kept, or made anew on the
    // same file.
    let text = config(scene, &["a", "b"], 10_000);
    at_each(scene, &points(&["Removing"])?, |point| {
        let daemon = ready(scene, &text)?;
        mark(scene, "a")?;
        mark(scene, "b")?;
        arm(scene, point)?;
        scene.ask(&["del", "b"])?;
        died(daemon, scene, point)?;
        ends_well(scene, &text, &["a", "b"], "b")
    })
}

fn f05_a_reload_killed_between_any_two_steps_is_finished_or_undone(scene: &Scene) -> Result<()> {
    // The reload removes b, adds c and changes the limit of the group; the next daemon has the new
    // configuration.
    let (before, after) = (config(scene, &["a", "b"], 10_000), config(scene, &["a", "c"], 5_000));
    let points = points(&["Making", "Removing", "Reloading"])?;
    at_each(scene, &points, |point| {
        let daemon = ready(scene, &before)?;
        mark(scene, "a")?;
        let path = scene.write("after.yaml", &after)?;
        arm(scene, point)?;
        scene.ask(&["reload", path.to_str().context("path")?])?;
        died(daemon, scene, point)?;
        ends_well(scene, &after, &["a"], "c")
    })
}

fn f06_a_recovery_killed_between_any_two_steps_and_then_at_another_ends_well(scene: &Scene) -> Result<()> {
    // Two daemons are killed during recovery, at one point and at the next; the third daemon
    // serves.
    let text = config(scene, &["a", "b"], 10_000);
    let points = points(&["Recovering"])?;
    let mut second = points.iter().cycle().skip(1);
    at_each(scene, &points, |point| {
        let daemon = ready(scene, &text)?;
        mark(scene, "a")?;
        mark(scene, "b")?;
        daemon.kill(LIMIT)?;
        for point in [point, second.next().context("an endless cycle")?] {
            arm(scene, point)?;
            died(scene.start_crashing(&text)?, scene, point)?;
        }
        ends_well(scene, &text, &["a", "b"], "a")
    })
}
