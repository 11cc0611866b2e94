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

/// Removals that count, and more of them for those that say nothing because a CPU was withheld: about one in three under
/// emulation while the host does something else as well.
const REMOVALS: usize = 200;
const SPARE: usize = 300;

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
    let mut removals = Vec::new();
    let mut late = Vec::new();
    let mut probe = Some(probe);
    let mut valid = 0;
    while valid < REMOVALS {
        let number = removals.len();
        ensure!(number < REMOVALS + SPARE, "the machine is too busy: {valid} of {number} removals say anything");
        // The same number again: free as soon as the load has closed the disk that it lost.
        wait::until("victim added again", Duration::from_secs(10), || {
            let answer = if number > 0 { client.ask(&add, Duration::from_secs(10))? } else { json!({"ok": true}) };
            ensure!(answer["ok"] == true || answer["error"]["class"] == "E-ID-TAKEN", "{add}: {answer}");
            Ok((answer["ok"] == true).then_some(()))
        })?;
        let before = removals.last().map_or(0, |last: &Removed| last.end_ms + AFTER_MS);
        sleep(Duration::from_millis(before.saturating_sub(now_ms()?)));
        let victim = scene.device("victim")?;
        File::create(scene.dir().join(format!("go-{number}")))?;
        wait_until_busy(&victim)?;
        sleep(Duration::from_millis(BEFORE_MS));
        let begin_ms = now_ms()?;
        scene.ask(&["del", "victim", "--force"])?.expect_code(0)?;
        removals.push(Removed { begin_ms, end_ms: now_ms()? });
        valid += 1;
        if valid == REMOVALS {
            // What was withheld so far is told at the end of a probe: those removals are made up for.
            sleep(Duration::from_millis(AFTER_MS));
            late.extend(probe.take().map(Probe::withheld).unwrap_or_default());
            let is_void = |removed: &&Removed| late.iter().any(|late| removed.overlaps(unix_ms(late.end).unwrap_or(0)));
            valid -= removals.iter().filter(is_void).count();
            probe = Some(Probe::start());
        }
    }
    neighbours_load.interrupt()?;
    let report = neighbours_load.finish_any(Duration::ZERO)?;
    drop(loads);
    ensure!(report.errors().is_empty(), "the neighbour saw errors: {:?}", report.errors());
    daemon.stop()?;
    let is_void = |removed: &Removed| late.iter().any(|late| removed.overlaps(unix_ms(late.end).unwrap_or(0)));
    removals.retain(|removed| !is_void(removed));
    judge(&removals, &Completions::read(&log)?)
}

impl Removed {
    /// Whether an instant falls into what is looked at.
    fn overlaps(self, at_ms: u64) -> bool {
        (self.begin_ms - BEFORE_MS..=self.end_ms + AFTER_MS).contains(&at_ms)
    }
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

fn judge(removals: &[Removed], done: &Completions) -> Result<()> {
    let worst = |of: &dyn Fn(&Removed) -> f64| removals.iter().map(of).fold(0.0, f64::max);
    let took = worst(&|removed| (removed.end_ms - removed.begin_ms) as f64);
    let gap = worst(&|removed| {
        done.longest_gap(removed.begin_ms - BEFORE_MS, removed.end_ms + AFTER_MS).as_secs_f64() * 1000.0
    });
    let missing = worst(&|removed| 1000.0 - done.rate(removed.end_ms + 500, removed.end_ms + AFTER_MS));
    eprintln!(
        "          {} removals: at most {took} ms, longest gap of the neighbour {gap:.0} ms, {:.1} of 1000 a second back at worst",
        removals.len(),
        1000.0 - missing
    );
    // Void removals are left out already: what is missed now is missed.
    ensure!(took <= 2000.0, "a removal took {took} ms");
    ensure!(gap <= 100.0, "the neighbour waited {gap} ms for a completion");
    ensure!(
        missing <= 30.0,
        "the neighbour had {:.1} of 1000 a second half a second after a removal",
        1000.0 - missing
    );
    Ok(())
}
