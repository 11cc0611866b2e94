//! A daemon is replaced by a second one, or stopped and started, while its devices are in use: a
//! pause.
//!
//! ```text
//!   old  ── serves ──┐ leaves its devices                 a thread reads repeatedly, and notes its longest read;
//!   new              └─ takes them over ── serves ──      fio writes and verifies
//! ```

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::mode::{Times, to_measure};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;

use crate::measure::expect_within;
use crate::{Case, VERIFIED, cases, let_run, load};

/// Bound on a pause of a device.
const PAUSE_LIMIT: Duration = Duration::from_secs(2);
/// Bound of an answer, and of the exit of a daemon without anything to wait for.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

pub(crate) fn cases() -> Vec<Case> {
    let plain = cases![[Need::Ublk];
        f10_sigterm_leaves_what_is_kept_to_the_next_daemon_and_removes_the_rest,
        a_takeover_that_would_end_a_device_is_refused_and_changes_nothing,
        a_takeover_without_a_daemon_is_a_start,
    ];
    let fio = cases![[Need::Ublk, Need::Fio];
        f19_takeovers_under_load_are_pauses_and_no_errors,
    ];
    plain.into_iter().chain(fio).collect()
}

/// Reads at intervals of 10 ms until `stop`; measures the longest read since the last call of
/// `longest`.
struct Probe {
    ends: Arc<AtomicBool>,
    longest_ns: Arc<AtomicU64>,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Probe {
    fn start(node: &Path) -> Result<Self> {
        let (ends, longest_ns) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let direct = Direct::open(node)?;
        let (until, longest) = (Arc::clone(&ends), Arc::clone(&longest_ns));
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                let begin = Instant::now();
                direct.read(0, 4096)?;
                longest.fetch_max(begin.elapsed().as_nanos() as u64, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        });
        Ok(Self { ends, longest_ns, thread })
    }

    fn longest(&self) -> Duration {
        Duration::from_nanos(self.longest_ns.swap(0, Ordering::Relaxed))
    }

    /// Ends the thread; an error if a read failed.
    fn stop(self) -> Result<()> {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("the probe's thread")?.context("a read failed")
    }
}

fn file(scene: &Scene, name: &str, more: &str) -> String {
    let path = scene.dir().join(format!("{name}.img"));
    format!("  {name}: {{ backend: {{ file: {}, size: 64MiB, create: true }}{more} }}\n", path.display())
}

fn config(devices: &str) -> String {
    format!("version: 1\ndevices:\n{devices}")
}

/// Takeovers, each with requests held and in flight.
const TAKEOVERS: Times = Times { ci: 5, thorough: 20 };

fn f19_takeovers_under_load_are_pauses_and_no_errors(scene: &Scene) -> Result<()> {
    // Device `d` writes and verifies at its limit, so that requests are held at each takeover.
    // Device `probe` is read without a limit.
    let devices = file(scene, "d", ", queues: 2, limits: { iops-total: 400 }") + &file(scene, "probe", "");
    let config = config(&devices);
    let mut daemon = scene.start(&config)?;
    let device = scene.device("d")?;
    let mut fio = load(scene, VERIFIED, &device)?;
    let probe = Probe::start(&scene.device("probe")?.node)?;
    let mut pauses = Vec::new();
    for _ in 0..TAKEOVERS.get() {
        let_run(1);
        probe.longest();
        let new = scene.take_over(&config)?;
        std::mem::replace(&mut daemon, new).expect_end(ANSWER_LIMIT)?;
        daemon.wait_for_log("device=d state=recovered", ANSWER_LIMIT)?;
        daemon.wait_for_log("device=probe state=recovered", ANSWER_LIMIT)?;
        // A read that waited counts after its return.
        std::thread::sleep(to_measure(Duration::from_secs(1)));
        pauses.push(probe.longest());
        ensure!(scene.device("d")?.id == device.id, "another id");
        ensure!(fio.is_running()?, "fio has ended:\n{:?}", fio.finish_any(Duration::ZERO)?.errors());
    }
    fio.stop()?;
    probe.stop()?;
    let longest = pauses.iter().max().copied().unwrap_or_default();
    expect_within(format!("longest pause of {pauses:?}"), longest, PAUSE_LIMIT)?;
    daemon.stop().map(drop)
}

fn f10_sigterm_leaves_what_is_kept_to_the_next_daemon_and_removes_the_rest(scene: &Scene) -> Result<()> {
    // A read without a daemon waits and is served by the next daemon. The change by `set` outlives
    // the stop, too.
    let devices = file(scene, "kept", ", on-stop: keep") + &file(scene, "goes", "");
    let config = config(&devices);
    let daemon = scene.start(&config)?;
    let (kept, goes) = (scene.device("kept")?, scene.device("goes")?);
    Direct::open(&kept.node)?.write(4096, 4096, 0x5a)?;
    scene.ask(&["set", "device", "kept", "iops-total=500"])?.expect_code(0)?;
    let probe = Probe::start(&kept.node)?;
    let_run(1);
    daemon.signal(Signal::SIGTERM)?;
    daemon.expect_end(ANSWER_LIMIT)?;
    ensure!(kept.node.exists() && !goes.node.exists(), "the one has to stay, the other to go");
    let listed = scene.ask(&["list"])?.expect_code(0)?;
    ensure!(listed.stdout.contains("unserved"), "{listed}");
    let daemon = scene.start(&config)?;
    daemon.wait_for_log("device=kept state=recovered", ANSWER_LIMIT)?;
    ensure!(scene.device("kept")?.id == kept.id, "another id");
    ensure!(Direct::open(&kept.node)?.holds(4096, 4096, 0x5a)?, "something else is read");
    probe.stop()?;
    let listed = scene.listing()?;
    ensure!(listed["devices"][1]["limits"]["iops-total"] == 500, "what was set is lost: {listed}");
    // A kept device ends with a `del`.
    scene.ask(&["del", "kept"])?.expect_code(0)?;
    daemon.stop()?;
    scene.expect_nothing_left()
}

fn a_takeover_that_would_end_a_device_is_refused_and_changes_nothing(scene: &Scene) -> Result<()> {
    let text = config(&(file(scene, "d", "") + "  lost: { backend: { memory: 1MiB } }\n"));
    let mut daemon = scene.start(&text)?;
    let direct = Direct::open(&scene.device("lost")?.node)?;
    direct.write(0, 4096, 0x33)?;
    let path = scene.write("config.yaml", &text)?;
    let path = path.to_str().context("path")?;
    scene.ask(&["run", path, "--takeover"])?.expect_code(5)?.expect_stderr(&["error[E-CONFLICT]", "lost"])?;
    // An invalid configuration is refused before the new daemon contacts the old one.
    let broken = scene.write("broken.yaml", "version: 2")?;
    scene.ask(&["run", broken.to_str().context("path")?, "--takeover"])?.expect_code(3)?;
    ensure!(daemon.is_running()? && direct.holds(0, 4096, 0x33)?, "the daemon or the device is hurt");
    scene.ask(&["set", "device", "d", "iops-total=100"])?.expect_code(0)?;
    drop(direct);
    daemon.stop().map(drop)
}

fn a_takeover_without_a_daemon_is_a_start(scene: &Scene) -> Result<()> {
    let daemon = scene.take_over(&config(&file(scene, "d", "")))?;
    daemon.wait_for_log("no daemon answers", ANSWER_LIMIT)?;
    daemon.stop()?;
    scene.expect_nothing_left()
}
