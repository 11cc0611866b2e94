//! The end-to-end suite: each trial starts the real binary on real ublk devices and checks the
//! visible results.
//!
//! ```text
//!   cargo xtask test                                        in a VM, as CI does
//!   cargo xtask vm -- cargo test -p ublk-throttle-tests     the same by hand; add `-- WORDS` to choose trials
//! ```
//!
//! Trials run one at a time, as most of them measure. A trial whose prerequisites are missing is
//! skipped with the reason; with `UBLK_THROTTLE_REQUIRE_ALL=1` it fails. A trial also fails if it
//! leaves anything behind.
//!
//! | variable | value | effect |
//! | --- | --- | --- |
//! | `UBLK_THROTTLE_SELECTION` | `every-kernel`, `two-cpus`, `smoke` | the trials of this list ([`selection`]) |
//! | `UBLK_THROTTLE_TRIALS` | names, with commas | these trials alone |
//! | `UBLK_THROTTLE_JUDGE` | `correctness` | times and rates are printed and not judged ([`measure`]) |
//! | `UBLK_THROTTLE_THOROUGH` | 1 | the higher numbers of repetitions |

mod bars;
mod burst;
mod control;
mod cpus;
mod crash_points;
mod credit;
mod data;
mod disks_below;
mod drain;
mod facts;
mod fairness;
mod faults_backing;
mod faults_control;
mod faults_kernel;
mod faults_machine;
mod filesystems;
mod foreign;
mod groups;
mod helpers;
mod kills;
mod late_writes;
mod measure;
mod package;
mod rates;
mod recovery;
mod refusals;
mod removal;
mod scale;
mod selection;
mod several_limits;
mod shapes;
mod silent_helpers;
mod stacked;
mod takeover;
mod waiting;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use libtest_mimic::{Arguments, Completion, Conclusion, Failed, Trial};
use ublk_throttle_tests::fio::{Completions, Fio, Job};
use ublk_throttle_tests::mode::{self, Judge};
use ublk_throttle_tests::needs::{Need, REQUIRE_ALL};
use ublk_throttle_tests::scene::{Device, Scene};
use ublk_throttle_tests::{fio, sysfs, wait};

use crate::measure::Unmeasured;

/// Most trials take less than half a minute. A trial that hangs is ended, so that the rest of the
/// suite runs.
const TRIAL_LIMIT: Duration = Duration::from_secs(300);

/// A trial in the making. Its name is the name of its function, a sentence.
struct Case {
    name: &'static str,
    needs: Vec<Need>,
    run: fn(&Scene) -> Result<()>,
    limit: Duration,
}

impl Case {
    /// A trial that takes long by its claim has a limit of its own.
    fn within(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }
}

/// Makes cases of functions with common needs.
macro_rules! cases {
    ($needs:expr; $($function:ident),+ $(,)?) => {
        [$($crate::Case {
            name: stringify!($function),
            needs: $needs.to_vec(),
            run: $function,
            limit: $crate::TRIAL_LIMIT,
        }),+]
    };
}
use cases;

fn main() -> ExitCode {
    if let Some(code) = foreign::errand() {
        return code;
    }
    match run(&Arguments::from_args()) {
        Ok(conclusion) => conclusion.exit_code(),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<Conclusion> {
    let kind = match Judge::from_environment()? {
        Judge::Everything => "",
        Judge::Correctness => "correctness",
    };
    let cases = [
        facts::cases(),
        refusals::cases(),
        rates::cases(),
        burst::cases(),
        groups::cases(),
        fairness::cases(),
        several_limits::cases(),
        data::cases(),
        filesystems::cases(),
        removal::cases(),
        stacked::cases(),
        drain::cases(),
        control::cases(),
        cpus::cases(),
        crash_points::cases(),
        credit::cases(),
        helpers::cases(),
        silent_helpers::cases(),
        kills::cases(),
        recovery::cases(),
        late_writes::cases(),
        takeover::cases(),
        waiting::cases(),
        faults_kernel::cases(),
        faults_machine::cases(),
        faults_backing::cases(),
        disks_below::cases(),
        faults_control::cases(),
        shapes::cases(),
        scale::cases(),
        bars::cases(),
        package::cases(),
    ];
    let trials = selection::of_this_run(cases.into_iter().flatten().collect())?
        .into_iter()
        .map(|case| Trial::ignorable_test(case.name, move || perform(&case)).with_kind(kind))
        .collect();
    let arguments = Arguments { test_threads: arguments.test_threads.or(Some(1)), ..arguments.clone() };
    Ok(libtest_mimic::run(&arguments, trials))
}

fn perform(case: &Case) -> Result<Completion, Failed> {
    let missing: Vec<_> = case.needs.iter().filter_map(|need| need.missing()).collect();
    if !missing.is_empty() {
        return unmeasured(Unmeasured::Missed(missing.join("; ")));
    }
    // The measurements of the trial begin on a new line.
    eprintln!();
    let begin = Instant::now();
    let scene = Scene::new().map_err(|error| format!("{error:#}"))?;
    let result = within(wait::patience(case.limit), &scene, || (case.run)(&scene));
    let result = match result {
        Err(error) if !error.is::<Unmeasured>() => Err(error),
        result => scene.expect_nothing_left().and(result),
    };
    eprintln!("{:6.1} s  {}", begin.elapsed().as_secs_f64(), case.name);
    let logs = result.as_ref().err().map(|_| scene.logs());
    scene.clear();
    match result.map_err(|error| error.downcast::<Unmeasured>()) {
        Ok(()) => Ok(Completion::Completed),
        Err(Ok(reason)) => unmeasured(reason),
        Err(Err(error)) => {
            // Printed at once, in addition to the summary at the end: a run that is cut short has
            // no summary.
            eprintln!("          {error:#}");
            Err(format!("{error:#}\n{}", logs.unwrap_or_default()).into())
        }
    }
}

/// Skips a trial that measured nothing, or fails it.
fn unmeasured(reason: Unmeasured) -> Result<Completion, Failed> {
    match reason {
        Unmeasured::Missed(reason) if mode::is_set(REQUIRE_ALL) => Err(format!("{REQUIRE_ALL}=1, and {reason}").into()),
        reason => Ok(Completion::ignored_with(reason)),
    }
}

/// Runs a trial. After `limit`, kills the daemons and helpers of its scene.
///
/// A read of a device without a server cannot be interrupted; it ends with an error when the daemon
/// ends.
fn within(limit: Duration, scene: &Scene, trial: impl FnOnce() -> Result<()>) -> Result<()> {
    let is_late = &AtomicBool::new(false);
    let (done, wait) = mpsc::channel::<()>();
    let result = thread::scope(|scope| {
        scope.spawn(move || {
            if wait.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                is_late.store(true, Ordering::Relaxed);
                scene.kill_processes();
                // A device that outlives its daemon keeps its requests, so the device is removed as
                // well.
                scene.remove_devices();
            }
        });
        let result = trial();
        drop(done);
        result
    });
    if is_late.load(Ordering::Relaxed) {
        return Err(anyhow!("not done after {limit:?}; its daemons were killed").context(format!("{result:?}")));
    }
    result
}

/// The number of error lines in a text.
fn error_count(stderr: &str) -> usize {
    stderr.lines().filter(|line| line.starts_with("error[")).count()
}

/// Whether the ublk driver offers a feature, according to `features`.
fn has_feature(scene: &Scene, name: &str) -> Result<bool> {
    let told = scene.run(&["features", "--json"])?.expect_code(0)?.json()?;
    let features = told["features"].as_array().context("no list of features")?;
    let found = features.iter().find(|feature| feature["name"] == name).with_context(|| format!("no {name}"))?;
    found["offered"].as_bool().context("offered or not?")
}

/// Whether the kernel has zero copy.
fn has_zero_copy(scene: &Scene) -> Result<bool> {
    has_feature(scene, "AUTO_BUF_REG")
}

/// Sleeps for whole seconds while a load runs.
fn let_run(seconds: u64) {
    thread::sleep(Duration::from_secs(seconds));
}

/// Jobs of 32 requests at a time that end on SIGINT. `READS` and `VERIFIED` log each completion;
/// `VERIFIED` writes, and reads each block to compare it.
const WRITES: &str = "requests-are-held-when-the-device-goes";
const READS: &str = "neighbour-keeps-its-rate-through-a-removal";
const VERIFIED: &str = "neighbour-verifies-through-removals";

/// Starts one of these jobs; returns once its requests are in flight.
fn load(scene: &Scene, claim: &str, device: &Device) -> Result<Fio> {
    let log = scene.dir().join(&device.disk);
    let fio = scene.fio(Job::new(claim).set("DEVICE", device.node()).set("LOG", log.display()))?;
    wait_until_busy(device)?;
    Ok(fio)
}

/// The completions of the load on a device.
fn completions(scene: &Scene, device: &Device) -> Result<Completions> {
    Completions::read(&scene.dir().join(&device.disk))
}

/// Waits until a job of depth 32 has its requests in flight on a device. The start of fio may take
/// seconds.
fn wait_until_busy(device: &Device) -> Result<()> {
    wait::until(&format!("30 requests in flight on {}", device.node()), Duration::from_secs(20), || {
        Ok((sysfs::in_flight(&device.disk)? >= 30).then_some(()))
    })
}

/// The current time in the unit of fio's logs.
fn now_ms() -> Result<u64> {
    fio::unix_ms(std::time::SystemTime::now()).context("the clock")
}
