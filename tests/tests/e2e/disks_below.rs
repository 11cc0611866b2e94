//! What a device has of the disk behind it: its size.
//!
//! Each trial begins with the number of its row in `FAULTS.md`.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::disks::LoopDisk;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::sysfs;

use crate::{Case, cases};

const MIB: u64 = 1 << 20;

pub(crate) fn cases() -> Vec<Case> {
    cases![[Need::Ublk, Need::Loop]; f80_a_device_follows_the_size_of_the_disk_behind_it].into()
}

fn can_resize(scene: &Scene) -> Result<bool> {
    let features = scene.run(&["features", "--json"])?.expect_code(0)?.json()?;
    let features = features["features"].as_array().context("no features")?;
    Ok(features.iter().any(|feature| feature["name"] == "UPDATE_SIZE" && feature["offered"] == true))
}

fn f80_a_device_follows_the_size_of_the_disk_behind_it(scene: &Scene) -> Result<()> {
    // A loop device, and a file without a size in the configuration: `reload` and `set` pass growth on, and never cut by themselves.
    let behind = [scene.dir().join("disk.img"), scene.dir().join("plain.img")];
    for file in &behind {
        File::create(file)?.set_len(8 * MIB)?;
    }
    let disk = LoopDisk::new(&behind[0], 512)?;
    let config = format!(
        "version: 1\ndevices:\n  b: {{ backend: {{ block: {} }} }}\n  f: {{ backend: {{ file: {} }} }}\n",
        disk.node().display(),
        behind[1].display()
    );
    let daemon = scene.start(&config)?;
    let devices = [scene.device("b")?, scene.device("f")?];
    let become_behind = |bytes: u64| -> Result<()> {
        for file in &behind {
            File::options().write(true).open(file)?.set_len(bytes)?;
        }
        disk.follow_file()
    };
    let expect_sizes = |when: &str, wanted: u64| -> Result<()> {
        for device in &devices {
            let size = sysfs::number(&device.disk, "size")? * 512;
            ensure!(size == wanted, "{when}: {} has {size} bytes, not {wanted}", device.disk);
        }
        Ok(())
    };
    scene.ask(&["reload"])?.expect_code(0)?.expect_stdout(&["nothing changes"])?;
    become_behind(16 * MIB)?;
    if !can_resize(scene)? {
        let cure = "remove the device and add it again";
        let words = ["set", "device", "b", "size=16MiB"];
        scene.ask(&words)?.expect_code(3)?.expect_stderr(&["error[E-UNSUPPORTED]", "6.16", cure])?;
        let reload = scene.ask(&["reload"])?.expect_code(0)?;
        reload.expect_stderr(&["W-SIZE-KEPT", "device=b size=8388608", "device=f size=8388608", "16777216", cure])?;
        expect_sizes("without UPDATE_SIZE", 8 * MIB)?;
        return daemon.stop().map(drop);
    }
    let line = "device b: size 8MiB → 16MiB";
    scene.ask(&["reload", "--dry-run"])?.expect_code(0)?.expect_stdout(&[line])?;
    expect_sizes("dry run", 8 * MIB)?;
    scene.ask(&["reload"])?.expect_code(0)?.expect_stdout(&[line, "device f: size 8MiB → 16MiB"])?;
    expect_sizes("reload", 16 * MIB)?;
    for device in &devices {
        let direct = Direct::open(&device.node)?;
        direct.write(12 * MIB, 65536, 0xa5).context("behind the old end")?;
        ensure!(direct.holds(12 * MIB, 65536, 0xa5)?, "what was written behind the old end reads wrong");
    }
    scene.ask(&["reload"])?.expect_code(0)?.expect_stdout(&["nothing changes"])?;
    become_behind(24 * MIB)?;
    for (size, told) in [("20MiB", "25165824"), ("32MiB", "extend it first")] {
        let refused = scene.ask(&["set", "device", "b", &format!("size={size}")])?;
        refused.expect_code(3)?.expect_stderr(&[&disk.node().to_string_lossy(), told])?;
    }
    expect_sizes("refused sizes", 16 * MIB)?;
    for name in ["b", "f"] {
        scene.ask(&["set", "device", name, "size=24MiB"])?.expect_code(0)?;
    }
    expect_sizes("set", 24 * MIB)?;
    // Taken up by the next daemon in the size that the disk has.
    daemon.kill(Duration::from_secs(5))?;
    become_behind(32 * MIB)?;
    let daemon = scene.start(&config)?;
    expect_sizes("after a kill", 24 * MIB)?;
    scene.ask(&["reload"])?.expect_code(0)?;
    expect_sizes("reload of the next daemon", 32 * MIB)?;
    become_behind(16 * MIB)?;
    let told = ["W-SIZE-KEPT", "device=b size=33554432", "device=f size=33554432", "16777216", "--allow-shrink"];
    scene.ask(&["reload"])?.expect_code(0)?.expect_stderr(&told)?;
    expect_sizes("smaller behind", 32 * MIB)?;
    scene.ask(&["reload", "--allow-shrink"])?.expect_code(0)?;
    expect_sizes("--allow-shrink", 16 * MIB)?;
    daemon.stop().map(drop)
}
