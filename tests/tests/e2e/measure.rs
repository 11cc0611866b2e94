//! Comparisons of numbers with bounds. Every bound holds as written: on the counted clock, where a
//! nanosecond of the guest is one instruction, no number depends on the host.
//!
//! | | [`Judge::Everything`] | [`Judge::Correctness`] |
//! | --- | --- | --- |
//! | [`expect`], [`expect_limit_held`] | judged | judged |
//! | [`expect_near`], [`expect_at_least`], [`expect_within`], [`expect_in_time`] | judged | printed |

use std::error::Error;
use std::fmt::{self, Display};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use ublk_throttle_tests::mode::Judge;
use ublk_throttle_tests::sysfs;

/// A trial that could not measure its claim: skipped with the reason, never passed.
#[derive(Debug)]
pub(crate) enum Unmeasured {
    /// A prerequisite is missing, or the tested state did not arise. A failure if everything is
    /// required.
    Missed(String),
    /// The kernel lacks the tested feature. A skip even if everything is required: `every-kernel`
    /// runs on a newer kernel.
    Kernel(String),
}

impl Display for Unmeasured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Missed(reason) | Self::Kernel(reason)) = self;
        f.write_str(reason)
    }
}

impl Error for Unmeasured {}

/// Fails unless a check holds that is valid on any clock: of a count, of data, of a bound over a
/// whole interval.
pub(crate) fn expect(is_met: bool, otherwise: impl FnOnce() -> String) -> Result<()> {
    if is_met { Ok(()) } else { bail!(otherwise()) }
}

/// Fails if a limit of `rate` operations a second without a burst has let more through than allowed
/// in `seconds`.
///
/// The most in any window: rate x seconds, the capacity (0.1 s of the rate), a sixteenth of the
/// capacity that a queue far below the limit may take in advance, and one request beyond the
/// capacity. `in_flight` is the number of requests that may have passed the limit before the window
/// and completed inside it.
pub(crate) fn expect_limit_held(what: impl Display, count: u64, rate: f64, seconds: f64, in_flight: u32) -> Result<()> {
    let most = rate * (seconds + 0.1 * (1.0 + 1.0 / 16.0)) + 1.0 + f64::from(in_flight);
    eprintln!("          {what}: {count} in {seconds:.2} s, at most {most:.1}");
    expect(count as f64 <= most, || format!("{what}: {count} in {seconds:.2} s is above {most:.1}"))
}

/// Fails unless `measured` is within `tolerance` (a share of `expected`) of `expected`.
pub(crate) fn expect_near(what: impl Display, measured: f64, expected: f64, tolerance: f64) -> Result<()> {
    let ratio = measured / expected;
    tell(format_args!("{what}: {measured:.1}, expected {expected:.1}, ratio {ratio:.4}"));
    judge((ratio - 1.0).abs() <= tolerance, || {
        let (off, direction) = (100.0 * (ratio - 1.0).abs(), if ratio > 1.0 { "above" } else { "below" });
        format!("{what}: {measured:.2} is {off:.2} % {direction} {expected:.2}, tolerance {:.2} %", 100.0 * tolerance)
    })
}

/// Fails unless a rate, or a share of one, reaches `least`.
pub(crate) fn expect_at_least(what: impl Display, measured: f64, least: f64) -> Result<()> {
    tell(format_args!("{what}: {measured:.4}, at least {least}"));
    judge(measured >= least, || format!("{what}: {measured:.4} is below {least}"))
}

/// Fails if `took` is above `limit`; prints both.
pub(crate) fn expect_within(what: impl Display, took: Duration, limit: Duration) -> Result<()> {
    tell(format_args!("{what}: {took:?}, at most {limit:?}"));
    judge(took <= limit, || format!("{what} took {took:?}, above {limit:?}"))
}

/// Like [`expect_within`], but prints only a failure.
pub(crate) fn expect_in_time(what: impl Display, took: Duration, limit: Duration) -> Result<()> {
    if took <= limit { Ok(()) } else { expect_within(what, took, limit) }
}

fn judge(is_met: bool, otherwise: impl FnOnce() -> String) -> Result<()> {
    expect(is_met || Judge::of_this_run() == Judge::Correctness, otherwise)
}

fn tell(number: fmt::Arguments<'_>) {
    let unless_judged = match Judge::of_this_run() {
        Judge::Everything => "",
        Judge::Correctness => " (not judged on this clock)",
    };
    eprintln!("          {number}{unless_judged}");
}

/// Reads that disks have completed in an interval, by the kernel's count.
pub(crate) struct Spell {
    pub(crate) reads: u64,
    /// From the last poll without a read to the first poll with all reads: longer than the interval
    /// by one poll at each end.
    pub(crate) seconds: f64,
}

/// Counts the completed reads of these disks while `run` runs.
pub(crate) fn reads_during<T>(disks: &[&str], run: impl FnOnce() -> Result<T>) -> Result<(T, Spell)> {
    let completed = || disks.iter().map(|disk| Ok(sysfs::stat(disk)?[0])).sum::<Result<u64>>();
    let is_over = AtomicBool::new(false);
    let watch = || -> Result<Spell> {
        let (before, mut began) = (completed()?, Instant::now());
        let (mut last, mut ended) = (before, began);
        loop {
            // Load `is_over` before the poll: a read that completes after this poll is counted by
            // the next poll.
            let is_last = is_over.load(Ordering::Acquire);
            let looked = Instant::now();
            let count = completed()?;
            if count == before {
                began = looked;
            } else if count > last {
                (last, ended) = (count, Instant::now());
            }
            if is_last {
                return Ok(Spell { reads: last - before, seconds: ended.duration_since(began).as_secs_f64() });
            }
            thread::sleep(Duration::from_millis(10));
        }
    };
    thread::scope(|scope| {
        let watch = scope.spawn(watch);
        let result = run();
        is_over.store(true, Ordering::Release);
        let spell = watch.join().map_err(|_| anyhow!("the watch of the disks panicked"))?;
        Ok((result?, spell?))
    })
}

/// Runs all checks, so that a failure lists each one that failed.
pub(crate) fn expect_all(checks: impl IntoIterator<Item = Result<()>>) -> Result<()> {
    let errors: Vec<_> =
        checks.into_iter().filter_map(Result::err).map(|error: anyhow::Error| format!("{error:#}")).collect();
    expect(errors.is_empty(), || errors.join("\n          "))
}
