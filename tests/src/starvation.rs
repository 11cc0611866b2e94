//! Whether the machine gave us its CPUs while something was measured.
//!
//! ```text
//!   a thread on each CPU:   sleep 5 ms ─ how late? ─ sleep 5 ms ─ how late? ─ …      worst of all: Probe::worst
//! ```
//!
//! A throttle loses no rate to a timer that is late by less than its headroom (0.1 s of the rate). On a machine whose CPUs are
//! withheld for longer, by a busy host below the VM, every rate is missed and none says anything about the throttle.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

const NAP: Duration = Duration::from_millis(5);

/// A measurement during which a CPU came later than this says nothing: half of the headroom of a rate.
pub const WITHHELD: Duration = Duration::from_millis(50);

/// The naps that are remembered one by one. Shorter ones are what any machine does.
const NOTICED: Duration = Duration::from_millis(10);

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

    /// Ends, and tells by how much a nap was too long at worst.
    pub fn worst(self) -> Duration {
        self.end().worst
    }

    /// Ends, and tells every nap that was too long by 10 ms or more.
    pub fn late(self) -> Vec<Late> {
        self.end().late
    }

    fn end(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            let _ = thread.join();
        }
        std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn watch(cpu: usize, stop: &AtomicBool, seen: &Mutex<Seen>) {
    let mut only = CpuSet::new();
    // Where CPUs are not numbered from 0 the thread runs anywhere: it then sees less, and never too much.
    let _ = only.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &only));
    let mut worst = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
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
