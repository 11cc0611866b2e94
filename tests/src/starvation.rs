//! Whether the machine gave us its CPUs while something was measured.
//!
//! ```text
//!   a thread on each CPU:   sleep 5 ms ─ how late? ─ sleep 5 ms ─ how late? ─ …      worst of all: Probe::worst
//! ```
//!
//! A throttle loses no rate to a timer that is late by less than its headroom (0.1 s of the rate). On a machine whose CPUs are
//! withheld for longer, by a busy host below the VM, every rate is missed and none says anything about the throttle.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

const NAP: Duration = Duration::from_millis(5);

/// A measurement during which a CPU came later than this says nothing: half of the headroom of a rate.
pub const WITHHELD: Duration = Duration::from_millis(50);

/// A look at the CPUs, from its start to [`Probe::worst`].
#[derive(Debug)]
pub struct Probe {
    stop: Arc<AtomicBool>,
    worst_ns: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Probe {
    /// Begins.
    pub fn start() -> Self {
        let (stop, worst_ns) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let threads = (0..cpus)
            .map(|cpu| {
                let (stop, worst_ns) = (Arc::clone(&stop), Arc::clone(&worst_ns));
                thread::spawn(move || watch(cpu, &stop, &worst_ns))
            })
            .collect();
        Self { stop, worst_ns, threads }
    }

    /// Ends, and tells by how much a nap was too long at worst.
    pub fn worst(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            let _ = thread.join();
        }
        Duration::from_nanos(self.worst_ns.load(Ordering::Relaxed))
    }
}

fn watch(cpu: usize, stop: &AtomicBool, worst_ns: &AtomicU64) {
    let mut only = CpuSet::new();
    // Where CPUs are not numbered from 0 the thread runs anywhere: it then sees less, and never too much.
    let _ = only.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &only));
    while !stop.load(Ordering::Relaxed) {
        let begin = Instant::now();
        thread::sleep(NAP);
        let late = begin.elapsed().saturating_sub(NAP);
        worst_ns.fetch_max(u64::try_from(late.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}
