//! A file system on a device.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use ublk_throttle_tests::disks::{self, Mount};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;

use crate::{Case, cases};

pub(crate) fn cases() -> Vec<Case> {
    cases![[Need::Ublk, Need::Ext4];
        file_system_is_clean_and_complete_after_removal_and_return_of_its_device,
        file_system_works_behind_a_limit,
    ]
    .into()
}

/// Files of several sizes below `folder`: a name and its content.
fn files(folder: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let content = |length: u32| (0..length).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    [0, 1, 4095, 4096, 100_000, 3_000_000].map(|length| (folder.join(length.to_string()), content(length))).into()
}

fn file_system_is_clean_and_complete_after_removal_and_return_of_its_device(scene: &Scene) -> Result<()> {
    // mkfs, mount, write, unmount, fsck; then the next daemon serves the same backing file.
    let config = format!(
        "version: 1\ndevices:\n  d: {{ backend: {{ file: {}, size: 64MiB, create: true }}, queues: 2 }}\n",
        scene.dir().join("disk.img").display()
    );
    let point = scene.dir().join("mount");
    let daemon = scene.start(&config)?;
    let device = scene.device("d")?;
    let mount = Mount::new(&device.node, &point)?;
    for (path, content) in files(&point) {
        fs::write(path, content)?;
    }
    mount.unmount()?;
    disks::fsck(&device.node)?;
    daemon.stop()?;
    scene.expect_nothing_left()?;

    let daemon = scene.start(&config)?;
    let device = scene.device("d")?;
    disks::fsck(&device.node)?;
    let mount = Mount::existing(&device.node, &point)?;
    for (path, content) in files(&point) {
        ensure!(fs::read(&path)? == content, "{} has changed", path.display());
    }
    mount.unmount()?;
    daemon.stop().map(drop)
}

fn file_system_works_behind_a_limit(scene: &Scene) -> Result<()> {
    // 8 MiB/s and 300 operations a second: the file system is slow and intact. Journal, write-back
    // and fsync are held by the limits.
    let daemon = scene.start(
        "version: 1\n\
         devices:\n  d: { backend: { memory: 32MiB }, queues: 2, limits: { bps-total: 8MiB/s, iops-total: 300 } }\n",
    )?;
    let device = scene.device("d")?;
    let mount = Mount::new(&device.node, &scene.dir().join("mount"))?;
    for (path, content) in files(mount.point()) {
        fs::write(&path, content)?;
        fs::File::open(&path)?.sync_all()?;
    }
    mount.unmount()?;
    disks::fsck(&device.node)?;
    daemon.stop().map(drop)
}
