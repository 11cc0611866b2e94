//! Repeated removals of a device under load, and their effect on a neighbour in the same group.
//!
//! ```text
//!   neighbour   ═══════ 500/s ═══════╪═════ 1000/s ══════╪══ 500/s ═      writes, and verifies 64 writes later
//!   victim      ═══════ 500/s ═══════╡ del               ├ add ════       32 in flight
//!   measured            │ 0.2 s │ removal │    1 s    │              gaps in all of it, the rate in any half of the last part
//! ```

use std::fs::{self, File};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use ublk_throttle_tests::fio::{Completions, Fio, Job};
use ublk_throttle_tests::mode::{Times, to_measure};
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::wait;

use crate::measure::{expect_all, expect_at_least, expect_limit_held, expect_within};
use crate::{VERIFIED, completions, load, now_ms, wait_until_busy};

/// Removals, each at a different moment of both loads. A fault that one in ten removals shows
/// escapes these 12 and the 12 of the run on two CPUs with probability 0.9^24 = 8 %.
const REMOVALS: Times = Times { ci: 12, thorough: 200 };

/// The begin and end of one `del`, in milliseconds since 1970.
#[derive(Clone, Copy, Debug)]
struct Removed {
    begin_ms: u64,
    end_ms: u64,
}

/// The id of the victim.
const VICTIM: u32 = 77;

/// Bound of a `del`.
const DEL_LIMIT: Duration = Duration::from_secs(2);
/// Bound on the interval between two completions of the neighbour.
const GAP_LIMIT: Duration = Duration::from_millis(100);
/// The measured intervals before and after a removal.
const BEFORE_MS: u64 = 200;
/// From the first full queue of the victim's load to the measurement. A new device delays its
/// neighbour, too, and that delay is not the subject of this trial.
const SETTLE_MS: u64 = 300;
const AFTER_MS: u64 = 1000;
/// The length of the windows over which the neighbour's rate is taken.
const WINDOW_MS: u64 = 500;
/// 1000 a second, less 3 %: 15 of 500 requests, more than one timer dispatches at either end of a
/// window. The best window counts, as a gap of the neighbour moves requests over the edge of a
/// window. A share that the group has not given back shows as half the rate in every window.
const RATE_BACK: f64 = 970.0;

pub(super) fn removals_under_load_hurt_no_neighbour(scene: &Scene) -> Result<()> {
    // A group of 1000 operations a second. Each removal: exit 0 within 2 s. The neighbour verifies
    // its data and sees no error, no gap above 0.1 s, and the whole rate for half a second within
    // the second after the removal.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { iops-total: 1000 } }\n\
         devices:\n  neighbour: { backend: { memory: 16MiB }, group: g }\n",
    )?;
    let mut client = scene.connect()?;
    let add = json!({"cmd": "add", "device": "victim", "settings": {"null": "1GiB", "group": "g", "id": VICTIM}});
    let neighbour = scene.device("neighbour")?;
    let neighbours_load = load(scene, VERIFIED, &neighbour)?;
    let loads = loads_one_after_another(scene)?;
    let mut removals: Vec<Removed> = Vec::new();
    for number in 0..REMOVALS.get() {
        // The id is free as soon as the load has closed the removed disk.
        wait::until("victim added again", Duration::from_secs(10), || {
            let answer = client.ask(&add, Duration::from_secs(10))?;
            ensure!(answer["ok"] == true || answer["error"]["class"] == "E-ID-TAKEN", "{add}: {answer}");
            Ok((answer["ok"] == true).then_some(()))
        })?;
        let measured_ms = removals.last().map_or(0, |last| last.end_ms + AFTER_MS);
        sleep(to_measure(Duration::from_millis(measured_ms.saturating_sub(now_ms()?))));
        let victim = scene.device("victim")?;
        File::create(go(scene).join(number.to_string()))?;
        wait_until_busy(&victim)?;
        sleep(Duration::from_millis(SETTLE_MS + BEFORE_MS));
        let begin_ms = now_ms()?;
        scene.ask(&["del", "victim", "--force"])?.expect_code(0)?;
        removals.push(Removed { begin_ms, end_ms: now_ms()? });
    }
    sleep(to_measure(Duration::from_millis(AFTER_MS)));
    neighbours_load.stop().context("the neighbour")?;
    drop(loads);
    let done = completions(scene, &neighbour)?;
    let (count, seconds) = done.in_all();
    let checks = removals.iter().enumerate().map(|(number, removed)| removed.check(number, &done));
    expect_all(checks.chain([expect_limit_held("neighbour over all", count, 1000.0, seconds, 32)]))?;
    daemon.stop().map(drop)
}

impl Removed {
    /// The duration of one removal, and the neighbour's gap and rate around it.
    fn check(&self, number: usize, done: &Completions) -> Result<()> {
        let (begin, end) = (self.begin_ms, self.end_ms);
        let windows = (end..=end + AFTER_MS - WINDOW_MS).step_by(50);
        let back = windows.map(|from_ms| done.rate(from_ms, from_ms + WINDOW_MS)).fold(0.0, f64::max);
        expect_all([
            expect_within(format!("removal {number}"), Duration::from_millis(end - begin), DEL_LIMIT),
            expect_within("longest gap", done.longest_gap(begin - BEFORE_MS, end + AFTER_MS), GAP_LIMIT),
            expect_at_least("rate given back", back, RATE_BACK),
        ])
    }
}

/// The folder in which a file `N` starts the load of removal N.
fn go(scene: &Scene) -> PathBuf {
    scene.dir().join("go")
}

/// Starts a load for each removal, all in one process.
fn loads_one_after_another(scene: &Scene) -> Result<Fio> {
    let go = go(scene);
    fs::create_dir(&go)?;
    let go = go.display();
    let wait = scene.write("wait-for", &format!("while [ -d {go} ] && [ ! -e \"$1\" ]; do sleep 0.02; done\n"))?;
    let job = Job::new("one-load-after-another-on-a-device-that-comes-and-goes");
    let job = job.set("DEVICE", format!("/dev/ublkb{VICTIM}"));
    let load = |number| job.clone().set("WAIT", format!("sh {} {go}/{number}", wait.display()));
    scene.fio_together(&(0..REMOVALS.get()).map(load).collect::<Vec<_>>())
}
