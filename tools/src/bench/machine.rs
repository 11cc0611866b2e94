//! The machine as a whole: what all of it spent, and whether all of it was there.

use std::collections::BTreeMap;
use std::fs;
use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Processor time of everything since the boot.
#[derive(Clone, Debug)]
pub struct Times {
    at: Instant,
    /// By thread, without ours.
    ran: BTreeMap<u32, Duration>,
    stolen: Duration,
}

/// Between two looks.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    /// By all threads.
    pub busy: Duration,
    /// Share of all that the host says it took.
    pub stolen: f64,
}

/// Looks now.
///
/// At what each thread ran, kernel's threads too, to the nanosecond. `/proc/stat` is no use here: what is not idle there is seen a
/// hundred times a second or so, and a throttle that wakes a thousand times a second for a tenth of a millisecond was measured at
/// 207 us a request, then at 621. Missing here: interrupts that find their processor idle.
pub fn times() -> Result<Times> {
    let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let stolen = stolen(&stat).context("/proc/stat has no first line of eight numbers")?;
    let (at, mut ran) = (Instant::now(), BTreeMap::new());
    for process in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // Ours only measures.
        if pid == std::process::id() {
            continue;
        }
        // It may end while it is looked at.
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
    /// What was spent from this look to a later one. A thread that ended in between is not in it.
    pub fn until(&self, later: &Times) -> Spent {
        let all = later.at.duration_since(self.at) * processors();
        let before = |id: &u32| self.ran.get(id).copied().unwrap_or_default();
        let busy = later.ran.iter().map(|(id, time)| time.saturating_sub(before(id))).sum();
        let stolen = later.stolen.saturating_sub(self.stolen);
        Spent { busy, stolen: stolen.as_secs_f64() / all.as_secs_f64().max(1e-9) }
    }
}

/// Processors that are on.
pub fn processors() -> u32 {
    thread::available_parallelism().map_or(1, |count| count.get() as u32)
}

/// A fixed kind of work on every processor for a tenth of a second; how much of it was done.
///
/// Under emulation the host takes processors without a word in `/proc/stat`. What it takes is missing here.
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

/// What the host took, of the line of all processors. A tick is 10 ms for every Linux that is built for distribution (`USER_HZ`).
fn stolen(stat: &str) -> Option<Duration> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    line.split_whitespace().nth(7)?.parse().ok().map(|ticks: u64| Duration::from_millis(ticks * 10))
}

/// The first number of a thread's `schedstat`, nanoseconds on a processor.
fn run_time(schedstat: &str) -> Option<Duration> {
    schedstat.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_of_the_kernel_are_read() {
        // user nice system idle iowait irq softirq steal guest guest_nice; ran, waited, times.
        assert_eq!(stolen("cpu  10 0 20 300 40 0 0 5 0 0\ncpu0 1 1\n"), Some(Duration::from_millis(50)));
        assert_eq!(run_time("123456 77 8\n"), Some(Duration::from_nanos(123_456)));
    }

    #[test]
    fn thread_that_began_in_between_counts_from_nothing() {
        // And one that ended is left out, not subtracted.
        let ran = |threads: &[(u32, u64)]| threads.iter().map(|&(id, ms)| (id, Duration::from_millis(ms))).collect();
        let at = Instant::now();
        let from = Times { at, ran: ran(&[(1, 500), (2, 900)]), stolen: Duration::ZERO };
        let to = Times { at: at + Duration::from_secs(1), ran: ran(&[(1, 600), (3, 50)]), stolen: Duration::ZERO };
        assert_eq!(from.until(&to).busy, Duration::from_millis(150));
    }
}
