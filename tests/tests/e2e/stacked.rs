//! Stacked devices: dm, loop and btrfs above a ublk disk or below a backend; a second node of a disk, a
//! second daemon, and disks that the host uses.

use std::fs::{self, File, OpenOptions};
use std::io::{IoSlice, Read, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use ublk_throttle_tests::daemon::Daemon;
use ublk_throttle_tests::disks::{self, FileSystem, LoopDisk, Mount, RamDisk};
use ublk_throttle_tests::export::Export;
use ublk_throttle_tests::fio::Job;
use ublk_throttle_tests::mapper::Mapped;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::{Device, Scene};
use ublk_throttle_tests::wait;

use crate::measure::{Unmeasured, expect_near};
use crate::{Case, cases, has_feature};

const MIB: usize = 1 << 20;

pub(crate) fn cases() -> Vec<Case> {
    let dm = cases![[Need::Ublk, Need::Mapper, Need::Ext4];
        f60_sigterm_writes_back_ext4_on_a_dm_target,
        f64_a_backend_above_a_device_of_ours_is_refused_through_dm,
    ];
    let btrfs = cases![[Need::Ublk, Need::Btrfs];
        f60_sigterm_writes_back_btrfs,
        f61_del_and_reload_are_refused_while_btrfs_is_mounted,
        f64_a_file_on_a_btrfs_above_a_device_of_ours_is_refused,
    ];
    let loops = cases![[Need::Ublk, Need::Loop, Need::Ext4, Need::UtilLinux];
        f60_sigterm_writes_back_ext4_on_a_loop_device,
        f60_forced_del_writes_back_ext4_on_a_loop_device,
        f61_del_is_refused_while_a_loop_device_stands_on_the_device,
        f62_zeroes_are_written_over_dirty_pages_of_a_buffered_block_backend,
        f64_a_file_that_a_loop_device_serves_is_refused,
    ];
    let shared = cases![[Need::Ublk, Need::Loop, Need::Ext4, Need::UtilLinux, Need::RamDisk, Need::Mapper];
        f90_a_disk_or_file_that_the_host_uses_is_refused_to_a_writer_that_shares_it,
    ];
    let plain = cases![[Need::Ublk];
        f61_del_is_refused_while_the_device_is_open_by_another_node,
        f61_del_is_refused_while_the_device_is_only_mapped,
        f61_del_is_refused_while_a_descriptor_of_the_device_is_in_a_socket,
        f63_a_second_daemon_does_not_take_a_stable_name,
    ];
    let exports =
        cases![[Need::Ublk, Need::Exports]; f61_del_and_reload_are_refused_while_the_kernel_exports_the_device];
    let own = cases![[Need::Ublk, Need::OwnMachine]; f65_a_flush_waits_for_a_thread_of_the_kernel];
    dm.into_iter().chain(btrfs).chain(loops).chain(shared).chain(plain).chain(exports).chain(own).collect()
}

/// A configuration with a device `d` on a file of 256 MiB, which the daemon creates.
fn config(scene: &Scene) -> String {
    let file = scene.dir().join("d.img");
    format!("version: 1\ndevices:\n  d: {{ backend: {{ file: {}, size: 256MiB, create: true }} }}\n", file.display())
}

/// 24 MiB of pseudo-random bytes, which no file system contains by chance.
fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    std::iter::repeat_with(next).take(24 * MIB).collect()
}

/// The stacked device between the device and the file system.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Between {
    Nothing,
    Mapper,
    Loop,
}

fn f60_sigterm_writes_back_ext4_on_a_dm_target(scene: &Scene) -> Result<()> {
    // 24 MiB are dirty in the page cache of the file system. The table of mounts has the device number of
    // dm-0, not that of the ublk device.
    is_written_back(scene, FileSystem::Ext4, Between::Mapper, sigterm)
}

fn f60_sigterm_writes_back_ext4_on_a_loop_device(scene: &Scene) -> Result<()> {
    // A loop device opens the disk without a claim, so an exclusive open (O_EXCL) of the disk succeeds beside it.
    is_written_back(scene, FileSystem::Ext4, Between::Loop, sigterm)
}

fn f60_forced_del_writes_back_ext4_on_a_loop_device(scene: &Scene) -> Result<()> {
    is_written_back(scene, FileSystem::Ext4, Between::Loop, |scene, daemon| {
        scene.ask(&["del", "d", "--force"])?.expect_code(0)?;
        sigterm(scene, daemon)
    })
}

fn f60_sigterm_writes_back_btrfs(scene: &Scene) -> Result<()> {
    // The table of mounts has an anonymous device number for btrfs, not the number of the device.
    is_written_back(scene, FileSystem::Btrfs, Between::Nothing, sigterm)
}

fn sigterm(_: &Scene, daemon: Daemon) -> Result<()> {
    daemon.stop().map(drop)
}

/// Writes 24 MiB to a file system above the device, removes the device while the data is dirty, and expects
/// the data on the disk.
fn is_written_back(
    scene: &Scene,
    kind: FileSystem,
    between: Between,
    remove: impl FnOnce(&Scene, Daemon) -> Result<()>,
) -> Result<()> {
    let daemon = scene.start(&config(scene))?;
    let device = scene.device("d")?;
    let mapped = (between == Between::Mapper).then(|| Mapped::new(&device.node)).transpose()?;
    let looped = (between == Between::Loop).then(|| LoopDisk::new(&device.node, 512)).transpose()?;
    let above = mapped.as_ref().map(Mapped::node).or(looped.as_ref().map(LoopDisk::node));
    let point = scene.dir().join("mount");
    let mount = Mount::new_of(kind, above.unwrap_or(&device.node), &point)?;
    fs::write(point.join("file"), pattern())?;
    remove(scene, daemon)?;
    // The disk is gone. Drop the page cache of the file system, so that the data can come from the disk only.
    mount.unmount()?;
    drop((mapped, looped));
    let daemon = scene.start(&config(scene))?;
    let mount = Mount::existing_of(kind, &scene.device("d")?.node, &point)?;
    let found = fs::read(point.join("file")).context("the file is gone")?;
    ensure!(found == pattern(), "the file has {} bytes, and not those that were written", found.len());
    mount.unmount()?;
    daemon.stop().map(drop)
}

fn f61_del_and_reload_are_refused_while_btrfs_is_mounted(scene: &Scene) -> Result<()> {
    let daemon = scene.start(&config(scene))?;
    let device = scene.device("d")?;
    let point = scene.dir().join("mount");
    let mount = Mount::new_of(FileSystem::Btrfs, &device.node, &point)?;
    let words = ["error[E-BUSY]", &point.display().to_string()];
    scene.ask(&["del", "d"])?.expect_code(5)?.expect_stderr(&words)?;
    fs::write(daemon.config(), "version: 1\ndevices:\n  other: { backend: { null: 1MiB } }\n")?;
    scene.ask(&["reload"])?.expect_code(5)?.expect_stderr(&words)?;
    ensure!(scene.devices()?.len() == 1, "a reload that was refused has made a device");
    fs::write(point.join("file"), "written after the refusals")?;
    mount.unmount()?;
    scene.ask(&["reload"])?.expect_code(0)?;
    daemon.stop().map(drop)
}

fn f61_del_is_refused_while_a_loop_device_stands_on_the_device(scene: &Scene) -> Result<()> {
    // A loop device opens its backing file inside the kernel, so no process has the disk open. `del` is
    // refused whether the loop device is mounted or not.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 64MiB } }\n")?;
    let device = scene.device("d")?;
    let above = LoopDisk::new(&device.node, 512)?;
    let name = above.node().display().to_string();
    scene.ask(&["del", "d"])?.expect_code(5)?.expect_stderr(&["error[E-BUSY]", &name])?;
    let mount = Mount::new(above.node(), &scene.dir().join("mount"))?;
    let point = mount.point().display().to_string();
    scene.ask(&["del", "d"])?.expect_code(5)?.expect_stderr(&["error[E-BUSY]", &name, &point])?;
    mount.unmount()?;
    drop(above);
    scene.ask(&["del", "d"])?.expect_code(0)?;
    daemon.stop().map(drop)
}

fn f61_del_and_reload_are_refused_while_the_kernel_exports_the_device(scene: &Scene) -> Result<()> {
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 16MiB } }\n")?;
    let node = scene.device("d")?.node;
    let nothing = scene.write("nothing.yaml", "version: 1\n")?;
    let nothing = nothing.to_str().context("path")?;
    let exports: [(&str, fn(&str, &Path) -> Result<Export>); 2] =
        [("exported by nvmet (e2e, namespace 1)", Export::nvmet), ("exported by LIO (iblock_0/e2e)", Export::lio)];
    for (words, make) in exports {
        let export = make("e2e", &node).context(words)?;
        for command in [&["del", "d"][..], &["reload", nothing]] {
            scene.ask(command)?.expect_code(5)?.expect_stderr(&["error[E-BUSY]", words])?;
        }
        drop(export);
    }
    scene.ask(&["del", "d"])?.expect_code(0)?;
    daemon.stop().map(drop)
}

fn f61_del_is_refused_while_the_device_is_open_by_another_node(scene: &Scene) -> Result<()> {
    // A container may have a node with the number of the device and a different name.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 16MiB } }\n")?;
    let device = scene.device("d")?;
    let node = Node::like(scene, &device)?;
    let opener = File::open(&node.0)?;
    let pid = format!("(pid {})", std::process::id());
    scene.ask(&["del", "d"])?.expect_code(5)?.expect_stderr(&["error[E-BUSY]", &pid])?;
    drop(opener);
    scene.ask(&["del", "d"])?.expect_code(0)?;
    daemon.stop().map(drop)
}

#[allow(unsafe_code, reason = "a mapping, which no code reads")]
fn f61_del_is_refused_while_the_device_is_only_mapped(scene: &Scene) -> Result<()> {
    // A mapping keeps the disk open after close(2).
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 16MiB } }\n")?;
    let disk = File::open(scene.device("d")?.node)?;
    let length = NonZeroUsize::new(4096).context("not zero")?;
    // SAFETY: a new mapping at an address that the kernel picks.
    let mapping = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &disk, 0) }?;
    drop(disk);
    let pid = format!("(pid {})", std::process::id());
    let refused = scene.ask(&["del", "d"])?;
    // SAFETY: the mapping from above, without a reference into it.
    unsafe { munmap(mapping, length.get()) }?;
    refused.expect_code(5)?.expect_stderr(&["error[E-BUSY]", "mapped by e2e", &pid])?;
    scene.ask(&["del", "d"])?.expect_code(0)?;
    daemon.stop().map(drop)
}

fn f61_del_is_refused_while_a_descriptor_of_the_device_is_in_a_socket(scene: &Scene) -> Result<()> {
    // /proc does not show a descriptor between sendmsg and recvmsg. Only TRY_STOP detects it, because the
    // kernel counts the openers of a disk.
    let daemon = scene.start(
        "version: 1\n\
         devices:\n  d: { backend: { memory: 16MiB }, limits: { iops-total: 50 } }\n  e: { backend: { null: 1MiB } }\n",
    )?;
    if !has_feature(scene, "SAFE_STOP_DEV")? {
        bail!(Unmeasured::Kernel("this kernel stops a device without a look at its openers".into()));
    }
    let device = scene.device("d")?;
    let disk = File::open(&device.node)?;
    let (end, other_end) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::empty())?;
    let (byte, descriptor) = ([IoSlice::new(b"x")], [disk.as_raw_fd()]);
    let message = [ControlMessage::ScmRights(&descriptor)];
    sendmsg::<()>(end.as_raw_fd(), &byte, &message, MsgFlags::empty(), None)?;
    drop(disk);
    let refused = scene.ask(&["del", "d"])?.expect_code(5)?;
    refused.expect_stderr(&["error[E-BUSY]", "open, by no process that /proc shows"])?;
    // The refusal leaves the device live and limited.
    ensure!(scene.listed("d")?["state"] == "live", "{}", scene.listed("d")?);
    let job = Job::new("iops-limit-is-met-to-one-percent").set("DEVICE", device.node()).set("RW", "randread");
    let report = scene.fio(job.set("BLOCK", 4096).set("DEPTH", 4).set("SECONDS", 2))?.finish(Duration::from_secs(9))?;
    expect_near("operations a second after the refusal", report.only()?.iops(4096), 50.0, 0.02)?;
    // A forced removal joins a removal whose TRY_STOP the kernel refuses. Both succeed without waiting for the
    // opener; the id stays reserved.
    let waiting = scene.begin_ask(&["del", "d"])?;
    std::thread::sleep(Duration::from_millis(600));
    let forced = scene.ask(&["del", "d", "--force"])?.expect_code(0)?;
    ensure!(forced.stderr.contains("stays reserved") || forced.stdout.contains("stays reserved"), "{forced}");
    waiting.finish(Duration::from_secs(5))?.expect_code(0)?;
    drop((end, other_end));
    // TRY_STOP of a device without an opener succeeds.
    scene.ask(&["del", "e"])?.expect_code(0)?;
    daemon.stop().map(drop)
}

/// A second node of a device, removed on drop.
struct Node(PathBuf);

impl Node {
    fn like(scene: &Scene, device: &Device) -> Result<Self> {
        let number = fs::metadata(&device.node)?.rdev();
        let path = PathBuf::from(format!("/dev/another-node-{}", std::process::id()));
        let (major, minor) = (nix::sys::stat::major(number).to_string(), nix::sys::stat::minor(number).to_string());
        scene.tool("mknod", &[path.to_str().context("a path of ASCII")?, "b", &major, &minor])?;
        ensure!(fs::metadata(&path)?.file_type().is_block_device(), "mknod has made no block device");
        Ok(Self(path))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn f62_zeroes_are_written_over_dirty_pages_of_a_buffered_block_backend(scene: &Scene) -> Result<()> {
    // Over dirty pages fallocate(2) needs a claim on the disk, and the descriptors of the lanes have none.
    let file = scene.dir().join("below.img");
    File::create(&file)?.set_len(32 * MIB as u64)?;
    let below = LoopDisk::new(&file, 512)?;
    let daemon = scene.start(&format!(
        "version: 1\ndevices:\n  d: {{ backend: {{ block: {}, direct: false }} }}\n",
        below.node().display()
    ))?;
    let device = scene.device("d")?;
    scene.tool("dd", &["if=/dev/urandom", &format!("of={}", device.node()), "bs=1M", "count=8", "oflag=direct"])?;
    scene.tool("blkdiscard", &["--zeroout", "--length", "8M", device.node()])?;
    let mut found = vec![0xff; 8 * MIB];
    File::open(&device.node)?.read_exact(&mut found)?;
    ensure!(found.iter().all(|byte| *byte == 0), "the range is not zero");
    daemon.stop().map(drop)
}

fn f63_a_second_daemon_does_not_take_a_stable_name(scene: &Scene) -> Result<()> {
    // A second daemon with its own state directory has a device of the same name. It is refused, and the
    // stable name still leads to the device of the first daemon.
    let config = "version: 1\ndevices:\n  v: { backend: { memory: 1MiB } }\n";
    let daemon = scene.start(config)?;
    let device = scene.device("v")?;
    let link = Path::new("/dev/ublk-throttle/v");
    let before = fs::read_link(link)?;
    let second = scene.write("second.yaml", config)?;
    let place = |name: &str| scene.dir().join(name).display().to_string();
    let words =
        ["run", &second.display().to_string(), "--socket", &place("second.sock"), "--state-dir", &place("second")];
    let owner = format!("(pid {})", daemon.pid());
    scene.run(&words)?.expect_code(5)?.expect_stderr(&["error[E-EXISTS]", device.node(), &owner])?;
    ensure!(fs::read_link(link)? == before, "{} leads elsewhere now", link.display());
    daemon.stop().map(drop)
}

fn f64_a_backend_above_a_device_of_ours_is_refused_through_dm(scene: &Scene) -> Result<()> {
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 16MiB } }\n")?;
    let device = scene.device("d")?;
    let above = Mapped::new(&device.node)?;
    let node = above.node().display().to_string();
    let refused = scene.ask(&["add", "x", "--block", &node])?.expect_code(3)?;
    refused.expect_stderr(&["error[E-BACKING]", &node, "on a ublk device", &device.disk])?;
    drop(above);
    daemon.stop().map(drop)
}

fn f64_a_file_on_a_btrfs_above_a_device_of_ours_is_refused(scene: &Scene) -> Result<()> {
    // The add is refused before `--create` makes the file.
    let daemon = scene.start(&config(scene))?;
    let device = scene.device("d")?;
    let mount = Mount::new_of(FileSystem::Btrfs, &device.node, &scene.dir().join("mount"))?;
    let file = mount.point().join("x.img");
    let path = file.display().to_string();
    let refused = scene.ask(&["add", "x", "--file", &path, "--size", "1MiB", "--create"])?.expect_code(3)?;
    refused.expect_stderr(&["error[E-BACKING]", &path, "on a ublk device", &device.disk])?;
    ensure!(!file.exists(), "{path} was made");
    mount.unmount()?;
    daemon.stop().map(drop)
}

fn f64_a_file_that_a_loop_device_serves_is_refused(scene: &Scene) -> Result<()> {
    // A loop device takes no lock on its backing file, so the daemon's own lock does not detect it.
    let file = scene.dir().join("served.img");
    File::create(&file)?.set_len(MIB as u64)?;
    let served = LoopDisk::new(&file, 512)?;
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?;
    let path = file.display().to_string();
    let refused = scene.ask(&["add", "x", "--file", &path])?.expect_code(3)?;
    refused.expect_stderr(&["error[E-BACKING]", &path, &served.node().display().to_string()])?;
    drop(served);
    scene.ask(&["add", "x", "--file", &path])?.expect_code(0)?;
    daemon.stop().map(drop)
}

fn f90_a_disk_or_file_that_the_host_uses_is_refused_to_a_writer_that_shares_it(scene: &Scene) -> Result<()> {
    // `shared: true` permits further devices and hosts on one disk, not use by this host: mount, swap, dm,
    // and a loop device, which takes no claim. The refusal names each user.
    let disk = RamDisk::new(16)?;
    let whole = disk.node().display().to_string();
    disks::partition(disk.node())?;
    scene.tool("blockdev", &["--rereadpt", &whole])?;
    let first = PathBuf::from(format!("{whole}p1"));
    let second = format!("{whole}p2");
    wait::until("second partition", Duration::from_secs(5), || Ok(Path::new(&second).exists().then_some(())))?;
    let first_node = first.display().to_string();
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?;
    let refused = |words: &[&str], told: &[&str]| -> Result<()> {
        for shared in [&[][..], &["--shared"]] {
            let words = [&["add", "x"][..], words, shared].concat();
            let told = [&["error[E-BACKING]", words[3]][..], told].concat();
            scene.ask(&words)?.expect_code(3)?.expect_stderr(&told)?;
        }
        Ok(())
    };
    let taken = |name: &str, words: &[&str]| -> Result<()> {
        scene.ask(&[&["add", name][..], words].concat())?.expect_code(0)?;
        scene.ask(&["del", name])?.expect_code(0).map(drop)
    };

    let mount = Mount::new(&first, &scene.dir().join("mount"))?;
    let point = format!("mounted at {}", mount.point().display());
    refused(&["--block", &first_node], &[&point])?;
    refused(&["--block", &whole], &[&point])?;
    taken("beside", &["--block", &second, "--shared"])?;
    taken("reader", &["--block", &whole, "--read-only"])?;
    mount.unmount()?;

    scene.tool("mkswap", &[&first_node])?;
    scene.tool("swapon", &[&first_node])?;
    let swapped = refused(&["--block", &whole], &[&format!("swap on {first_node}")]);
    scene.tool("swapoff", &[&first_node])?;
    swapped?;

    let mapped = Mapped::new(&first)?;
    refused(&["--block", &whole], &[&format!("held by {}", mapped.node().display())])?;
    drop(mapped);

    let above = LoopDisk::new(&first, 512)?;
    let held = format!("held by {}", above.node().display());
    refused(&["--block", &first_node], &[&held])?;
    refused(&["--block", &whole], &[&held])?;
    drop(above);

    let file = scene.dir().join("served.img");
    File::create(&file)?.set_len(MIB as u64)?;
    let served = LoopDisk::new(&file, 512)?;
    let path = file.display().to_string();
    refused(&["--file", &path], &[&served.node().display().to_string()])?;
    drop(served);

    for (name, words) in [("one", ["--block", &whole]), ("two", ["--block", &whole]), ("file", ["--file", &path])] {
        scene.ask(&[&["add", name, "--shared"][..], &words].concat())?.expect_code(0)?;
    }
    daemon.stop().map(drop)
}

fn f65_a_flush_waits_for_a_thread_of_the_kernel(scene: &Scene) -> Result<()> {
    // io_uring needs a kernel thread for the first flush of a queue, and the control group of the daemon has
    // no room for a thread. The start has made such a thread for one of the two queues at most, and each of
    // the two flushes comes from a CPU of its own, hence through a queue of its own.
    let daemon = scene.start(&config(scene).replace("create: true }", "create: true }, queues: 2"))?;
    let device = scene.device("d")?;
    let group = ControlGroup::of(daemon.pid())?;
    group.set("pids.max", &group.get("pids.current")?)?;
    let flush = |cpu: &str| {
        let of = format!("of={}", device.node());
        scene.begin_tool("taskset", &["--cpu-list", cpu, "dd", "if=/dev/zero", &of, "bs=4k", "count=1", "conv=fsync"])
    };
    let flushes = [flush("0")?, flush("1")?];
    daemon.wait_for_log("W-THREADS", Duration::from_secs(5))?;
    group.set("pids.max", "max")?;
    for flush in flushes {
        flush.finish(Duration::from_secs(5))?.expect_code(0)?;
    }
    ensure!(scene.listed("d")?["errors"] == 0, "a request has failed");
    daemon.stop().map(drop)
}

/// A control group with one process, removed on drop.
struct ControlGroup(PathBuf);

impl ControlGroup {
    fn of(pid: u32) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        if !root.join("cgroup.controllers").exists() {
            let status =
                std::process::Command::new("mount").args(["-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"]).status()?;
            ensure!(status.success(), "cannot mount cgroup2: {status}");
        }
        OpenOptions::new().write(true).open(root.join("cgroup.subtree_control"))?.write_all(b"+pids")?;
        let group = Self(root.join(format!("e2e-{pid}")));
        fs::create_dir(&group.0)?;
        group.set("cgroup.procs", &pid.to_string())?;
        Ok(group)
    }

    fn set(&self, name: &str, value: &str) -> Result<()> {
        fs::write(self.0.join(name), value).with_context(|| format!("{name} = {value}"))
    }

    fn get(&self, name: &str) -> Result<String> {
        Ok(fs::read_to_string(self.0.join(name))?.trim().to_owned())
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        if let Ok(pids) = fs::read_to_string(self.0.join("cgroup.procs")) {
            for pid in pids.lines() {
                let _ = fs::write("/sys/fs/cgroup/cgroup.procs", pid);
            }
        }
        let _ = fs::remove_dir(&self.0);
    }
}
