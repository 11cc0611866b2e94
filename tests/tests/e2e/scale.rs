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
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::process::Ran;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::socket::Client;
use ublk_throttle_tests::{process, sysfs};

use crate::measure::{expect, expect_all, repeat_if_void};
use crate::{Case, cases};

/// For a hundred devices under emulation, made and removed.
const TRIAL_LIMIT: Duration = Duration::from_secs(600);

pub(crate) fn cases() -> Vec<Case> {
    cases![[Need::Ublk];
        sixty_four_idle_devices_cost_a_millisecond_a_second_and_4_mib_each,
        a_device_is_added_and_removed_beside_a_hundred_as_fast_as_beside_one,
    ]
    .map(|case| case.within(TRIAL_LIMIT))
    .into()
}

/// For 64 devices to come, and to go: under emulation each takes a third of a second of CPU.
const MANY_LIMIT: Duration = Duration::from_secs(120);

/// How long idleness is looked at, and how often at most.
const IDLE: Duration = Duration::from_secs(10);
const LOOKS: usize = 6;

fn sixty_four_idle_devices_cost_a_millisecond_a_second_and_4_mib_each(scene: &Scene) -> Result<()> {
    // 64 devices of two queues in one group of one daemon: all come up and serve. Then no thread of a device runs at all; the daemon
    // and its helpers together use no more than 10 ms of CPU in 10 s; and what is resident is no more than 64 x 4 MiB.
    //
    // Time that the host of a virtual machine takes away counts as that of the thread from which it is taken. It can only add, so
    // of several looks the least counts; one that is within the bound is enough.
    let mut config = "version: 1\ngroups:\n  g: { limits: { iops-total: 1000 } }\ndevices:\n".to_owned();
    for number in 0..64 {
        writeln!(config, "  d{number}: {{ backend: {{ null: 1GiB }}, queues: 2, group: g }}")?;
    }
    let begin = Instant::now();
    let mut daemon = scene.start_without_waiting(&config)?;
    daemon.wait_for_log("\nready\n", MANY_LIMIT)?;
    eprintln!("          64 devices ready after {:?}", begin.elapsed());
    let cpus = std::thread::available_parallelism()?.get();
    for number in 0..64 {
        let device = scene.device(&format!("d{number}"))?;
        let queues = sysfs::queue_cpus(&device.disk)?.len();
        ensure!(queues == cpus.min(2), "d{number} has {queues} queues");
        ensure!(Direct::open(&device.node)?.holds(0, 4096, 0)?, "d{number} does not read as zeroes");
    }
    // What the reads have left behind is given back within seconds, and a kernel's worker without work ends after five.
    sleep(Duration::from_secs(12));
    let mut least = u64::MAX;
    for _ in 0..LOOKS {
        let before = ran(scene)?;
        sleep(IDLE);
        let after = ran(scene)?;
        let spent = after.iter().map(|(thread, after)| {
            let before = before.get(thread).copied().unwrap_or_default();
            (thread, Ran { ns: after.ns - before.ns, times: after.times - before.times })
        });
        let spent: BTreeMap<_, _> = spent.filter(|(_, ran)| ran.times > 0).collect();
        let total: u64 = spent.values().map(|ran| ran.ns).sum();
        eprintln!("          {} threads, {:.3} ms of CPU in {IDLE:?}: {spent:?}", after.len(), total as f64 / 1e6);
        // Of a device and of a queue of it: d12, d12/q0.
        let of_devices =
            spent.keys().filter(|(_, thread)| thread.split(' ').nth(1).is_some_and(|name| name.starts_with('d')));
        let of_devices: Vec<_> = of_devices.collect();
        ensure!(of_devices.is_empty(), "threads of idle devices have run: {of_devices:?}");
        least = least.min(total);
        if least <= IDLE_NS_MAX {
            break;
        }
    }
    let rss_kib = process::resident_kib(daemon.pid())?;
    eprintln!("          {rss_kib} KiB resident, {} KiB a device", rss_kib / 64);
    ensure!(least <= IDLE_NS_MAX, "{least} ns of CPU while idle for {IDLE:?}, {LOOKS} times at least");
    ensure!(rss_kib <= 64 * 4096, "{rss_kib} KiB resident for 64 devices");
    let begin = Instant::now();
    daemon.signal(Signal::SIGTERM)?;
    let code = daemon.wait_for_end(MANY_LIMIT)?;
    eprintln!("          64 devices removed after {:?}", begin.elapsed());
    ensure!(code == Some(0), "exit code {code:?}:\n{}", daemon.log()?);
    Ok(())
}

/// A millisecond a second.
const IDLE_NS_MAX: u64 = 1_000_000 * IDLE.as_secs();

/// What every thread of the daemon and its helpers has had of the CPUs, by process, and number and name.
fn ran(scene: &Scene) -> Result<BTreeMap<(u32, String), Ran>> {
    let mut all = BTreeMap::new();
    for pid in scene.processes() {
        all.extend(process::ran(pid)?.into_iter().map(|(thread, ran)| ((pid, thread), ran)));
    }
    ensure!(!all.is_empty(), "no thread of the daemon was found");
    Ok(all)
}

/// Rounds of a measurement of `add` and `del`.
const ROUNDS: usize = 21;

/// How much longer the median may be beside a hundred devices.
///
/// Under emulation one `add` differs from the next by a standard deviation of a fifth, and a `del` by as much. The median of 21 of
/// them has 1.25 x 0.2 / sqrt(21) = 5.5 %, the ratio of two medians 7.7 %, and four times that is 31 %: beyond it in one of
/// ten thousand runs. What grows with the number of devices is found if each adds a third of a percent; were it all of the cost,
/// the ratio would be a hundred.
const LONGER: f64 = 1.3;

fn a_device_is_added_and_removed_beside_a_hundred_as_fast_as_beside_one(scene: &Scene) -> Result<()> {
    // One daemon: rounds beside one device, beside a hundred, and beside one again. If the first and the last are as far apart as
    // what is looked for, the machine has changed meanwhile and nothing is known; else the slower of the two counts.
    let daemon = scene.start(
        "version: 1\ngroups:\n  g: { limits: { iops-total: 1000 } }\ndevices:\n  d0: { backend: { null: 1GiB }, group: g }\n",
    )?;
    repeat_if_void(|| {
        come_and_go(scene, 3)?;
        let first = rounds(scene, "beside one")?;
        together(scene, |client, number| {
            let settings = json!({"null": "1GiB", "group": "g"});
            client.must(&json!({"cmd": "add", "device": format!("d{number}"), "settings": settings}), ANSWER)
        })?;
        let hundred = rounds(scene, "beside a hundred")?;
        together(scene, |client, number| client.must(&json!({"cmd": "del", "device": format!("d{number}")}), ANSWER))?;
        let last = rounds(scene, "beside one again")?;
        let compare = |what: &str, first: Duration, hundred: Duration, last: Duration| {
            let ratio = hundred.div_duration_f64(first.max(last));
            eprintln!("          {what} beside a hundred: {ratio:.2} x as long as beside one, at most {LONGER}");
            let drift = first.max(last).div_duration_f64(first.min(last));
            expect(drift <= LONGER, || format!("{what} beside one took {first:?}, and later {last:?}"))?;
            expect(ratio <= LONGER, || {
                format!("{what} beside a hundred devices takes {ratio:.2} x as long as beside one")
            })
        };
        expect_all([compare("add", first.add, hundred.add, last.add), compare("del", first.del, hundred.del, last.del)])
    })?;
    daemon.stop().map(drop)
}

/// What an answer may take; the bounds that users are promised are those of other trials.
const ANSWER: Duration = Duration::from_secs(20);

/// Does something for d1 to d99, from four clients at once.
fn together(scene: &Scene, what: impl Fn(&mut Client, usize) -> Result<serde_json::Value> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let what = &what;
                scope.spawn(move || -> Result<()> {
                    let mut connection = scene.connect()?;
                    (1..100).filter(|number| number % 4 == client).try_for_each(|number| {
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
fn rounds(scene: &Scene, when: &str) -> Result<Medians> {
    let present = fs::read_dir("/dev/ublk-throttle")?.count();
    let [add, del] = come_and_go(scene, ROUNDS)?;
    eprintln!(
        "          {when} ({present}): add {:?} ({:?} to {:?}), del {:?} ({:?} to {:?})",
        add[ROUNDS / 2],
        add[0],
        add[ROUNDS - 1],
        del[ROUNDS / 2],
        del[0],
        del[ROUNDS - 1]
    );
    Ok(Medians { add: add[ROUNDS / 2], del: del[ROUNDS / 2] })
}
