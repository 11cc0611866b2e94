//! Faults of backends: errors, full disks, files that change while they are served, backends that stall,
//! paths that mislead.
//!
//! Each trial begins with the number of its row in `FAULTS.md`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::libc::{EIO, ENOSPC};
use ublk_throttle_tests::daemon::Daemon;
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::disks::{LoopDisk, Mount, RamDisk, Tmpfs};
use ublk_throttle_tests::mapper::{Mapped, Target};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::{Device, Scene};
use ublk_throttle_tests::{sysfs, wait};

use crate::measure::{expect, expect_all, expect_near, expect_within};
use crate::{Case, READS, WRITES, cases, completions, let_run, load, now_ms};

const MIB: u64 = 1 << 20;

pub(crate) fn cases() -> Vec<Case> {
    let mapper = cases![[Need::Ublk, Need::RamDisk, Need::Mapper];
        f21_an_error_of_the_backend_reaches_that_request_only,
        f21_a_backend_in_trouble_for_long_is_degraded_and_heals_without_a_restart,
        f26_a_slow_backend_is_waited_for_without_an_error,
        f30_a_failed_flush_is_told_and_the_next_epoch_is_sound,
        f68_a_failed_write_is_told_to_its_writer_by_default,
    ];
    let load = cases![[Need::Ublk, Need::Fio, Need::RamDisk, Need::Mapper];
        f26_a_stalled_backend_holds_no_tokens_of_its_group,
    ];
    let ext4 = cases![[Need::Ublk, Need::RamDisk, Need::Ext4];
        f25_a_file_system_unmounted_lazily_serves_on,
        f68_a_file_is_direct_where_its_file_system_can,
    ];
    let loops = cases![[Need::Ublk, Need::Loop]; f29_a_block_larger_than_the_wanted_one_is_told_with_both_numbers];
    let plain = cases![[Need::Ublk];
        f22_a_full_disk_is_told_to_that_write_and_works_once_there_is_room,
        f24_reads_behind_the_end_of_a_truncated_file_are_errors_and_the_rest_works,
        f25_an_unlinked_file_serves_on,
        f27_links_of_others_and_odd_nodes_are_refused,
        f28_a_file_in_use_is_refused_to_a_second_writer,
        f31_a_size_that_is_no_multiple_of_the_block_is_cut_and_told,
    ];
    mapper.into_iter().chain(load).chain(ext4).chain(loops).chain(plain).collect()
}

/// A daemon with one device `d`.
fn one(scene: &Scene, backend: &str) -> Result<(Daemon, Device, Direct)> {
    let daemon = scene.start(&format!("version: 1\ndevices:\n  d: {{ backend: {{ {backend} }} }}\n"))?;
    let device = scene.device("d")?;
    let direct = Direct::open(&device.node)?;
    Ok((daemon, device, direct))
}

/// Fails unless a request failed with this error number.
fn expect_errno<T>(what: &str, result: io::Result<T>, errno: i32) -> Result<()> {
    let found = result.err().map(|error| error.raw_os_error());
    ensure!(found == Some(Some(errno)), "{what}: error {found:?}, expected {errno}");
    Ok(())
}

fn f21_an_error_of_the_backend_reaches_that_request_only(scene: &Scene) -> Result<()> {
    // The disk fails from 8 to 16 MiB. Requests that touch this range get EIO and are counted; requests
    // outside succeed. Once the disk is sound, so is the device, without a restart.
    let mapped = Mapped::on_ram(32)?;
    let (daemon, device, direct) = one(scene, &format!("block: {}, direct: true", mapped.node().display()))?;
    let part = 8 * MIB / 512;
    mapped.become_parts(&[
        (part, Target::Linear),
        (part, Target::Error),
        (mapped.sectors() - 2 * part, Target::Linear),
    ])?;
    direct.write(0, 65536, 0xa5).context("before the bad stretch")?;
    direct.write(20 * MIB, 65536, 0xa6).context("behind the bad stretch")?;
    expect_errno("write to the bad stretch", direct.write(9 * MIB, 4096, 1), EIO)?;
    expect_errno("read of the bad stretch", direct.read(9 * MIB, 4096), EIO)?;
    expect_errno("write that reaches into it", direct.write(8 * MIB - 4096, 8192, 1), EIO)?;
    ensure!(direct.holds(0, 65536, 0xa5)? && direct.holds(20 * MIB, 65536, 0xa6)?, "sound parts have changed");
    let status = scene.listed("d")?;
    ensure!(status["errors"].as_u64() >= Some(3), "3 failed requests are listed as {}", status["errors"]);
    ensure!(status["state"] == "live", "state {}", status["state"]);
    mapped.become_all(Target::Linear)?;
    direct.write(9 * MIB, 4096, 0xa7).context("write to the stretch that was bad")?;
    ensure!(direct.holds(9 * MIB, 4096, 0xa7)?, "the stretch that was bad reads wrong");
    ensure!(device.node.exists(), "the device is gone");
    drop(direct);
    daemon.stop().map(drop)
}

fn f21_a_backend_in_trouble_for_long_is_degraded_and_heals_without_a_restart(scene: &Scene) -> Result<()> {
    // The disk fails every request for 15 s. The device stays, each error is passed on and counted, and
    // `list` reports `degraded` all the time. Once the disk is sound, requests succeed at once, and `list`
    // reports `ok` 10 s after the last error.
    let mapped = Mapped::on_ram(32)?;
    let (daemon, device, direct) = one(scene, &format!("block: {}, direct: true", mapped.node().display()))?;
    direct.write(0, 65536, 0xa5)?;
    mapped.become_all(Target::Error)?;
    let (begin, mut failed) = (Instant::now(), 0);
    while begin.elapsed() < Duration::from_secs(15) {
        expect_errno("write to a disk in trouble", direct.write(MIB, 4096, 1), EIO)?;
        expect_errno("read of a disk in trouble", direct.read(0, 4096), EIO)?;
        failed += 2;
        let status = scene.listed("d")?;
        ensure!(status["health"] == "degraded" && status["state"] == "live", "{status}");
        std::thread::sleep(Duration::from_millis(500));
    }
    let counted = scene.listed("d")?["errors"].clone();
    ensure!(counted.as_u64() >= Some(failed), "{failed} failed requests are listed as {counted}");
    mapped.become_all(Target::Linear)?;
    ensure!(direct.holds(0, 65536, 0xa5)?, "what was there before reads wrong");
    direct.write(MIB, 4096, 0xa6)?;
    wait::until("the health", Duration::from_secs(15), || {
        // Each `list` starts a program, so poll twice a second only.
        std::thread::sleep(Duration::from_millis(500));
        direct.read(0, 4096)?;
        Ok((scene.listed("d")?["health"] == "ok").then_some(()))
    })?;
    ensure!(direct.holds(MIB, 4096, 0xa6)? && device.node.exists(), "the device is hurt");
    drop(direct);
    daemon.stop().map(drop)
}

fn f22_a_full_disk_is_told_to_that_write_and_works_once_there_is_room(scene: &Scene) -> Result<()> {
    // A sparse file of 32 MiB on a file system of 8 MiB. The write that finds it full gets ENOSPC, earlier
    // data is intact, and the same write succeeds after the file system has grown to 64 MiB.
    let tmpfs = Tmpfs::new(&scene.dir().join("small"), 8)?;
    let file = tmpfs.point().join("disk.img");
    let (daemon, device, direct) = one(scene, &format!("file: {}, size: 32MiB, create: true", file.display()))?;
    let step = 256 << 10;
    let mut written = 0;
    let full = loop {
        ensure!(written < 32 * MIB, "32 MiB went into 8");
        match direct.write(written, step, 0xa5) {
            Ok(()) => written += step as u64,
            Err(error) => break error,
        }
    };
    ensure!(full.raw_os_error() == Some(ENOSPC), "the full disk is told as {full}");
    ensure!(written >= 6 * MIB, "full after {written} bytes");
    ensure!(direct.holds(0, usize::try_from(written)?, 0xa5)?, "earlier data has changed");
    tmpfs.resize(64)?;
    direct.write(written, step, 0xa6).context("once there is room")?;
    ensure!(direct.holds(written, step, 0xa6)?, "what was written once there was room reads wrong");
    ensure!(device.node.exists(), "the device is gone");
    drop(direct);
    daemon.stop().map(drop)
}

fn f24_reads_behind_the_end_of_a_truncated_file_are_errors_and_the_rest_works(scene: &Scene) -> Result<()> {
    // Another program truncates the file of 16 MiB to 8 MiB + 2 KiB. Reads behind the end get EIO: no SIGBUS,
    // no invented bytes. Reads before the end succeed. A write behind the end extends the file again.
    let path = scene.dir().join("disk.img");
    let file = File::create(&path)?;
    file.write_all_at(&vec![0xa5; 16 << 20], 0)?;
    let (mut daemon, _, direct) = one(scene, &format!("file: {}", path.display()))?;
    file.set_len(8 * MIB + 2048)?;
    expect_errno("read behind the end", direct.read(12 * MIB, 4096), EIO)?;
    expect_errno("read over the end", direct.read(8 * MIB, 4096), EIO)?;
    ensure!(direct.holds(4 * MIB, 65536, 0xa5)?, "the part before the end reads wrong");
    let status = scene.listed("d")?;
    ensure!(status["health"] == "degraded", "`list` says health {} after errors", status["health"]);
    direct.write(12 * MIB, 4096, 0xa6).context("a write behind the end makes the file longer")?;
    ensure!(direct.holds(12 * MIB, 4096, 0xa6)?, "what was written behind the end reads wrong");
    ensure!(direct.holds(10 * MIB, 4096, 0)?, "what was cut off is not zero");
    ensure!(daemon.is_running()?, "the daemon ended:\n{}", daemon.log()?);
    drop(direct);
    daemon.stop().map(drop)
}

fn f25_an_unlinked_file_serves_on(scene: &Scene) -> Result<()> {
    // The open file stays the backend when its path leads to a new file. A reload warns with
    // `W-BACKING-CHANGED` and does not switch to the new file.
    let path = scene.dir().join("disk.img");
    let (daemon, _, direct) = one(scene, &format!("file: {}, size: 8MiB, create: true", path.display()))?;
    direct.write(0, 65536, 0xa5)?;
    fs::remove_file(&path)?;
    File::create(&path)?.set_len(8 * MIB)?;
    direct.write(65536, 65536, 0xa6)?;
    ensure!(direct.holds(0, 65536, 0xa5)? && direct.holds(65536, 65536, 0xa6)?, "the unlinked file reads wrong");
    ensure!(fs::read(&path)?.iter().all(|&byte| byte == 0), "the new file was written to");
    let reload = scene.ask(&["reload"])?.expect_code(0)?;
    let told = format!("{}{}{}", reload.stdout, reload.stderr, daemon.log()?);
    ensure!(told.contains("W-BACKING-CHANGED"), "a reload does not tell:\n{told}");
    ensure!(direct.holds(0, 65536, 0xa5)?, "a reload has switched the file");
    drop(direct);
    daemon.stop().map(drop)
}

fn f25_a_file_system_unmounted_lazily_serves_on(scene: &Scene) -> Result<()> {
    // `umount --lazy` removes the paths of the file system; the open file stays usable.
    let disk = RamDisk::new(64)?;
    let mount = Mount::new(disk.node(), &scene.dir().join("mount"))?;
    let path = mount.point().join("disk.img");
    let (daemon, _, direct) = one(scene, &format!("file: {}, size: 16MiB, create: true", path.display()))?;
    scene.tool("umount", &["--lazy", &mount.point().display().to_string()])?;
    ensure!(!path.exists(), "the file is still there by its name");
    direct.write(0, 65536, 0xa5)?;
    direct.flush()?;
    ensure!(direct.holds(0, 65536, 0xa5)?, "reads wrong");
    drop(direct);
    daemon.stop()?;
    // The last close, at the end of the daemon, has really unmounted the file system.
    let again = Mount::existing(disk.node(), &scene.dir().join("again"))?;
    let begin = fs::read(again.point().join("disk.img"))?;
    ensure!(begin[..65536].iter().all(|&byte| byte == 0xa5), "the file has lost its data");
    again.unmount()
}

fn f26_a_slow_backend_is_waited_for_without_an_error(scene: &Scene) -> Result<()> {
    // The disk delays each request by 300 ms. Each write succeeds after 300 ms at least and 2 s at most.
    let mapped = Mapped::on_ram(16)?;
    let (daemon, _, direct) = one(scene, &format!("block: {}, direct: true", mapped.node().display()))?;
    mapped.become_all(Target::Delay(Duration::from_millis(300)))?;
    for number in 0..3 {
        let begin = std::time::Instant::now();
        direct.write(number * 65536, 65536, 0xa5)?;
        let took = begin.elapsed();
        expect(took >= Duration::from_millis(300), || format!("a request of 300 ms took {took:?}"))?;
        expect_within("a request of 300 ms", took, Duration::from_secs(2))?;
    }
    ensure!(direct.holds(0, 3 * 65536, 0xa5)?, "reads wrong");
    mapped.become_all(Target::Linear)?;
    drop(direct);
    daemon.stop().map(drop)
}

fn f26_a_stalled_backend_holds_no_tokens_of_its_group(scene: &Scene) -> Result<()> {
    // Two devices share 200 operations/s. While the backend of `stalled` answers no request, `other` gets all
    // 200. After the backend has resumed, the load on `stalled` ends without an error.
    let mapped = Mapped::on_ram(16)?;
    let daemon = scene.start(&format!(
        "version: 1\n\
         groups:\n  g: {{ limits: {{ iops-total: 200 }} }}\n\
         devices:\n  stalled: {{ backend: {{ block: {}, direct: true }}, group: g }}\n  \
           other: {{ backend: {{ null: 1GiB }}, group: g }}\n",
        mapped.node().display()
    ))?;
    mapped.suspend()?;
    let stalled = scene.device("stalled")?;
    let stalled_load = load(scene, WRITES, &stalled)?;
    let other = scene.device("other")?;
    let load = load(scene, READS, &other)?;
    let begin = now_ms()? + 1000;
    let_run(5);
    load.stop()?;
    let in_flight = sysfs::in_flight(&stalled.disk)?;
    ensure!(in_flight >= 30, "{in_flight} requests in flight on the stalled device");
    mapped.resume()?;
    let_run(1);
    stalled_load.stop().context("the load of the stalled device")?;
    let rate = completions(scene, &other)?.rate(begin, begin + 4000);
    expect_near("beside a stalled device", rate, 200.0, 0.02)?;
    daemon.stop().map(drop)
}

fn f27_links_of_others_and_odd_nodes_are_refused(scene: &Scene) -> Result<()> {
    // Refused with exit code 3 and the path: a link that belongs to an unprivileged user, a socket, two
    // terminals, a disk of a ublk-throttle daemon.
    let sound = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 1MiB } }\n")?;
    let own_disk = scene.device("d")?.node;
    let target = scene.dir().join("precious");
    fs::write(&target, vec![0; 1 << 20])?;
    let link = scene.dir().join("link");
    symlink(&target, &link)?;
    nix::unistd::fchownat(
        nix::fcntl::AT_FDCWD,
        &link,
        Some(65534.into()),
        Some(65534.into()),
        nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
    )?;
    let socket = scene.dir().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let wrong: [(&str, &Path); 5] = [
        ("file", &link),
        ("file", &socket),
        ("file", Path::new("/dev/console")),
        ("block", Path::new("/dev/ptmx")),
        ("block", &own_disk),
    ];
    expect_all(wrong.map(|(kind, path)| {
        let config = format!("version: 1\ndevices:\n  wrong: {{ backend: {{ {kind}: {} }} }}\n", path.display());
        scene.write("wrong.yaml", &config)?;
        let words = ["run", "wrong.yaml", "--socket", "second.sock", "--state-dir", "second"];
        let told = path.display().to_string();
        scene.run(&words)?.expect_code(3)?.expect_stderr(&["error[E-BACKING]", &told]).map(drop)
    }))?;
    // A link that belongs to root is followed.
    let own_link = scene.dir().join("own-link");
    symlink(&target, &own_link)?;
    sound.stop()?;
    one(scene, &format!("file: {}", own_link.display()))?.0.stop().map(drop)
}

fn f28_a_file_in_use_is_refused_to_a_second_writer(scene: &Scene) -> Result<()> {
    // A second daemon on the same file is refused with exit code 3, under each of two hard links; the first
    // device is not affected.
    let path = scene.dir().join("disk.img");
    let other_name = scene.dir().join("other-name.img");
    let (daemon, _, direct) = one(scene, &format!("file: {}, size: 4MiB, create: true", path.display()))?;
    fs::hard_link(&path, &other_name)?;
    for path in [&path, &other_name] {
        let config = format!("version: 1\ndevices:\n  second: {{ backend: {{ file: {} }} }}\n", path.display());
        scene.write("second.yaml", &config)?;
        let words = ["run", "second.yaml", "--socket", "second.sock", "--state-dir", "second"];
        let told = path.display().to_string();
        scene.run(&words)?.expect_code(3)?.expect_stderr(&["error[E-BACKING]", &told, "lock"])?;
    }
    direct.write(0, 65536, 0xa5)?;
    ensure!(direct.holds(0, 65536, 0xa5)?, "the first device is hurt");
    drop(direct);
    daemon.stop().map(drop)
}

fn f29_a_block_larger_than_the_wanted_one_is_told_with_both_numbers(scene: &Scene) -> Result<()> {
    // A device on a disk with blocks of 4096 bytes has such blocks; `block-size: 512` is refused.
    let path = scene.dir().join("disk.img");
    File::create(&path)?.set_len(16 * MIB)?;
    let disk = LoopDisk::new(&path, 4096)?;
    let (daemon, device, direct) = one(scene, &format!("block: {}", disk.node().display()))?;
    let block = sysfs::number(&device.disk, "queue/logical_block_size")?;
    ensure!(block == 4096, "a disk of 4096-byte blocks became one of {block}");
    direct.write(4096, 4096, 0xa5)?;
    ensure!(direct.holds(4096, 4096, 0xa5)?, "reads wrong");
    drop(direct);
    daemon.stop()?;
    let config =
        format!("version: 1\ndevices:\n  d: {{ backend: {{ block: {} }}, block-size: 512 }}\n", disk.node().display());
    scene.write("wrong.yaml", &config)?;
    scene.ask(&["run", "wrong.yaml"])?.expect_code(3)?.expect_stderr(&["512", "4096"]).map(drop)
}

fn f30_a_failed_flush_is_told_and_the_next_epoch_is_sound(scene: &Scene) -> Result<()> {
    // A buffered backend (`direct: false`) whose disk fails the write-back: the fsync on the device gets EIO.
    // Once the disk is sound, the next write and fsync succeed and the data is on the disk.
    let mapped = Mapped::on_ram(16)?;
    let (daemon, _, direct) = one(scene, &format!("block: {}, direct: false", mapped.node().display()))?;
    direct.write(0, 65536, 0xa5)?;
    direct.flush().context("on a sound disk")?;
    mapped.become_all(Target::Error)?;
    direct.write(65536, 65536, 0xa6).context("into the page cache below")?;
    expect_errno("fsync of what cannot be written back", direct.flush(), EIO)?;
    mapped.become_all(Target::Linear)?;
    direct.write(65536, 65536, 0xa7)?;
    direct.flush().context("after the disk became sound")?;
    drop(direct);
    daemon.stop()?;
    let below = Direct::open(mapped.node())?;
    ensure!(below.holds(0, 65536, 0xa5)? && below.holds(65536, 65536, 0xa7)?, "the disk below lacks flushed data");
    Ok(())
}

fn f68_a_failed_write_is_told_to_its_writer_by_default(scene: &Scene) -> Result<()> {
    // By default the backend bypasses the page cache, so the write itself gets EIO. Through the page cache the
    // write would succeed, and only a later flush could report the error, or none.
    let mapped = Mapped::on_ram(16)?;
    let (daemon, _, direct) = one(scene, &format!("block: {}", mapped.node().display()))?;
    ensure!(scene.listed("d")?["direct"] == true, "`list` does not say that it is direct");
    direct.write(0, 65536, 0xa5)?;
    mapped.become_all(Target::Error)?;
    expect_errno("write to a disk that fails writes", direct.write(0, 65536, 0xa6), EIO)?;
    mapped.become_all(Target::Linear)?;
    ensure!(direct.holds(0, 65536, 0xa5)?, "what was there before reads wrong");
    drop(direct);
    daemon.stop().map(drop)
}

fn f68_a_file_is_direct_where_its_file_system_can(scene: &Scene) -> Result<()> {
    // ext4 on a disk with blocks of 512 bytes supports direct I/O; tmpfs does not report the support. The
    // device has blocks of 512 bytes in each case.
    let disk = RamDisk::new(64)?;
    let mount = Mount::new(disk.node(), &scene.dir().join("mount"))?;
    let tmpfs = Tmpfs::new(&scene.dir().join("tmpfs"), 16)?;
    for (point, said, is_direct) in [
        (mount.point(), "", true),
        (mount.point(), ", direct: auto", true),
        (mount.point(), ", direct: false", false),
        (tmpfs.point(), "", false),
    ] {
        let file = point.join("d.img");
        let (daemon, device, direct) =
            one(scene, &format!("file: {}, size: 8MiB, create: true{said}", file.display()))?;
        let what = format!("{}{said}", file.display());
        let (status, block) = (scene.listed("d")?, sysfs::number(&device.disk, "queue/logical_block_size")?);
        ensure!(status["direct"] == is_direct, "{what}: direct is {}", status["direct"]);
        ensure!(block == 512, "{what}: blocks of {block} bytes");
        direct.write(512, 1024, 0xa5)?;
        ensure!(direct.holds(512, 1024, 0xa5)? && direct.holds(0, 512, 0)?, "{what}: reads wrong");
        drop(direct);
        daemon.stop()?;
    }
    mount.unmount()
}

fn f31_a_size_that_is_no_multiple_of_the_block_is_cut_and_told(scene: &Scene) -> Result<()> {
    // A file of 1 MiB and 100 bytes becomes a disk of 1 MiB, with the warning W-SIZE. A file of one sector is
    // a disk of one sector; a file of 0 or 511 bytes is refused.
    let file = |name: &str, length: u64| -> Result<PathBuf> {
        let path = scene.dir().join(name);
        OpenOptions::new().create(true).truncate(true).write(true).open(&path)?.set_len(length)?;
        Ok(path)
    };
    let odd = file("odd", MIB + 100)?;
    let (daemon, device, direct) = one(scene, &format!("file: {}", odd.display()))?;
    let size = sysfs::number(&device.disk, "size")? * 512;
    ensure!(size == MIB, "{size} bytes of a file of {}", MIB + 100);
    ensure!(daemon.log()?.contains("W-SIZE"), "nothing is told:\n{}", daemon.log()?);
    drop(direct);
    daemon.stop()?;
    let (daemon, device, _) = one(scene, &format!("file: {}", file("sector", 512)?.display()))?;
    ensure!(sysfs::number(&device.disk, "size")? == 1, "one sector is no disk of one sector");
    daemon.stop()?;
    for length in [0, 511] {
        let config =
            format!("version: 1\ndevices:\n  d: {{ backend: {{ file: {} }} }}\n", file("short", length)?.display());
        scene.write("wrong.yaml", &config)?;
        scene.ask(&["run", "wrong.yaml"])?.expect_code(3)?.expect_stderr(&["error[E-BACKING]"])?;
    }
    Ok(())
}
