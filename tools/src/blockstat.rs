//! The kernel's own counters of a block device, looked at all the time: rates over any window, and the longest gap.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Twenty looks a second: a gap is seen to 50 ms, and the looking costs nothing that shows.
const INTERVAL: Duration = Duration::from_millis(50);

/// The kernel's name (`ublkb3`) of a device node or a link to one.
pub fn name(node: &Path) -> Result<String> {
    let true_path = node.canonicalize().with_context(|| format!("no device {}", node.display()))?;
    Ok(true_path.file_name().unwrap_or_default().to_string_lossy().into_owned())
}

/// Waits until a device has completed `count` more reads than now.
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

/// Reads completed by two devices up to a moment.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    at: Instant,
    first: u64,
    /// Of the second device.
    pub second: u64,
}

impl Sample {
    /// Of both devices.
    pub fn both(self) -> u64 {
        self.first + self.second
    }
}

/// Looks at two devices from its start until stopped. A device that is gone keeps its last count.
pub struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Sample>>,
}

impl Sampler {
    /// Starts to look.
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

    /// Ends the looking.
    pub fn stop(self) -> Samples {
        self.stop.store(true, Ordering::Relaxed);
        Samples(self.thread.join().unwrap_or_default())
    }
}

/// What was seen, in order of time.
pub struct Samples(Vec<Sample>);

impl Samples {
    /// Requests a second between two moments: from the first look to the last one between them.
    pub fn rate(&self, from: Instant, to: Instant, count: impl Fn(Sample) -> u64) -> f64 {
        let within = self.within(from, to);
        let [first, .., last] = within[..] else { return 0.0 };
        (count(last) - count(first)) as f64 / last.at.duration_since(first.at).as_secs_f64()
    }

    /// The longest time in which the second device's count stood still.
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

/// Reads and writes completed, together; `None` once the device is gone.
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

    /// The second device's count at 0, 50, 100, … ms; the first device has done 2 at each.
    fn samples(start: Instant, counts: &[u64]) -> Samples {
        let at = |index: usize| start + INTERVAL * index as u32;
        let sample = |(index, &second): (usize, &u64)| Sample { at: at(index), first: 2 * index as u64, second };
        Samples(counts.iter().enumerate().map(sample).collect())
    }

    #[test]
    fn rate_counts_only_what_lies_in_the_window() {
        // 0 to 100 ms: 50 requests in 0.1 s; what came before and after is not counted.
        let start = Instant::now();
        let seen = samples(start, &[100, 120, 150, 900]);
        let end = start + Duration::from_millis(110);
        assert_eq!(seen.rate(start, end, |sample| sample.second).round(), 500.0);
        assert_eq!(seen.rate(start, end, |sample| sample.both()).round(), 540.0);
    }

    #[test]
    fn gap_is_the_longest_standstill() {
        // Still at 7 from 50 to 200 ms.
        let start = Instant::now();
        let seen = samples(start, &[5, 7, 7, 7, 7, 9, 9, 11]);
        assert_eq!(seen.longest_gap(start, start + Duration::from_secs(1)), Duration::from_millis(150));
    }

    #[test]
    fn window_without_samples_has_no_rate() {
        // A machine that stood still must not end in a division by zero.
        let start = Instant::now();
        assert_eq!(samples(start, &[]).rate(start, start, |sample| sample.second), 0.0);
    }
}
