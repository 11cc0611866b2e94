//! 200 removals of a device under load, and what its neighbour in the group sees of them.
//!
//! ```text
//!   neighbour   ═══════ 500/s ═══════╪═════ 1000/s ══════╪══ 500/s ═      writes, and verifies 64 writes later
//!   victim      ═══════ 500/s ═══════╡ del               ├ add ════       32 in flight
//!   looked at           │ 0.2 s │ removal │    1 s    │              gaps in all of it, the rate in any half of the last part
//! ```

use std::fs::{self, File};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use ublk_throttle_tests::fio::{Completions, Fio, Gap, Job, unix_ms};
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::starvation::{Probe, WITHHELD};
use ublk_throttle_tests::wait;

use crate::measure::SLOW;
use crate::{now_ms, wait_until_busy};

/// Removals that must have met their bounds.
const REMOVALS: usize = 200;
/// In rounds with loads of their own, so that no more of them follow once there are enough.
const ROUND: usize = 50;
/// More than four, for the removals that say nothing because a CPU was withheld.
const ROUNDS_MAX: usize = 8;

/// One removal, as the test saw it, in milliseconds since 1970.
#[derive(Clone, Copy, Debug)]
struct Removed {
    begin_ms: u64,
    end_ms: u64,
}

/// The number of the disk that comes and goes.
const VICTIM: u32 = 77;

/// What a removal may take (see `measure` for what that is on a slow machine).
const DEL_LIMIT_MS: u64 = 2000;
/// How long the neighbour may wait for a completion.
const GAP_LIMIT: Duration = Duration::from_millis(100);
/// How long the neighbour is looked at before and after a removal.
const BEFORE_MS: u64 = 200;
/// From the first full queue of the victim's load to what is looked at: the neighbour waits for a newcomer, too, and that is no
/// matter of removals.
const SETTLE_MS: u64 = 300;
const AFTER_MS: u64 = 1000;
/// What its rate is measured over.
const WINDOW_MS: u64 = 500;

pub(super) fn two_hundred_removals_under_load_hurt_no_neighbour(scene: &Scene) -> Result<()> {
    // A group of 1000 a second. Each removal: exit 0 within 2 s; the neighbour, which verifies what it reads, sees no error, no
    // gap above 0.1 s, and all 1000 for half a second within the second after it.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { iops-total: 1000 } }\n\
         devices:\n  neighbour: { backend: { memory: 16MiB }, group: g }\n",
    )?;
    let mut good = Vec::new();
    let mut void = 0;
    for round in 0..ROUNDS_MAX {
        let Round { seen, late, slowness } = removals(scene, round)?;
        let del_limit_ms = (DEL_LIMIT_MS as f64 * slowness) as u64;
        let (met, missed): (Vec<Seen>, Vec<Seen>) = seen.into_iter().partition(|seen| seen.is_good(del_limit_ms));
        good.extend(met);
        void += missed.len();
        // One that missed a bound while a CPU was withheld, or slow, says nothing, and another makes up for it.
        let (_, missed): (Vec<Seen>, Vec<Seen>) =
            missed.into_iter().partition(|seen| slowness >= SLOW || seen.is_void(del_limit_ms, &late));
        ensure!(missed.is_empty(), "missed a bound on a machine {slowness:.2} x as slow: {missed:?}");
        if good.len() >= REMOVALS {
            break;
        }
    }
    let took_ms = good.iter().map(|seen| seen.took_ms).max().unwrap_or_default();
    let gap = good.iter().map(|seen| seen.gap.length()).max().unwrap_or_default();
    let back = good.iter().map(|seen| seen.back).fold(f64::INFINITY, f64::min);
    eprintln!(
        "          {} removals: each within {took_ms} ms, the neighbour waited at most {gap:?} and had at least {back:.0} of 1000 a \
         second back; {void} more were void, as a CPU was withheld or slow",
        good.len()
    );
    ensure!(good.len() >= REMOVALS, "the machine is too busy: only {} removals say anything", good.len());
    daemon.stop().map(drop)
}

/// What was seen of a round.
struct Round {
    seen: Vec<Seen>,
    /// When a CPU was withheld meanwhile.
    late: Vec<Gap>,
    slowness: f64,
}

fn removals(scene: &Scene, round: usize) -> Result<Round> {
    let mut client = scene.connect()?;
    let add = json!({"cmd": "add", "device": "victim", "settings": {"null": "1GiB", "group": "g", "id": VICTIM}});
    let log = scene.dir().join(format!("neighbour-{round}"));
    let neighbour = scene.device("neighbour")?;
    let job = Job::new("neighbour-verifies-through-removals").set("DEVICE", neighbour.node()).set("LOG", log.display());
    let neighbours_load = scene.fio(job)?;
    wait_until_busy(&neighbour)?;
    let loads = loads_one_after_another(scene, round)?;
    let probe = Probe::start();
    let mut removals: Vec<Removed> = Vec::new();
    for number in 0..ROUND {
        // The same number again: free as soon as the load has closed the disk that it lost.
        wait::until("victim added again", Duration::from_secs(10), || {
            let answer = client.ask(&add, Duration::from_secs(10))?;
            ensure!(answer["ok"] == true || answer["error"]["class"] == "E-ID-TAKEN", "{add}: {answer}");
            Ok((answer["ok"] == true).then_some(()))
        })?;
        let before = removals.last().map_or(0, |last| last.end_ms + AFTER_MS);
        sleep(Duration::from_millis(before.saturating_sub(now_ms()?)));
        let victim = scene.device("victim")?;
        File::create(go(scene, round).join(number.to_string()))?;
        wait_until_busy(&victim)?;
        sleep(Duration::from_millis(SETTLE_MS + BEFORE_MS));
        let begin_ms = now_ms()?;
        scene.ask(&["del", "victim", "--force"])?.expect_code(0)?;
        removals.push(Removed { begin_ms, end_ms: now_ms()? });
    }
    sleep(Duration::from_millis(AFTER_MS));
    let slowness = probe.slowness();
    let late = probe.late();
    let late = late.iter().map(|late| Ok(Gap { from_ms: unix_ms(late.end - late.by)?, to_ms: unix_ms(late.end)? }));
    let late = late.collect::<Result<Vec<_>>>()?;
    neighbours_load.interrupt()?;
    let report = neighbours_load.finish_any(Duration::ZERO)?;
    drop(loads);
    ensure!(report.errors().is_empty(), "the neighbour saw errors: {:?}", report.errors());
    let done = Completions::read(&log)?;
    Ok(Round { seen: removals.into_iter().map(|removed| removed.seen(&done)).collect(), late, slowness })
}

/// What one removal took, and what the neighbour had of it.
#[derive(Debug)]
struct Seen {
    removed: Removed,
    took_ms: u64,
    gap: Gap,
    /// The neighbour's requests a second in the best half of the second after it.
    back: f64,
}

impl Removed {
    fn seen(self, done: &Completions) -> Seen {
        Seen {
            removed: self,
            took_ms: self.end_ms - self.begin_ms,
            gap: done.longest_gap(self.begin_ms - BEFORE_MS, self.end_ms + AFTER_MS),
            back: self.windows().map(|from_ms| done.rate(from_ms, from_ms + WINDOW_MS)).fold(0.0, f64::max),
        }
    }

    /// The windows of the second after it. Of all of them, because a nap that is not long enough to be void moves up to 5 % of a
    /// second's requests over the edge of any one; a share that was not given back shows as half in each.
    fn windows(self) -> impl Iterator<Item = u64> {
        (self.end_ms..=self.end_ms + AFTER_MS - WINDOW_MS).step_by(50)
    }
}

impl Seen {
    fn is_good(&self, del_limit_ms: u64) -> bool {
        self.took_ms <= del_limit_ms && self.gap.length() <= GAP_LIMIT && self.back >= 970.0
    }

    /// Whether a CPU was withheld for so long that nothing is said; or it is only the gap, and without the time for which a
    /// CPU was withheld in it, it is none.
    fn is_void(&self, del_limit_ms: u64, late: &[Gap]) -> bool {
        let overlaps = |late: &&Gap, from_ms, to_ms| late.from_ms < to_ms && late.to_ms > from_ms;
        let (from_ms, to_ms) = (self.removed.begin_ms - BEFORE_MS, self.removed.end_ms + AFTER_MS);
        if late.iter().filter(|late| overlaps(late, from_ms, to_ms)).any(|late| late.length() >= WITHHELD) {
            return true;
        }
        let in_gap =
            late.iter().filter(|late| overlaps(late, self.gap.from_ms, self.gap.to_ms)).map(|late| late.length());
        let withheld = in_gap.max().unwrap_or_default();
        Self { gap: Gap { from_ms: 0, to_ms: 0 }, ..*self }.is_good(del_limit_ms)
            && self.gap.length() <= GAP_LIMIT + withheld
    }
}

/// Where a file `N` lets the load of removal N begin.
fn go(scene: &Scene, round: usize) -> PathBuf {
    scene.dir().join(format!("go-{round}"))
}

/// A load for each removal of a round, in one process.
fn loads_one_after_another(scene: &Scene, round: usize) -> Result<Fio> {
    let go = go(scene, round);
    fs::create_dir(&go)?;
    let go = go.display();
    let wait = scene.write("wait-for", &format!("while [ -d {go} ] && [ ! -e \"$1\" ]; do sleep 0.02; done\n"))?;
    let job = Job::new("one-load-after-another-on-a-device-that-comes-and-goes");
    let job = job.set("DEVICE", format!("/dev/ublkb{VICTIM}"));
    let load = |number| job.clone().set("WAIT", format!("sh {} {go}/{number}", wait.display()));
    scene.fio_together(&(0..ROUND).map(load).collect::<Vec<_>>())
}
