//! Limits that several devices or queues share.

use std::time::Duration;

use anyhow::{Result, ensure};
use ublk_throttle_tests::fio::Job;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::sysfs;

use crate::measure::{expect_all, expect_limit_held, expect_near, reads_during};
use crate::{Case, cases};

const RUNTIME: Duration = Duration::from_secs(10);

pub(crate) fn cases() -> Vec<Case> {
    let any = cases![[Need::Ublk, Need::Fio];
        two_devices_share_their_groups_limit_half_and_half,
        device_in_a_group_keeps_its_own_limit_and_the_rest_goes_to_the_other,
    ];
    let two_cpus = cases![[Need::Ublk, Need::Fio, Need::TwoCpus]; two_queues_of_a_device_share_its_limit];
    any.into_iter().chain(two_cpus).collect()
}

fn two_devices_share_their_groups_limit_half_and_half(scene: &Scene) -> Result<()> {
    // Both devices hold requests all the time, so the turn alternates.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { iops-total: 1000 } }\n\
         devices:\n  a: { backend: { null: 1GiB }, group: g }\n  b: { backend: { null: 1GiB }, group: g }\n",
    )?;
    let job = Job::new("two-devices-share-one-limit")
        .set("DEVICE_A", scene.device("a")?.node())
        .set("DEVICE_B", scene.device("b")?.node());
    let report = scene.fio(job)?.finish(RUNTIME)?;
    let (a, b) = (report.job("a")?.iops(4096), report.job("b")?.iops(4096));
    expect_all([
        expect_near("sum", a + b, 1000.0, 0.01),
        expect_near("device a", a, 500.0, 0.04),
        expect_near("device b", b, 500.0, 0.04),
    ])?;
    daemon.stop().map(drop)
}

fn two_queues_of_a_device_share_its_limit(scene: &Scene) -> Result<()> {
    // Held requests of both queues wait in one member's order; each queue's thread is woken for its
    // own requests.
    let daemon = scene.start(
        "version: 1\n\
         devices:\n  d: { backend: { null: 1GiB }, queues: 2, limits: { iops-total: 1000 } }\n",
    )?;
    let device = scene.device("d")?;
    let queues = sysfs::queue_cpus(&device.disk)?;
    ensure!(queues.len() == 2, "{} has {} queues", device.disk, queues.len());
    let job = Job::new("two-queues-share-one-limit")
        .set("DEVICE", device.node())
        .set("CPU_A", queues[0][0])
        .set("CPU_B", queues[1][0]);
    let (report, spell) = reads_during(&[&device.disk], || scene.fio(job)?.finish(RUNTIME))?;
    let (a, b) = (report.job("queue-a")?.iops(4096), report.job("queue-b")?.iops(4096));
    expect_all([
        expect_near("sum", a + b, 1000.0, 0.01),
        expect_near("queue a", a, 500.0, 0.1),
        expect_near("queue b", b, 500.0, 0.1),
        expect_limit_held("both", spell.reads, 1000.0, spell.seconds, 0),
    ])?;
    daemon.stop().map(drop)
}

fn device_in_a_group_keeps_its_own_limit_and_the_rest_goes_to_the_other(scene: &Scene) -> Result<()> {
    // A member that its own limit holds back is skipped: the group's limit is still used up.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { iops-total: 1000 } }\n\
         devices:\n  capped: { backend: { null: 1GiB }, group: g, limits: { iops-total: 100 } }\n  \
           free: { backend: { null: 1GiB }, group: g }\n",
    )?;
    let job = Job::new("device-in-a-group-keeps-its-own-limit")
        .set("DEVICE_CAPPED", scene.device("capped")?.node())
        .set("DEVICE_FREE", scene.device("free")?.node());
    let report = scene.fio(job)?.finish(RUNTIME)?;
    expect_all([
        expect_near("capped", report.job("capped")?.iops(4096), 100.0, 0.01),
        expect_near("free", report.job("free")?.iops(4096), 900.0, 0.01),
    ])?;
    daemon.stop().map(drop)
}
