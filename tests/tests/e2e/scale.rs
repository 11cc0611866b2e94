//! Many devices: what they cost while nothing happens, and whether the next one is as quick as the first.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::mode::Times;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::process::Ran;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::socket::Client;
use ublk_throttle_tests::{process, sysfs};

use crate::measure::{expect_all, expect_within};
use crate::{Case, cases};

/// For a hundred devices, made and removed.
const TRIAL_LIMIT: Duration = Duration::from_secs(600);

pub(crate) fn cases() -> Vec<Case> {
    cases![[Need::Ublk];
        idle_devices_cost_a_millisecond_a_second_and_4_mib_each,
        a_device_is_added_and_removed_beside_many_as_fast_as_beside_one,
    ]
    .map(|case| case.within(TRIAL_LIMIT))
    .into()
}

/// For all devices to come, and to go.
const MANY_LIMIT: Duration = Duration::from_secs(120);

/// Idle devices. A thread that runs shows with the first device; the bound on CPU is for the whole daemon.
const IDLE_DEVICES: Times = Times { ci: 16, thorough: 64 };

/// How long idleness is looked at.
const IDLE: Duration = Duration::from_secs(10);

fn idle_devices_cost_a_millisecond_a_second_and_4_mib_each(scene: &Scene) -> Result<()> {
    // Devices of two queues in one group of one daemon: all come up and serve. Then no thread of a device runs at all;
    // the daemon and its helpers together use no more than 10 ms of CPU in 10 s; and at most 4 MiB are resident for
    // each device.
    let count = IDLE_DEVICES.get();
    let mut config = "version: 1\ngroups:\n  g: { limits: { iops-total: 1000 } }\ndevices:\n".to_owned();
    for number in 0..count {
        writeln!(config, "  d{number}: {{ backend: {{ null: 1GiB }}, queues: 2, group: g }}")?;
    }
    let begin = Instant::now();
    let mut daemon = scene.start_without_waiting(&config)?;
    daemon.wait_for_log("\nready\n", MANY_LIMIT)?;
    eprintln!("          {count} devices ready after {:?}", begin.elapsed());
    let cpus = std::thread::available_parallelism()?.get();
    for number in 0..count {
        let device = scene.device(&format!("d{number}"))?;
        let queues = sysfs::queue_cpus(&device.disk)?.len();
        ensure!(queues == cpus.min(2), "d{number} has {queues} queues");
        ensure!(Direct::open(&device.node)?.holds(0, 4096, 0)?, "d{number} does not read as zeroes");
    }
    // What the reads have left behind is given back within seconds, and a kernel's worker without work ends after five.
    sleep(Duration::from_secs(12));
    let before = ran(scene)?;
    sleep(IDLE);
    let after = ran(scene)?;
    let spent = after.iter().map(|(thread, after)| {
        let before = before.get(thread).copied().unwrap_or_default();
        (thread, Ran { ns: after.ns - before.ns, times: after.times - before.times })
    });
    let spent: BTreeMap<_, _> = spent.filter(|(_, ran)| ran.times > 0).collect();
    // Of a device and of a queue of it: d12, d12/q0.
    let is_of_a_device = |thread: &str| thread.split(' ').nth(1).is_some_and(|name| name.starts_with('d'));
    let of_devices: Vec<_> = spent.keys().filter(|(_, thread)| is_of_a_device(thread)).collect();
    ensure!(of_devices.is_empty(), "threads of idle devices have run: {of_devices:?}");
    let cpu = Duration::from_nanos(spent.values().map(|ran| ran.ns).sum());
    expect_within(format!("CPU of {} threads in {IDLE:?}: {spent:?}", after.len()), cpu, IDLE / 1000)?;
    let rss_kib = process::resident_kib(daemon.pid())?;
    eprintln!("          {rss_kib} KiB resident, {} KiB a device", rss_kib / count as u64);
    ensure!(rss_kib <= 4096 * count as u64, "{rss_kib} KiB resident for {count} devices");
    let begin = Instant::now();
    daemon.signal(Signal::SIGTERM)?;
    let code = daemon.wait_for_end(MANY_LIMIT)?;
    eprintln!("          {count} devices removed after {:?}", begin.elapsed());
    ensure!(code == Some(0), "exit code {code:?}:\n{}", daemon.log()?);
    Ok(())
}

/// What every thread of the daemon and its helpers has had of the CPUs, by process, and number and name.
fn ran(scene: &Scene) -> Result<BTreeMap<(u32, String), Ran>> {
    let mut all = BTreeMap::new();
    for pid in scene.processes() {
        all.extend(process::ran(pid)?.into_iter().map(|(thread, ran)| ((pid, thread), ran)));
    }
    ensure!(!all.is_empty(), "no thread of the daemon was found");
    Ok(all)
}

/// Rounds of a measurement of `add` and `del`, of which the median counts.
const ROUNDS: Times = Times { ci: 11, thorough: 21 };

/// Devices beside the one that comes and goes.
const MANY: Times = Times { ci: 32, thorough: 100 };

/// How much longer the median may be beside many devices. A cost that grows with their number shows if each of 100 adds
/// a third of a percent (each of 32: one percent).
const LONGER: f64 = 1.3;

fn a_device_is_added_and_removed_beside_many_as_fast_as_beside_one(scene: &Scene) -> Result<()> {
    // One daemon: rounds beside one device, and then beside many.
    let daemon = scene.start(
        "version: 1\ngroups:\n  g: { limits: { iops-total: 1000 } }\ndevices:\n  d0: { backend: { null: 1GiB }, group: g }\n",
    )?;
    come_and_go(scene, 3)?;
    let one = rounds(scene)?;
    together(scene, |client, number| {
        let settings = json!({"null": "1GiB", "group": "g"});
        client.must(&json!({"cmd": "add", "device": format!("d{number}"), "settings": settings}), ANSWER)
    })?;
    let many = rounds(scene)?;
    let compare = |what: &str, one: Duration, many: Duration| {
        expect_within(format!("{what} beside many, {one:?} beside one"), many, one.mul_f64(LONGER))
    };
    expect_all([compare("add", one.add, many.add), compare("del", one.del, many.del)])?;
    daemon.stop().map(drop)
}

/// What an answer may take; the bounds that users are promised are those of other trials.
const ANSWER: Duration = Duration::from_secs(20);

/// Does something for all of [`MANY`] but d0, from four clients at once.
fn together(scene: &Scene, what: impl Fn(&mut Client, usize) -> Result<serde_json::Value> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let what = &what;
                scope.spawn(move || -> Result<()> {
                    let mut connection = scene.connect()?;
                    (1..MANY.get()).filter(|number| number % 4 == client).try_for_each(|number| {
                        what(&mut connection, number).map(drop).with_context(|| format!("d{number}"))
                    })
                })
            })
            .collect();
        clients.into_iter().try_for_each(|client| client.join().map_err(|_| anyhow!("a client panicked"))?)
    })
}

struct Medians {
    add: Duration,
    del: Duration,
}

/// Adds and removes one device again and again: how long each took, shortest first.
fn come_and_go(scene: &Scene, count: usize) -> Result<[Vec<Duration>; 2]> {
    let mut client = scene.connect()?;
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..count {
        let add = json!({"cmd": "add", "device": "new", "settings": {"null": "1GiB", "group": "g"}});
        let commands = [add, json!({"cmd": "del", "device": "new"})];
        for (command, times) in commands.iter().zip(&mut times) {
            let begin = Instant::now();
            client.must(command, ANSWER)?;
            times.push(begin.elapsed());
        }
    }
    Ok(times.map(|mut times| {
        times.sort();
        times
    }))
}

/// Medians of [`ROUNDS`] of both, which it prints with their extremes.
fn rounds(scene: &Scene) -> Result<Medians> {
    let present = fs::read_dir("/dev/ublk-throttle")?.count();
    let [add, del] = come_and_go(scene, ROUNDS.get())?;
    let (middle, last) = (add.len() / 2, add.len() - 1);
    for (what, took) in [("add", &add), ("del", &del)] {
        eprintln!("          beside {present}: {what} {:?} ({:?} to {:?})", took[middle], took[0], took[last]);
    }
    Ok(Medians { add: add[middle], del: del[middle] })
}
