//! The end-to-end suite: each trial starts the real binary on real ublk devices and looks at what users would see.
//!
//! ```text
//!   cargo xtask test                                        in a VM, as CI does
//!   cargo xtask vm -- cargo test -p ublk-throttle-tests     the same by hand; add `-- WORDS` to choose trials
//! ```
//!
//! Trials run one at a time: most of them measure. What a trial needs and the machine lacks is a skip that is counted and
//! says why; with `UBLK_THROTTLE_REQUIRE_ALL=1` it is a failure. A trial also fails if it leaves anything behind.

mod bars;
mod burst;
mod control;
mod cpus;
mod crash_points;
mod credit;
mod data;
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
mod kills;
mod measure;
mod package;
mod rates;
mod recovery;
mod refusals;
mod removal;
mod scale;
mod shapes;
mod takeover;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use ublk_throttle_tests::needs::{Need, REQUIRE_ALL};
use ublk_throttle_tests::scene::{Device, Scene};
use ublk_throttle_tests::{sysfs, wait};

/// Most trials take less than half a minute under emulation. One that hangs is ended, so that the others are run.
const TRIAL_LIMIT: Duration = Duration::from_secs(300);

/// Set to run [`ON_EVERY_KERNEL`] only.
const SELECTION: &str = "UBLK_THROTTLE_ON_EVERY_KERNEL";
/// What goes another way through the driver where that can do more: how data comes and goes, in batches and without a copy, and how
/// a queue ends. The rest is the same on every kernel.
const ON_EVERY_KERNEL: [&str; 13] = [
    "file_data_is_kept_with_and_without_a_copy",
    "block_data_is_kept_with_and_without_a_copy",
    "memory_data_is_kept_with_and_without_a_copy",
    "null_backend_reads_zeros",
    "f30_flushes_reach_the_device_and_are_not_charged",
    "each_iops_limit_of_1000_is_met",
    "f01_forced_del_under_load_leaves_the_neighbour_unhurt",
    "f01_forced_del_lets_requests_held_at_one_a_second_go_at_once",
    "f02_removal_by_another_client_under_load_leaves_the_neighbour_unhurt",
    "f02_removal_by_another_client_does_not_wait_for_requests_held_at_one_a_second",
    "f06_a_daemon_killed_while_it_recovers_is_recovered_from",
    "f26_a_stalled_backend_holds_no_tokens_of_its_group",
    "f44_any_depth_and_number_of_queues_serves_or_is_refused_with_the_bound",
];

/// One trial before it is one: its name is its function's, and that is a sentence.
struct Case {
    name: &'static str,
    needs: Vec<Need>,
    run: fn(&Scene) -> Result<()>,
    limit: Duration,
}

impl Case {
    /// A trial that is long by what it claims gets a limit of its own.
    fn within(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }
}

/// Cases of functions that need the same.
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
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(1);
    let cases = [
        facts::cases(),
        refusals::cases(),
        rates::cases(),
        burst::cases(),
        groups::cases(),
        fairness::cases(),
        data::cases(),
        filesystems::cases(),
        removal::cases(),
        drain::cases(),
        control::cases(),
        cpus::cases(),
        crash_points::cases(),
        credit::cases(),
        kills::cases(),
        recovery::cases(),
        takeover::cases(),
        faults_kernel::cases(),
        faults_machine::cases(),
        faults_backing::cases(),
        faults_control::cases(),
        shapes::cases(),
        scale::cases(),
        bars::cases(),
        package::cases(),
    ];
    let cases: Vec<Case> = cases.into_iter().flatten().collect();
    for name in ON_EVERY_KERNEL {
        assert!(cases.iter().any(|case| case.name == name), "there is no trial {name}");
    }
    let is_selected = |case: &Case| std::env::var_os(SELECTION).is_none() || ON_EVERY_KERNEL.contains(&case.name);
    let trials = cases
        .into_iter()
        .filter(is_selected)
        .map(|case| Trial::ignorable_test(case.name, move || perform(&case)))
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn perform(case: &Case) -> Result<Completion, Failed> {
    let missing: Vec<_> = case.needs.iter().filter_map(|need| need.missing()).collect();
    if !missing.is_empty() {
        let reason = missing.join("; ");
        if std::env::var(REQUIRE_ALL).is_ok_and(|value| value == "1") {
            return Err(format!("{REQUIRE_ALL}=1, and {reason}").into());
        }
        return Ok(Completion::ignored_with(reason));
    }
    // Measurements follow on lines of their own.
    eprintln!();
    let begin = Instant::now();
    let scene = Scene::new().map_err(|error| format!("{error:#}"))?;
    let result = measure::repeat_if_void(|| {
        within(case.limit, &scene, || (case.run)(&scene).and_then(|()| scene.expect_nothing_left()))
    });
    eprintln!("{:6.1} s  {}", begin.elapsed().as_secs_f64(), case.name);
    let result = result.map_err(|error| {
        // At once, besides the summary at the end: a run that is cut short has none.
        eprintln!("          {error:#}");
        format!("{error:#}\n{}", scene.logs()).into()
    });
    scene.clear();
    result.map(|()| Completion::Completed)
}

/// Runs a trial; when it has not ended after `limit`, kills the daemons and helpers of its scene.
///
/// A read of a device that nobody serves cannot be interrupted: only the end of the daemon ends it, by an error.
fn within(limit: Duration, scene: &Scene, trial: impl FnOnce() -> Result<()>) -> Result<()> {
    let is_late = &AtomicBool::new(false);
    let (done, wait) = mpsc::channel::<()>();
    let result = thread::scope(|scope| {
        scope.spawn(move || {
            if wait.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                is_late.store(true, Ordering::Relaxed);
                scene.kill_processes();
                // One that outlives its daemon ends no request.
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

/// The number of lines of a text that say an error.
fn error_count(stderr: &str) -> usize {
    stderr.lines().filter(|line| line.starts_with("error[")).count()
}

/// Whether the kernel of this machine has zero copy, as the program under test tells.
fn has_zero_copy(scene: &Scene) -> Result<bool> {
    let told = scene.run(&["features", "--json"])?.expect_code(0)?.json()?;
    let features = told["features"].as_array().context("no list of features")?;
    let found = features.iter().find(|feature| feature["name"] == "AUTO_BUF_REG").context("no AUTO_BUF_REG")?;
    found["offered"].as_bool().context("offered or not?")
}

/// Sleeps for whole seconds: how long a load runs before something is done to it.
fn let_run(seconds: u64) {
    thread::sleep(Duration::from_secs(seconds));
}

/// Waits until a job of depth 32 has come up to its depth on a device. fio itself may take seconds to start.
fn wait_until_busy(device: &Device) -> Result<()> {
    wait::until(&format!("30 requests in flight on {}", device.node()), Duration::from_secs(20), || {
        Ok((sysfs::in_flight(&device.disk)? >= 30).then_some(()))
    })
}

/// The present instant as it stands in fio's logs.
fn now_ms() -> Result<u64> {
    ublk_throttle_tests::fio::unix_ms(std::time::SystemTime::now()).context("the clock")
}
