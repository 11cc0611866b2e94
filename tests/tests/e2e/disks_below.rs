//! Properties that a device takes from the disk below it: the size, the I/O hints, and copies where
//! the disk needs stable pages. A zoned disk is refused.
//!
//! Each trial begins with the number of its row in `FAULTS.md`.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::disks::{FileSystem, LoopDisk, Mount, RamDisk, Tmpfs};
use ublk_throttle_tests::mapper::{Mapped, Striped, Target};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::sysfs;

use crate::measure::Unmeasured;
use crate::{Case, cases, has_feature, has_zero_copy};

const MIB: u64 = 1 << 20;
const KIB: u64 = 1 << 10;

pub(crate) fn cases() -> Vec<Case> {
    let sizes = cases![[Need::Ublk, Need::Loop]; f80_a_device_follows_the_size_of_the_disk_behind_it];
    let mapped = cases![[Need::Ublk, Need::RamDisk, Need::Mapper];
        f80_a_device_follows_a_mapped_disk_that_got_another_table,
        f81_a_device_passes_on_the_hints_of_the_disk_behind_it,
    ];
    let files = cases![[Need::Ublk, Need::RamDisk, Need::Ext4];
        f81_a_file_has_the_hints_of_the_disk_that_its_file_system_is_on,
    ];
    let stable = cases![[Need::Ublk, Need::RamDisk, Need::Ext4, Need::Btrfs];
        f93_a_backend_that_needs_stable_pages_gets_copies,
    ];
    let zones = cases![[Need::Ublk, Need::NullBlk]; f82_a_zoned_disk_is_refused];
    sizes.into_iter().chain(mapped).chain(files).chain(stable).chain(zones).collect()
}

fn f80_a_device_follows_the_size_of_the_disk_behind_it(scene: &Scene) -> Result<()> {
    // A loop device, and a file without `size` in the configuration. `reload` and `set` pass growth on to the
    // device; only `--allow-shrink` makes it smaller. Without UPDATE_SIZE, `set` is refused and `reload` warns.
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
    if !has_feature(scene, "UPDATE_SIZE")? {
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
    // The backends grow while no daemon runs. The recovered device keeps the size of its disk (24 MiB), and
    // the next reload follows the backend (32 MiB).
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

fn f80_a_device_follows_a_mapped_disk_that_got_another_table(scene: &Scene) -> Result<()> {
    // As lvextend does: the mapped disk gets a longer table while the device is open and written to.
    if !has_feature(scene, "UPDATE_SIZE")? {
        bail!(Unmeasured::Kernel("this kernel cannot resize a live device".into()));
    }
    let mapped = Mapped::on_ram(32)?;
    mapped.become_parts(&[(mapped.sectors() / 2, Target::Linear)])?;
    let node = mapped.node().display();
    let daemon = scene.start(&format!("version: 1\ndevices:\n  d: {{ backend: {{ block: {node} }} }}\n"))?;
    let device = scene.device("d")?;
    let direct = Direct::open(&device.node)?;
    direct.write(0, 65536, 0xa5)?;
    mapped.become_all(Target::Linear)?;
    scene.ask(&["reload"])?.expect_code(0)?.expect_stdout(&["device d: size 16MiB → 32MiB"])?;
    let size = sysfs::number(&device.disk, "size")? * 512;
    ensure!(size == 32 * MIB, "the disk has {size} bytes");
    direct.write(24 * MIB, 65536, 0xa6).context("behind the old end")?;
    ensure!(direct.holds(0, 65536, 0xa5)? && direct.holds(24 * MIB, 65536, 0xa6)?, "reads wrong");
    drop(direct);
    daemon.stop().map(drop)
}

/// The hints of a disk: `minimum_io_size`, `optimal_io_size` (bytes), `rotational`.
fn hints(disk: &str) -> Result<[u64; 3]> {
    let [min, opt, rotational] =
        ["queue/minimum_io_size", "queue/optimal_io_size", "queue/rotational"].map(|name| sysfs::number(disk, name));
    Ok([min?, opt?, rotational?])
}

fn disk_name(node: &Path) -> String {
    node.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn set_queue(node: &Path, name: &str, value: u8) -> Result<()> {
    let path = Path::new("/sys/block").join(disk_name(node)).join("queue").join(name);
    fs::write(&path, value.to_string()).with_context(|| path.display().to_string())
}

fn f81_a_device_passes_on_the_hints_of_the_disk_behind_it(scene: &Scene) -> Result<()> {
    // Chunks of 64 KiB on two disks make a stripe of 128 KiB. On three disks the stripe is 192 KiB, of which
    // the ublk parameters can express the largest power of two that divides it, 64 KiB.
    for (disks, rotational, expected) in [(2, 1, [64 * KIB, 128 * KIB, 1]), (3, 0, [64 * KIB, 64 * KIB, 0])] {
        let below = Striped::new(disks, 8, 64 * KIB)?;
        set_queue(below.node(), "rotational", rotational)?;
        let told = hints(&disk_name(below.node()))?;
        let of_stripes = [64 * KIB, 64 * KIB * disks, rotational.into()];
        ensure!(told == of_stripes, "{disks} stripes have the hints {told:?}, not {of_stripes:?}");
        let found = hints_on(scene, below.node(), "")?;
        ensure!(found == expected, "{disks} stripes: the device has the hints {found:?}, not {expected:?}");
    }
    // Hints of 512 bytes are raised to the block of the device, 4096 bytes.
    let small = RamDisk::new(8)?;
    let found = hints_on(scene, small.node(), ", block-size: 4096")?;
    ensure!(found[..2] == [4096, 4096], "blocks of 4096 bytes on smaller ones have the hints {found:?}");
    Ok(())
}

/// The hints of a device on the block device `node`; `keys` are further settings of the device.
fn hints_on(scene: &Scene, node: &Path, keys: &str) -> Result<[u64; 3]> {
    let config = format!("version: 1\ndevices:\n  d: {{ backend: {{ block: {} }}{keys} }}\n", node.display());
    let daemon = scene.start(&config)?;
    let found = hints(&scene.device("d")?.disk)?;
    daemon.stop()?;
    Ok(found)
}

fn f81_a_file_has_the_hints_of_the_disk_that_its_file_system_is_on(scene: &Scene) -> Result<()> {
    // A file on ext4 has the hints of the one disk below, which is rotational. tmpfs has no disk below.
    let disk = RamDisk::new(64)?;
    set_queue(disk.node(), "rotational", 1)?;
    let mount = Mount::new(disk.node(), &scene.dir().join("mount"))?;
    let tmpfs = Tmpfs::new(&scene.dir().join("tmpfs"), 16)?;
    for (point, rotational) in [(mount.point(), 1), (tmpfs.point(), 0)] {
        let file = point.join("d.img");
        let daemon = scene.start(&format!(
            "version: 1\ndevices:\n  d: {{ backend: {{ file: {}, size: 8MiB, create: true }} }}\n",
            file.display()
        ))?;
        let found = hints(&scene.device("d")?.disk)?;
        ensure!(found == [4096, 4096, rotational], "{}: the device has the hints {found:?}", file.display());
        daemon.stop()?;
    }
    mount.unmount()
}

fn f93_a_backend_that_needs_stable_pages_gets_copies(scene: &Scene) -> Result<()> {
    // A page that changes between the checksum of the disk below and its write leaves a block that does not fit its checksum.
    if !has_zero_copy(scene)? {
        bail!(Unmeasured::Kernel("this kernel has no zero copy".into()));
    }
    let (disk, other) = (RamDisk::new(64)?, RamDisk::new(256)?);
    let node = disk.node().to_string_lossy().into_owned();
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?;
    let is_copied = |words: &[&str]| -> Result<bool> {
        let added = scene.ask(&[&["add", "x", "--json"][..], words].concat())?.expect_code(0)?.json()?;
        let (transfer, reason) = (&added["transfer"], added["transfer_reason"].as_str());
        let is_copied = transfer == "copy";
        ensure!(is_copied == reason.is_some_and(|why| why.contains("stable pages")), "{transfer}, as {reason:?}");
        scene.ask(&["del", "x"])?.expect_code(0)?;
        Ok(is_copied)
    };
    let expect = |is_wanted: bool, words: &[&str]| -> Result<()> {
        ensure!(is_copied(words)? == is_wanted, "{words:?}: copied: {}", !is_wanted);
        Ok(())
    };
    let refused = |words: &[&str]| -> Result<()> {
        let words = [&["add", "x", "--zero-copy", "on"][..], words].concat();
        scene.ask(&words)?.expect_code(3)?.expect_stderr(&["error[E-UNSUPPORTED]", "stable pages"]).map(drop)
    };
    let block = ["--block", &node];
    expect(false, &block)?;
    set_queue(disk.node(), "stable_writes", 1)?;
    expect(true, &block)?;
    refused(&block)?;
    // The page cache keeps a copy.
    expect(false, &["--block", &node, "--no-direct", "--zero-copy", "on"])?;

    for is_needed in [true, false] {
        set_queue(disk.node(), "stable_writes", is_needed.into())?;
        let ext4 = Mount::new(disk.node(), &scene.dir().join("ext4"))?;
        let file = ext4.point().join("d.img").to_string_lossy().into_owned();
        expect(is_needed, &["--file", &file, "--size", "8MiB", "--create", "--direct"])?;
        ext4.unmount()?;
    }
    let btrfs = Mount::new_of(FileSystem::Btrfs, other.node(), &scene.dir().join("btrfs"))?;
    let file = btrfs.point().join("d.img").to_string_lossy().into_owned();
    let words = ["--file", &file, "--size", "8MiB", "--create"];
    expect(true, &[&words[..], &["--direct"]].concat())?;
    expect(false, &[&words[..], &["--no-direct"]].concat())?;
    btrfs.unmount()?;

    // The way of the data of a device is settled when it is made: the next daemon can only tell.
    scene.ask(&[&["add", "kept"][..], &block].concat())?.expect_code(0)?;
    daemon.kill(Duration::from_secs(5))?;
    set_queue(disk.node(), "stable_writes", 1)?;
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?;
    daemon.wait_for_log("W-ZERO-COPY", Duration::from_secs(5))?;
    ensure!(scene.listed("kept")?["transfer"] == "zero-copy", "the device is another one");
    scene.ask(&["del", "kept"])?.expect_code(0)?;
    daemon.stop().map(drop)
}

fn f82_a_zoned_disk_is_refused(scene: &Scene) -> Result<()> {
    // A zoned disk accepts writes only at the write pointers of its zones; users of a device write anywhere.
    let disk = RamDisk::zoned(32, 4)?;
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?;
    let node = disk.node().to_string_lossy().into_owned();
    for words in [&["add", "z", "--block", &node][..], &["add", "z", "--block", &node, "--read-only"]] {
        scene.ask(words)?.expect_code(3)?.expect_stderr(&["error[E-BACKING]", &node, "host-managed", "zoned"])?;
    }
    ensure!(scene.devices()?.len() == 1, "the refused device is listed");
    daemon.stop().map(drop)
}
