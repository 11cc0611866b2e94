//! A write that a daemon has passed to its backend ends before the next daemon serves the device.
//!
//! ```text
//!   client        W1 ──────────────────────────────────────────► success    W2 ─► success
//!   old daemon    W1 ─► backend     its end
//!   backend             ══════════ W1 takes 3 s ══════► on the disk
//!   new daemon                      start ┄┄ waits ┄┄┄┄► serves: W1 once more, then W2
//! ```
//!
//! If the new daemon served earlier, the old W1 could still reach the disk after W2.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ublk_throttle_tests::daemon::Daemon;
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::mapper::{Mapped, Target};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::{sysfs, wait};

use crate::{Case, cases};

/// The time that the backend takes for each request.
const LATE: Duration = Duration::from_secs(3);
/// Bound of every wait: the write of the old daemon, its end, and the start of the new one.
const LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn cases() -> Vec<Case> {
    cases![[Need::Ublk, Need::RamDisk, Need::Mapper];
        f96_a_write_of_a_killed_daemon_ends_before_the_next_one_serves,
        f96_a_write_of_a_stopped_daemon_ends_before_the_next_one_serves,
        f96_a_write_of_a_replaced_daemon_ends_before_the_next_one_serves,
    ]
    .into()
}

fn f96_a_write_of_a_killed_daemon_ends_before_the_next_one_serves(scene: &Scene) -> Result<()> {
    for zero_copy in ["off", "auto"] {
        write_ends_before_the_next_serves(scene, zero_copy, |daemon, config| {
            daemon.kill(LIMIT)?;
            scene.start(config)
        })?;
    }
    Ok(())
}

fn f96_a_write_of_a_stopped_daemon_ends_before_the_next_one_serves(scene: &Scene) -> Result<()> {
    write_ends_before_the_next_serves(scene, "auto", |daemon, config| {
        daemon.stop()?;
        scene.start(config)
    })
}

fn f96_a_write_of_a_replaced_daemon_ends_before_the_next_one_serves(scene: &Scene) -> Result<()> {
    write_ends_before_the_next_serves(scene, "auto", |daemon, config| {
        let new = scene.take_over(config)?;
        daemon.expect_end(LIMIT)?;
        Ok(new)
    })
}

/// `replace` ends the old daemon while a write is in the backend, and returns the new one.
fn write_ends_before_the_next_serves(
    scene: &Scene,
    zero_copy: &str,
    replace: impl FnOnce(Daemon, &str) -> Result<Daemon>,
) -> Result<()> {
    let disk = Mapped::on_ram(32)?;
    let config = format!(
        "version: 1\n\
         devices:\n  d: {{ backend: {{ block: {}, direct: true }}, zero-copy: {zero_copy}, on-stop: keep }}\n",
        disk.node().display()
    );
    let old = scene.start(&config)?;
    let device = scene.device("d")?;
    let client = Arc::new(Direct::open(&device.node)?);
    let below = Direct::open(disk.below())?;
    disk.become_all(Target::Delay(LATE))?;
    // Not a scoped thread: if the trial fails, the write ends only when the scene removes the device.
    let write = thread::spawn({
        let client = Arc::clone(&client);
        move || client.write(0, 4096, 0x11)
    });
    wait::until("the write", LIMIT, || Ok((sysfs::in_flight(&device.disk)? > 0).then_some(())))?;
    // From the block layer to the backend: microseconds.
    thread::sleep(LATE / 6);
    ensure!(!below.holds(0, 4096, 0x11)?, "the backend takes {LATE:?} for a write, and it is there at once");
    let new = replace(old, &config)?;
    new.wait_for_log("device=d state=recovered", LIMIT)?;
    // The new daemon's own W1 is still about 3 s away.
    ensure!(below.holds(0, 4096, 0x11)?, "zero-copy {zero_copy}: served before the write of the old daemon ended");
    write.join().expect("no panic").context("the write")?;
    client.write(0, 4096, 0x22).context("the later write")?;
    disk.become_all(Target::Linear)?;
    ensure!(below.holds(0, 4096, 0x22)?, "zero-copy {zero_copy}: the later write was overwritten");
    drop(client);
    scene.ask(&["del", "d"])?.expect_code(0)?;
    new.stop().map(drop)
}
