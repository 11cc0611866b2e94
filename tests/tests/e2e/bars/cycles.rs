//! Devices that are added and removed repeatedly leave nothing behind.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;
use ublk_throttle_tests::mode::Times;
use ublk_throttle_tests::process::Holdings;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::{sysfs, wait};

/// Devices added and removed. A leak of a descriptor, thread, node or id shows with the first
/// device. A leak of memory shows from 1 MiB / 500 = 2 KiB a device in a thorough run, from 17 KiB
/// in a usual run.
const CYCLES: Times = Times { ci: 60, thorough: 500 };

pub(super) fn devices_come_and_go_and_leave_nothing(scene: &Scene) -> Result<()> {
    // After 20 devices to warm up, four clients at once: no more descriptors, threads, nodes or ids
    // than before, and at most 1 MiB more memory.
    let daemon = scene.start("version: 1\ngroups:\n  g: { limits: { iops-total: 1000 } }\ndevices: {}\n")?;
    let cycles = |count: usize| -> Result<()> {
        thread::scope(|scope| {
            let clients: Vec<_> =
                (0..4).map(|client| scope.spawn(move || come_and_go(scene, client, count / 4))).collect();
            clients.into_iter().try_for_each(|client| client.join().map_err(|_| anyhow!("a client panicked"))?)
        })
    };
    let held = || -> Result<(Holdings, BTreeSet<String>)> {
        let ids =
            fs::read_dir("/sys/class/ublk-char")?.flatten().map(|id| id.file_name().to_string_lossy().into_owned());
        Ok((Holdings::of(daemon.pid())?, ids.collect()))
    };
    cycles(20)?;
    let (before, ids_before) = held()?;
    let nodes_before = sysfs::ublk_nodes();
    let begin = Instant::now();
    cycles(CYCLES.get())?;
    let took = begin.elapsed();
    // The last threads end a moment after the answers of their devices.
    let settled = wait::until("descriptors and threads back", Duration::from_secs(5), || {
        let (now, _) = held()?;
        Ok((now.descriptors <= before.descriptors && now.threads <= before.threads).then_some(now))
    });
    let (after, ids_after) = held()?;
    eprintln!("          {} cycles in {took:?}: {before:?} before, {after:?} after", CYCLES.get());
    settled.with_context(|| format!("{before:?} before, {after:?} after"))?;
    ensure!(sysfs::ublk_nodes() == nodes_before && ids_after == ids_before, "left: {ids_after:?} of {ids_before:?}");
    let state: Vec<_> = fs::read_dir(scene.state_dir())?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(!state.iter().any(|name| name.to_string_lossy().contains("device")), "state files left: {state:?}");
    let grown = after.rss_kib.saturating_sub(before.rss_kib);
    ensure!(grown <= 1024, "devices that are gone hold {grown} KiB");
    daemon.stop().map(drop)
}

/// Adds and removes a device of this client `count` times.
fn come_and_go(scene: &Scene, client: usize, count: usize) -> Result<()> {
    let name = format!("d{client}");
    let limit = Duration::from_secs(10);
    let mut connection = scene.connect()?;
    for number in 0..count {
        let kind = if number % 2 == 0 { "null" } else { "memory" };
        let add = json!({"cmd": "add", "device": name, "settings": {kind: "1MiB", "group": "g"}});
        connection.must(&add, limit).with_context(|| format!("number {number}"))?;
        connection.must(&json!({"cmd": "del", "device": name}), limit).with_context(|| format!("number {number}"))?;
    }
    Ok(())
}
