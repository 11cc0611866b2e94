//! Numbers against bounds, and measurements that say nothing.
//!
//! A bound is never widened for a slow machine. Instead the machine is watched while a trial measures: a rate that was missed
//! while a CPU was withheld is void, said so, and measured again; one that was missed on a machine that kept up is a
//! failure at once. What is not a number (an error, a crash, wrong data) is a failure whatever the machine did.

use std::fmt::{self, Display};
use std::time::Duration;

use anyhow::{Result, anyhow};
use ublk_throttle_tests::starvation::{Probe, WITHHELD};

/// How often a void measurement is repeated.
const ATTEMPTS: u32 = 4;

/// A number out of its bounds.
#[derive(Debug)]
pub(crate) struct Missed(String);

impl Display for Missed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Missed {}

/// Fails unless `measured` is within `tolerance` (a share of `expected`) of `expected`.
pub(crate) fn expect_near(what: impl Display, measured: f64, expected: f64, tolerance: f64) -> Result<()> {
    let ratio = measured / expected;
    eprintln!("          {what}: {measured:.1}, expected {expected:.1}, ratio {ratio:.4}");
    expect((ratio - 1.0).abs() <= tolerance, || {
        format!("{what}: measured {measured:.1}, expected {expected:.1}, {:.1} % off", 100.0 * (ratio - 1.0))
    })
}

/// Fails with a [`Missed`] unless a number is what it should be.
pub(crate) fn expect(is_met: bool, otherwise: impl FnOnce() -> String) -> Result<()> {
    if is_met { Ok(()) } else { Err(Missed(otherwise()).into()) }
}

/// Fails with a [`Missed`] if what took `took` was to take `limit` at most.
pub(crate) fn expect_within(what: impl Display, took: Duration, limit: Duration) -> Result<()> {
    eprintln!("          {what}: {took:?}, at most {limit:?}");
    expect(took <= limit, || format!("{what} took {took:?}, at most {limit:?}"))
}

/// Runs checks to the last, so that a failure shows all that are wrong and not only the first.
pub(crate) fn expect_all(checks: impl IntoIterator<Item = Result<()>>) -> Result<()> {
    let errors: Vec<_> = checks.into_iter().filter_map(Result::err).collect();
    if errors.is_empty() {
        return Ok(());
    }
    let text = errors.iter().map(|error| format!("{error:#}")).collect::<Vec<_>>().join("\n          ");
    if errors.iter().all(|error| error.is::<Missed>()) { Err(Missed(text).into()) } else { Err(anyhow!(text)) }
}

/// Runs what measures, again if what it missed is void. What it fails with is final: nothing around it repeats that again.
///
/// Around one measurement rather than around many: on a busy machine the chance that all of them get through is small.
pub(crate) fn repeat_if_void(mut trial: impl FnMut() -> Result<()>) -> Result<()> {
    let mut attempt = 1;
    loop {
        let probe = Probe::start();
        let result = trial();
        let worst = probe.worst();
        let Err(error) = result else { return Ok(()) };
        if !error.is::<Missed>() {
            return Err(error);
        }
        if worst < WITHHELD {
            return Err(anyhow!("{error:#}"));
        }
        let void = format!("void, as a CPU was withheld for {worst:?} meanwhile: {error:#}");
        if attempt == ATTEMPTS {
            return Err(anyhow!("{void}\nthe machine is too busy to measure on, {ATTEMPTS} times in a row"));
        }
        eprintln!("          {void}");
        attempt += 1;
    }
}
