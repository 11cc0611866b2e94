//! Data reads back as written, on every backend.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ublk_throttle_tests::disks::{Mount, RamDisk, Tmpfs};
use ublk_throttle_tests::fio::Job;
use ublk_throttle_tests::mapper::{Mapped, Target};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::{Device, Scene};
use ublk_throttle_tests::sysfs;

use crate::measure::{expect, expect_all, expect_near};
use crate::{Case, cases, has_zero_copy};

const MIB: u64 = 1 << 20;

/// Time for a verifying job, which moves some MiB.
const RUNTIME: Duration = Duration::from_secs(30);

pub(crate) fn cases() -> Vec<Case> {
    let fio = cases![[Need::Ublk, Need::Fio];
        file_backend_keeps_data,
        memory_data_is_kept_with_and_without_a_copy,
        file_keeps_its_data_over_a_restart_of_the_daemon,
        null_backend_reads_zeros,
        f30_flushes_reach_the_device_and_are_not_charged,
        f30_forced_unit_access_writes_arrive,
    ];
    let direct = cases![[Need::Ublk, Need::Fio, Need::RamDisk, Need::Ext4];
        file_data_is_kept_with_and_without_a_copy,
    ];
    let block = cases![[Need::Ublk, Need::Fio, Need::RamDisk]; block_data_is_kept_with_and_without_a_copy];
    let mapper = cases![[Need::Ublk, Need::Fio, Need::RamDisk, Need::Mapper]; block_backend_that_must_wait_keeps_data];
    let zeroes = cases![[Need::Ublk, Need::UtilLinux, Need::RamDisk, Need::Ext4];
        discarded_and_zeroed_ranges_read_zeros_and_the_rest_is_unhurt,
    ];
    let util_linux = cases![[Need::Ublk, Need::UtilLinux];
        discard_gives_space_back_to_the_file_system,
    ];
    let plain = cases![[Need::Ublk]; read_only_device_refuses_writes, device_has_the_size_of_its_file];
    fio.into_iter().chain(direct).chain(block).chain(mapper).chain(zeroes).chain(util_linux).chain(plain).collect()
}

fn file_backend_keeps_data(scene: &Scene) -> Result<()> {
    // Through the page cache of the host's file system.
    let file = scene.dir().join("disk.img");
    keeps_data(scene, &format!("file: {}, size: 64MiB, create: true", file.display()))
}

fn block_backend_that_must_wait_keeps_data(scene: &Scene) -> Result<()> {
    // A dm-delay disk refuses requests with REQ_NOWAIT, as many device-mapper targets do.
    let mapped = Mapped::on_ram(64)?;
    mapped.become_all(Target::Delay(Duration::ZERO))?;
    for is_direct in [true, false] {
        keeps_data(scene, &format!("block: {}, direct: {is_direct}", mapped.node().display()))?;
    }
    Ok(())
}

fn file_data_is_kept_with_and_without_a_copy(scene: &Scene) -> Result<()> {
    // O_DIRECT on ext4 needs aligned buffers, offsets and lengths.
    let disk = RamDisk::new(128)?;
    let mount = Mount::new(disk.node(), &scene.dir().join("mount"))?;
    let file = format!("file: {}, size: 64MiB, create: true", mount.point().join("disk.img").display());
    for is_direct in [true, false] {
        keeps_data_in_each_way(scene, &format!("{file}, direct: {is_direct}"))?;
    }
    mount.unmount()
}

fn block_data_is_kept_with_and_without_a_copy(scene: &Scene) -> Result<()> {
    let disk = RamDisk::new(64)?;
    for is_direct in [true, false] {
        keeps_data_in_each_way(scene, &format!("block: {}, direct: {is_direct}", disk.node().display()))?;
    }
    Ok(())
}

fn memory_data_is_kept_with_and_without_a_copy(scene: &Scene) -> Result<()> {
    // A file on tmpfs is opened as a memory backend is.
    let tmpfs = Tmpfs::new(&scene.dir().join("tmpfs"), 80)?;
    keeps_data_in_each_way(scene, "memory: 64MiB")?;
    let file = tmpfs.point().join("disk.img");
    keeps_data_in_each_way(scene, &format!("file: {}, size: 64MiB, create: true", file.display()))
}

/// Tests zero copy and copy where the kernel has both. Without zero copy, `on` is refused and
/// nothing is left.
fn keeps_data_in_each_way(scene: &Scene, backend: &str) -> Result<()> {
    let config =
        |word| format!("version: 1\ndevices:\n  d: {{ backend: {{ {backend} }}, queues: 2, zero-copy: {word} }}\n");
    let has = has_zero_copy(scene)?;
    // `auto` takes zero copy if the kernel has it; the loop below tests the data of each way.
    let daemon = scene.start(&config("auto"))?;
    expect_transfer(scene, &[if has { "zero-copy" } else { "copy" }])?;
    daemon.stop()?;
    for (word, transfer) in [("on", "zero-copy"), ("off", "copy")] {
        if word == "on" && !has {
            let path = scene.write("refused.yaml", &config(word))?;
            let refused = scene.ask(&["run", &path.display().to_string()])?.expect_code(3)?;
            refused.expect_stderr(&["error[E-UNSUPPORTED]", "AUTO_BUF_REG"])?;
            continue;
        }
        keeps_data_of(scene, &config(word), &[transfer]).with_context(|| format!("{backend}, zero-copy: {word}"))?;
    }
    Ok(())
}

/// Tests several block sizes and depths on a device of 64 MiB with two queues and this backend.
fn keeps_data(scene: &Scene, backend: &str) -> Result<()> {
    let config = format!("version: 1\ndevices:\n  d: {{ backend: {{ {backend} }}, queues: 2 }}\n");
    keeps_data_of(scene, &config, &["copy", "zero-copy"])
}

/// Fails unless the transfer of the only device is one of these.
fn expect_transfer(scene: &Scene, transfers: &[&str]) -> Result<()> {
    let listed = scene.listing()?;
    let transfer = listed["devices"][0]["transfer"].as_str().context("no transfer")?;
    ensure!(transfers.contains(&transfer), "its transfer is {transfer}, not {transfers:?}");
    Ok(())
}

/// Like [`keeps_data`], for device `d` of a configuration, with one of these transfers.
fn keeps_data_of(scene: &Scene, config: &str, transfers: &[&str]) -> Result<()> {
    let daemon = scene.start(config)?;
    expect_transfer(scene, transfers)?;
    let device = scene.device("d")?;
    ensure!(sysfs::number(&device.disk, "size")? * 512 == 64 * MIB, "the device is not of 64 MiB");
    ensure!(sysfs::number(&device.disk, "queue/logical_block_size")? == 512, "the logical block is not of 512 bytes");
    for (block, depth, size) in [(4096, 32, MIB), (65536, 4, 4 * MIB), (1_048_576, 2, 4 * MIB), (512, 1, MIB / 8)] {
        let job = Job::new("data-written-is-read-back")
            .set("DEVICE", device.node())
            .set("BLOCK", block)
            .set("DEPTH", depth)
            .set("SIZE", size);
        let report = scene.fio(job)?.finish(RUNTIME).with_context(|| format!("{block} bytes at depth {depth}"))?;
        let bytes: u64 = report.jobs().iter().map(|job| job.bytes).sum();
        // Two jobs; each block is written once and read once.
        ensure!(bytes == 4 * size, "{block} bytes at depth {depth}: {bytes} bytes moved, expected {}", 4 * size);
    }
    let job = Job::new("odd-sizes-and-offsets-arrive-whole").set("DEVICE", device.node()).set("SIZE", 4 * MIB);
    scene.fio(job)?.finish(RUNTIME).context("odd sizes")?;
    daemon.stop().map(drop)
}

fn file_keeps_its_data_over_a_restart_of_the_daemon(scene: &Scene) -> Result<()> {
    // After SIGTERM the file is complete, and the next daemon serves the same bytes.
    let file = scene.dir().join("disk.img");
    let config = format!(
        "version: 1\ndevices:\n  d: {{ backend: {{ file: {}, size: 16MiB, create: true }}, queues: 2 }}\n",
        file.display()
    );
    let job = || -> Result<Job> {
        Ok(Job::new("data-survives-a-restart").set("DEVICE", scene.device("d")?.node()).set("SIZE", 8 * MIB))
    };
    let daemon = scene.start(&config)?;
    scene.fio(job()?.section("write"))?.finish(RUNTIME)?;
    daemon.stop()?;
    scene.expect_nothing_left()?;
    let daemon = scene.start(&config)?;
    scene.fio(job()?.section("verify"))?.finish(RUNTIME)?;
    daemon.stop().map(drop)
}

fn null_backend_reads_zeros(scene: &Scene) -> Result<()> {
    // All tags share one buffer, and a read must not return the bytes of an earlier write. 32 MiB
    // read as zeros, after and during writes of non-zero bytes: without limits, and with reads and
    // writes held (held reads were delivered before the writes that overtake them).
    let daemon = scene.start(
        "version: 1\ndevices:\n  d: { backend: { null: 1GiB } }\n  held: { backend: { null: 1GiB }, limits: { iops-read: 1000, iops-write: 1300 } }\n",
    )?;
    let device = scene.device("d")?;
    OpenOptions::new().write(true).open(&device.node)?.write_all(&[0xa5; 1 << 20])?;
    flush_page_cache(&device)?;
    let job = Job::new("device-reads-zeros").set("DEVICE", device.node()).set("OFFSET", 0).set("SIZE", 32 * MIB);
    scene.fio(job)?.finish(RUNTIME)?;
    for name in ["d", "held"] {
        let job = Job::new("reads-give-zeros-beside-writes").set("DEVICE", scene.device(name)?.node());
        scene.fio(job)?.finish(RUNTIME).with_context(|| name.to_owned())?;
    }
    daemon.stop().map(drop)
}

fn f30_flushes_reach_the_device_and_are_not_charged(scene: &Scene) -> Result<()> {
    // iops-total 100 with a flush after each write: 100 writes a second, not 50.
    let file = scene.dir().join("disk.img");
    let daemon = scene.start(&format!(
        "version: 1\ndevices:\n  d:\n    backend: {{ file: {}, size: 64MiB, create: true }}\n    limits: {{ iops-total: 100 }}\n",
        file.display()
    ))?;
    let device = scene.device("d")?;
    ensure!(sysfs::attribute(&device.disk, "queue/write_cache")? == "write back", "the device has no write cache");
    let job = Job::new("flushes-are-not-charged").set("DEVICE", device.node());
    let report = scene.fio(job)?.finish(Duration::from_secs(10))?;
    let stat = sysfs::stat(&device.disk)?;
    let flushes = *stat.get(15).context("no count of flushes")?;
    expect_all([
        // Writes only: fio counts its fsyncs separately.
        expect_near("writes a second", report.only()?.iops(4096), 100.0, 0.02),
        expect(flushes >= 700, || format!("the kernel sent {flushes} flushes for 800 fsyncs: {stat:?}")),
    ])?;
    daemon.stop().map(drop)
}

fn f30_forced_unit_access_writes_arrive(scene: &Scene) -> Result<()> {
    // O_SYNC writes succeed and read back correctly, on a file and in memory.
    let file = scene.dir().join("disk.img");
    let daemon = scene.start(&format!(
        "version: 1\ndevices:\n  f: {{ backend: {{ file: {}, size: 16MiB, create: true }} }}\n  m: {{ backend: {{ memory: 16MiB }} }}\n",
        file.display()
    ))?;
    for name in ["f", "m"] {
        let job = Job::new("forced-unit-access-writes-arrive").set("DEVICE", scene.device(name)?.node());
        scene.fio(job)?.finish(RUNTIME).with_context(|| name.to_owned())?;
    }
    ensure!(sysfs::number(&scene.device("f")?.disk, "queue/fua")? == 1, "the device does not say that it knows FUA");
    daemon.stop().map(drop)
}

fn discarded_and_zeroed_ranges_read_zeros_and_the_rest_is_unhurt(scene: &Scene) -> Result<()> {
    // 4 MiB of 0xa5; then the 2nd MiB is discarded and parts of the 3rd and 4th are zeroed; on a
    // file and in memory. The file is on ext4: tmpfs cannot zero a range and keep it allocated, so
    // a device on tmpfs offers no write-zeroes.
    let disk = RamDisk::new(64)?;
    let mount = Mount::new(disk.node(), &scene.dir().join("mount"))?;
    let file = mount.point().join("disk.img");
    let daemon = scene.start(&format!(
        "version: 1\ndevices:\n  f: {{ backend: {{ file: {}, size: 16MiB, create: true }} }}\n  m: {{ backend: {{ memory: 16MiB }} }}\n",
        file.display()
    ))?;
    for name in ["f", "m"] {
        let device = scene.device(name)?;
        let node = device.node();
        let mut expected = vec![0xa5_u8; 4 << 20];
        write_all(&device, &expected)?;

        scene.tool("blkdiscard", &["--offset", "1MiB", "--length", "1MiB", node])?;
        expected[1 << 20..2 << 20].fill(0);
        expect_content(&device, &expected).with_context(|| format!("{name} after blkdiscard"))?;

        scene.tool("blkdiscard", &["--zeroout", "--offset", "2MiB", "--length", "64KiB", node])?;
        expected[2 << 20..(2 << 20) + (64 << 10)].fill(0);
        expect_content(&device, &expected).with_context(|| format!("{name} after blkdiscard --zeroout"))?;

        // Begin and end lie inside a page. The kernel sends the range as write-zeroes.
        scene.tool("fallocate", &["--punch-hole", "--offset", "3146240", "--length", "5120", node])?;
        expected[3_146_240..3_146_240 + 5120].fill(0);
        expect_content(&device, &expected).with_context(|| format!("{name} after fallocate --punch-hole"))?;
    }
    daemon.stop()?;
    mount.unmount()
}

fn discard_gives_space_back_to_the_file_system(scene: &Scene) -> Result<()> {
    // A discard makes a hole in the file: of 8 MiB at most 0.5 MiB stay allocated.
    let file = scene.dir().join("disk.img");
    let daemon = scene.start(&format!(
        "version: 1\ndevices:\n  f: {{ backend: {{ file: {}, size: 16MiB, create: true }} }}\n",
        file.display()
    ))?;
    let device = scene.device("f")?;
    write_all(&device, &vec![0xa5; 8 << 20])?;
    let allocated = || Ok::<_, anyhow::Error>(fs::metadata(&file)?.blocks() * 512);
    let before = allocated()?;
    ensure!(before >= 8 * MIB, "8 MiB written, {before} bytes allocated");
    scene.tool("blkdiscard", &[device.node()])?;
    let after = allocated()?;
    ensure!(after <= MIB / 2, "{before} bytes allocated before the discard of all, {after} after it");
    daemon.stop().map(drop)
}

fn read_only_device_refuses_writes(scene: &Scene) -> Result<()> {
    // The kernel refuses an open for writing or the write itself; reads return the bytes of the
    // file.
    let content: Vec<u8> = (0..1_u32 << 20).map(|at| (at >> 9) as u8).collect();
    let file = scene.dir().join("disk.img");
    fs::write(&file, &content)?;
    let daemon = scene.start(&format!(
        "version: 1\ndevices:\n  d: {{ backend: {{ file: {} }}, read-only: true }}\n",
        file.display()
    ))?;
    let device = scene.device("d")?;
    ensure!(sysfs::number(&device.disk, "ro")? == 1, "the kernel does not hold {} for read-only", device.disk);
    let write = OpenOptions::new().write(true).open(&device.node).and_then(|mut node| {
        node.write_all(&[0; 4096])?;
        node.sync_all()
    });
    ensure!(write.is_err(), "a write to a read-only device succeeded");
    expect_content(&device, &content)?;
    daemon.stop()?;
    ensure!(fs::read(&file)? == content, "the file of a read-only device has changed");
    Ok(())
}

fn device_has_the_size_of_its_file(scene: &Scene) -> Result<()> {
    // Without the key `size` the device takes the size of its file.
    let file = scene.dir().join("disk.img");
    File::create(&file)?.set_len(5 * MIB)?;
    let daemon = scene.start(&format!("version: 1\ndevices:\n  d: {{ backend: {{ file: {} }} }}\n", file.display()))?;
    let sectors = sysfs::number(&scene.device("d")?.disk, "size")?;
    ensure!(sectors * 512 == 5 * MIB, "a file of 5 MiB became a device of {} bytes", sectors * 512);
    daemon.stop().map(drop)
}

/// Writes from the beginning of the device, and flushes.
fn write_all(device: &Device, content: &[u8]) -> Result<()> {
    let mut node = OpenOptions::new().write(true).open(&device.node)?;
    node.write_all(content)?;
    node.sync_all()?;
    Ok(())
}

/// Compares the first bytes of the device with `expected`, past the page cache.
fn expect_content(device: &Device, expected: &[u8]) -> Result<()> {
    flush_page_cache(device)?;
    let mut found = vec![0; expected.len()];
    File::open(&device.node)?.read_exact(&mut found)?;
    let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
    if let Some(at) = wrong {
        anyhow::bail!("byte {at} is {:#04x}, expected {:#04x}", found[at], expected[at]);
    }
    Ok(())
}

/// Writes the device's dirty pages back and drops the page cache of all disks, so that reads reach
/// the device.
fn flush_page_cache(device: &Device) -> Result<()> {
    // A read-only node cannot be opened for writing and has no dirty pages.
    if let Ok(node) = OpenOptions::new().write(true).open(&device.node) {
        node.sync_all()?;
    }
    fs::write(Path::new("/proc/sys/vm/drop_caches"), "1").context("dropping the page cache")
}
