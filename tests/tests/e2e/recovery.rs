//! The death of a daemon is a pause for the users of its devices, not an error: the next daemon
//! takes the devices over.
//!
//! ```text
//!   SIGKILL ──► requests wait in the kernel ──► run ──► the same disks, ids and limits; each request in flight is done once
//! ```

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use ublk_target::ublk::control::Control;
use ublk_target::ublk::leftovers;
use ublk_throttle_tests::command::{self, Started};
use ublk_throttle_tests::daemon::Daemon;
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::disks::{Mount, RamDisk};
use ublk_throttle_tests::fio::{Fio, Job};
use ublk_throttle_tests::mode::Times;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::{Device, Scene};
use ublk_throttle_tests::setting::Setting;
use ublk_throttle_tests::{process, sysfs, wait};

use crate::measure::expect_within;
use crate::removal::kill_during_dels;
use crate::{Case, VERIFIED, WRITES, cases, let_run, load};

/// From SIGKILL until every device serves again.
const BACK_LIMIT: Duration = Duration::from_secs(2);
/// Bound of an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// CPU time that the fair server gives to normal tasks beside real-time tasks on CPU 0, in ns per
/// second (since Linux 6.12).
const FAIR_SERVER: &str = "/sys/kernel/debug/sched/fair_server/cpu0/runtime";
/// Bound of a recovery on a kernel that gives up a queue without a free tag only after 30 s.
const FULL_LIMIT: Duration = Duration::from_secs(40);

/// Kills in the middle of a removal or a recovery, each after another delay. The trials of
/// `crash_points` kill at every step.
const KILLS: Times = Times { ci: 2, thorough: 5 };

pub(crate) fn cases() -> Vec<Case> {
    let plain = cases![[Need::Ublk];
        f04_what_set_and_add_made_survives_a_daemon_that_is_killed,
        f04_a_device_that_is_not_in_the_configuration_is_kept_and_told,
        f04_a_backend_that_is_away_is_waited_for_and_a_replaced_one_refused,
        f04_a_device_left_behind_can_be_removed_before_it_is_served,
        f66_what_was_set_of_weighted_groups_stays_after_kill_takeover_and_keep,
        f83_a_state_file_that_cannot_be_read_is_put_aside_and_the_others_are_served,
    ];
    let two_cpus = cases![[Need::Ublk, Need::TwoCpus];
        f06_a_server_that_died_between_its_queues_is_recovered_from,
        f06_what_the_kernel_does_late_about_a_dead_server_is_waited_for,
    ];
    let fio = cases![[Need::Ublk, Need::Fio];
        f04_a_queue_without_a_free_tag_is_waited_for,
        f05_a_daemon_killed_during_a_removal_leaves_nothing_of_it,
        f06_a_daemon_killed_while_it_recovers_is_recovered_from,
    ];
    let slow = cases![[Need::Ublk, Need::Ext4, Need::NullBlk];
        sigterm_loses_nothing_of_a_mounted_device_that_outlives_daemons,
    ];
    plain.into_iter().chain(two_cpus).chain(fio).chain(slow).collect()
}

fn image(scene: &Scene, name: &str) -> PathBuf {
    scene.dir().join(format!("{name}.img"))
}

/// The configuration of a device on a file of its own; `more` is appended to it.
fn in_a_file(scene: &Scene, name: &str, more: &str) -> String {
    let image = image(scene, name);
    format!("  {name}: {{ backend: {{ file: {}, size: 64MiB, create: true }}{more} }}\n", image.display())
}

fn config(devices: &str) -> String {
    format!("version: 1\ndevices:\n{devices}")
}

/// Sends SIGKILL and waits for the end of the process.
fn kill(daemon: Daemon) -> Result<()> {
    daemon.kill(ANSWER_LIMIT).map(drop)
}

/// Writes and reads a page of the device.
fn serves(device: &Device, byte: u8) -> Result<()> {
    let direct = Direct::open(&device.node)?;
    direct.write(4096, 4096, byte)?;
    ensure!(direct.holds(4096, 4096, byte)?, "{} reads something else", device.node());
    Ok(())
}

fn sigterm_loses_nothing_of_a_mounted_device_that_outlives_daemons(scene: &Scene) -> Result<()> {
    // The kernel fails dirty pages when a disk that outlived its daemon is stopped: write-back has
    // to come first, however long it takes. Here it is 24 MiB at no more than 512 KiB per 0.1 s:
    // longer than a removal waits for a backend without progress.
    let disk = RamDisk::slow(48, Duration::from_millis(80))?;
    let node = disk.node().display();
    let config = config(&format!("  d: {{ backend: {{ block: {node}, direct: true }}, depth: 1 }}\n"));
    let daemon = scene.start(&config)?;
    let mount = Mount::new(&scene.device("d")?.node, &scene.dir().join("mount"))?;
    let point = mount.point().to_owned();
    let written: Vec<u8> = (0..24 << 20).map(|at: u32| (at / 4096 % 251) as u8).collect();
    fs::write(point.join("file"), &written)?;
    eprintln!("          SIGTERM to exit: {:?}", daemon.stop()?);
    mount.unmount()?;
    let daemon = scene.start(&config)?;
    let mount = Mount::existing(&scene.device("d")?.node, &point)?;
    let read = fs::read(point.join("file"))?;
    mount.unmount()?;
    ensure!(read == written, "{} of {} bytes are there, or others", read.len(), written.len());
    daemon.stop().map(drop)
}

fn f04_what_set_and_add_made_survives_a_daemon_that_is_killed(scene: &Scene) -> Result<()> {
    let config = format!(
        "version: 1\ngroups:\n  g: {{ limits: {{ iops-total: 100 }} }}\ndevices:\n{}",
        in_a_file(scene, "d", ", group: g, limits: { iops-total: 50 }")
    );
    let daemon = scene.start(&config)?;
    scene.ask(&["set", "device", "d", "iops-total=70"])?.expect_code(0)?;
    scene.ask(&["set", "group", "g", "iops-total=170"])?.expect_code(0)?;
    scene.ask(&["set", "group", "made", "iops-total=30", "--create"])?.expect_code(0)?;
    let file = image(scene, "added");
    let file = file.to_str().context("path")?;
    scene.ask(&["add", "added", "--file", file, "--size", "8MiB", "--create", "--group", "made"])?.expect_code(0)?;
    let added = scene.device("added")?;
    serves(&added, 0x77)?;
    // A thread of the daemon writes the state of groups shortly after the answer.
    std::thread::sleep(Duration::from_millis(200));
    kill(daemon)?;
    let daemon = scene.start(&config)?;
    ensure!(scene.listed("d")?["limits"]["iops-total"] == 70, "{}", scene.listed("d")?);
    let groups = scene.listing()?["groups"].clone();
    let limit = |name: &str| {
        let group = groups.as_array().and_then(|groups| groups.iter().find(|group| group["name"] == name));
        group.map(|group| group["limits"]["iops-total"].clone())
    };
    ensure!(limit("g") == Some(170.into()) && limit("made") == Some(30.into()), "{groups}");
    ensure!(scene.device("added")?.id == added.id, "another id");
    ensure!(scene.listed("added")?["group"] == "made", "{}", scene.listed("added")?);
    ensure!(Direct::open(&added.node)?.holds(4096, 4096, 0x77)?, "its bytes are gone");
    // A changed value in the configuration file replaces the value of `set`.
    kill(daemon)?;
    let daemon = scene.start(&config.replace("iops-total: 50", "iops-total: 51"))?;
    ensure!(scene.listed("d")?["limits"]["iops-total"] == 51, "{}", scene.listed("d")?);
    daemon.stop().map(drop)
}

fn f66_what_was_set_of_weighted_groups_stays_after_kill_takeover_and_keep(scene: &Scene) -> Result<()> {
    // A group at the top has a weight without effect: it has no siblings to share with.
    let device = in_a_file(scene, "d", ", group: g, on-stop: keep");
    let config = format!(
        "version: 1\ngroups:\n  g: {{ weight: 200, limits: {{ iops-total: 100 }} }}\n  \
         above: {{ limits: {{ iops-total: 1000 }} }}\n  below: {{ parent: above, weight: 300 }}\ndevices:\n{device}"
    );
    let mut daemon = scene.start(&config)?;
    scene.ask(&["set", "group", "g", "iops-total=50"])?.expect_code(0)?;
    scene.ask(&["set", "group", "below", "parent=none", "weight=500"])?.expect_code(0)?;
    // A thread of the daemon writes the state of groups shortly after the answer.
    std::thread::sleep(Duration::from_millis(200));
    for way in ["kill", "takeover", "keep"] {
        daemon = match way {
            "takeover" => {
                let new = scene.take_over(&config)?;
                daemon.expect_end(ANSWER_LIMIT)?;
                new
            }
            "keep" => {
                daemon.stop()?;
                scene.start(&config)?
            }
            _ => {
                kill(daemon)?;
                scene.start(&config)?
            }
        };
        let groups = scene.listing()?["groups"].clone();
        let group = |name: &str| groups.as_array().and_then(|groups| groups.iter().find(|group| group["name"] == name));
        let (g, below) = (group("g").context("g")?, group("below").context("below")?);
        ensure!(g["limits"]["iops-total"] == 50 && g["weight"] == 200, "{way}: {g}");
        ensure!(below["parent"].is_null() && below["weight"] == 500, "{way}: {below}");
    }
    scene.ask(&["del", "d"])?.expect_code(0)?;
    daemon.stop().map(drop)
}

fn f04_a_device_that_is_not_in_the_configuration_is_kept_and_told(scene: &Scene) -> Result<()> {
    let one = in_a_file(scene, "one", "");
    let daemon = scene.start(&config(&format!("{one}{}", in_a_file(scene, "two", ""))))?;
    let two = scene.device("two")?;
    serves(&two, 0x22)?;
    kill(daemon)?;
    let daemon = scene.start(&config(&one))?;
    daemon.wait_for_log("W-NOT-IN-CONFIG", ANSWER_LIMIT)?;
    ensure!(scene.device("two")?.id == two.id && Direct::open(&two.node)?.holds(4096, 4096, 0x22)?, "two is not there");
    // The device counts as made by `add`: a reload keeps it, a `del` removes it.
    scene.ask(&["reload"])?.expect_code(0)?;
    ensure!(two.node.exists(), "a reload took it away");
    scene.ask(&["del", "two"])?.expect_code(0)?;
    daemon.stop().map(drop)
}

fn f04_a_backend_that_is_away_is_waited_for_and_a_replaced_one_refused(scene: &Scene) -> Result<()> {
    // The daemon serves `other` while the file of `away` is missing. Another file of the same size
    // in that place is refused.
    let config = config(&format!("{}{}", in_a_file(scene, "away", ""), in_a_file(scene, "other", "")));
    let daemon = scene.start(&config)?;
    let device = scene.device("away")?;
    serves(&device, 0x33)?;
    let (place, aside) = (image(scene, "away"), image(scene, "aside"));
    kill(daemon)?;
    fs::rename(&place, &aside)?;
    let daemon = scene.start(&config)?;
    ensure!(scene.listed("away")?["state"] == "recovering", "{}", scene.listed("away")?);
    serves(&scene.device("other")?, 0x44)?;
    ensure!(!place.exists(), "an empty file was made in its place");
    fs::File::create(&place)?.set_len(fs::metadata(&aside)?.size())?;
    daemon.wait_for_log("is another file now", ANSWER_LIMIT)?;
    ensure!(scene.listed("away")?["state"] == "recovering", "{}", scene.listed("away")?);
    fs::rename(&aside, &place)?;
    wait::until("the device", ANSWER_LIMIT, || Ok((scene.listed("away")?["state"] == "live").then_some(())))?;
    ensure!(Direct::open(&device.node)?.holds(4096, 4096, 0x33)?, "its bytes are gone");
    daemon.stop().map(drop)
}

fn f04_a_device_left_behind_can_be_removed_before_it_is_served(scene: &Scene) -> Result<()> {
    let config = config(&format!("{}{}", in_a_file(scene, "away", ""), in_a_file(scene, "other", "")));
    let daemon = scene.start(&config)?;
    let device = scene.device("away")?;
    kill(daemon)?;
    fs::remove_file(image(scene, "away"))?;
    let daemon = scene.start(&config)?;
    let del = scene.ask(&["del", "away"])?.expect_code(0)?;
    expect_within("del", del.took, ANSWER_LIMIT)?;
    ensure!(!device.node.exists(), "{} is still there", device.node());
    daemon.stop().map(drop)
}

fn f04_a_queue_without_a_free_tag_is_waited_for(scene: &Scene) -> Result<()> {
    // Some kernels notice only after 30 s that a queue without a free tag has lost its server. The
    // daemon logs the wait, and serves `other` during that time.
    let config = config(
        "  full: { backend: { null: 1GiB }, depth: 4, limits: { iops-total: 2 } }\n  other: { backend: { null: 1GiB } }\n",
    );
    let daemon = scene.start(&config)?;
    let device = scene.device("full")?;
    let fio = scene.fio(Job::new(WRITES).set("DEVICE", device.node()))?;
    wait::until("4 in flight", ANSWER_LIMIT, || Ok((sysfs::in_flight(&device.disk)? >= 4).then_some(())))?;
    let begin = Instant::now();
    kill(daemon)?;
    let daemon = scene.start_without_waiting(&config)?;
    Direct::open(&scene.device("other")?.node)?.read(0, 4096)?;
    expect_within("SIGKILL to service of the other", begin.elapsed(), BACK_LIMIT * 2)?;
    daemon.wait_for_log("device=full state=recovered", FULL_LIMIT)?;
    expect_within("SIGKILL to service of the full one", begin.elapsed(), FULL_LIMIT)?;
    fio.interrupt()?;
    let report = fio.finish_any(Duration::from_secs(30))?;
    ensure!(report.errors().is_empty(), "errors: {:?}", report.errors());
    daemon.wait_for_log("ready", ANSWER_LIMIT)?;
    daemon.stop().map(drop)
}

fn f83_a_state_file_that_cannot_be_read_is_put_aside_and_the_others_are_served(scene: &Scene) -> Result<()> {
    // Device e is recovered under its id. Device d stays unserved, the configuration makes no
    // second device of its name, and it is recovered once its state file is back. Unreadable files
    // of groups and levels do not stop the start.
    let config = config(&format!("{}{}", in_a_file(scene, "d", ""), in_a_file(scene, "e", "")));
    let mut daemon = scene.start(&config)?;
    let (d, e) = (scene.device("d")?, scene.device("e")?);
    serves(&d, 0x55)?;
    let state = |name: &str| scene.state_dir().join(name);
    let (file, aside) = (state("d.device.json"), state("d.device.json.aside"));
    for what in ["truncated", "newer", "a directory"] {
        kill(daemon)?;
        let sound = fs::read_to_string(&file)?;
        fs::remove_file(&file)?;
        match what {
            "truncated" => fs::write(&file, &sound[..sound.len() / 2])?,
            "newer" => fs::write(&file, sound.replace("\"version\":1", "\"version\":2"))?,
            _ => fs::create_dir(&file)?,
        }
        fs::write(state("groups.json"), what)?;
        fs::write(state("levels.json"), what)?;
        daemon = scene.start(&config).context(what)?;
        ensure!(scene.device("e")?.id == e.id, "{what}: e is another device");
        serves(&e, 0x66).context(what)?;
        ensure!(d.node.exists() && scene.device("d")?.id == d.id, "{what}: {} is gone", d.node());
        let names: Vec<_> = scene.devices()?.into_iter().map(|device| device["name"].clone()).collect();
        ensure!(names == ["e"], "{what}: served: {names:?}");
        for told in ["d.device.json.aside: its device", "groups.json.aside", "levels.json.aside", "W-UNKNOWN-DEVICE"] {
            daemon.wait_for_log(told, ANSWER_LIMIT).context(what)?;
        }
        daemon.wait_for_log("error[E-CONFLICT]: device \"d\" is not made", ANSWER_LIMIT).context(what)?;
        kill(daemon)?;
        if what == "a directory" {
            fs::remove_dir(&aside)?
        } else {
            fs::remove_file(&aside)?
        }
        for name in ["groups.json.aside", "levels.json.aside"] {
            fs::remove_file(state(name)).with_context(|| format!("{what}: {name}"))?;
        }
        fs::write(&file, sound)?;
        daemon = scene.start(&config)?;
        ensure!(Direct::open(&d.node)?.holds(4096, 4096, 0x55)?, "{what}: the bytes of d are gone");
    }
    // The state file stays lost: after a removal by rublk, a reload makes the device anew.
    kill(daemon)?;
    fs::write(&file, "")?;
    let daemon = scene.start(&config)?;
    scene.ask(&["reload"])?.expect_code(5)?.expect_stderr(&["error[E-CONFLICT]", "\"d\"", "wait for a server"])?;
    ensure!(scene.device("d")?.id == d.id, "a reload has given the name of d to another disk");
    scene.tool("rublk", &["del", "-n", &d.id.to_string()])?;
    scene.ask(&["reload"])?.expect_code(0)?;
    ensure!(Direct::open(&scene.device("d")?.node)?.holds(4096, 4096, 0x55)?, "d has another file");
    daemon.stop().map(drop)
}

fn f05_a_daemon_killed_during_a_removal_leaves_nothing_of_it(scene: &Scene) -> Result<()> {
    // A forced removal with held requests: the helper outlives the daemon and finishes the removal.
    let begin = || {
        let daemon = scene.start(&config("  d: { backend: { null: 1GiB }, limits: { iops-total: 1 } }\n"))?;
        let device = scene.device("d")?;
        let fio = load(scene, WRITES, &device)?;
        Ok((daemon, device, fio))
    };
    let check = |device: Device, fio: Fio, del: Started, killed: Instant| {
        del.finish(ANSWER_LIMIT)?;
        // Depending on the moment of the kill, the removal is finished, or has not begun and the
        // device waits for the next daemon.
        wait::until("end of helpers", Duration::from_secs(10), || Ok(scene.processes().is_empty().then_some(())))?;
        let is_there = device.node.exists();
        eprintln!("          {:?} after the kill the device is there: {is_there}", killed.elapsed());
        let daemon = scene.start(&config("  d: { backend: { null: 1GiB } }\n"))?;
        if is_there {
            ensure!(scene.device("d")?.id == device.id, "it was not taken up");
        }
        Direct::open(&scene.device("d")?.node)?.read(0, 4096)?;
        fio.interrupt()?;
        fio.finish_any(Duration::ZERO)?;
        daemon.stop()?;
        scene.expect_nothing_left()
    };
    kill_during_dels(scene, KILLS, begin, check)
}

fn f06_a_daemon_killed_while_it_recovers_is_recovered_from(scene: &Scene) -> Result<()> {
    // Two recoveries in a row are killed, after several delays. The third start serves, and the
    // load has seen no error.
    let config = config(&in_a_file(scene, "d", ", queues: 2, limits: { iops-total: 1000 }"));
    let mut daemon = scene.start(&config)?;
    let device = scene.device("d")?;
    let fio = load(scene, VERIFIED, &device)?;
    for delays_ms in [[10, 20], [50, 60], [30, 40], [80, 100]].into_iter().take(KILLS.get()) {
        kill(daemon)?;
        for delay_ms in delays_ms {
            let half = scene.start_without_waiting(&config)?;
            std::thread::sleep(Duration::from_millis(delay_ms));
            half.signal(Signal::SIGKILL)?;
            kill(half)?;
        }
        let begin = Instant::now();
        daemon = scene.start(&config)?;
        expect_within("third start", begin.elapsed(), ANSWER_LIMIT)?;
        ensure!(scene.device("d")?.id == device.id, "another id");
    }
    let_run(1);
    fio.stop()?;
    daemon.stop().map(drop)
}

fn f06_a_server_that_died_between_its_queues_is_recovered_from(scene: &Scene) -> Result<()> {
    // Linux 6.12 remembers the offered queues until START_RECOVERY, which assumes that all queues
    // were offered. With one of two it followed a null pointer while it held the lock of the
    // device, and only a restart of the host cured that.
    let config = config(&in_a_file(scene, "d", ", queues: 2"));
    let mut daemon = scene.start(&config)?;
    let device = scene.device("d")?;
    serves(&device, 0x44)?;
    for queue in [0, 1] {
        kill(daemon)?;
        begin_recovery(&device)?;
        leftovers::offer_and_leave(&Control::open()?.info(device.id)?, queue..queue + 1)?;
        let begin = Instant::now();
        daemon = scene.start(&config)?;
        expect_within("start", begin.elapsed(), ANSWER_LIMIT)?;
        ensure!(Direct::open(&device.node)?.holds(4096, 4096, 0x44)?, "its bytes are gone");
        for cpu in [0, 1] {
            serves_on(cpu, &device)?;
        }
    }
    daemon.stop().map(drop)
}

/// Sends START_RECOVERY, as a server does that dies right after it.
fn begin_recovery(device: &Device) -> Result<()> {
    let mut control = Control::open()?;
    wait::until("START_RECOVERY", FULL_LIMIT, || match control.start_recovery(device.id) {
        Ok(()) => Ok(Some(())),
        Err(Errno::EBUSY) => Ok(None),
        Err(errno) => Err(errno.into()),
    })
}

/// Fails unless the device serves requests of this CPU, and so of the CPU's hardware queue.
fn serves_on(cpu: usize, device: &Device) -> Result<()> {
    on_cpu(cpu, || serves(device, 0x44))
}

/// Runs a function on a thread that is bound to one CPU.
fn on_cpu<T: Send>(cpu: usize, run: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let mut only = CpuSet::new();
    only.set(cpu)?;
    let on_it = || sched_setaffinity(Pid::from_raw(0), &only).map_err(Into::into).and_then(|()| run());
    thread::scope(|scope| scope.spawn(on_it).join().expect("no panic"))
}

fn f06_what_the_kernel_does_late_about_a_dead_server_is_waited_for(scene: &Scene) -> Result<()> {
    // The kernel takes the offers of a dead server back in deferred work, on the CPU that noticed
    // the death. No interface reports the end of that work. If a new server has offered its tags
    // before, their offers are taken back as well: the disk is live and has no server. Here a
    // real-time program on CPU 0 keeps the work waiting.
    let config = config(&in_a_file(scene, "d", ", queues: 1"));
    let daemon = scene.start(&config)?;
    let device = scene.device("d")?;
    serves(&device, 0x44)?;
    kill(daemon)?;
    begin_recovery(&device)?;
    let info = Control::open()?.info(device.id)?;
    // Normal tasks would still get a 20th of the CPU: before Linux 6.12 by the limit on real-time
    // tasks, since then by the fair server (50 ms after each second without a normal task; 0
    // disables it). The kernel stops an active fair server only while a normal task runs on its
    // CPU, so the write happens on CPU 0.
    let _all = Setting::set("/proc/sys/kernel/sched_rt_runtime_us", "-1")?;
    let _never = Path::new(FAIR_SERVER).exists().then(|| on_cpu(0, || Setting::set(FAIR_SERVER, "0"))).transpose()?;
    // The kernel closes rings and their files in work that runs on any CPU: keep that work off CPU
    // 0.
    let _elsewhere = Setting::set("/sys/devices/virtual/workqueue/cpumask", "2")?;
    let mut hog = Command::new("taskset");
    hog.args(["--cpu-list", "0", "chrt", "--fifo", "10", "sh", "-c", "while :; do :; done"]);
    let hog = command::start(scene.dir(), &mut hog)?;
    // The hog has used 0.5 s of CPU time: before that, faults that read its pages let normal tasks
    // run.
    let has_run = || Ok(process::ran(hog.pid())?.iter().any(|(_, ran)| ran.ns >= 500_000_000).then_some(()));
    wait::until("the hog", ANSWER_LIMIT, has_run)?;
    thread::scope(|scope| {
        let waiting = scope.spawn(|| leftovers::make_good(&info));
        // Without the hog `make_good` takes milliseconds. 3 s are three periods of the fair server,
        // so one that is still active fails the check.
        thread::sleep(Duration::from_secs(3));
        let has_waited = !waiting.is_finished();
        drop(hog);
        waiting.join().expect("no panic")?;
        ensure!(has_waited, "it did not wait for the kernel");
        Ok(())
    })?;
    let daemon = scene.start(&config)?;
    serves(&device, 0x44)?;
    daemon.stop().map(drop)
}
