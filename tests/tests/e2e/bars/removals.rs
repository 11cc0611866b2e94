//! 200 removals of a device under load, and what its neighbour in the group sees of them.
//!
//! ```text
//!   neighbour   ═══════ 500/s ═══════╪═════ 1000/s ══════╪══ 500/s ═      writes, and verifies 64 writes later
//!   victim      ═══════ 500/s ═══════╡ del               ├ add ════       32 in flight
//!   looked at           │ 0.2 s │ removal │ 0.5 s │ 0.5 s │              gaps in all of it, the rate in the last part
//! ```

use std::fs::File;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use ublk_throttle_tests::fio::{Completions, Fio, Job, unix_ms};
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::starvation::Probe;
use ublk_throttle_tests::wait;

use crate::{now_ms, wait_until_busy};

/// Removals in a row, and more of them for those that say nothing because a CPU was withheld.
const REMOVALS: usize = 200;
const SPARE: usize = 30;

/// One removal, as the test saw it, in milliseconds since 1970.
#[derive(Clone, Copy)]
struct Removed {
    begin_ms: u64,
    end_ms: u64,
}

/// How long the neighbour is looked at before and after a removal.
const BEFORE_MS: u64 = 200;
const AFTER_MS: u64 = 1000;

pub(super) fn two_hundred_removals_under_load_hurt_no_neighbour(scene: &Scene) -> Result<()> {
    // A group of 1000 a second. Each removal: exit 0 within 2 s; the neighbour, which verifies what it reads, sees no error, no
    // gap above 0.1 s, and all 1000 from half a second to a second after it.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { iops-total: 1000 } }\n\
         devices:\n  neighbour: { backend: { memory: 16MiB }, group: g }\n",
    )?;
    let mut client = scene.connect()?;
    let add = json!({"cmd": "add", "device": "victim", "settings": {"null": "1GiB", "group": "g", "id": 77}});
    let log = scene.dir().join("neighbour");
    let neighbour = scene.device("neighbour")?;
    let job = Job::new("neighbour-verifies-through-removals").set("DEVICE", neighbour.node()).set("LOG", log.display());
    let neighbours_load = scene.fio(job)?;
    wait_until_busy(&neighbour)?;
    client.must(&add, Duration::from_secs(10))?;
    let loads = loads_one_after_another(scene)?;
    let probe = Probe::start();
    let mut removals: Vec<Removed> = Vec::new();
    for number in 0..REMOVALS + SPARE {
        // The same number again: free as soon as the load has closed the disk that it lost.
        wait::until("victim added again", Duration::from_secs(10), || {
            let answer = if number > 0 { client.ask(&add, Duration::from_secs(10))? } else { json!({"ok": true}) };
            ensure!(answer["ok"] == true || answer["error"]["class"] == "E-ID-TAKEN", "{add}: {answer}");
            Ok((answer["ok"] == true).then_some(()))
        })?;
        let before = removals.last().map_or(0, |last| last.end_ms + AFTER_MS);
        sleep(Duration::from_millis(before.saturating_sub(now_ms()?)));
        let victim = scene.device("victim")?;
        File::create(scene.dir().join(format!("go-{number}")))?;
        wait_until_busy(&victim)?;
        sleep(Duration::from_millis(BEFORE_MS));
        let begin_ms = now_ms()?;
        scene.ask(&["del", "victim", "--force"])?.expect_code(0)?;
        removals.push(Removed { begin_ms, end_ms: now_ms()? });
    }
    sleep(Duration::from_millis(AFTER_MS));
    let withheld = probe.withheld().iter().map(|late| unix_ms(late.end)).collect::<Result<Vec<_>>>()?;
    neighbours_load.interrupt()?;
    let report = neighbours_load.finish_any(Duration::ZERO)?;
    drop(loads);
    ensure!(report.errors().is_empty(), "the neighbour saw errors: {:?}", report.errors());
    daemon.stop()?;
    let done = Completions::read(&log)?;
    judge(removals.iter().map(|removed| removed.seen(&done)).collect(), &withheld)
}

/// What one removal took, and what the neighbour had of it.
struct Seen {
    removed: Removed,
    took_ms: u64,
    gap: Duration,
    /// The neighbour's requests a second, half a second later.
    back: f64,
}

impl Removed {
    fn seen(self, done: &Completions) -> Seen {
        Seen {
            removed: self,
            took_ms: self.end_ms - self.begin_ms,
            gap: done.longest_gap(self.begin_ms - BEFORE_MS, self.end_ms + AFTER_MS),
            back: done.rate(self.end_ms + 500, self.end_ms + AFTER_MS),
        }
    }

    /// Whether an instant falls into what is looked at.
    fn overlaps(self, at_ms: u64) -> bool {
        (self.begin_ms - BEFORE_MS..=self.end_ms + AFTER_MS).contains(&at_ms)
    }
}

impl Seen {
    fn is_good(&self) -> bool {
        self.took_ms <= 2000 && self.gap <= Duration::from_millis(100) && self.back >= 970.0
    }
}

/// A removal that missed a bound is a failure; one that did while a CPU was withheld says nothing, and another makes up for it.
fn judge(seen: Vec<Seen>, withheld_ms: &[u64]) -> Result<()> {
    let (good, missed): (Vec<Seen>, Vec<Seen>) = seen.into_iter().partition(Seen::is_good);
    let is_void = |seen: &&Seen| withheld_ms.iter().any(|&at_ms| seen.removed.overlaps(at_ms));
    let void = missed.iter().filter(is_void).count();
    let took_ms = good.iter().map(|seen| seen.took_ms).max().unwrap_or_default();
    let gap = good.iter().map(|seen| seen.gap).max().unwrap_or_default();
    let back = good.iter().map(|seen| seen.back).fold(f64::INFINITY, f64::min);
    eprintln!(
        "          {} removals: each within {took_ms} ms, the neighbour waited at most {gap:?} and had at least {back:.0} of 1000 a \
         second back; {void} more were void, as a CPU was withheld",
        good.len()
    );
    for seen in missed.iter().filter(|seen| !is_void(seen)) {
        eprintln!("          missed: {} ms, a gap of {:?}, {:.0} a second back", seen.took_ms, seen.gap, seen.back);
    }
    ensure!(missed.len() == void, "{} of {} removals missed a bound", missed.len() - void, good.len() + missed.len());
    ensure!(good.len() >= REMOVALS, "the machine is too busy: {} removals say anything", good.len());
    Ok(())
}

/// A load for each removal, in one process; number N begins when there is a file `go-N`.
fn loads_one_after_another(scene: &Scene) -> Result<Fio> {
    let dir = scene.dir().display();
    let wait = scene.write("wait-for", &format!("while [ -d {dir} ] && [ ! -e \"$1\" ]; do sleep 0.02; done\n"))?;
    let victim = scene.device("victim")?;
    let job = Job::new("one-load-after-another-on-a-device-that-comes-and-goes").set("DEVICE", victim.node());
    let load = |number| job.clone().set("WAIT", format!("sh {} {dir}/go-{number}", wait.display()));
    scene.fio_together(&(0..REMOVALS + SPARE).map(load).collect::<Vec<_>>())
}
