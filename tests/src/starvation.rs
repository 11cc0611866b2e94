//! Whether the machine gave us its CPUs while something was measured, and how fast they were.
//!
//! ```text
//!   a thread on each CPU:   sleep 5 ms ─ how late? ─ sleep 5 ms ─ how late? ─ …      worst of all: Probe::worst
//!                                          every tenth time: a fixed piece of work     mean: Probe::slowness
//! ```
//!
//! A throttle loses no rate to a timer that is late by less than its headroom (0.1 s of the rate). On a machine whose CPUs are
//! withheld for longer, by a busy host below the VM, every rate is missed and none says anything about the throttle.
//!
//! The piece of work is timed by the thread's own CPU time: what else runs in the machine, the program under test first, is not
//! in it; what the host takes from the machine is.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

const NAP: Duration = Duration::from_millis(5);

/// A measurement during which a CPU came later than this says nothing: half of the headroom of a rate.
pub const WITHHELD: Duration = Duration::from_millis(50);

/// The naps that are remembered one by one. Shorter ones are what any machine does.
const NOTICED: Duration = Duration::from_millis(10);

/// One piece of work for so many naps: less than a hundredth of a CPU.
const NAPS_A_PIECE: u64 = 10;
/// Rounds of a piece.
const ROUNDS: u64 = 50_000;
/// What a piece takes on the slowest machine that has to meet the suite's bounds of time as they stand, in the VM, built for
/// release: half as much again as on the fastest that they were tried on (0.12 to 0.15 ms, when nothing else ran there).
const PIECE: Duration = Duration::from_micros(200);

/// A nap that was too long.
#[derive(Clone, Copy, Debug)]
pub struct Late {
    /// When it ended.
    pub end: SystemTime,
    /// By how much it was too long.
    pub by: Duration,
}

/// A look at the CPUs, from its start to [`Probe::worst`] or [`Probe::late`].
#[derive(Debug)]
pub struct Probe {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    work: Arc<Work>,
    threads: Vec<JoinHandle<()>>,
}

/// What all threads have done.
#[derive(Debug, Default)]
struct Work {
    pieces: AtomicU64,
    ns: AtomicU64,
}

/// What all threads have seen.
#[derive(Debug, Default)]
struct Seen {
    worst: Duration,
    late: Vec<Late>,
}

impl Probe {
    /// Begins.
    pub fn start() -> Self {
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Seen::default())));
        let work = Arc::new(Work::default());
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let threads = (0..cpus)
            .map(|cpu| {
                let (stop, seen, work) = (Arc::clone(&stop), Arc::clone(&seen), Arc::clone(&work));
                thread::spawn(move || watch(cpu, &stop, &seen, &work))
            })
            .collect();
        Self { stop, seen, work, threads }
    }

    /// How many times as long as on a machine that has to meet all bounds of time a piece of work has taken so far; at least 1.
    pub fn slowness(&self) -> f64 {
        let (pieces, ns) = (self.work.pieces.load(Ordering::Relaxed), self.work.ns.load(Ordering::Relaxed));
        let wanted = pieces as f64 * PIECE.as_nanos() as f64;
        if pieces == 0 { 1.0 } else { (ns as f64 / wanted).max(1.0) }
    }

    /// Ends, and tells by how much a nap was too long at worst.
    pub fn worst(mut self) -> Duration {
        self.end();
        self.taken().worst
    }

    /// Ends, and tells every nap that was too long by 10 ms or more.
    pub fn late(mut self) -> Vec<Late> {
        self.end();
        self.taken().late
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }

    fn taken(&self) -> Seen {
        std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Probe {
    /// A thread left behind would take from every measurement after it.
    fn drop(&mut self) {
        self.end();
    }
}

fn watch(cpu: usize, stop: &AtomicBool, seen: &Mutex<Seen>, work: &Work) {
    let mut only = CpuSet::new();
    // Where CPUs are not numbered from 0 the thread runs anywhere: it then sees less, and never too much.
    let _ = only.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &only));
    let mut worst = Duration::ZERO;
    for nap in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        if nap % NAPS_A_PIECE == 0 {
            work.piece();
        }
        let begin = Instant::now();
        thread::sleep(NAP);
        let by = begin.elapsed().saturating_sub(NAP);
        if by <= worst && by < NOTICED {
            continue;
        }
        worst = worst.max(by);
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.worst = seen.worst.max(by);
        if by >= NOTICED {
            seen.late.push(Late { end: SystemTime::now(), by });
        }
    }
}

impl Work {
    fn piece(&self) {
        let begin = ran();
        let mut value = 1_u64;
        for _ in 0..ROUNDS {
            value = black_box(value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        }
        let Some((begin, end)) = begin.zip(ran()) else { return };
        self.ns.fetch_add(u64::try_from(end.saturating_sub(begin).as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.pieces.fetch_add(1, Ordering::Relaxed);
    }
}

/// What this thread has had of the CPUs.
fn ran() -> Option<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok().map(Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_a_probe_ends_its_threads() {
        let probe = Probe::start();
        // The probe holds one; each thread another while it runs.
        let stop = Arc::downgrade(&probe.stop);
        assert!(stop.strong_count() > 1);
        drop(probe);
        assert_eq!(stop.strong_count(), 0);
    }

    #[test]
    fn slowness_is_at_least_one_and_is_known_while_it_runs() {
        let probe = Probe::start();
        assert!(probe.slowness() >= 1.0);
        while probe.work.pieces.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        assert!((1.0..1e6).contains(&probe.slowness()));
    }
}
