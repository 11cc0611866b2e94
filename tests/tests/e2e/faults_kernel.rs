//! Faults of the kernel and of processes: holders of a disk, signals, missing drivers, taken ids,
//! exhausted limits.
//!
//! Each trial begins with the number of its row in `FAULTS.md`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::disks::Mount;
use ublk_throttle_tests::mapper::Mapped;
use ublk_throttle_tests::needs::{self, Need};
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::setting::Setting;
use ublk_throttle_tests::sysfs;
use ublk_throttle_tests::wait;

use crate::measure::{Unmeasured, expect_in_time, expect_within};
use crate::{Case, WRITES, cases, has_feature, load};

const MIB: u64 = 1 << 20;

/// Bound of the answer to every command, in any state of a device or of the daemon.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

pub(crate) fn cases() -> Vec<Case> {
    let plain = cases![[Need::Ublk];
        f07_commands_to_a_stopped_daemon_end_with_7,
        f13_what_the_kernel_lacks_is_said_and_the_rest_works,
        f79_a_disk_gets_smaller_only_when_told,
        f14_commands_of_an_unprivileged_user_are_refused,
        f18_a_node_that_does_not_appear_is_told_and_rolled_back,
        f20_out_of_descriptors_an_add_is_refused_and_devices_serve_on,
    ];
    let own = cases![[Need::Ublk, Need::OwnMachine];
        f12_without_the_driver_or_its_rings_run_says_what_to_do,
        f84_an_add_that_the_driver_refuses_to_root_is_not_told_to_run_as_root,
    ];
    let fio = cases![[Need::Ublk, Need::Fio]; f09_a_daemon_that_aborts_under_load_ends_every_request];
    let rublk = cases![[Need::Ublk, Need::Rublk]; f16_an_id_of_other_software_is_refused_and_another_one_picked];
    let mapper = cases![[Need::Ublk, Need::Mapper];
        f03_del_of_a_disk_that_is_swap_or_below_another_disk_is_refused,
    ];
    let ext4 = cases![[Need::Ublk, Need::Ext4]; f03_forced_del_of_a_mounted_device_tells_who_keeps_its_id];
    plain.into_iter().chain(own).chain(fio).chain(rublk).chain(mapper).chain(ext4).collect()
}

fn f03_del_of_a_disk_that_is_swap_or_below_another_disk_is_refused(scene: &Scene) -> Result<()> {
    // Exit 5 with the kind of holder, and I/O continues. Without a holder `del` succeeds.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 16MiB } }\n")?;
    let device = scene.device("d")?;
    scene.tool("mkswap", &[device.node()])?;
    scene.tool("swapon", &[device.node()])?;
    let refused = scene.ask(&["del", "d"])?;
    scene.tool("swapoff", &[device.node()])?;
    refused.expect_code(5)?.expect_stderr(&["error[E-BUSY]", "swap"])?;

    let mapped = Mapped::new(&device.node)?;
    let above = Direct::open(mapped.node())?;
    let holder = mapped.node().display().to_string();
    let refused = scene.ask(&["del", "d"])?.expect_code(5)?.expect_stderr(&["error[E-BUSY]", &holder])?;
    expect_within("the refusal", refused.took, Duration::from_secs(1))?;
    above.write(0, 65536, 0xa5).context("through the holder, after the refusal")?;
    ensure!(above.holds(0, 65536, 0xa5)?, "the holder reads wrong");
    drop((above, mapped));
    scene.ask(&["del", "d"])?.expect_code(0)?;
    ensure!(!device.node.exists(), "{} is still there", device.node());
    daemon.stop().map(drop)
}

fn f03_forced_del_of_a_mounted_device_tells_who_keeps_its_id(scene: &Scene) -> Result<()> {
    // Exit 0 within the limit. The disk is gone; its id stays with the mount, and `del` names both.
    // After the unmount the id is free.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 32MiB } }\n")?;
    let device = scene.device("d")?;
    let mount = Mount::new(&device.node, &scene.dir().join("mount"))?;
    let point = mount.point().display().to_string();
    let del = scene.ask(&["del", "d", "--force"])?.expect_code(0)?;
    expect_within("del --force of a mounted device", del.took, ANSWER_LIMIT)?;
    let told = format!("{}{}", del.stdout, del.stderr);
    let id = format!("id {}", device.id);
    ensure!(told.contains(&id) && told.contains(&point), "who keeps {id} is not told:\n{told}");
    ensure!(!device.node.exists(), "{} is still there", device.node());
    scene.tool("umount", &[&point])?;
    wait::until("a free id", Duration::from_secs(5), || {
        Ok((!Path::new(&format!("/sys/class/ublk-char/ublkc{}", device.id)).exists()).then_some(()))
    })?;
    daemon.stop().map(drop)
}

fn f07_commands_to_a_stopped_daemon_end_with_7(scene: &Scene) -> Result<()> {
    // During SIGSTOP each command gives up within 5 s with exit 7; after SIGCONT commands work
    // again.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?;
    daemon.signal(Signal::SIGSTOP)?;
    let commands: [&[&str]; 2] = [&["list"], &["del", "d"]];
    for words in commands {
        let outcome = scene.ask(words)?;
        let outcome = outcome.expect_code(7)?.expect_stderr(&["error[E-TIMEOUT]"])?;
        expect_in_time(format!("{words:?}"), outcome.took, ANSWER_LIMIT)?;
    }
    daemon.signal(Signal::SIGCONT)?;
    scene.ask(&["list"])?.expect_code(0)?;
    daemon.stop().map(drop)
}

fn f09_a_daemon_that_aborts_under_load_ends_every_request(scene: &Scene) -> Result<()> {
    // SIGABRT stands for a panic in any thread, as panics abort: the whole process ends, and each
    // request of its devices ends.
    let mut daemon = scene.start(
        "version: 1\n\
         devices:\n  a: { backend: { null: 1GiB }, limits: { iops-total: 1 }, on-crash: fail }\n  b: { backend: { memory: 16MiB } }\n",
    )?;
    let (a, b) = (scene.device("a")?, scene.device("b")?);
    let load = load(scene, WRITES, &a)?;
    let begin = Instant::now();
    daemon.signal(Signal::SIGABRT)?;
    daemon.wait_for_end(ANSWER_LIMIT)?;
    load.finish_any(Duration::ZERO).context("the load of a daemon that aborted")?;
    ensure!(
        Direct::open(&b.node).and_then(|disk| disk.write(0, 4096, 1)).is_err(),
        "a write that nobody serves succeeds"
    );
    expect_within("from the abort to the end of every request", begin.elapsed(), ANSWER_LIMIT)?;
    scene.remove_devices();
    scene.expect_nothing_left()
}

/// Unloads the driver; the drop loads it again.
struct DriverGone;

impl DriverGone {
    fn new(scene: &Scene) -> Result<Self> {
        scene.tool("modprobe", &["-r", "ublk_drv"])?;
        Ok(Self)
    }
}

impl Drop for DriverGone {
    fn drop(&mut self) {
        let loaded = needs::program("modprobe").map(|modprobe| Command::new(modprobe).arg("ublk_drv").status());
        assert!(
            loaded.is_some_and(|status| status.is_ok_and(|status| status.success())),
            "ublk_drv does not load again"
        );
    }
}

fn f12_without_the_driver_or_its_rings_run_says_what_to_do(scene: &Scene) -> Result<()> {
    // Exit 1 with the command that repairs it, and nothing is made. `check` works without driver
    // and io_uring.
    let config = scene.write("config.yaml", "version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?;
    let config = config.to_str().context("path")?;
    let nothing_made = || ensure_no(scene.socket().exists(), "a socket was made");
    {
        let _away = DriverGone::new(scene)?;
        scene.ask(&["run", config])?.expect_code(1)?.expect_stderr(&["error[E-NOKERNEL]", "modprobe ublk_drv"])?;
        nothing_made()?;
        scene.run(&["features"])?.expect_code(1)?.expect_stderr(&["error[E-NOKERNEL]"])?;
        scene.run(&["check", config])?.expect_code(0)?;
    }
    wait::until("the driver's node", Duration::from_secs(5), || {
        Ok(Path::new("/dev/ublk-control").exists().then_some(()))
    })?;
    {
        let _off = Setting::set("/proc/sys/kernel/io_uring_disabled", "2")?;
        scene.ask(&["run", config])?.expect_code(1)?.expect_stderr(&["error[E-NOURING]", "io_uring_disabled"])?;
        nothing_made()?;
        scene.run(&["check", config])?.expect_code(0)?;
    }
    scene.start("version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?.stop().map(drop)
}

fn f84_an_add_that_the_driver_refuses_to_root_is_not_told_to_run_as_root(scene: &Scene) -> Result<()> {
    // Drivers before Linux 6.15 refuse even root's device above `ublks_max`, with EACCES; later
    // drivers do not count root's devices.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?;
    {
        let bound = "/sys/module/ublk_drv/parameters/ublks_max";
        let _none = Setting::set(bound, "0")?;
        let added = scene.ask(&["add", "more", "--null", "1MiB"])?;
        eprintln!("          ublks_max 0: exit code {:?}", added.code);
        if added.code != Some(0) {
            added.expect_code(1)?.expect_stderr(&["error[E-KERNEL-LIMIT]", bound, "(0)"])?;
        }
    }
    daemon.stop().map(drop)
}

fn ensure_no(found: bool, what: &str) -> Result<()> {
    ensure!(!found, "{what}");
    Ok(())
}

fn f13_what_the_kernel_lacks_is_said_and_the_rest_works(scene: &Scene) -> Result<()> {
    // A resize needs UPDATE_SIZE (Linux 6.16). With it the disk is larger at once; without it: exit
    // 3, and the device keeps its size.
    let offered = has_feature(scene, "UPDATE_SIZE")?;
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 8MiB } }\n")?;
    let device = scene.device("d")?;
    let direct = Direct::open(&device.node)?;
    direct.write(0, 65536, 0xa5)?;
    let outcome = scene.ask(&["set", "device", "d", "size=16MiB"])?;
    let size = sysfs::number(&device.disk, "size")? * 512;
    if offered {
        outcome.expect_code(0)?;
        ensure!(size == 16 * MIB, "resized to 16 MiB, the disk has {size} bytes");
        direct.write(12 * MIB, 65536, 0xa6).context("where there was nothing before")?;
    } else {
        outcome.expect_code(3)?.expect_stderr(&["error[E-UNSUPPORTED]"])?;
        ensure!(size == 8 * MIB, "a refused resize has changed the size to {size}");
    }
    ensure!(direct.holds(0, 65536, 0xa5)?, "what was written before reads wrong");
    drop(direct);
    daemon.stop().map(drop)
}

fn f79_a_disk_gets_smaller_only_when_told(scene: &Scene) -> Result<()> {
    // `set` has made the device larger than the configuration says. A reload and a new daemon do
    // not cut it; the refused reload changes no limit either.
    if !has_feature(scene, "UPDATE_SIZE")? {
        bail!(Unmeasured::Kernel("this kernel cannot resize a live device".into()));
    }
    let file = scene.dir().join("d.img");
    let config = |iops: u32| {
        format!(
            "version: 1\ndevices:\n  d: {{ backend: {{ file: {}, size: 8MiB, create: true }}, limits: {{ iops: {iops} }} }}\n",
            file.display()
        )
    };
    let daemon = scene.start(&config(1000))?;
    let device = scene.device("d")?;
    let expect_size = |wanted: u64| -> Result<()> {
        let size = sysfs::number(&device.disk, "size")? * 512;
        ensure!(size == wanted, "the disk has {size} bytes, not {wanted}");
        Ok(())
    };
    scene.ask(&["set", "device", "d", "size=16MiB"])?.expect_code(0)?;
    Direct::open(&device.node)?.write(12 * MIB, 65536, 0xa5)?;
    scene.write("other.yaml", &config(2000))?;
    for words in [&["reload", "other.yaml"][..], &["reload", "other.yaml", "--dry-run"]] {
        let told = "has 16777216 bytes and would be cut to 8388608";
        scene.ask(words)?.expect_code(3)?.expect_stderr(&["error[E-CONFIG]", told, "--allow-shrink"])?;
    }
    ensure!(scene.listed("d")?["limits"]["iops-total"] == 1000, "a refused reload has changed a limit");
    expect_size(16 * MIB)?;
    daemon.kill(Duration::from_secs(5))?;
    let daemon = scene.start(&config(1000))?;
    daemon.wait_for_log("W-SIZE-KEPT", Duration::from_secs(5))?;
    expect_size(16 * MIB)?;
    ensure!(Direct::open(&device.node)?.holds(12 * MIB, 65536, 0xa5)?, "what was behind the said end reads wrong");
    scene.ask(&["reload", "other.yaml", "--allow-shrink"])?.expect_code(0)?;
    expect_size(8 * MIB)?;
    daemon.stop()?;
    // The backing file keeps its length, but a new device takes the size of the configuration.
    let daemon = scene.start(&config(1000))?;
    daemon.wait_for_log("W-SIZE", Duration::from_secs(5))?;
    daemon.stop().map(drop)
}

fn f14_commands_of_an_unprivileged_user_are_refused(scene: &Scene) -> Result<()> {
    // An unprivileged user (uid 65534) on root's socket: exit 6, no change.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?;
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let commands: [&[&str]; 2] = [&["list"], &["del", "d"]];
    for words in commands {
        scene.ask_under(&nobody, words)?.expect_code(6)?.expect_stderr(&["error[E-PERM]"])?;
    }
    ensure!(scene.device("d")?.node.exists(), "the device is gone");
    daemon.stop().map(drop)
}

fn f16_an_id_of_other_software_is_refused_and_another_one_picked(scene: &Scene) -> Result<()> {
    // rublk has id 7: exit 5 with rublk's pid, and its device is intact. Without an id in the
    // configuration another id is picked.
    scene.tool("rublk", &["add", "null", "-n", "7"])?;
    scene.write("wrong.yaml", "version: 1\ndevices:\n  d: { id: 7, backend: { null: 1MiB } }\n")?;
    let refused = scene.ask(&["run", "wrong.yaml"])?;
    let other_reads = Direct::open(Path::new("/dev/ublkb7")).and_then(|disk| disk.read(0, 4096));
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?;
    let id = scene.device("d")?.id;
    daemon.stop()?;
    scene.remove_device_of_rublk("7")?;
    refused.expect_code(5)?.expect_stderr(&["error[E-ID-TAKEN]", "7", "pid"])?;
    other_reads.context("the other software's device")?;
    ensure!(id != 7, "id 7 twice");
    Ok(())
}

fn f18_a_node_that_does_not_appear_is_told_and_rolled_back(scene: &Scene) -> Result<()> {
    // In a /dev without a daemon that makes nodes: exit 1 with the name of the node after at most 5
    // s, and no device is left.
    scene.write("config.yaml", "version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?;
    let dev = scene.dir().join("dev");
    fs::create_dir(&dev)?;
    let script = format!(
        "cp -a /dev/ublk-control /dev/null /dev/zero /dev/urandom {dev} && mount --bind {dev} /dev && exec \"$@\"",
        dev = dev.display()
    );
    let wrapper = ["unshare", "--mount", "--propagation=private", "sh", "-c", &script, "sh"];
    let outcome = scene.ask_under(&wrapper, &["run", "config.yaml"])?;
    let outcome = outcome.expect_code(1)?.expect_stderr(&["error[E-NODE]", "/dev/ublk"])?;
    expect_within("the refusal", outcome.took, Duration::from_secs(8))?;
    scene.expect_nothing_left()
}

fn f20_out_of_descriptors_an_add_is_refused_and_devices_serve_on(scene: &Scene) -> Result<()> {
    // With 64 descriptors, the first device without one is refused with the name of the limit;
    // earlier devices serve.
    let daemon = scene.start_under(
        &["prlimit", "--nofile=64:64"],
        "version: 1\ndevices:\n  first: { backend: { memory: 1MiB } }\n",
    )?;
    let first = Direct::open(&scene.device("first")?.node)?;
    first.write(0, 4096, 0xa5)?;
    let mut refused = None;
    for number in 0..16 {
        let outcome = scene.ask(&["add", &format!("more-{number}"), "--memory", "1MiB"])?;
        if outcome.code != Some(0) {
            refused = Some((number, outcome));
            break;
        }
    }
    let (number, outcome) = refused.context("17 devices with 64 descriptors")?;
    eprintln!("          refused after {number} more devices");
    outcome.expect_code(1)?.expect_stderr(&["error[E-RESOURCE]", "RLIMIT_NOFILE"])?;
    ensure!(first.holds(0, 4096, 0xa5)?, "the first device reads wrong");
    for made in 0..number {
        ensure!(Direct::open(&scene.device(&format!("more-{made}"))?.node)?.holds(0, 4096, 0)?, "more-{made} is hurt");
    }
    ensure!(scene.device(&format!("more-{number}")).is_err(), "the refused device has a name");
    // The refused device gives its descriptors back: after the removal of one device there is room
    // for a new one.
    scene.ask(&["del", "more-0"])?.expect_code(0)?;
    scene.ask(&["add", "again", "--memory", "1MiB"])?.expect_code(0)?;
    drop(first);
    daemon.stop().map(drop)
}
