//! Every command, beside a device in a state that has blocked comparable software: no command waits for
//! that device.

use std::fs::{self, File};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ublk_throttle_tests::daemon::Daemon;
use ublk_throttle_tests::disks::Mount;
use ublk_throttle_tests::mapper::Mapped;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::wait;

use crate::measure::{expect_all, expect_in_time, expect_within};
use crate::{WRITES, load};

/// Bound of the answer to every command, in any state of a device.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Sends every command to a daemon with a group `g`, a device `d` in the given state and an idle
/// device. `del d` may end with 5 or 7 (timeout); all remaining commands must end with 0.
fn ask_everything(scene: &Scene, state: &str) -> Result<()> {
    let commands: [&[&str]; 12] = [
        &["list"],
        &["stats"],
        &["add", "new", "--memory", "1MiB", "--group", "g"],
        &["set", "group", "g", "iops-total=2000"],
        &["set", "device", "d", "weight=200"],
        &["set", "device", "other", "group=g"],
        &["set", "device", "other", "group=none"],
        &["reload", "--dry-run"],
        &["reload"],
        &["del", "new"],
        &["del", "d"],
        &["list", "--json"],
    ];
    let mut worst = (Duration::ZERO, String::new());
    let mut checks = Vec::new();
    for words in commands {
        let outcome = scene.ask(words)?;
        let wanted = if words == ["del", "d"] { [5, 7] } else { [0, 0] };
        ensure!(outcome.code.is_some_and(|code| wanted.contains(&code)), "{state}:\n{outcome}");
        checks.push(expect_in_time(format!("{state}: {words:?}"), outcome.took, ANSWER_LIMIT));
        worst = worst.max((outcome.took, words.join(" ")));
    }
    eprintln!("          {state}: at most {:?} ({})", worst.0, worst.1);
    expect_all(checks)
}

/// Removes `d` by force, in any state.
fn del_force(scene: &Scene, state: &str) -> Result<()> {
    let del = scene.ask(&["del", "d", "--force"])?;
    ensure!(matches!(del.code, Some(0 | 7)), "{state}:\n{del}");
    expect_within(format!("{state}: del --force (exit {:?})", del.code), del.took, ANSWER_LIMIT)
}

/// A group, a device `d` with this backend, and a device without load. Data is copied: with zero
/// copy a forced removal waits for the backend, which has the pages of the clients.
fn with_device(scene: &Scene, backend: &str) -> Result<Daemon> {
    scene.start(&format!(
        "version: 1\n\
         groups:\n  g: {{ limits: {{ iops-total: 1000 }} }}\n\
         devices:\n  d: {{ backend: {{ {backend} }}, queues: 2, zero-copy: off }}\n  other: {{ backend: {{ null: 1MiB }} }}\n"
    ))
}

pub(super) fn every_command_answers_in_five_seconds_while_a_device_is_mounted_or_open(scene: &Scene) -> Result<()> {
    // `del` of a device in use is refused with 5 at once; `del --force` removes it.
    let daemon = with_device(scene, "memory: 32MiB")?;
    let node = scene.device("d")?.node;
    let open = File::open(&node)?;
    ask_everything(scene, "open")?;
    drop(open);
    let mount = Mount::new(&node, &scene.dir().join("mount"))?;
    ask_everything(scene, "mounted")?;
    fs::write(mount.point().join("file"), [0xa5; 1 << 20])?;
    del_force(scene, "mounted")?;
    scene.tool("umount", &[&mount.point().display().to_string()])?;
    daemon.stop().map(drop)
}

pub(super) fn every_command_answers_in_five_seconds_while_queues_are_busy(scene: &Scene) -> Result<()> {
    // 32 requests in flight without a limit keep both queue threads busy.
    let daemon = with_device(scene, "null: 1GiB")?;
    let load = load(scene, WRITES, &scene.device("d")?)?;
    ask_everything(scene, "busy")?;
    del_force(scene, "busy")?;
    load.finish_any(Duration::ZERO)?;
    daemon.stop().map(drop)
}

pub(super) fn every_command_answers_in_five_seconds_while_a_backend_is_stalled_for_a_minute(
    scene: &Scene,
) -> Result<()> {
    // 32 requests wait for a stalled backend. All commands are answered, and `del --force` removes
    // the device without the backend's answer. Once the backend answers again, a new device can use
    // it.
    let mapped = Mapped::on_ram(16)?;
    let backend = format!("block: {}, direct: true", mapped.node().display());
    let daemon = with_device(scene, &backend)?;
    let device = scene.device("d")?;
    mapped.suspend()?;
    let begin = Instant::now();
    let load = load(scene, WRITES, &device)?;
    ask_everything(scene, "stalled")?;
    sleep(Duration::from_secs(50).saturating_sub(begin.elapsed()));
    ask_everything(scene, "stalled for 50 s")?;
    del_force(scene, "stalled")?;
    load.finish_any(Duration::ZERO).context("the load of a device without an answer")?;
    wait::until("end of the device", Duration::from_secs(5), || Ok((!device.node.exists()).then_some(())))?;
    scene.ask(&["list"])?.expect_code(0)?;
    sleep(Duration::from_secs(60).saturating_sub(begin.elapsed()));
    mapped.resume()?;
    let words = ["add", "again", "--block", mapped.node().to_str().context("node")?];
    wait::until("the backend free again", Duration::from_secs(5), || {
        Ok((scene.ask(&words)?.code == Some(0)).then_some(()))
    })?;
    daemon.stop().map(drop)
}
