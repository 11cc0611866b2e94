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
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
    threads: Vec<JoinHandle<()>>,
}

/// What all threads have seen.
#[derive(Debug, Default)]
struct Seen {
    worst: Duration,
    late: Vec<Late>,
    /// Pieces of work done, and what they took in all.
    pieces: u32,
    took: Duration,
}

impl Probe {
    /// Begins.
    pub fn start() -> Self {
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Seen::default())));
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let threads = (0..cpus)
            .map(|cpu| {
                let (stop, seen) = (Arc::clone(&stop), Arc::clone(&seen));
                thread::spawn(move || watch(cpu, &stop, &seen))
            })
            .collect();
        Self { stop, seen, threads }
    }

    /// How many times as long as on a machine that has to meet all bounds of time a piece of work has taken so far; at least 1.
    pub fn slowness(&self) -> f64 {
        let seen = lock(&self.seen);
        if seen.pieces == 0 { 1.0 } else { seen.took.div_duration_f64(PIECE * seen.pieces).max(1.0) }
    }

    /// Ends, and tells by how much a nap was too long at worst.
    pub fn worst(mut self) -> Duration {
        self.end().worst
    }

    /// Ends, and tells every nap that was too long by 10 ms or more.
    pub fn late(mut self) -> Vec<Late> {
        self.end().late
    }

    fn end(&mut self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        std::mem::take(&mut *lock(&self.seen))
    }
}

impl Drop for Probe {
    /// A thread left behind would take from every measurement after it.
    fn drop(&mut self) {
        self.end();
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn watch(cpu: usize, stop: &AtomicBool, seen: &Mutex<Seen>) {
    let mut only = CpuSet::new();
    // Where CPUs are not numbered from 0 the thread runs anywhere: it then sees less, and never too much.
    let _ = only.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &only));
    let mut worst = Duration::ZERO;
    for nap in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        if nap % NAPS_A_PIECE == 0 {
            let took = piece();
            let mut seen = lock(seen);
            seen.pieces += 1;
            seen.took += took;
        }
        let begin = Instant::now();
        thread::sleep(NAP);
        let by = begin.elapsed().saturating_sub(NAP);
        if by <= worst && by < NOTICED {
            continue;
        }
        worst = worst.max(by);
        let mut seen = lock(seen);
        seen.worst = seen.worst.max(by);
        if by >= NOTICED {
            seen.late.push(Late { end: SystemTime::now(), by });
        }
    }
}

/// Does a piece of work; what it took of the CPUs.
fn piece() -> Duration {
    let begin = ran();
    let mut value = 1_u64;
    for _ in 0..ROUNDS {
        value = black_box(value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
    ran().saturating_sub(begin)
}

/// What this thread has had of the CPUs.
fn ran() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("Linux has this clock").into()
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
        while lock(&probe.seen).pieces == 0 {
            thread::yield_now();
        }
        assert!((1.0..1e6).contains(&probe.slowness()));
    }
}
