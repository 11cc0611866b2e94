//! Helper processes that cannot be made, fail or die: before, during or after their step, once or more.
//!
//! ```text
//!   add, run   START, then STOP and DEL to undo it            answered, undone
//!   del        in-use check, write-back, STOP, DEL            gone, or live and limited
//!   SIGTERM    in-use check, write-back, STOP, DEL            tried again, and the daemon ends
//!   recovery   END_RECOVERY                                   tried again, and served
//! ```
//!
//! In each trial the answer comes within [`ANSWER_LIMIT`], the log reports a step that is tried again, and a
//! neighbour stays live and limited.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ublk_throttle_tests::daemon::Daemon;
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::setting::Setting;
use ublk_throttle_tests::{sysfs, wait};

use crate::measure::expect_in_time;
use crate::{Case, WRITES, cases, has_feature, load};

/// Limit for the answer to a command, even if helpers die.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Limit from the end of a shortage to the end of the work that waited for it.
const BACK_LIMIT: Duration = Duration::from_secs(10);
/// The limit of each device, in operations/s. Unlimited reads reach thousands a second.
pub(crate) const IOPS: u64 = 50;

pub(crate) fn cases() -> Vec<Case> {
    let plain = cases![[Need::Ublk];
        f71_a_removal_whose_helper_dies_leaves_the_device_limited_or_gone,
        f71_a_reload_whose_helpers_die_is_answered_and_what_stays_is_limited,
        f72_a_daemon_that_ends_makes_another_helper_for_one_that_dies,
        f73_an_add_whose_helpers_die_is_undone,
        f73_a_start_whose_helpers_die_is_undone,
        f75_a_recovery_whose_helper_dies_is_tried_again,
        f75_a_takeover_whose_helper_dies_is_tried_again,
        f77_a_resize_whose_helper_dies_tells_the_size_that_the_disk_has,
    ];
    let own = cases![[Need::Ublk, Need::OwnMachine];
        f71_a_removal_without_io_uring_leaves_the_device_limited,
        f74_without_a_process_left_a_command_names_the_limit_and_changes_nothing,
        f75_a_recovery_without_processes_waits_for_them,
    ];
    let rublk = cases![[Need::Ublk, Need::Rublk]; f76_a_device_lost_while_its_file_is_away_takes_no_other_along];
    let fio = cases![[Need::Ublk, Need::Fio, Need::Rublk]; f78_another_watcher_is_made_for_one_that_dies_or_is_silent];
    plain.into_iter().chain(own).chain(rublk).chain(fio).collect()
}

/// A configuration of devices with these names, each on a file and limited to [`IOPS`].
pub(crate) fn config(scene: &Scene, names: &[&str]) -> String {
    let mut text = "version: 1\ndevices:\n".to_owned();
    for name in names {
        let path = scene.dir().join(format!("{name}.img"));
        text += &format!(
            "  {name}: {{ backend: {{ file: {}, size: 4MiB, create: true }}, limits: {{ iops-total: {IOPS} }} }}\n",
            path.display()
        );
    }
    text
}

pub(crate) fn ready(scene: &Scene, config: &str) -> Result<Daemon> {
    let daemon = scene.start_crashing(config)?;
    daemon.wait_for_log("ready", ANSWER_LIMIT)?;
    Ok(daemon)
}

/// Makes helpers die at these crash points. Each line of the file `crash` kills one helper and is then removed.
fn arm(scene: &Scene, points: &[&str]) -> Result<()> {
    let lines: Vec<String> = points.iter().map(|point| format!("{point}/helper")).collect();
    scene.write("crash", &lines.join("\n")).map(drop)
}

/// Fails unless a helper has died at each armed point: the file `crash` goes with its last line.
fn expect_died(scene: &Scene, points: &[&str]) -> Result<()> {
    let path = scene.dir().join("crash");
    ensure!(!path.exists(), "of {points:?} nothing came by {:?}", fs::read_to_string(&path));
    Ok(())
}

/// Reads from a device for a second; fails unless it serves reads, and no more than its limit allows.
pub(crate) fn expect_limited(scene: &Scene, name: &str) -> Result<()> {
    let disk = Direct::open(&scene.device(name)?.node)?;
    let (begin, mut count) = (Instant::now(), 0);
    while begin.elapsed() < Duration::from_secs(1) {
        disk.read(0, 4096)?;
        count += 1;
    }
    // The capacity is 0.1 s of the rate. One read more finds the level at the brim, and the last read ends
    // after the second.
    let most = IOPS as f64 * (begin.elapsed().as_secs_f64() + 0.1) + 2.0;
    ensure!(count as f64 <= most && count > 1, "{name}: {count} reads in a second, limited to {IOPS}");
    Ok(())
}

pub(crate) fn state(scene: &Scene, name: &str) -> Result<Option<String>> {
    let devices = scene.devices()?;
    let found = devices.iter().find(|device| device["name"] == name);
    Ok(found.and_then(|device| device["state"].as_str().map(str::to_owned)))
}

/// Waits until `list` no longer has the device.
pub(crate) fn expect_gone(scene: &Scene, name: &str) -> Result<()> {
    wait::until(&format!("end of {name}"), ANSWER_LIMIT, || Ok(state(scene, name)?.is_none().then_some(())))
        .with_context(|| format!("{:?}", state(scene, name)))
}

pub(crate) fn expect_live(scene: &Scene, name: &str) -> Result<()> {
    wait::until(&format!("{name} live"), BACK_LIMIT, || {
        Ok((state(scene, name)?.as_deref() == Some("live")).then_some(()))
    })
    .with_context(|| format!("{:?}", state(scene, name)))
}

/// The number of ublk ids in the kernel.
pub(crate) fn ids() -> usize {
    fs::read_dir("/sys/class/ublk-char").map_or(0, Iterator::count)
}

/// Ends the daemon by SIGTERM, and leaves nothing.
pub(crate) fn ends(scene: &Scene, daemon: Daemon) -> Result<()> {
    daemon.stop()?;
    expect_nothing_left(scene)
}

/// No device, no id and no state file of a device may be left.
pub(crate) fn expect_nothing_left(scene: &Scene) -> Result<()> {
    scene.expect_nothing_left()?;
    wait::until("no id left", ANSWER_LIMIT, || Ok((ids() == 0).then_some(())))?;
    let left: Vec<_> = fs::read_dir(scene.state_dir())?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|name| name.ends_with(".device.json"))
        .collect();
    ensure!(left.is_empty(), "state files of devices that are gone: {left:?}");
    Ok(())
}

/// Steps of a removal at which its helper can die.
pub(crate) const REMOVING: [&str; 6] =
    ["helper-claiming", "helper-writing", "helper-stopping", "helper-stopped", "helper-deleting", "helper-deleted"];

fn f71_a_removal_whose_helper_dies_leaves_the_device_limited_or_gone(scene: &Scene) -> Result<()> {
    // `del` is answered. The device is then gone; or it is live and limited, and the next `del` removes it.
    let daemon = ready(scene, &config(scene, &["a", "n"]))?;
    let path = scene.dir().join("a.img").display().to_string();
    for force in [&[][..], &["--force"]] {
        for point in REMOVING {
            arm(scene, &[point])?;
            let del = scene.ask(&[&["del", "a"], force].concat())?;
            expect_died(scene, &[point])?;
            expect_in_time(format!("del without a helper at {point}"), del.took, ANSWER_LIMIT)?;
            if del.code == Some(0) {
                expect_gone(scene, "a").with_context(|| point.to_owned())?;
            } else {
                ensure!(state(scene, "a")?.as_deref() == Some("live"), "{point}: {:?}\n{del}", state(scene, "a")?);
                expect_limited(scene, "a").with_context(|| format!("after a del whose helper died at {point}"))?;
                scene.ask(&["set", "device", "a", &format!("iops-total={IOPS}")])?.expect_code(0)?;
                scene.ask(&["del", "a"])?.expect_code(0).with_context(|| format!("after {point}"))?;
            }
            scene
                .ask(&[
                    "add",
                    "a",
                    "--file",
                    &path,
                    "--size",
                    "4MiB",
                    "--create",
                    "--limit",
                    &format!("iops-total={IOPS}"),
                ])?
                .expect_code(0)
                .with_context(|| format!("after {point}"))?;
        }
    }
    expect_limited(scene, "n")?;
    ends(scene, daemon)
}

fn f71_a_removal_without_io_uring_leaves_the_device_limited(scene: &Scene) -> Result<()> {
    // The helper needs io_uring and reports the lack before the daemon has changed anything.
    let daemon = ready(scene, &config(scene, &["a"]))?;
    {
        let _off = Setting::set("/proc/sys/kernel/io_uring_disabled", "2")?;
        for words in [&["del", "a"][..], &["del", "a", "--force"]] {
            let del = scene.ask(words)?;
            ensure!(del.code != Some(0), "removed without io_uring:\n{del}");
            del.expect_stderr(&["io_uring"])?;
            ensure!(state(scene, "a")?.as_deref() == Some("live"), "{:?}", state(scene, "a")?);
            expect_limited(scene, "a")?;
        }
    }
    scene.ask(&["del", "a"])?.expect_code(0)?;
    ends(scene, daemon)
}

fn f71_a_reload_whose_helpers_die_is_answered_and_what_stays_is_limited(scene: &Scene) -> Result<()> {
    // The reload removes `a` and adds `c`; `n` stays. Each of them is live and limited afterwards, or gone.
    let (before, after) = (config(scene, &["a", "n"]), config(scene, &["n", "c"]));
    for point in REMOVING.into_iter().chain(["helper-adding", "helper-added", "helper-starting", "helper-started"]) {
        let daemon = ready(scene, &before)?;
        let path = scene.write("after.yaml", &after)?;
        arm(scene, &[point])?;
        let reload = scene.ask(&["reload", path.to_str().context("path")?])?;
        expect_died(scene, &[point])?;
        expect_in_time(format!("reload without a helper at {point}"), reload.took, ANSWER_LIMIT)?;
        for name in ["a", "n", "c"] {
            wait::until(&format!("{name} live or gone"), ANSWER_LIMIT, || {
                let is_settled = matches!(state(scene, name)?.as_deref(), None | Some("live"));
                Ok(is_settled.then_some(()))
            })?;
            if state(scene, name)?.is_some() {
                expect_limited(scene, name).with_context(|| format!("after a reload whose helper died at {point}"))?;
            }
        }
        ends(scene, daemon).with_context(|| point.to_owned())?;
    }
    Ok(())
}

fn f72_a_daemon_that_ends_makes_another_helper_for_one_that_dies(scene: &Scene) -> Result<()> {
    // A removal at the end of the daemon cannot be refused: the daemon tries again with a new helper, logs
    // that, and ends. At each point one helper dies, or two in a row.
    for points in [&REMOVING[..1], &REMOVING[1..2], &REMOVING[2..3], &REMOVING[3..4], &REMOVING[4..5], &REMOVING[5..]] {
        for points in [points.to_vec(), points.repeat(2)] {
            let daemon = ready(scene, &config(scene, &["a"]))?;
            arm(scene, &points)?;
            let log = scene.logs();
            ends(scene, daemon).with_context(|| format!("helpers that died at {points:?}:\n{log}"))?;
            // After STOP or DEL has succeeded, the next helper does not repeat it: a second line for this point stays.
            let is_done = matches!(points[0], "helper-stopped" | "helper-deleted");
            ensure!(is_done || !scene.dir().join("crash").exists(), "nothing came by {points:?}");
            let _ = fs::remove_file(scene.dir().join("crash"));
            let told = scene.logs();
            ensure!(points[0] == "helper-deleted" || told.contains("tried again"), "{points:?} is not told:\n{told}");
        }
    }
    Ok(())
}

/// The points at which helpers of an add die: the helper of ADD and START, then those that would undo the start.
const MAKING: [&[&str]; 10] = [
    &["helper-adding"],
    &["helper-added"],
    &["helper-added", "helper-deleting"],
    &["helper-starting"],
    &["helper-started"],
    &["helper-starting", "helper-claiming"],
    &["helper-started", "helper-claiming", "helper-claiming"],
    &["helper-started", "helper-writing"],
    &["helper-started", "helper-stopping"],
    &["helper-started", "helper-stopped", "helper-deleting"],
];

fn f73_an_add_whose_helpers_die_is_undone(scene: &Scene) -> Result<()> {
    // The add is refused within the limit and leaves nothing. A neighbour stays limited, and the next add of
    // the same name succeeds.
    let daemon = ready(scene, &config(scene, &["n"]))?;
    for points in MAKING {
        arm(scene, points)?;
        let add = scene.ask(&["add", "x", "--null", "64MiB"])?;
        ensure!(add.code != Some(0), "{points:?}: added\n{add}");
        expect_in_time(format!("add without helpers at {points:?}"), add.took, ANSWER_LIMIT)?;
        expect_gone(scene, "x").with_context(|| format!("{points:?}:\n{add}"))?;
        let _ = fs::remove_file(scene.dir().join("crash"));
        ensure!(ids() == 1, "{points:?}: the kernel has {} devices", ids());
        scene.ask(&["add", "x", "--null", "64MiB"])?.expect_code(0).with_context(|| format!("after {points:?}"))?;
        scene.ask(&["del", "x"])?.expect_code(0)?;
    }
    expect_limited(scene, "n")?;
    ends(scene, daemon)
}

fn f73_a_start_whose_helpers_die_is_undone(scene: &Scene) -> Result<()> {
    // A start makes all devices or none: the daemon ends with an error and leaves nothing.
    for points in MAKING {
        arm(scene, points)?;
        let mut daemon = scene.start_crashing(&config(scene, &["a"]))?;
        let code = daemon.wait_for_end(ANSWER_LIMIT).with_context(|| format!("{points:?}:\n{}", scene.logs()))?;
        ensure!(code.is_some_and(|code| code != 0), "{points:?}: it ended with {code:?}:\n{}", daemon.log()?);
        let _ = fs::remove_file(scene.dir().join("crash"));
        scene.expect_nothing_left().with_context(|| format!("{points:?}"))?;
        wait::until("no id left", ANSWER_LIMIT, || Ok((ids() == 0).then_some(())))?;
    }
    Ok(())
}

/// A control group with a limit on its processes and threads (`pids.max`).
struct Few {
    root: PathBuf,
    folder: PathBuf,
}

impl Few {
    fn new(scene: &Scene) -> Result<Self> {
        let root = scene.dir().join("cgroup");
        fs::create_dir(&root)?;
        scene.tool("mount", &["-t", "cgroup2", "cgroup2", root.to_str().context("path")?])?;
        let folder = root.join("few");
        let few = Self { root, folder };
        fs::write(few.root.join("cgroup.subtree_control"), "+pids").context("no control group of pids")?;
        fs::create_dir(&few.folder)?;
        Ok(few)
    }

    fn set(&self, file: &str, value: impl ToString) -> Result<()> {
        let path = self.folder.join(file);
        fs::write(&path, value.to_string()).with_context(|| path.display().to_string())
    }

    fn current(&self) -> Result<u64> {
        Ok(fs::read_to_string(self.folder.join("pids.current"))?.trim().parse()?)
    }

    /// The number of processes and threads, after those of the last command have ended.
    fn steady(&self) -> Result<u64> {
        let mut last = self.current()?;
        wait::until("steady threads", BACK_LIMIT, || {
            std::thread::sleep(Duration::from_millis(200));
            let now = self.current()?;
            Ok((std::mem::replace(&mut last, now) == now).then_some(now))
        })
    }
}

impl Drop for Few {
    fn drop(&mut self) {
        let _ = self.set("pids.max", "max");
        for pid in fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = fs::write(self.root.join("cgroup.procs"), pid);
        }
        let _ = fs::remove_dir(&self.folder);
        let _ = fs::write(self.root.join("cgroup.subtree_control"), "-pids");
        let _ = nix::mount::umount2(&self.root, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn f74_without_a_process_left_a_command_names_the_limit_and_changes_nothing(scene: &Scene) -> Result<()> {
    // With 0, 1, 2, … processes left, the add succeeds, or is refused with the name of the limit and undone.
    // The removal succeeds, or is refused with the name of the limit; the device is then live and limited.
    let daemon = ready(scene, &config(scene, &["n"]))?;
    let few = Few::new(scene)?;
    few.set("cgroup.procs", daemon.pid())?;
    let attempt = |command: &[&str]| -> Result<()> {
        let is_add = command[0] == "add";
        for left in 0..=10 {
            few.set("pids.max", few.steady()? + left)?;
            let answer = scene.ask(command)?;
            let (code, took) = (answer.code, answer.took);
            eprintln!("          {left} left: {} {code:?} after {took:.1?}: {}", command[0], answer.stderr.trim());
            expect_in_time(format!("{} with {left} processes left", command[0]), took, ANSWER_LIMIT)?;
            let is_done = code == Some(0);
            if !is_done {
                answer.expect_code(1)?.expect_stderr(&["error[E-RESOURCE]", "pids.max"])?;
            }
            if is_done == is_add {
                expect_limited(scene, "x")?;
            } else {
                expect_gone(scene, "x").with_context(|| format!("{left} left: {:?}", state(scene, "x")))?;
            }
            let expected = if is_done == is_add { 2 } else { 1 };
            ensure!(ids() == expected, "{left} left: the kernel has {} devices, not {expected}", ids());
            expect_limited(scene, "n")?;
            if is_done {
                return Ok(());
            }
        }
        bail!("no {} with ten processes left", command[0])
    };
    attempt(&["add", "x", "--null", "64MiB", "--limit", &format!("iops-total={IOPS}")])?;
    attempt(&["del", "x"])?;
    few.set("pids.max", "max")?;
    ends(scene, daemon)
}

fn f75_a_recovery_whose_helper_dies_is_tried_again(scene: &Scene) -> Result<()> {
    // For each helper that dies before END_RECOVERY, users of the device wait one second longer. SIGTERM still
    // ends the daemon.
    let text = config(scene, &["a", "n"]);
    for points in [
        &["helper-recovering"][..],
        &["helper-recovering"; 2],
        &["helper-recovering"; 4],
        &["helper-recovered"],
        &["helper-recovered", "helper-recovering"],
    ] {
        ready(scene, &text)?.kill(ANSWER_LIMIT)?;
        arm(scene, points)?;
        let daemon = scene.start_crashing(&text)?;
        expect_recovered(scene, daemon, points)?;
    }
    // SIGTERM arrives between two tries.
    ready(scene, &text)?.kill(ANSWER_LIMIT)?;
    arm(scene, &["helper-recovering"; 50])?;
    let daemon = scene.start_crashing(&text)?;
    daemon.wait_for_log("tried again", ANSWER_LIMIT)?;
    ends(scene, daemon)
}

fn f75_a_takeover_whose_helper_dies_is_tried_again(scene: &Scene) -> Result<()> {
    let text = config(scene, &["a", "n"]);
    for points in [&["helper-recovering"][..], &["helper-recovering"; 2], &["helper-recovered"]] {
        let old = ready(scene, &text)?;
        arm(scene, points)?;
        let new = scene.start_crashing_with(&["--takeover"], &text)?;
        old.expect_end(ANSWER_LIMIT)?;
        expect_recovered(scene, new, points)?;
    }
    Ok(())
}

/// A helper has died at each of the points, and the daemon serves `a` and `n`, limited; then it ends.
fn expect_recovered(scene: &Scene, daemon: Daemon, points: &[&str]) -> Result<()> {
    wait::until("an answer", ANSWER_LIMIT, || Ok(scene.listing().ok().map(drop)))?;
    for name in ["a", "n"] {
        expect_live(scene, name).with_context(|| format!("{points:?}:\n{}", scene.logs()))?;
        expect_limited(scene, name)?;
    }
    expect_died(scene, points)?;
    ends(scene, daemon).with_context(|| format!("{points:?}"))
}

fn f75_a_recovery_without_processes_waits_for_them(scene: &Scene) -> Result<()> {
    // With each limit on the processes the daemon does not abort; without the limit it serves all devices.
    let text = config(scene, &["a", "n"]);
    for most in 3..=14 {
        ready(scene, &text)?.kill(ANSWER_LIMIT)?;
        let few = Few::new(scene)?;
        few.set("pids.max", most)?;
        let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", few.folder.display());
        let mut daemon = scene.start_under_without_waiting(&["sh", "-c", &script, "sh"], &text)?;
        std::thread::sleep(Duration::from_secs(3));
        let is_running = daemon.is_running()?;
        eprintln!("          {most} processes: runs {is_running}");
        few.set("pids.max", "max")?;
        if !is_running {
            // The daemon ended with an error, not by a signal, and before it changed anything.
            let code = daemon.wait_for_end(ANSWER_LIMIT)?;
            ensure!(code.is_some(), "{most} processes: it ended by a signal:\n{}", daemon.log()?);
            daemon = scene.start_without_waiting(&text)?;
        }
        wait::until("an answer", ANSWER_LIMIT, || Ok(scene.listing().ok().map(drop)))
            .with_context(|| format!("{most} processes:\n{}", scene.logs()))?;
        for name in ["a", "n"] {
            expect_live(scene, name).with_context(|| format!("{most} processes:\n{}", scene.logs()))?;
            expect_limited(scene, name)?;
        }
        drop(few);
        fs::remove_dir(scene.dir().join("cgroup"))?;
        ends(scene, daemon).with_context(|| format!("{most} processes"))?;
    }
    Ok(())
}

fn f76_a_device_lost_while_its_file_is_away_takes_no_other_along(scene: &Scene) -> Result<()> {
    // The daemon has died, the file of `a` is missing, and a second client deletes the device: the daemon
    // cannot make it anew. Device `n` stays served and limited: once as a device that was left behind
    // as well, once as a new one.
    device_is_lost(scene, &["a", "n"])?;
    device_is_lost(scene, &["a"])
}

/// Loses device `a` of those that a killed daemon leaves behind, and makes it by a reload.
fn device_is_lost(scene: &Scene, left_behind: &[&str]) -> Result<()> {
    let text = config(scene, &["a", "n"]);
    let daemon = ready(scene, &config(scene, left_behind))?;
    let id = scene.device("a")?.id.to_string();
    daemon.kill(ANSWER_LIMIT)?;
    let (image, away) = (scene.dir().join("a.img"), scene.dir().join("away"));
    // A directory at the path of the file keeps `create: true` from making a new file.
    fs::rename(&image, &away)?;
    fs::create_dir(&image)?;
    let mut daemon = scene.start(&text)?;
    ensure!(state(scene, "a")?.as_deref() == Some("recovering"), "{:?}", state(scene, "a")?);
    scene.tool("rublk", &["del", "-n", &id])?;
    expect_gone(scene, "a")?;
    daemon.wait_for_log("W-LOST", ANSWER_LIMIT)?;
    daemon.wait_for_log("error[E-BACKING]: device \"a\"", ANSWER_LIMIT)?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(daemon.is_running()?, "the daemon ended:\n{}", daemon.log()?);
    expect_limited(scene, "n")?;
    // With the file back in place, a reload makes the device.
    fs::remove_dir(&image)?;
    fs::rename(&away, &image)?;
    scene.ask(&["reload"])?.expect_code(0)?;
    expect_limited(scene, "a")?;
    ends(scene, daemon)
}

fn f77_a_resize_whose_helper_dies_tells_the_size_that_the_disk_has(scene: &Scene) -> Result<()> {
    // If the helper dies before UPDATE_SIZE, the size stays; if it dies after it, `set` succeeds. On a kernel
    // without UPDATE_SIZE no resize is tried.
    let daemon = ready(scene, &config(scene, &["a"]))?;
    let is_offered = has_feature(scene, "UPDATE_SIZE")?;
    let disk = scene.device("a")?.disk;
    for (point, mib) in [("helper-resizing", 8), ("helper-resized", 12), ("none", 16)] {
        if !is_offered {
            break;
        }
        arm(scene, &[point])?;
        let set = scene.ask(&["set", "device", "a", &format!("size={mib}MiB")])?;
        expect_in_time(format!("a resize without a helper at {point}"), set.took, ANSWER_LIMIT)?;
        let size = sysfs::number(&disk, "size")? * 512;
        ensure!(scene.listed("a")?["size"] == size, "{point}: the disk has {size}: {}", scene.listed("a")?);
        ensure!((set.code == Some(0)) == (size == mib << 20), "{point}: the disk has {size}:\n{set}");
        ensure!(set.code == Some(0) || point == "helper-resizing", "{point}:\n{set}");
        expect_limited(scene, "a")?;
        let _ = fs::remove_file(scene.dir().join("crash"));
    }
    ends(scene, daemon)
}

fn f78_another_watcher_is_made_for_one_that_dies_or_is_silent(scene: &Scene) -> Result<()> {
    // The STOP of a second client waits for the held requests, and only the watcher notices it. The trial
    // kills the watcher, or stops it: then it is replaced after 5 s.
    for signal in [Signal::SIGKILL, Signal::SIGSTOP] {
        let daemon =
            scene.start("version: 1\ndevices:\n  d: { backend: { null: 1GiB }, limits: { iops-total: 1 } }\n")?;
        let device = scene.device("d")?;
        let load = load(scene, WRITES, &device)?;
        let id = device.id.to_string();
        let del = scene.begin_tool("rublk", &["del", "-n", &id])?;
        let is_watcher = |pid: &u32| {
            fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|command| command.contains("__watch"))
        };
        let watcher = wait::until("a watcher", ANSWER_LIMIT, || Ok(scene.processes().into_iter().find(is_watcher)))?;
        kill(Pid::from_raw(i32::try_from(watcher)?), signal)?;
        let del = del.finish(ANSWER_LIMIT)?;
        expect_in_time(format!("a del of another client, {signal} to the watcher"), del.took, ANSWER_LIMIT)?;
        load.finish_any(ANSWER_LIMIT)?;
        daemon.stop()?;
    }
    Ok(())
}
