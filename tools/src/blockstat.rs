//! Samples the kernel's counters of block devices: rates over any window, and the longest gap.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// 20 samples a second: the resolution of a gap is 50 ms, and the cost of sampling does not show.
const INTERVAL: Duration = Duration::from_millis(50);

/// Kernel name (`ublkb3`) of a device node or of a link to it.
pub fn name(node: &Path) -> Result<String> {
    let true_path = node.canonicalize().with_context(|| format!("no device {}", node.display()))?;
    Ok(true_path.file_name().unwrap_or_default().to_string_lossy().into_owned())
}

/// Waits until a device has completed `count` further reads.
pub fn wait_for_reads(name: &str, count: u64, limit: Duration) -> Result<()> {
    let (start, until) = (reads(name).unwrap_or(0), Instant::now() + limit);
    while reads(name).unwrap_or(0) < start + count {
        if Instant::now() > until {
            bail!("{name} did not complete {count} reads within {} s", limit.as_secs());
        }
        thread::sleep(INTERVAL);
    }
    Ok(())
}

/// Completed reads of two devices at an instant.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    at: Instant,
    first: u64,
    /// Completed reads of the second device.
    pub second: u64,
}

impl Sample {
    /// Completed reads of both devices.
    pub fn both(self) -> u64 {
        self.first + self.second
    }
}

/// Samples two devices until stopped. A removed device keeps its last count.
pub struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Sample>>,
}

impl Sampler {
    /// Starts sampling.
    pub fn start(first: &str, second: &str) -> Sampler {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, names) = (Arc::clone(&stop), [first.to_owned(), second.to_owned()]);
        let thread = thread::spawn(move || {
            let (mut samples, mut counts) = (Vec::new(), [0, 0]);
            while !stopped.load(Ordering::Relaxed) {
                let at = Instant::now();
                for (count, name) in counts.iter_mut().zip(&names) {
                    *count = reads(name).unwrap_or(*count);
                }
                samples.push(Sample { at, first: counts[0], second: counts[1] });
                thread::sleep(INTERVAL);
            }
            samples
        });
        Sampler { stop, thread }
    }

    /// Stops sampling and returns the samples.
    pub fn stop(self) -> Samples {
        self.stop.store(true, Ordering::Relaxed);
        Samples(self.thread.join().unwrap_or_default())
    }
}

/// Samples in order of time.
pub struct Samples(Vec<Sample>);

impl Samples {
    /// Requests a second from the first to the last sample between two instants.
    pub fn rate(&self, from: Instant, to: Instant, count: impl Fn(Sample) -> u64) -> f64 {
        let within = self.within(from, to);
        let [first, .., last] = within[..] else { return 0.0 };
        (count(last) - count(first)) as f64 / last.at.duration_since(first.at).as_secs_f64()
    }

    /// Longest time without a completed read on the second device.
    pub fn longest_gap(&self, from: Instant, to: Instant) -> Duration {
        let within = self.within(from, to);
        let (mut longest, mut since) = (Duration::ZERO, within.first().copied());
        for &sample in &within {
            match since {
                Some(moved) if moved.second == sample.second => {
                    longest = longest.max(sample.at.duration_since(moved.at))
                }
                _ => since = Some(sample),
            }
        }
        longest
    }

    fn within(&self, from: Instant, to: Instant) -> Vec<Sample> {
        self.0.iter().copied().filter(|sample| sample.at >= from && sample.at <= to).collect()
    }
}

/// Completed reads and writes; `None` if the device is gone.
pub fn completed(name: &str) -> Option<u64> {
    Some(field(name, 0)? + field(name, 4)?)
}

fn reads(name: &str) -> Option<u64> {
    field(name, 0)
}

/// A field of `/sys/block/NAME/stat`: 0 is reads completed, 4 writes.
fn field(name: &str, number: usize) -> Option<u64> {
    let stat = fs::read_to_string(Path::new("/sys/block").join(name).join("stat")).ok()?;
    stat.split_whitespace().nth(number)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Samples of the second device at 0, 50, 100, … ms; the first device completes 2 reads in each
    /// interval.
    fn samples(start: Instant, counts: &[u64]) -> Samples {
        let at = |index: usize| start + INTERVAL * index as u32;
        let sample = |(index, &second): (usize, &u64)| Sample { at: at(index), first: 2 * index as u64, second };
        Samples(counts.iter().enumerate().map(sample).collect())
    }

    #[test]
    fn rate_counts_only_what_lies_in_the_window() {
        // 50 requests from 0 to 100 ms; the window excludes the last sample, at 150 ms.
        let start = Instant::now();
        let seen = samples(start, &[100, 120, 150, 900]);
        let end = start + Duration::from_millis(110);
        assert_eq!(seen.rate(start, end, |sample| sample.second).round(), 500.0);
        assert_eq!(seen.rate(start, end, |sample| sample.both()).round(), 540.0);
    }

    #[test]
    fn gap_is_the_longest_standstill() {
        // The count stays at 7 from 50 to 200 ms.
        let start = Instant::now();
        let seen = samples(start, &[5, 7, 7, 7, 7, 9, 9, 11]);
        assert_eq!(seen.longest_gap(start, start + Duration::from_secs(1)), Duration::from_millis(150));
    }

    #[test]
    fn window_without_samples_has_no_rate() {
        // A machine that stood still must not cause a division by zero.
        let start = Instant::now();
        assert_eq!(samples(start, &[]).rate(start, start, |sample| sample.second), 0.0);
    }
}
