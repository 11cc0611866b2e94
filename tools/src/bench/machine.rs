//! The machine as a whole: processor time of all threads, and the share of processor time that the
//! host took.

use std::collections::BTreeMap;
use std::fs;
use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Processor time of all threads since the boot.
#[derive(Clone, Debug)]
pub struct Times {
    at: Instant,
    /// By thread ID, without the threads of this process.
    ran: BTreeMap<u32, Duration>,
    stolen: Duration,
}

/// Processor time between two calls of [`times`].
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    /// Processor time of all threads.
    pub busy: Duration,
    /// Share of all processor time that the host reports as stolen.
    pub stolen: f64,
}

/// Reads the processor times.
///
/// The source is the run time of each thread, kernel threads included, in nanoseconds. `/proc/stat`
/// is unsuitable, because it samples about a hundred times a second: for a throttle that wakes 1000
/// times a second for 0.1 ms each it gave 207 us a request, then 621. Interrupts on an idle
/// processor are missing here.
pub fn times() -> Result<Times> {
    let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let stolen = stolen(&stat).context("/proc/stat has no first line of eight numbers")?;
    let (at, mut ran) = (Instant::now(), BTreeMap::new());
    for process in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // This process only measures.
        if pid == std::process::id() {
            continue;
        }
        // The thread may end before its file is read.
        for thread in fs::read_dir(process.path().join("task")).into_iter().flatten().flatten() {
            let schedstat = fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
            let id = thread.file_name().to_str().and_then(|name| name.parse().ok());
            if let (Some(id), Some(time)) = (id, run_time(&schedstat)) {
                ran.insert(id, time);
            }
        }
    }
    Ok(Times { at, ran, stolen })
}

impl Times {
    /// Processor time between this reading and a later one. The time of a thread that ended in
    /// between is missing.
    pub fn until(&self, later: &Times) -> Spent {
        let all = later.at.duration_since(self.at) * processors();
        let before = |id: &u32| self.ran.get(id).copied().unwrap_or_default();
        let busy = later.ran.iter().map(|(id, time)| time.saturating_sub(before(id))).sum();
        let stolen = later.stolen.saturating_sub(self.stolen);
        Spent { busy, stolen: stolen.as_secs_f64() / all.as_secs_f64().max(1e-9) }
    }
}

/// Number of available processors.
pub fn processors() -> u32 {
    thread::available_parallelism().map_or(1, |count| count.get() as u32)
}

/// Does the same kind of work on all processors for 0.1 s, and returns the amount of work done.
///
/// Under emulation `/proc/stat` shows no stolen time, but stolen time reduces this amount.
pub fn yardstick() -> f64 {
    let until = Instant::now() + Duration::from_millis(100);
    let work = move || {
        let (mut done, mut value) = (0u64, 1u64);
        while Instant::now() < until {
            for _ in 0..20_000 {
                value = black_box(value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
            }
            done += 1;
        }
        done
    };
    let workers: Vec<_> = (0..processors()).map(|_| thread::spawn(work)).collect();
    workers.into_iter().map(|worker| worker.join().unwrap_or(0) as f64).sum()
}

/// Time that the host stole, from the line of all processors in `/proc/stat`. A tick (`USER_HZ`) is
/// 10 ms on every Linux built for a distribution.
fn stolen(stat: &str) -> Option<Duration> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    line.split_whitespace().nth(7)?.parse().ok().map(|ticks: u64| Duration::from_millis(ticks * 10))
}

/// First field of a thread's `schedstat`: nanoseconds on a processor.
fn run_time(schedstat: &str) -> Option<Duration> {
    schedstat.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_of_the_kernel_are_read() {
        // Fields of `/proc/stat`: user nice system idle iowait irq softirq steal guest guest_nice.
        // Fields of `schedstat`: time on a processor, time in the run queue, time slices.
        assert_eq!(stolen("cpu  10 0 20 300 40 0 0 5 0 0\ncpu0 1 1\n"), Some(Duration::from_millis(50)));
        assert_eq!(run_time("123456 77 8\n"), Some(Duration::from_nanos(123_456)));
    }

    #[test]
    fn thread_that_began_in_between_counts_from_nothing() {
        // Thread 2, which ended, is left out, not subtracted.
        let ran = |threads: &[(u32, u64)]| threads.iter().map(|&(id, ms)| (id, Duration::from_millis(ms))).collect();
        let at = Instant::now();
        let from = Times { at, ran: ran(&[(1, 500), (2, 900)]), stolen: Duration::ZERO };
        let to = Times { at: at + Duration::from_secs(1), ran: ran(&[(1, 600), (3, 50)]), stolen: Duration::ZERO };
        assert_eq!(from.until(&to).busy, Duration::from_millis(150));
    }
}
