//! Many devices: their cost while idle, and the time of `add` and `del` beside them.

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

/// Limit of a trial that makes and removes 100 devices.
const TRIAL_LIMIT: Duration = Duration::from_secs(600);

pub(crate) fn cases() -> Vec<Case> {
    cases![[Need::Ublk];
        idle_devices_cost_a_millisecond_a_second_and_4_mib_each,
        a_device_is_added_and_removed_beside_many_as_fast_as_beside_one,
    ]
    .map(|case| case.within(TRIAL_LIMIT))
    .into()
}

/// Limit on the start and on the removal of all devices.
const MANY_LIMIT: Duration = Duration::from_secs(120);

/// Idle devices. A thread that wakes shows with the first device; the bound on CPU time is for the
/// whole daemon.
const IDLE_DEVICES: Times = Times { ci: 16, thorough: 64 };

/// The interval without requests over which CPU time is measured.
const IDLE: Duration = Duration::from_secs(10);

fn idle_devices_cost_a_millisecond_a_second_and_4_mib_each(scene: &Scene) -> Result<()> {
    // Devices of two queues in one group of one daemon: all start and serve. Then no thread of a
    // device runs at all; the daemon and its helpers together use at most 10 ms of CPU in 10 s; and
    // at most 4 MiB per device are resident.
    let count = IDLE_DEVICES.get();
    let mut config = "version: 1\ngroups:\n  g: { limits: { iops-total: 1000 } }\ndevices:\n".to_owned();
    for number in 0..count {
        writeln!(config, "  d{number}: {{ backend: {{ null: 1GiB }}, queues: 2, group: g }}")?;
    }
    let begin = Instant::now();
    let daemon = scene.start_without_waiting(&config)?;
    daemon.wait_for_log("\nready\n", MANY_LIMIT)?;
    eprintln!("          {count} devices ready after {:?}", begin.elapsed());
    let cpus = std::thread::available_parallelism()?.get();
    for number in 0..count {
        let device = scene.device(&format!("d{number}"))?;
        let queues = sysfs::queue_cpus(&device.disk)?.len();
        ensure!(queues == cpus.min(2), "d{number} has {queues} queues");
        ensure!(Direct::open(&device.node)?.holds(0, 4096, 0)?, "d{number} does not read as zeroes");
    }
    // Buffers of the reads are given back within 4 s, and an idle io-wq worker of the kernel ends
    // after 5 s.
    sleep(Duration::from_secs(12));
    let before = ran(scene)?;
    sleep(IDLE);
    let after = ran(scene)?;
    let spent = after.iter().map(|(thread, after)| {
        let before = before.get(thread).copied().unwrap_or_default();
        (thread, Ran { ns: after.ns - before.ns, times: after.times - before.times })
    });
    let spent: BTreeMap<_, _> = spent.filter(|(_, ran)| ran.times > 0).collect();
    // Threads of a device and of its queues: d12, d12/q0.
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
    daemon.expect_end(MANY_LIMIT)?;
    eprintln!("          {count} devices removed after {:?}", begin.elapsed());
    Ok(())
}

/// CPU time of every thread of the daemon and its helpers, by pid, and by the thread's id and name.
fn ran(scene: &Scene) -> Result<BTreeMap<(u32, String), Ran>> {
    let mut all = BTreeMap::new();
    for pid in scene.processes() {
        all.extend(process::ran(pid)?.into_iter().map(|(thread, ran)| ((pid, thread), ran)));
    }
    ensure!(!all.is_empty(), "no thread of the daemon was found");
    Ok(all)
}

/// Measurements of `add` and `del`, from which the median is taken.
const ROUNDS: Times = Times { ci: 11, thorough: 21 };

/// Devices beside the measured one.
const MANY: Times = Times { ci: 32, thorough: 100 };

/// Bound on the ratio of the medians, beside many devices to beside one. A cost per present device
/// shows from a third of a percent for each of 100 (1 % for each of 32).
const LONGER: f64 = 1.3;

fn a_device_is_added_and_removed_beside_many_as_fast_as_beside_one(scene: &Scene) -> Result<()> {
    // One daemon: rounds beside one device, then beside many.
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

/// Limit of an answer; the bounds promised to users are the claims of further trials.
const ANSWER: Duration = Duration::from_secs(20);

/// Calls `what` for each number below [`MANY`] except 0, from four clients in parallel.
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

/// Adds and removes a device `count` times; returns the sorted times of `add` and of `del`.
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

/// The medians of `add` and `del` over [`ROUNDS`] rounds, printed with their extremes.
fn rounds(scene: &Scene) -> Result<Medians> {
    let present = fs::read_dir("/dev/ublk-throttle")?.count();
    let [add, del] = come_and_go(scene, ROUNDS.get())?;
    let (middle, last) = (add.len() / 2, add.len() - 1);
    for (what, took) in [("add", &add), ("del", &del)] {
        eprintln!("          beside {present}: {what} {:?} ({:?} to {:?})", took[middle], took[0], took[last]);
    }
    Ok(Medians { add: add[middle], del: del[middle] })
}
