//! Everything that CI runs, as named and timed steps; a failed one does not hide the others.
//!
//! ```text
//!   fmt ─ clippy ─ unit ─ models ─ build ─ rublk ─ dist ─ e2e ─ newest (in the VM, with the kernel's log watched)
//! ```

use std::env;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::build::{self, cargo};
use crate::dist;
use crate::install;
use crate::process;
use crate::tally::{self, Tally};
use crate::vm::Kernel;
use crate::workspace;

/// The package of the end-to-end suite, which needs real ublk and so the VM.
const E2E: &str = "ublk-throttle-tests";

/// For a suite that hangs. It takes half an hour, boot included, and with the other steps twice as slow as well all of CI still has
/// its 90 minutes.
const E2E_SECONDS: u32 = 4200;

/// Run everything that CI runs
///
/// Each step is timed, its output stays visible, and a failed step does not stop the others. Arguments after -- go to
/// the end-to-end suite, which knows libtest's: a filter, --exact, --test-threads, --list.
///
/// Examples: `cargo xtask test --only unit`, `cargo xtask test --only e2e --kernel newest -- removal`.
#[derive(Args)]
pub struct Flags {
    /// Only this step; may be given several times
    #[arg(long, value_name = "STEP")]
    only: Vec<Step>,
    /// The kernel of the end-to-end suite: 6.12 (the oldest supported) or newest (that Debian has)
    #[arg(long, default_value = "6.12")]
    kernel: Kernel,
    /// Arguments for the end-to-end suite
    #[arg(last = true, value_name = "ARGS")]
    e2e: Vec<String>,
}

/// A part of the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Step {
    /// rustfmt has nothing to change
    Fmt,
    /// clippy has nothing to say
    Clippy,
    /// unit, property and documentation tests, on the host
    Unit,
    /// the throttle's races under the model checkers loom and shuttle
    Models,
    /// the daemon's release build
    Build,
    /// rublk, the foreign control client, built once and kept
    Rublk,
    /// the Debian package of that build, and the score of its unit's sandbox
    Dist,
    /// the end-to-end suite, in the VM
    E2e,
    /// those of its trials that a newer driver serves in another way, on the newest kernel
    Newest,
}

/// Which trials of the end-to-end suite to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trials {
    All,
    /// Those that are worth it on each kernel.
    OnEveryKernel,
}

/// What became of a step.
struct Done {
    step: Step,
    took: Duration,
    outcome: Result<Tally>,
}

/// The chore `test`.
pub fn main(flags: &Flags) -> Result<u8> {
    install::packages(&[install::BUILD, install::VM, install::MEASURE, install::TEST, install::PACKAGE])?;
    let wanted = |step: &&Step| flags.only.is_empty() || flags.only.contains(step);
    let mut done = Vec::new();
    for &step in Step::value_variants().iter().filter(wanted) {
        println!("\n== {}", step.name());
        let start = Instant::now();
        let outcome = step.run(flags);
        if let Err(error) = &outcome {
            eprintln!("error: {}: {error:#}", step.name());
        }
        done.push(Done { step, took: start.elapsed(), outcome });
    }
    println!("\n{}", summary(&done));
    Ok(u8::from(done.iter().any(|done| done.outcome.is_err())))
}

impl Step {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    fn run(self, flags: &Flags) -> Result<Tally> {
        match self {
            Step::Fmt => {
                component("fmt", "rustfmt")?;
                counted(cargo().args(["fmt", "--all", "--check"]))
            }
            Step::Clippy => {
                component("clippy", "clippy")?;
                counted(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
            }
            Step::Unit => {
                let mut tally = counted(cargo().args(["test", "--workspace", "--exclude", E2E]))?;
                tally += counted(cargo().args(["test", "--package", E2E, "--lib"]))?;
                Ok(tally)
            }
            Step::Models => {
                let mut tally = counted(&mut models("loom"))?;
                tally += counted(&mut models("shuttle"))?;
                Ok(tally)
            }
            Step::Build => counted(&mut build::daemon_command()),
            Step::Rublk => install::RUBLK.install().map(|()| Tally::default()),
            Step::Dist => dist(),
            Step::E2e => e2e(flags.kernel, Trials::All, &flags.e2e),
            Step::Newest => e2e(Kernel::Newest, Trials::OnEveryKernel, &flags.e2e),
        }
    }
}

/// The models of the throttle under a checker, which is switched on by a `cfg` of its name. Each has a build directory of
/// its own: with the flags changing, one would be built anew each time.
fn models(checker: &str) -> Command {
    let mut test = cargo();
    test.args(["test", "--release", "--package", "throttle-core", "--lib", "models"])
        .env("RUSTFLAGS", format!("--cfg {checker}"))
        .env("CARGO_TARGET_DIR", workspace::target().join(checker));
    test
}

/// Runs it; its counts, or an error if it fails.
fn counted(command: &mut Command) -> Result<Tally> {
    let (tally, status) = tally::run(command)?;
    if tally.failed > 0 {
        bail!("{tally}");
    }
    if !status.success() {
        bail!("{} ended with {status}", process::line(command));
    }
    Ok(tally)
}

/// Makes sure that cargo has a subcommand; a minimal toolchain lacks these.
fn component(subcommand: &str, name: &str) -> Result<()> {
    if process::output(cargo().args([subcommand, "--version"])).is_ok() {
        return Ok(());
    }
    eprintln!("xtask: adding the toolchain's component {name}");
    process::output(Command::new("rustup").args(["component", "add", name]).current_dir(workspace::root()))
        .with_context(|| format!("cargo has no `{subcommand}`: install {name}"))
        .map(drop)
}

/// The package of the release build, and what can be said of it without a VM.
fn dist() -> Result<Tally> {
    dist::expect_sandbox()?;
    println!("{}", dist::of_release()?.display());
    Ok(Tally::default())
}

fn e2e(kernel: Kernel, trials: Trials, arguments: &[String]) -> Result<Tally> {
    let crashing = build::crashing_daemon()?;
    build::daemon()?;
    let suite = build::e2e()?;
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([install::programs()].into_iter().chain(env::split_paths(&path)))?;
    let mut vm = itself_in_vm()?;
    vm.args(["--kernel", kernel.name()]);
    vm.args(["--check-dmesg", "--memory", "3G", "--timeout", &E2E_SECONDS.to_string(), "--"])
        .arg(&suite)
        .args(arguments);
    vm.env("PATH", path).env("UBLK_THROTTLE_BIN", build::daemon_path()).env("UBLK_THROTTLE_CRASHING_BIN", crashing);
    // Absent after `--only e2e` on a new build: the trials that need it then say which step makes it.
    if let Some(package) = dist::of_this_release() {
        vm.env("UBLK_THROTTLE_DEB", package);
    }
    // Nothing is missing in the VM: what is not met there is a fault, not a reason to skip.
    vm.env("UBLK_THROTTLE_REQUIRE_ALL", "1").env("UBLK_THROTTLE_OWN_MACHINE", "1").env("RUST_BACKTRACE", "1");
    if trials == Trials::OnEveryKernel {
        vm.env("UBLK_THROTTLE_ON_EVERY_KERNEL", "1");
    }
    let tally = counted(&mut vm)?;
    if tally.is_empty() && !arguments.iter().any(|argument| argument == "--list") {
        bail!("{} ended well without a count of tests", suite.display());
    }
    Ok(tally)
}

/// `cargo xtask vm` as a child, whose output can be counted; it dies with us, and its guest with it.
fn itself_in_vm() -> Result<Command> {
    let itself = env::current_exe().context("cannot tell where this program is")?;
    let mut vm = Command::new("setpriv");
    vm.args(["--pdeathsig", "KILL", "--"]).arg(itself).arg("vm").current_dir::<&Path>(workspace::root());
    Ok(vm)
}

fn summary(done: &[Done]) -> String {
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
    let time: Duration = done.iter().map(|done| done.took).sum();
    let failed = done.iter().filter(|done| done.outcome.is_err()).count();
    let result = if failed == 0 { format!("ok: {total}") } else { format!("FAILED: {failed} of {} steps", done.len()) };
    lines.push(format!("{:8} {:>6.1} s  {result}", "all", time.as_secs_f64()));
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
        let text = summary(&[
            done(Step::Fmt, Ok(Tally::default())),
            done(Step::Unit, Ok(counted)),
            done(Step::E2e, Ok(counted)),
        ]);
        assert!(text.contains("fmt         1.5 s  ok\n"), "{text}");
        assert!(text.ends_with("all         4.5 s  ok: 14 passed, 0 failed, 2 skipped"), "{text}");
    }

    #[test]
    fn summary_with_one_failed_step_is_a_failure() {
        // The last line is what people read.
        let text = summary(&[done(Step::Fmt, Ok(Tally::default())), done(Step::Clippy, Err(anyhow::anyhow!("no")))]);
        assert!(text.contains("clippy      1.5 s  FAILED: no\n"), "{text}");
        assert!(text.ends_with("FAILED: 1 of 2 steps"), "{text}");
    }
}
