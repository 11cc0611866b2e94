//! Rates over all positions of a sliding window, computed from the completion times of requests.
//!
//! ```text
//!   completions  | ||  |  | || |  |  ||   | |
//!   window         ├───────────┤                 slides by 1 ms at a time: minimum and maximum of its completions
//! ```

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Length of the part of the log that is cut off at its end. Before fio ends it reaps all requests
/// under way at once and logs the time of the last one for each. The preceding window thus lacks 32
/// requests, and the end of the log is no measurement. These entries lie within this time.
const HEAP_MS: u64 = 10;

/// Times of completions in whole milliseconds, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Completions(Vec<u64>);

impl Completions {
    /// Reads fio's latency log: `time_ms, latency_ns, direction, bytes, …`, a line for each
    /// request.
    pub fn read(path: &Path) -> Result<Completions> {
        let text = fs::read_to_string(path).with_context(|| format!("fio wrote no {}", path.display()))?;
        Completions::parse(&text).with_context(|| path.display().to_string())
    }

    fn parse(text: &str) -> Result<Completions> {
        let mut times = Vec::new();
        for line in text.lines() {
            let time = line.split(',').next().unwrap_or_default().trim();
            times.push(time.parse().with_context(|| format!("not a line of a latency log: {line:?}"))?);
        }
        times.sort_unstable();
        let last = times.last().copied().unwrap_or(0);
        times.retain(|&time: &u64| time + HEAP_MS < last);
        if times.len() < 2 || times[0] == times[times.len() - 1] {
            bail!("{} requests, which is too few for a rate", times.len());
        }
        Ok(Completions(times))
    }

    /// Requests a second from the first completion to the last.
    pub fn rate(&self) -> f64 {
        let span = self.0[self.0.len() - 1] - self.0[0];
        (self.0.len() - 1) as f64 * 1000.0 / span as f64
    }

    /// Minimum and maximum number of completions in any window of `window_ms` within the log;
    /// `None` if the log is shorter than a window.
    pub fn extremes(&self, window_ms: u64) -> Option<(u64, u64)> {
        let (first, last) = (self.0[0], self.0[self.0.len() - 1]);
        // Windows start in the millisecond after the first completion and end before the last one,
        // so that each covers whole milliseconds.
        let counts = (first + 1..=last.checked_sub(window_ms)?).map(|from| {
            let before = |time: u64| self.0.partition_point(|&at| at < time) as u64;
            before(from + window_ms) - before(from)
        });
        counts.fold(None, |seen, count| match seen {
            None => Some((count, count)),
            Some((least, most)) => Some((least.min(count), most.max(count))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steady_requests_have_the_same_number_in_every_window() {
        // A request each 10 ms for 1 s: 10 in any window of 100 ms.
        let steady = Completions((0..=100).map(|number| number * 10).collect());
        assert_eq!((steady.rate(), steady.extremes(100)), (100.0, Some((10, 10))));
    }

    #[test]
    fn pause_between_aligned_windows_is_seen() {
        // No completions from 150 to 250 ms, then 10 at once: windows aligned at 100 and 200 ms
        // would each see half of the pause.
        let mut times: Vec<u64> = (0..=15).map(|number| number * 10).collect();
        times.extend([250; 10]);
        times.extend((26..=50).map(|number| number * 10));
        assert_eq!(Completions(times).extremes(99), Some((0, 19)));
    }

    #[test]
    fn log_of_fio_is_read() {
        // Lines of a real log. The last two belong to the end that is cut off. An empty log is an
        // error.
        let log = "2001, 32011000, 0, 4096, 0\n2000, 31000, 0, 4096, 0\n2048, 9, 0, 4096, 0\n2049, 9, 0, 4096, 0\n";
        assert_eq!(Completions::parse(log).unwrap(), Completions(vec![2000, 2001]));
        assert!(Completions::parse("").is_err());
    }
}
