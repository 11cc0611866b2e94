//! Numbers against bounds, and measurements that say nothing.
//!
//! The machine is watched while a trial measures ([`ublk_throttle_tests::starvation`]): a number that was missed while a CPU was
//! withheld, or slow, is void, said so, and measured again once the machine is quiet; one that was missed on a machine that
//! kept up is a failure at once. What is not a number (an error, a crash, wrong data) is a failure whatever the machine did.
//!
//! | bound of | on a slow machine |
//! | --- | --- |
//! | a rate, a share, a count | the same: it depends on no speed |
//! | a time | as many times the bound as the machine was slower, meanwhile, than one that has to meet it as it stands |
//!
//! The latter is a ratio to a fixed piece of work on the same CPUs at the same time, in which nothing of the program under test
//! takes part: a program that has become slower misses the bound on any machine.

use std::cell::RefCell;
use std::fmt::{self, Display};
use std::sync::Mutex;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use ublk_throttle_tests::starvation::{Probe, WITHHELD};

/// How often a measurement is begun.
const ATTEMPTS: usize = 4;

/// A measurement on a machine slower than this says nothing: what one request at a time takes of the milliseconds between two
/// tokens leaves half as much room.
pub(crate) const SLOW: f64 = 1.5;

/// How long the machine must have been quiet before a void measurement is repeated, and how long that is waited for.
const QUIET: Duration = Duration::from_secs(2);
const QUIET_LIMIT: Duration = Duration::from_secs(60);

/// What the whole suite waits for a quiet machine: one that never is must not cost an hour.
static PATIENCE: Mutex<Duration> = Mutex::new(Duration::from_secs(600));

thread_local! {
    /// Of the measurements under way, the innermost last.
    static PROBES: RefCell<Vec<Probe>> = const { RefCell::new(Vec::new()) };
}

/// What makes a measurement void.
#[derive(Debug)]
enum Disturbance {
    /// A CPU came so much too late.
    Withheld(Duration),
    /// All of them took so many times as long for the same work.
    Slow(f64),
    /// What was asked for is more than there is without the program under test, as a trial has found out.
    TooMuch(String),
}

impl Display for Disturbance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Withheld(worst) => write!(f, "a CPU was withheld for {worst:?} meanwhile"),
            Self::Slow(slowness) => write!(f, "the CPUs were {slowness:.2} x as slow meanwhile"),
            Self::TooMuch(what) => f.write_str(what),
        }
    }
}

/// A number out of its bounds.
#[derive(Debug)]
pub(crate) struct Missed(String);

impl Display for Missed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Missed {}

/// A number out of its bounds, and why it says nothing.
#[derive(Debug)]
pub(crate) struct Void {
    pub(crate) missed: anyhow::Error,
    pub(crate) because: String,
}

impl Display for Void {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.missed)
    }
}

impl std::error::Error for Void {}

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

/// Fails with a [`Missed`] if what took `took` was to take `limit` at most; prints both.
pub(crate) fn expect_within(what: impl Display, took: Duration, limit: Duration) -> Result<()> {
    eprintln!("          {what}: {took:?}, at most {limit:?}");
    expect_in_time(what, took, limit)
}

/// The same without a word when it is met.
pub(crate) fn expect_in_time(what: impl Display, took: Duration, limit: Duration) -> Result<()> {
    if took <= limit {
        return Ok(());
    }
    let slowness = slowness();
    let here = limit.mul_f64(slowness);
    expect(took <= here, || {
        format!("{what} took {took:?}, at most {limit:?} (x {slowness:.2}, as the machine is slow)")
    })?;
    eprintln!("          {what}: {took:?} on a machine {slowness:.2} x as slow, on which that is at most {here:?}");
    Ok(())
}

/// Of the machine, during the measurement under way so far.
fn slowness() -> f64 {
    PROBES.with_borrow(|probes| probes.last().map_or(1.0, Probe::slowness))
}

/// Whether the measurement under way is void in any case, if it has missed a number.
pub(crate) fn is_slow() -> bool {
    slowness() >= SLOW
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
    repeat(|_| trial(), |_| true)
}

/// The same for what can be measured with less load, too: the trial is told whether to, after it was void twice, or once because the
/// machine was slow or does not do that much: waiting makes that one no faster, and is not done.
pub(crate) fn repeat_with_less_if_void(mut trial: impl FnMut(bool) -> Result<()>) -> Result<()> {
    let with_less = |voids: &[Disturbance]| {
        let is_for_good = |disturbance| matches!(disturbance, &Disturbance::Slow(_) | &Disturbance::TooMuch(_));
        voids.len() >= 2 || voids.iter().any(is_for_good)
    };
    repeat(|voids| trial(with_less(voids)), |voids| !with_less(voids))
}

/// Runs a trial until it is not void; it and `waits`, whether to wait for a quiet machine before the next attempt, are told what has
/// made the attempts before void.
fn repeat(mut trial: impl FnMut(&[Disturbance]) -> Result<()>, waits: impl Fn(&[Disturbance]) -> bool) -> Result<()> {
    let mut voids = Vec::new();
    loop {
        PROBES.with_borrow_mut(|probes| probes.push(Probe::start()));
        let result = trial(&voids);
        let probe = PROBES.with_borrow_mut(Vec::pop).expect("pushed before, and whoever pushed meanwhile has popped");
        let Err(error) = result else {
            tell_slow(&probe);
            return Ok(());
        };
        let disturbance = match error.downcast_ref() {
            Some(Void { because, .. }) => Some(Disturbance::TooMuch(because.clone())),
            None if error.is::<Missed>() => disturbance(probe),
            None => return Err(error),
        };
        let Some(disturbance) = disturbance else { return Err(anyhow!("{error:#}")) };
        let void = format!("void, as {disturbance}: {error:#}");
        voids.push(disturbance);
        if voids.len() == ATTEMPTS {
            return Err(anyhow!("{void}\nthe machine is too busy to measure on, {ATTEMPTS} times in a row"));
        }
        eprintln!("          {void}");
        if waits(&voids) {
            wait_for_quiet();
        }
    }
}

/// How slow the machine was during a whole trial, if it was.
fn tell_slow(probe: &Probe) {
    let slowness = probe.slowness();
    if slowness > 1.0 && PROBES.with_borrow(Vec::is_empty) {
        eprintln!("          on a machine {slowness:.2} x as slow");
    }
}

/// What was wrong with the machine, if anything was.
fn disturbance(probe: Probe) -> Option<Disturbance> {
    let (slowness, worst) = (probe.slowness(), probe.worst());
    if worst >= WITHHELD {
        return Some(Disturbance::Withheld(worst));
    }
    (slowness >= SLOW).then_some(Disturbance::Slow(slowness))
}

/// Until nothing is wrong with the machine, or patience is at its end.
fn wait_for_quiet() {
    let begin = Instant::now();
    let mut patience = PATIENCE.lock().expect("nothing panics while it holds this lock");
    let limit = QUIET_LIMIT.min(*patience);
    while begin.elapsed() < limit {
        let probe = Probe::start();
        sleep(QUIET);
        if disturbance(probe).is_none() {
            break;
        }
    }
    *patience = patience.saturating_sub(begin.elapsed());
}
