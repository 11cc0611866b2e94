//! Runs all checks of CI as named and timed steps. A failed step does not stop the rest.
//!
//! ```text
//!   fmt ─ clippy ─ unit ─ rublk ─ dist ─┐
//!                                       ├─► e2e ─ newest ─ two-cpus     in VMs, with their kernels' logs watched
//!   build ─ loom ─ shuttle ─────────────┘
//! ```
//!
//! The two lanes run side by side, because for a part of its time each can use a single CPU only.
//! They share no build directory, except that `dist` uses that of `build` and waits for it. `rublk`
//! and `dist` follow `unit`, which builds half of their crates. The steps in VMs run in turn,
//! because each keeps two CPUs busy.

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::build::{self, cargo};
use crate::dist;
use crate::e2e::{self, Programs, Run};
use crate::install;
use crate::process;
use crate::tally::{self, Tally};
use crate::vm::{self, Clock, Kernel};
use crate::workspace;

/// Run everything that CI runs
///
/// Each step is timed, and a failed step does not stop the others. Arguments after -- go to the end-to-end suite, which knows
/// libtest's: a filter, --exact, --list.
///
/// Examples: `cargo xtask test --quick`, `cargo xtask test --only e2e --kernel newest -- removal`.
#[derive(Args)]
pub struct Flags {
    /// Only this step; may be given several times
    #[arg(long, value_name = "STEP")]
    only: Vec<Step>,
    /// For the inner loop: format, clippy, unit tests, and a dozen end-to-end trials of the debug build
    #[arg(long, conflicts_with_all = ["only", "thorough"])]
    quick: bool,
    /// Repeat removals, kills, takeovers and changes as often as it takes to trust them: hours
    #[arg(long)]
    thorough: bool,
    /// The kernel of the end-to-end suite: 6.12 (the oldest supported) or newest (that Debian has)
    #[arg(long, default_value = "6.12")]
    kernel: Kernel,
    /// The time of the end-to-end suite: by default the host's where KVM works, else instructions
    #[arg(long, value_enum, default_value_t = Clock::Auto)]
    clock: Clock,
    /// Seed of the random numbers in the end-to-end suite's VMs: another seed is another order of events
    #[arg(long, default_value_t = 1)]
    seed: u32,
    /// Arguments for the end-to-end suite
    #[arg(last = true, value_name = "ARGS")]
    e2e: Vec<String>,
}

/// A step of the test run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Step {
    /// rustfmt has nothing to change
    Fmt,
    /// clippy has nothing to say
    Clippy,
    /// unit, property and documentation tests, on the host
    Unit,
    /// the daemon's release build
    Build,
    /// rublk, the foreign control client, built once and kept
    Rublk,
    /// the Debian package of that build, and the score of its unit's sandbox
    Dist,
    /// the throttle's races under the model checker loom
    Loom,
    /// the same under shuttle
    Shuttle,
    /// a dozen trials of the end-to-end suite, with the daemon's debug build
    Smoke,
    /// the end-to-end suite, in VMs
    E2e,
    /// those of its trials that a newer driver serves in another way, on the newest kernel
    Newest,
    /// those of its trials that need two CPUs at the same instant, on the host's clock: judged by what is right, not by how fast
    TwoCpus,
}

/// Lanes of steps that run side by side, then the steps that follow.
const LANES: [&[Step]; 2] =
    [&[Step::Fmt, Step::Clippy, Step::Unit, Step::Rublk, Step::Dist], &[Step::Build, Step::Loom, Step::Shuttle]];
const THEN: [Step; 4] = [Step::Smoke, Step::E2e, Step::Newest, Step::TwoCpus];
const QUICK: [Step; 5] = [Step::Fmt, Step::Clippy, Step::Unit, Step::Rublk, Step::Smoke];

/// Interval at which a terminal shows the running steps.
const TICK: Duration = Duration::from_secs(1);

/// Result of a step.
struct Done {
    step: Step,
    took: Duration,
    outcome: Result<Tally>,
}

/// The command `cargo xtask test`.
pub fn main(flags: &Flags) -> Result<u8> {
    install::packages(&[install::BUILD, install::VM, install::MEASURE, install::TEST, install::PACKAGE])?;
    let start = Instant::now();
    let is_wanted = |step: &&Step| match flags.only.as_slice() {
        [] if flags.quick => QUICK.contains(step),
        [] => **step != Step::Smoke,
        only => only.contains(step),
    };
    let wanted = |lane: &[Step]| lane.iter().filter(is_wanted).copied().collect::<Vec<_>>();
    let mut done = side_by_side(&LANES.map(wanted), flags);
    done.extend(wanted(&THEN).into_iter().map(|step| captured(step, flags, &Mutex::default())));
    println!("\n{}", summary(&done, start.elapsed()));
    Ok(u8::from(done.iter().any(|done| done.outcome.is_err())))
}

/// Runs lanes of steps side by side. The output of a step is printed in a single block when it has
/// ended; until then a terminal shows the running steps.
fn side_by_side(lanes: &[Vec<Step>], flags: &Flags) -> Vec<Done> {
    let running = Mutex::new(Vec::new());
    let (ended, wait) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let lanes: Vec<_> = lanes
            .iter()
            .map(|lane| {
                let (running, ended) = (&running, ended.clone());
                scope.spawn(move || {
                    let _ended = ended;
                    lane.iter().map(|&step| captured(step, flags, running)).collect::<Vec<_>>()
                })
            })
            .collect();
        drop(ended);
        while wait.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
            show_progress(&running.lock().expect("no panic while it is held"));
        }
        lanes.into_iter().flat_map(|lane| lane.join().expect("a lane does not panic")).collect()
    })
}

/// Runs a step, and prints its output when it has ended.
fn captured(step: Step, flags: &Flags, running: &Mutex<Vec<(Step, Instant)>>) -> Done {
    let is_this = |(other, _): &(Step, Instant)| *other == step;
    running.lock().expect("no panic while it is held").push((step, Instant::now()));
    if step.is_live() {
        println!("\n== {}", step.name());
    }
    let log = Log(workspace::target().join(format!("xtask-{}.log", step.name())));
    let done = step.timed(flags, &log);
    let mut running = running.lock().expect("no panic while it is held");
    running.retain(|entry| !is_this(entry));
    let said = fs::read(&log.0).unwrap_or_default();
    let mut out = std::io::stdout().lock();
    let clear = if out.is_terminal() { "\r\x1b[K" } else { "" };
    let head = if step.is_live() { String::new() } else { format!("\n== {}\n", step.name()) };
    let _ = write!(out, "{clear}{head}{}", String::from_utf8_lossy(&said));
    done
}

fn show_progress(running: &[(Step, Instant)]) {
    let mut out = std::io::stdout().lock();
    if out.is_terminal() {
        let steps = running.iter().map(|(step, since)| format!("{} {} s", step.name(), since.elapsed().as_secs()));
        let _ = write!(out, "\r\x1b[K{}", steps.collect::<Vec<_>>().join(", ")).and_then(|()| out.flush());
    }
}

/// Output file of a step's commands, shown when the step has ended.
struct Log(PathBuf);

impl Log {
    /// Runs a command and returns its test counts; an error if it fails.
    fn counted(&self, command: &mut Command) -> Result<Tally> {
        let open = || fs::File::options().create(true).append(true).open(&self.0);
        let file = open().with_context(|| self.0.display().to_string())?;
        command.stderr(file.try_clone()?);
        let (tally, status) = tally::run(command, file)?;
        if tally.failed > 0 {
            bail!("{tally}");
        }
        if !status.success() {
            bail!("{} ended with {status}", process::line(command));
        }
        Ok(tally)
    }

    /// Appends a line.
    fn say(&self, line: &str) -> Result<()> {
        self.counted(Command::new("echo").arg(line)).map(drop)
    }
}

impl Step {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Whether the step prints each of its trials at its end.
    fn is_live(self) -> bool {
        matches!(self, Step::Smoke | Step::E2e | Step::Newest | Step::TwoCpus)
    }

    fn timed(self, flags: &Flags, log: &Log) -> Done {
        let _ = fs::remove_file(&log.0);
        let start = Instant::now();
        let outcome = self.run(flags, log);
        if let Err(error) = &outcome {
            let _ = log.say(&format!("error: {}: {error:#}", self.name()));
        }
        Done { step: self, took: start.elapsed(), outcome }
    }

    fn run(self, flags: &Flags, log: &Log) -> Result<Tally> {
        let run = |kernel: Kernel, selection| {
            let clock = vm::clock(kernel, flags.clock)?;
            let name = [kernel.name()].into_iter().chain(selection).collect::<Vec<_>>().join("-");
            Ok::<_, anyhow::Error>(Run {
                name,
                kernel,
                clock,
                selection,
                correctness_only: false,
                thorough: flags.thorough,
                seed: flags.seed,
            })
        };
        match self {
            Step::Fmt => {
                component("fmt", "rustfmt")?;
                log.counted(cargo().args(["fmt", "--all", "--check"]))
            }
            Step::Clippy => {
                component("clippy", "clippy")?;
                log.counted(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
            }
            Step::Unit => {
                let tally = log.counted(cargo().args(["test", "--workspace"]))?;
                // Built in this lane, where no step waits for the build directory, so that the
                // steps in VMs find their programs built.
                log.counted(&mut build::debug_command())?;
                Ok(tally)
            }
            Step::Build => log.counted(&mut build::daemon_command()),
            Step::Rublk => install::RUBLK.install(|command| log.counted(command).map(drop)).map(|()| Tally::default()),
            Step::Dist => {
                log.say(&dist::expect_sandbox()?)?;
                let package = dist::of_release(|command| log.counted(command).map(drop))?;
                log.say(&package.display().to_string())?;
                Ok(Tally::default())
            }
            Step::Loom => log.counted(&mut models("loom")),
            Step::Shuttle => log.counted(&mut models("shuttle")),
            Step::Smoke => e2e::run(&debug_programs()?, &run(flags.kernel, Some("smoke"))?, &flags.e2e),
            Step::E2e => e2e::run(&programs()?, &run(flags.kernel, None)?, &flags.e2e),
            Step::Newest => e2e::run(&programs()?, &run(Kernel::Newest, Some("every-kernel"))?, &flags.e2e),
            Step::TwoCpus => {
                let run = Run { clock: Clock::Host, correctness_only: true, ..run(flags.kernel, Some("two-cpus"))? };
                e2e::run(&programs()?, &run, &flags.e2e)
            }
        }
    }
}

/// Tests the throttle's models under a checker, which a `cfg` of its name enables. Each checker has
/// a build directory of its own: with alternating flags in a shared one, each run would build anew.
fn models(checker: &str) -> Command {
    let mut test = cargo();
    test.args(["test", "--profile", "models", "--package", "throttle-core", "--lib", "models"])
        .env("RUSTFLAGS", format!("--cfg {checker}"))
        .env("CARGO_TARGET_DIR", workspace::target().join(checker));
    test
}

/// Makes sure that cargo has a subcommand, which a minimal toolchain may lack.
fn component(subcommand: &str, name: &str) -> Result<()> {
    if process::output(cargo().args([subcommand, "--version"])).is_ok() {
        return Ok(());
    }
    eprintln!("xtask: adding the toolchain's component {name}");
    process::output(Command::new("rustup").args(["component", "add", name]).current_dir(workspace::root()))
        .with_context(|| format!("cargo has no `{subcommand}`: install {name}"))
        .map(drop)
}

/// Builds the release programs and the suite that tests them.
fn programs() -> Result<Programs> {
    process::run(&mut build::daemon_command())?;
    install::RUBLK.install(process::run)?;
    let [suite, crashing] = build::debug()?;
    Ok(Programs { suite, daemon: build::daemon_path("release"), crashing, package: dist::of_this_release() })
}

/// Builds the suite and the daemon's debug build. The release build, which takes minutes, is not
/// needed.
fn debug_programs() -> Result<Programs> {
    let [suite, crashing] = build::debug()?;
    Ok(Programs { suite, daemon: crashing.clone(), crashing, package: None })
}

fn summary(done: &[Done], took: Duration) -> String {
    let mut lines = vec![format!("{:8} {:>8}  result", "step", "time")];
    let mut total = Tally::default();
    for Done { step, took, outcome } in done {
        let result = match outcome {
            Ok(tally) if tally.is_empty() => "ok".to_owned(),
            Ok(tally) => format!("ok: {tally}"),
            Err(error) => format!("FAILED: {error}"),
        };
        total += *outcome.as_ref().unwrap_or(&Tally::default());
        lines.push(format!("{:8} {:>6.1} s  {result}", step.name(), took.as_secs_f64()));
    }
    let failed = done.iter().filter(|done| done.outcome.is_err()).count();
    let result = if failed == 0 { format!("ok: {total}") } else { format!("FAILED: {failed} of {} steps", done.len()) };
    // The total is less than the sum, because steps run side by side.
    lines.push(format!("{:8} {:>6.1} s  {result}", "all", took.as_secs_f64()));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(step: Step, outcome: Result<Tally>) -> Done {
        Done { step, took: Duration::from_millis(1500), outcome }
    }

    #[test]
    fn summary_adds_up_the_counts() {
        // Steps without tests show no zeros.
        let counted = Tally { passed: 7, failed: 0, skipped: 1 };
        let steps =
            [done(Step::Fmt, Ok(Tally::default())), done(Step::Unit, Ok(counted)), done(Step::E2e, Ok(counted))];
        let text = summary(&steps, Duration::from_secs(4));
        assert!(text.contains("fmt         1.5 s  ok\n"), "{text}");
        assert!(text.ends_with("all         4.0 s  ok: 14 passed, 0 failed, 2 skipped"), "{text}");
    }

    #[test]
    fn summary_with_one_failed_step_is_a_failure() {
        // Readers look at the last line.
        let steps = [done(Step::Fmt, Ok(Tally::default())), done(Step::Clippy, Err(anyhow::anyhow!("no")))];
        let text = summary(&steps, Duration::from_secs(2));
        assert!(text.contains("clippy      1.5 s  FAILED: no\n"), "{text}");
        assert!(text.ends_with("FAILED: 1 of 2 steps"), "{text}");
    }

    #[test]
    fn every_step_runs_once() {
        let all: Vec<Step> = [LANES.concat(), THEN.into()].concat();
        let times = |step: &Step| all.iter().filter(|other| *other == step).count();
        assert!(Step::value_variants().iter().all(|step| times(step) == 1), "{all:?}");
        assert!(QUICK.iter().all(|step| all.contains(step)));
    }
}
