//! Changes while I/O runs: thousands that hold, and those that are refused and change nothing.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use ublk_throttle_tests::fio::{Completions, Job};
use ublk_throttle_tests::process::{Thread, prefer_this_thread};
use ublk_throttle_tests::scene::Scene;

use crate::measure::{expect, expect_all, expect_in_time, expect_near, repeat_if_void};
use crate::refusals::files;
use crate::{let_run, now_ms, wait_until_busy};

pub(super) fn ten_thousand_sets_under_load_take_50_ms_each_and_lose_nothing(scene: &Scene) -> Result<()> {
    // Two clients, 5000 each: the group's limit between 499 and 501, the devices' weights. Both devices verify what they read;
    // together they get the limit, and no more than 501 a second and the capacity (50, and one at the brim).
    repeat_if_void(|| {
        let daemon = scene.start(
            "version: 1\n\
             groups:\n  g: { limits: { iops-total: 500 } }\n\
             devices:\n  a: { backend: { memory: 16MiB }, group: g }\n  b: { backend: { memory: 16MiB }, group: g }\n",
        )?;
        // One of its threads is preferred to its queues and to those who use them: the one that answers.
        let preferred: Vec<_> = Thread::all_of(daemon.pid())?.into_iter().filter(|thread| thread.nice != 0).collect();
        let is_control = |thread: &Thread| thread.name == "ublk-throttle" && thread.nice == -5;
        ensure!(matches!(&preferred[..], [thread] if is_control(thread)), "preferred: {preferred:?}");
        let devices = [scene.device("a")?, scene.device("b")?];
        let logs = ["a", "b"].map(|name| scene.dir().join(name));
        let jobs = [0, 1].map(|number| {
            Job::new("neighbour-verifies-through-removals")
                .set("DEVICE", devices[number].node())
                .set("LOG", logs[number].display())
        });
        let load = scene.fio_together(&jobs)?;
        for device in &devices {
            wait_until_busy(device)?;
        }
        let_run(1);
        let limits = |number: u32| json!({"cmd": "set", "group": "g", "settings": {"iops-total": 499 + number % 3}});
        let weights = |number: u32| {
            let device = if number.is_multiple_of(2) { "a" } else { "b" };
            json!({"cmd": "set", "device": device, "settings": {"weight": 100 + number % 7}})
        };
        // In an emulated machine code that has never run takes ten times as long, to be translated: 40 to 60 ms for a first set.
        let mut client = scene.connect()?;
        for question in [limits(0), weights(0), weights(1)] {
            let begin = Instant::now();
            client.must(&question, Duration::from_secs(5))?;
            eprintln!("          a first set took {:?}", begin.elapsed());
        }
        let begin = now_ms()?;
        let mut took = thread::scope(|scope| -> Result<Vec<Duration>> {
            let one = scope.spawn(|| five_thousand(scene, limits));
            let other = scope.spawn(|| five_thousand(scene, weights));
            let mut took = one.join().map_err(|_| anyhow!("a client panicked"))??;
            took.extend(other.join().map_err(|_| anyhow!("a client panicked"))??);
            Ok(took)
        })?;
        let end = now_ms()?;
        let_run(1);
        load.interrupt()?;
        let report = load.finish_any(Duration::ZERO)?;
        ensure!(report.errors().is_empty(), "errors: {:?}", report.errors());
        daemon.stop()?;
        took.sort();
        let [median, most, worst] = [took.len() / 2, took.len() * 99 / 100, took.len() - 1].map(|place| took[place]);
        let seconds = (end - begin) as f64 / 1000.0;
        eprintln!(
            "          10000 sets in {seconds:.1} s: median {median:?}, 99 of 100 within {most:?}, worst {worst:?}"
        );
        let [a, b] = [Completions::read_numbered(&logs[0], 1)?, Completions::read_numbered(&logs[1], 2)?];
        let served = a.count(begin, end) + b.count(begin, end);
        let bound = 501.0 * seconds + 51.0;
        expect_all([
            expect_in_time("a set", worst, Duration::from_millis(50)),
            expect(served as f64 <= bound, || format!("{served} served in {seconds:.1} s, at most {bound:.0}")),
            expect_near("served a second", served as f64 / seconds, 500.0, 0.02),
        ])
    })
}

/// Sends 5000 questions over one connection, each after the answer to the one before; how long each took.
fn five_thousand(scene: &Scene, question: impl Fn(u32) -> Value) -> Result<Vec<Duration>> {
    prefer_this_thread()?;
    let mut client = scene.connect()?;
    let ask = |number| {
        let begin = Instant::now();
        client.must(&question(number), Duration::from_secs(5))?;
        Ok(begin.elapsed())
    };
    (0..5000).map(ask).collect()
}

pub(super) fn reload_of_every_broken_file_changes_nothing(scene: &Scene) -> Result<()> {
    // Exit 3, the place in the file, and everything as it was. The daemon gives a file 4 s, which is a bound like others: on a
    // machine that stands still, 7.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { iops-total: 300 } }\n\
         devices:\n  d: { backend: { memory: 1MiB }, group: g, limits: { bps-write: 1MB/s } }\n",
    )?;
    let in_force = || -> Result<Value> {
        let facts = scene.ask(&["list", "--json"])?.expect_code(0)?.json()?;
        let of = |device: &Value| ["name", "id", "nonce", "group", "limits", "size"].map(|key| device[key].clone());
        let devices: Vec<_> = facts["devices"].as_array().context("no devices")?.iter().map(of).collect();
        Ok(json!([devices, facts["groups"]]))
    };
    let before = in_force()?;
    let paths = files("tests/broken", "yaml")?;
    let mut worst = Duration::ZERO;
    for path in &paths {
        let expected = fs::read_to_string(path.with_extension("expected"))?;
        let outcome = scene.ask(&["reload", path.to_str().context("path")?])?;
        expect(outcome.code != Some(7), || outcome.to_string())?;
        let outcome = outcome.expect_code(3)?;
        // The same words as from `check`, after the whole path instead of the name.
        let said: Vec<_> = expected.lines().map(|line| line.trim_start_matches("error[E-CONFIG]: ")).collect();
        let outcome = outcome.expect_stderr(&said)?;
        worst = worst.max(outcome.took);
    }
    let after = in_force()?;
    ensure!(after == before, "before: {before}\nafter: {after}");
    eprintln!("          {} broken files refused, each within {worst:?}", paths.len());
    daemon.stop().map(drop)
}
