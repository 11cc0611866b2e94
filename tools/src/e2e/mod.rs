//! Runs the end-to-end suite: its trials in several VMs side by side, a line for each trial, and a
//! total tally.
//!
//! ```text
//!   suite --list ─► shards: a function of the trials and of the table of their lengths
//!                     ├─► VM 1 ─ output ─► blocks ─┐
//!                     ├─► VM 2 ─ output ─► blocks ─┼─► standard output, trial by trial, and target/e2e/RUN.txt
//!                     └─► …    at a time as many as the host has CPUs
//! ```
//!
//! On the counted clock a shard is deterministic: it is a fixed list of trials, in a fixed order,
//! in a guest with all files in its memory. The number of shards depends only on the trials and on
//! the table, so the output of a trial depends neither on the host nor on its number of CPUs.

mod blocks;
mod shards;

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use self::blocks::{Blocks, Ended};
use self::shards::Lengths;
use crate::install;
use crate::process;
use crate::tally::Tally;
use crate::vm::{Clock, Kernel};
use crate::workspace;

/// Time limit of a guest in seconds. The longest shard takes four minutes on an idle host.
const SECONDS_MAX: u32 = 2400;

/// Memory of a guest, for its files and for the writes of its trials.
const MEMORY: &str = "3G";

/// The programs under test.
pub struct Programs {
    /// The end-to-end suite.
    pub suite: PathBuf,
    /// The daemon.
    pub daemon: PathBuf,
    /// The daemon with crash points, at which a trial can kill it.
    pub crashing: PathBuf,
    /// The daemon's Debian package, if one was built.
    pub package: Option<PathBuf>,
}

/// Trials of a run, and their guest.
pub struct Run {
    /// Name of the run's files in `target/e2e`.
    pub name: String,
    /// Kernel of the guests.
    pub kernel: Kernel,
    /// Clock of the guests: instructions or the host's.
    pub clock: Clock,
    /// Name of a selection of trials that the suite defines; `None`: all trials.
    pub selection: Option<&'static str>,
    /// Judges no rate and no time, because a second on two CPUs of a busy host proves nothing about
    /// them.
    pub correctness_only: bool,
    /// Seed of the guests' random numbers.
    pub seed: u32,
    /// Repeats removals, kills and changes as often as needed to trust them, beyond the time of a
    /// CI run.
    pub thorough: bool,
}

/// Runs the trials that libtest's `arguments` select. Returns an error if a trial fails or does not
/// end.
pub fn run(programs: &Programs, run: &Run, arguments: &[String]) -> Result<Tally> {
    let names = list(programs, run, arguments)?;
    if arguments.iter().any(|argument| argument == "--list") {
        names.iter().for_each(|name| println!("{name}"));
        return Ok(Tally::default());
    }
    ensure!(!names.is_empty(), "no trial is called so");
    let lengths = Lengths::read()?;
    // On the host's clock each guest needs two CPUs at the same instant, which may be all that the
    // host has: one VM.
    let shards = if run.clock == Clock::Instructions { shards::split(&names, &lengths) } else { vec![names.clone()] };
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let report = Mutex::new(Report { run, count: names.len(), done: Vec::new(), tally: Tally::default() });
    let next = Mutex::new(shards.iter());
    let trouble = thread::scope(|scope| {
        let lanes: Vec<_> = (0..cpus.min(shards.len()))
            .map(|_| {
                scope.spawn(|| {
                    let mut trouble = Vec::new();
                    while let Some(shard) = { next.lock().expect("no panic while it is held").next() } {
                        trouble.extend(in_vm(programs, run, shard, arguments, &report).err());
                    }
                    trouble
                })
            })
            .collect();
        lanes.into_iter().flat_map(|lane| lane.join().expect("a lane does not panic")).collect::<Vec<_>>()
    });
    let report = report.into_inner().expect("no panic while it is held");
    report.write()?;
    let mut tally = report.tally;
    let ended: BTreeSet<&str> = report.done.iter().map(|ended| ended.name.as_str()).collect();
    for name in names.iter().filter(|name| !ended.contains(name.as_str())) {
        println!("test {name} ... FAILED: it did not end");
        tally.failed += 1;
    }
    for error in &trouble {
        println!("error: {error:#}");
    }
    println!("\ntest result: {tally}", tally = libtest(tally));
    match trouble.first() {
        _ if tally.failed > 0 => bail!("{tally}"),
        Some(error) => bail!("{error:#}"),
        None => Ok(tally),
    }
}

/// Result in the form of libtest's last line.
fn libtest(tally: Tally) -> String {
    let Tally { passed, failed, skipped } = tally;
    let outcome = if failed == 0 { "ok" } else { "FAILED" };
    format!("{outcome}. {passed} passed; {failed} failed; {skipped} ignored; 0 measured; 0 filtered out")
}

/// Trials of a run in the suite's order. The suite can list them on any host.
fn list(programs: &Programs, run: &Run, arguments: &[String]) -> Result<Vec<String>> {
    let mut list = Command::new(&programs.suite);
    let chosen = arguments.iter().filter(|argument| *argument != "--list");
    list.args(chosen).args(["--list", "--format", "terse"]).envs(environment(programs, run));
    Ok(process::output(&mut list)?.lines().filter_map(blocks::listed).map(str::to_owned).collect())
}

/// Environment variables that control the suite.
fn environment(programs: &Programs, run: &Run) -> Vec<(&'static str, String)> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut variables = vec![
        ("UBLK_THROTTLE_BIN", text(&programs.daemon)),
        ("UBLK_THROTTLE_CRASHING_BIN", text(&programs.crashing)),
        // The VM has everything that a trial requires: an unmet requirement is a fault, not a
        // reason to skip.
        ("UBLK_THROTTLE_REQUIRE_ALL", "1".to_owned()),
        ("UBLK_THROTTLE_OWN_MACHINE", "1".to_owned()),
        ("RUBLK", text(&install::RUBLK.path())),
        ("RUST_BACKTRACE", "1".to_owned()),
    ];
    // Absent after `--only e2e` on a new build; the trials that need it then name the step that
    // builds it.
    variables.extend(programs.package.as_ref().map(|path| ("UBLK_THROTTLE_DEB", text(path))));
    variables.extend(run.selection.map(|selection| ("UBLK_THROTTLE_SELECTION", selection.to_owned())));
    variables.extend(run.correctness_only.then(|| ("UBLK_THROTTLE_JUDGE", "correctness".to_owned())));
    variables.extend(run.thorough.then(|| ("UBLK_THROTTLE_THOROUGH", "1".to_owned())));
    variables
}

/// Runs a shard and adds its trials to the report as they end. Returns an error if the guest fails
/// without a failed trial.
fn in_vm(
    programs: &Programs,
    run: &Run,
    shard: &[String],
    arguments: &[String],
    report: &Mutex<Report<'_>>,
) -> Result<()> {
    let mut vm = itself_in_vm(programs, run)?;
    vm.arg("--").arg(&programs.suite).args(arguments).args(["--color", "never"]);
    vm.envs(environment(programs, run)).env("UBLK_THROTTLE_TRIALS", shard.join(","));
    let mut child = vm.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let child = child.as_mut().map_err(|error| anyhow::anyhow!("cannot run {}: {error}", process::line(&vm)))?;
    let mut blocks = Blocks::new(Instant::now());
    let mut lines = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = Vec::new();
    // Bytes, not text: the output of a trial may be invalid UTF-8.
    while lines.read_until(b'\n', &mut line)? > 0 {
        if let Some(ended) = blocks.line(&String::from_utf8_lossy(&line), Instant::now()) {
            report.lock().expect("no panic while it is held").add(ended)?;
        }
        line.clear();
    }
    let status = child.wait()?;
    if status.success() {
        return Ok(());
    }
    // The logs of failed trials, or the output before an early end.
    println!("{}", blocks.rest());
    if blocks.failed() == 0 {
        bail!("the VM with {} to {} ended with {status}", shard[0], shard[shard.len() - 1]);
    }
    Ok(())
}

/// `cargo xtask vm` as a child that dies with this process, and its guest with it.
fn itself_in_vm(programs: &Programs, run: &Run) -> Result<Command> {
    let itself = env::current_exe().context("cannot tell where this program is")?;
    let mut vm = Command::new("setpriv");
    vm.args(["--pdeathsig", "KILL", "--"]).arg(itself).arg("vm").current_dir::<&Path>(workspace::root());
    let clock = if run.clock == Clock::Instructions { "instructions" } else { "host" };
    vm.args(["--kernel", run.kernel.name(), "--clock", clock, "--cpus", "2", "--memory", MEMORY]);
    vm.args(["--check-dmesg", "--timeout", &SECONDS_MAX.to_string(), "--in-memory"]);
    vm.args(["--seed", &run.seed.to_string()]);
    let files = ["fio-jobs", "config/examples", "config/tests/broken"].map(|folder| workspace::root().join(folder));
    let binaries = [&programs.suite, &programs.daemon, &programs.crashing].map(|path| path.to_path_buf());
    let all = files.into_iter().chain(binaries).chain([install::RUBLK.path()]).chain(programs.package.clone());
    vm.args(all.flat_map(|path| ["--with".into(), path.into_os_string()]));
    Ok(vm)
}

/// Trials that have ended so far.
struct Report<'a> {
    run: &'a Run,
    /// Number of trials of the run.
    count: usize,
    done: Vec<Ended>,
    tally: Tally,
}

impl Report<'_> {
    /// Prints an ended trial as a block, because the trials of a second VM run beside it.
    fn add(&mut self, ended: Ended) -> Result<()> {
        self.tally += ended.tally();
        let number = self.done.len() + 1;
        let mut out = std::io::stdout().lock();
        // Clears a line of progress.
        let clear = if out.is_terminal() { "\r\x1b[K" } else { "" };
        let host = ended.host.as_secs();
        let run = &self.run.name;
        writeln!(out, "{clear}{}[{run} {number:3}/{}] {}, {host} s of the host", ended.text, self.count, ended.line())?;
        self.done.push(ended);
        Ok(())
    }

    /// Writes the output of each trial, sorted by name, so that `diff` compares two runs, and the
    /// lengths of the long trials.
    fn write(&self) -> Result<()> {
        let folder = workspace::target().join("e2e");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let mut done: Vec<&Ended> = self.done.iter().collect();
        done.sort_by(|one, other| one.name.cmp(&other.name));
        let text: String = done.iter().map(|ended| format!("{}\n{}", ended.line(), ended.text)).collect();
        let long = done.iter().filter(|ended| ended.host.as_secs_f64() >= shards::LINE_MIN);
        let lengths: String = long.map(|ended| ended.length()).collect();
        for (suffix, content) in [("txt", text), ("lengths", lengths)] {
            let path = folder.join(format!("{}.{suffix}", self.run.name));
            fs::write(&path, content).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}
