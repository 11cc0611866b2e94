//! Backends that are missing when the daemon starts: their devices wait, and the rest is served.
//!
//! Each trial begins with the number of its row in `FAULTS.md`.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use ublk_throttle_tests::daemon::Daemon;
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::disks::Mount;
use ublk_throttle_tests::mapper::Mapped;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::wait;

use crate::measure::expect_within;
use crate::{Case, cases, let_run};

/// From a backend that is there until its device is served.
const SERVED_LIMIT: Duration = Duration::from_secs(2);
/// Bound of an answer and of the daemon's end.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// A block major number for local use, without a driver in the guest.
const NO_DRIVER: u64 = 240;

const MIB: u64 = 1 << 20;

pub(crate) fn cases() -> Vec<Case> {
    let plain = cases![[Need::Ublk];
        f87_a_missing_file_is_waited_for_and_served_with_its_limits_in_its_group,
        f87_a_device_that_waits_can_be_removed_and_changed,
        f87_a_device_waits_on_under_the_next_daemon,
        f87_what_is_required_or_wrong_ends_the_start,
        f89_an_id_that_is_named_is_given_to_no_other_device,
    ];
    let mapped = cases![[Need::Ublk, Need::RamDisk, Need::Mapper]; f87_a_missing_disk_is_waited_for];
    let mounted = cases![[Need::Ublk, Need::RamDisk, Need::Mapper, Need::Ext4];
        f88_a_path_that_does_not_answer_holds_up_no_other_device,
    ];
    plain.into_iter().chain(mapped).chain(mounted).collect()
}

fn image(scene: &Scene, name: &str) -> PathBuf {
    scene.dir().join(format!("{name}.img"))
}

/// A device on the file of its name, and more keys.
fn on_file(scene: &Scene, name: &str, more: &str) -> String {
    format!("  {name}: {{ backend: {{ file: {} }}{more} }}\n", image(scene, name).display())
}

/// A group of 100 requests a second, and the device `here`, which is served in every trial.
fn config(devices: &str) -> String {
    format!(
        "version: 1\ngroups:\n  g: {{ limits: {{ iops-total: 100 }} }}\ndevices:\n  here: {{ backend: {{ null: 1MiB }} }}\n{devices}"
    )
}

/// Puts a file of 8 MiB in place by a rename.
fn bring(path: &Path) -> Result<()> {
    let beside = path.with_extension("new");
    File::create(&beside)?.set_len(8 * MIB)?;
    fs::rename(beside, path).with_context(|| path.display().to_string())
}

fn expect_waiting(scene: &Scene, name: &str, why: &str) -> Result<()> {
    let listed = scene.listed(name)?;
    let told = listed["waiting_for"].as_str().unwrap_or_default();
    ensure!(listed["state"] == "waiting" && told.contains(why), "not waiting because of {why:?}: {listed}");
    ensure!(fs::read(scene.device("here")?.node)?.len() as u64 == MIB, "the device beside it is not served");
    Ok(())
}

/// Waits until a device is served, and fails if that takes too long; a page of it is written and read.
fn expect_served(scene: &Scene, name: &str) -> Result<()> {
    let begin = Instant::now();
    wait::until(
        &format!("device {name}"),
        ANSWER_LIMIT,
        || Ok((scene.listed(name)?["state"] == "live").then_some(())),
    )?;
    expect_within(format!("from its backend to device {name}"), begin.elapsed(), SERVED_LIMIT)?;
    let device = Direct::open(&scene.device(name)?.node)?;
    device.write(4096, 4096, 0xa5)?;
    ensure!(device.holds(4096, 4096, 0xa5)?, "{name} reads something else");
    Ok(())
}

fn names(scene: &Scene) -> Result<Vec<String>> {
    Ok(scene.devices()?.iter().filter_map(|device| device["name"].as_str().map(str::to_owned)).collect())
}

fn f87_a_missing_file_is_waited_for_and_served_with_its_limits_in_its_group(scene: &Scene) -> Result<()> {
    // The directory is missing, too. A limit that `set` gives the waiting device is in force when it is served.
    let folder = scene.dir().join("later");
    let path = folder.join("late.img");
    let daemon = scene.start(&config(&format!(
        "  late: {{ backend: {{ file: {}, size: 8MiB, create: true }}, group: g, limits: {{ iops-total: 50 }} }}\n",
        path.display()
    )))?;
    let told = path.display().to_string();
    expect_waiting(scene, "late", &told)?;
    scene.ask(&["list"])?.expect_code(0)?.expect_stdout(&["waiting", "late waits for its backend", &told])?;
    scene.ask(&["stats", "late"])?.expect_code(0)?.expect_stdout(&["late"])?;
    scene.ask(&["set", "device", "late", "iops-total=20"])?.expect_code(0)?;
    let size = scene.ask(&["set", "device", "late", "size=16MiB"])?.expect_code(5)?;
    size.expect_stderr(&["error[E-CONFLICT]", "waits for its backend", "reload"])?;
    let words = ["add", "late", "--null", "1MiB"];
    scene.ask(&words)?.expect_code(5)?.expect_stderr(&["error[E-EXISTS]", "is waiting"])?;
    let words = ["del", "--group", "g"];
    scene.ask(&words)?.expect_code(5)?.expect_stderr(&["error[E-GROUP-IN-USE]", "device late"])?;
    let_run(3);
    let log = daemon.log()?;
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("W-WAITING")).collect();
    let [line] = lines[..] else { anyhow::bail!("not told once: {lines:?}") };
    ensure!(line.contains("ENOENT") && line.contains(&told), "{line}");
    fs::create_dir(&folder)?;
    expect_served(scene, "late")?;
    let listed = scene.listed("late")?;
    ensure!(listed["limits"]["iops-total"] == 20 && listed["waiting_for"].is_null(), "{listed}");
    ensure!(scene.listing()?["groups"][0]["devices"] == serde_json::json!(["late"]), "{}", scene.listing()?);
    // 20 a second lets 3 go at once, so the last of 13 reads goes after 0.5 s. The group would let 11 go at once.
    let device = Direct::open(&scene.device("late")?.node)?;
    let_run(1);
    let begin = Instant::now();
    (0..13).try_for_each(|page| device.read(page * 4096, 4096).map(drop))?;
    ensure!(begin.elapsed() >= Duration::from_millis(450), "13 reads took {:?}", begin.elapsed());
    daemon.stop().map(drop)
}

fn f87_a_missing_disk_is_waited_for(scene: &Scene) -> Result<()> {
    // No node, then a node without a driver, then a link to the disk as udev makes it.
    let path = scene.dir().join("disk");
    let daemon =
        scene.start(&config(&format!("  late: {{ backend: {{ block: {} }}, group: g }}\n", path.display())))?;
    expect_waiting(scene, "late", "no such file")?;
    mknod(&path, SFlag::S_IFBLK, Mode::S_IRUSR | Mode::S_IWUSR, makedev(NO_DRIVER, 0))?;
    daemon.wait_for_log("errno=ENXIO", ANSWER_LIMIT)?;
    expect_waiting(scene, "late", "without a driver")?;
    let disk = Mapped::on_ram(16)?;
    let beside = scene.dir().join("link");
    symlink(disk.node(), &beside)?;
    fs::rename(&beside, &path)?;
    expect_served(scene, "late")?;
    ensure!(scene.listed("late")?["size"] == 16 * MIB, "{}", scene.listed("late")?);
    daemon.stop().map(drop)
}

fn f87_a_device_that_waits_can_be_removed_and_changed(scene: &Scene) -> Result<()> {
    let late = on_file(scene, "late", "");
    let path = image(scene, "late");
    let daemon = scene.start(&config(&late))?;
    // A removal ends the waiting. A new device of `add` or `reload` does not wait: it is refused.
    ensure!(scene.ask(&["del", "late"])?.expect_code(0)?.took < Duration::from_secs(2), "the removal waited");
    bring(&path)?;
    let_run(2);
    ensure!(names(scene)? == ["here"], "{:?}", names(scene)?);
    fs::remove_file(&path)?;
    scene.ask(&["reload"])?.expect_code(3)?.expect_stderr(&["error[E-BACKING]", "line 6", "nothing was changed"])?;
    let file = path.display().to_string();
    scene.ask(&["add", "late", "--file", &file])?.expect_code(3)?.expect_stderr(&["error[E-BACKING]"])?;
    daemon.stop()?;

    let daemon = scene.start(&config(&late))?;
    let reload = |devices: &str| -> Result<_> {
        fs::write(daemon.config(), config(devices))?;
        scene.ask(&["reload"])
    };
    // Group and limits change as those of any device, and so does every key that is fixed for a running device.
    reload(&on_file(scene, "late", ", group: g, limits: { iops-total: 7 }"))?.expect_code(0)?;
    let listed = scene.listed("late")?;
    ensure!(listed["state"] == "waiting" && listed["group"] == "g" && listed["limits"]["iops-total"] == 7, "{listed}");
    let other = image(scene, "other");
    let moved = format!("  late: {{ backend: {{ file: {} }}, group: g, depth: 64 }}\n", other.display());
    let changed = ["device late, which waits for its backend: backend file", "depth 128 → 64"];
    reload(&moved)?.expect_code(0)?.expect_stdout(&changed)?;
    expect_waiting(scene, "late", &other.display().to_string())?;
    // An empty file, as at the start of a copy, does not end the waiting.
    File::create(&other)?;
    daemon.wait_for_log("has 0 bytes", ANSWER_LIMIT)?;
    expect_waiting(scene, "late", "0 bytes")?;
    bring(&other)?;
    expect_served(scene, "late")?;
    ensure!(scene.listed("late")?["depth"] == 64, "{}", scene.listed("late")?);
    // A file without the device removes it, live or waiting.
    reload("")?.expect_code(0)?.expect_stdout(&["device late: removed"])?;
    daemon.stop()?;

    let daemon = scene.start(&config(&late))?;
    fs::write(daemon.config(), config(""))?;
    scene.ask(&["reload"])?.expect_code(0)?.expect_stdout(&["device late: removed"])?;
    ensure!(names(scene)? == ["here"], "{:?}", names(scene)?);
    // A new backend of the wrong kind is a failure of the reload.
    daemon.stop()?;
    let daemon = scene.start(&config(&late))?;
    let folder = scene.dir().display().to_string();
    fs::write(daemon.config(), config(&format!("  late: {{ backend: {{ file: {folder} }} }}\n")))?;
    scene.ask(&["reload"])?.expect_code(3)?.expect_stderr(&["the rest is in force, but", "a directory"])?;
    daemon.stop().map(drop)
}

fn f87_a_device_waits_on_under_the_next_daemon(scene: &Scene) -> Result<()> {
    // After a kill and after a takeover, with the limit of `set`. SIGTERM ends the waiting at once and leaves nothing, unless
    // the device is kept.
    let late = on_file(scene, "late", ", group: g, limits: { iops-total: 50 }");
    let (kept, config) = (config(&late.replace(" }\n", ", on-stop: keep }\n")), config(&late));
    let expect_set = |daemon: &Daemon| -> Result<()> {
        expect_waiting(scene, "late", "no such file")?;
        ensure!(scene.listed("late")?["limits"]["iops-total"] == 30, "{}\n{}", scene.listed("late")?, daemon.log()?);
        Ok(())
    };
    let daemon = scene.start(&config)?;
    scene.ask(&["set", "device", "late", "iops-total=30"])?.expect_code(0)?;
    let_run(1);
    daemon.kill(ANSWER_LIMIT)?;
    let mut daemon = scene.start(&config)?;
    expect_set(&daemon)?;
    let new = scene.take_over(&config)?;
    daemon.wait_for_end(ANSWER_LIMIT)?;
    expect_set(&new)?;
    bring(&image(scene, "late"))?;
    expect_served(scene, "late")?;
    ensure!(scene.listed("late")?["limits"]["iops-total"] == 30, "{}", scene.listed("late")?);
    new.stop()?;
    fs::remove_file(image(scene, "late"))?;
    let daemon = scene.start(&config)?;
    let begin = Instant::now();
    daemon.signal(Signal::SIGTERM)?;
    daemon.expect_end(ANSWER_LIMIT)?;
    expect_within("SIGTERM while a device waits", begin.elapsed(), SERVED_LIMIT)?;
    let left = fs::read_dir(scene.state_dir())?.filter_map(Result::ok).map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().ends_with(".device.json")).collect();
    ensure!(left.is_empty(), "{left:?}");
    // With `on-stop: keep` its limit outlives SIGTERM, too.
    let daemon = scene.start(&kept)?;
    scene.ask(&["set", "device", "late", "iops-total=30"])?.expect_code(0)?;
    daemon.stop()?;
    let daemon = scene.start(&kept)?;
    expect_set(&daemon)?;
    scene.ask(&["del", "late"])?.expect_code(0)?;
    daemon.stop().map(drop)
}

fn f87_what_is_required_or_wrong_ends_the_start(scene: &Scene) -> Result<()> {
    let (late, path) = (on_file(scene, "late", ""), image(scene, "late"));
    let defaults = |devices: &str| config(devices).replace("groups:", "defaults: { required: true }\ngroups:");
    let refused = |text: &str, why: &str| -> Result<()> {
        scene.write("run.yaml", text)?;
        let told = path.display().to_string();
        scene.ask(&["run", "run.yaml"])?.expect_code(3)?.expect_stderr(&["error[E-BACKING]", &told, why])?;
        scene.expect_nothing_left()
    };
    refused(&config(&on_file(scene, "late", ", required: true")), "no such file")?;
    refused(&defaults(&late), "no such file")?;
    // A path that leads to a file of the wrong kind or size ends the start without `required`, too.
    File::create(&path)?;
    refused(&config(&late), "0 bytes")?;
    fs::remove_file(&path)?;
    fs::create_dir(&path)?;
    refused(&config(&late), "a directory")
}

fn f88_a_path_that_does_not_answer_holds_up_no_other_device(scene: &Scene) -> Result<()> {
    // The file system is on a disk that stalls. The daemon is ready, answers, and removes a device whose open still
    // hangs.
    let disk = Mapped::on_ram(64)?;
    let point = scene.dir().join("mount");
    let mount = Mount::new(disk.node(), &point)?;
    for name in ["late", "gone"] {
        bring(&point.join(format!("{name}.img")))?;
    }
    // A new mount has no entry of the folder in memory.
    mount.unmount()?;
    let mount = Mount::existing(disk.node(), &point)?;
    let device = |name: &str| format!("  {name}: {{ backend: {{ file: {}/{name}.img }} }}\n", point.display());
    disk.suspend()?;
    let begin = Instant::now();
    let daemon = scene.start(&config(&format!("{}{}", device("late"), device("gone"))))?;
    expect_within("ready beside a path that does not answer", begin.elapsed(), Duration::from_secs(8))?;
    expect_waiting(scene, "late", "has not answered")?;
    scene.ask(&["del", "gone"])?.expect_code(0)?;
    ensure!(names(scene)? == ["here", "late"], "{:?}", names(scene)?);
    disk.resume()?;
    expect_served(scene, "late")?;
    ensure!(names(scene)? == ["here", "late"], "{:?}", names(scene)?);
    daemon.stop()?;
    mount.unmount()
}

fn f89_an_id_that_is_named_is_given_to_no_other_device(scene: &Scene) -> Result<()> {
    // The first free ids are named for a device that waits and for one that starts with the rest.
    let autos: String = (0..6).map(|n| format!("  auto{n}: {{ backend: {{ null: 1MiB }} }}\n")).collect();
    let devices = format!("{autos}  z: {{ backend: {{ null: 1MiB }}, id: 0 }}\n{}", on_file(scene, "late", ", id: 1"));
    let daemon = scene.start(&config(&devices))?;
    scene.ask(&["add", "more", "--null", "1MiB"])?.expect_code(0)?;
    let refused = scene.ask(&["add", "one", "--null", "1MiB", "--id", "1"])?.expect_code(5)?;
    refused.expect_stderr(&["error[E-ID-TAKEN]", "late"])?;
    expect_waiting(scene, "late", "no such file")?;
    bring(&image(scene, "late"))?;
    expect_served(scene, "late")?;
    let ids = ["z", "late"].map(|name| scene.device(name).map(|device| device.id));
    ensure!(matches!(ids, [Ok(0), Ok(1)]), "{ids:?}");
    daemon.stop().map(drop)
}
