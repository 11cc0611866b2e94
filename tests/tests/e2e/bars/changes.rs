//! Changes under load: thousands of accepted `set` commands, and refused reloads that change
//! nothing.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use ublk_throttle_tests::mode::Times;
use ublk_throttle_tests::process::{Thread, prefer_this_thread};
use ublk_throttle_tests::scene::Scene;

use crate::measure::{expect_all, expect_limit_held, expect_near, expect_within};
use crate::refusals::files;
use crate::{VERIFIED, completions, let_run, load, now_ms};

/// Sets of each of the two clients. 3000 sets take about a second; 2 % of the requests of that
/// second are 10.
const SETS: Times = Times { ci: 1500, thorough: 5000 };

pub(super) fn sets_under_load_take_50_ms_each_and_lose_nothing(scene: &Scene) -> Result<()> {
    // The first client sets the group's limit between 499 and 501, the second client the weights of
    // the devices. Both devices verify their data. Together they get the limit, and at most 501 a
    // second and the capacity.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { iops-total: 500 } }\n\
         devices:\n  a: { backend: { memory: 16MiB }, group: g }\n  b: { backend: { memory: 16MiB }, group: g }\n",
    )?;
    // Only the control thread, which answers commands, runs at a higher priority (nice -5).
    let preferred: Vec<_> = Thread::all_of(daemon.pid())?.into_iter().filter(|thread| thread.nice != 0).collect();
    let is_control = |thread: &Thread| thread.name == "ublk-throttle" && thread.nice == -5;
    ensure!(matches!(&preferred[..], [thread] if is_control(thread)), "preferred: {preferred:?}");
    let devices = [scene.device("a")?, scene.device("b")?];
    let loads = [load(scene, VERIFIED, &devices[0])?, load(scene, VERIFIED, &devices[1])?];
    let_run(1);
    let limits = |number: u32| json!({"cmd": "set", "group": "g", "settings": {"iops-total": 499 + number % 3}});
    let weights = |number: u32| {
        let device = if number.is_multiple_of(2) { "a" } else { "b" };
        json!({"cmd": "set", "device": device, "settings": {"weight": 100 + number % 7}})
    };
    let begin = now_ms()?;
    let mut took = thread::scope(|scope| -> Result<Vec<Duration>> {
        let one = scope.spawn(|| ask_repeatedly(scene, limits));
        let other = scope.spawn(|| ask_repeatedly(scene, weights));
        let mut took = one.join().map_err(|_| anyhow!("a client panicked"))??;
        took.extend(other.join().map_err(|_| anyhow!("a client panicked"))??);
        Ok(took)
    })?;
    let end = now_ms()?;
    let_run(1);
    loads.into_iter().try_for_each(|load| load.stop().map(drop))?;
    took.sort();
    let [median, most, worst] = [took.len() / 2, took.len() * 99 / 100, took.len() - 1].map(|place| took[place]);
    let seconds = (end - begin) as f64 / 1000.0;
    eprintln!("          {} sets in {seconds:.1} s: median {median:?}, 99 of 100 within {most:?}", took.len());
    let [a, b] = [completions(scene, &devices[0])?, completions(scene, &devices[1])?];
    let rate = a.rate(begin, end) + b.rate(begin, end);
    let (first, last) = (a.first_ms().min(b.first_ms()), a.last_ms().max(b.last_ms()) + 1);
    let in_all = a.in_all().0 + b.in_all().0;
    expect_all([
        expect_within("the slowest set", worst, Duration::from_millis(50)),
        expect_near("served a second", rate, 500.0, 0.02),
        expect_limit_held("served", in_all, 501.0, (last - first) as f64 / 1000.0, 64),
    ])?;
    daemon.stop().map(drop)
}

/// Sends [`SETS`] questions over one connection, each after the previous answer; returns the time
/// of each.
fn ask_repeatedly(scene: &Scene, question: impl Fn(u32) -> Value) -> Result<Vec<Duration>> {
    prefer_this_thread()?;
    let mut client = scene.connect()?;
    let ask = |number| {
        let begin = Instant::now();
        client.must(&question(number), Duration::from_secs(5))?;
        Ok(begin.elapsed())
    };
    (0..SETS.get() as u32).map(ask).collect()
}

pub(super) fn reload_of_every_broken_file_changes_nothing(scene: &Scene) -> Result<()> {
    // Exit 3, the place in the file, and no change.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { iops-total: 300 } }\n\
         devices:\n  d: { backend: { memory: 1MiB }, group: g, limits: { bps-write: 1MB/s } }\n",
    )?;
    let in_force = || -> Result<Value> {
        let facts = scene.listing()?;
        let of = |device: &Value| ["name", "id", "nonce", "group", "limits", "size"].map(|key| device[key].clone());
        let devices: Vec<_> = facts["devices"].as_array().context("no devices")?.iter().map(of).collect();
        Ok(json!([devices, facts["groups"]]))
    };
    let before = in_force()?;
    let paths = files("tests/broken", "yaml")?;
    let mut worst = Duration::ZERO;
    for path in &paths {
        let expected = fs::read_to_string(path.with_extension("expected"))?;
        let outcome = scene.ask(&["reload", path.to_str().context("path")?])?.expect_code(3)?;
        // The words of `check`, with the whole path instead of the name of the file.
        let said: Vec<_> = expected.lines().map(|line| line.trim_start_matches("error[E-CONFIG]: ")).collect();
        let outcome = outcome.expect_stderr(&said)?;
        worst = worst.max(outcome.took);
    }
    let after = in_force()?;
    ensure!(after == before, "before: {before}\nafter: {after}");
    eprintln!("          {} broken files refused, each within {worst:?}", paths.len());
    daemon.stop().map(drop)
}
