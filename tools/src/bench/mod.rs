//! Measures speed, accuracy and cost of ours and of its peers in turn, in one boot of the VM.
//!
//! ```text
//!   host    builds ─► boots the VM ─► this program again, `bench --inside`
//!   guest   case by case:  start all sides ─► A B, B A, A B … ─► stop them ─► judge against the bars
//!   then    a table ─► stdout   all numbers ─► target/bench/KERNEL.json   plots ─► target/bench/KERNEL.html
//!
//!   cases/            loads and their bars                 peers/    the sides that are measured
//!   load, slices      fio, and the kernel's counters       grid      lateness
//!   cgroup, machine   CPU time by group and in all         windows   rates over a sliding window
//!   statistics, bar   medians, spread, verdicts            report/   text, JSON, HTML
//! ```
//!
//! Absolute numbers belong to the machine, under emulation even more so: the results are ratios
//! within one boot. On the host's clock an emulated VM measures mostly the emulator and the host's
//! load, so without KVM a nanosecond is an instruction ([`vm::Clock`]). CI checks no bar, because a
//! bench takes too long.

mod bar;
#[expect(clippy::module_inception, reason = "a bench is what this chore runs")]
mod bench;
mod cases;
mod cgroup;
mod decisions;
mod grid;
mod inside;
mod load;
mod machine;
mod peers;
mod report;
mod sample;
mod slices;
mod statistics;
mod windows;

use std::env;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use crate::vm;
use crate::workspace;
use crate::{build, install, kublk, process};
use bench::Plan;
use cases::Case;

/// Measure ours against its peers in a VM, and judge every bar: IOPS, CPU a request, latency, rates, lateness
///
/// All cases take about half an hour with five rounds, emulated about two and a half hours. Ends with 0 unless a case could not be
/// run or a bar was surely not met. With --decisions: what a decision of the throttle costs, beside governor's, on this host;
/// arguments after -- then go to criterion: a filter, --quick, --save-baseline NAME.
#[derive(Args)]
pub struct Flags {
    /// Alternations of each case; with fewer than five no verdict is trusted
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Two short rounds, to see that it runs
    #[arg(long)]
    quick: bool,
    /// Only this case; may be given several times
    #[arg(long, value_name = "CASE")]
    only: Vec<Case>,
    /// The VM's kernel: 6.12 (the oldest supported) or newest (that Debian has)
    #[arg(long, default_value = "newest")]
    kernel: vm::Kernel,
    /// What the VM's time is
    #[arg(long, value_enum, default_value_t = vm::Clock::Auto)]
    clock: vm::Clock,
    /// The VM's processors [default: 2, where an instruction is a nanosecond 1]
    #[arg(long)]
    cpus: Option<u32>,
    /// Queues of each device, ours and the peers'
    #[arg(long, default_value_t = 1)]
    queues: u32,
    /// Criterion's benchmarks of a decision instead
    #[arg(long, conflicts_with_all = ["rounds", "quick", "only", "kernel", "clock", "cpus", "queues"])]
    decisions: bool,
    /// Already in the VM; everything is built
    #[arg(long, hide = true)]
    inside: bool,
    /// Arguments for criterion
    #[arg(last = true, value_name = "ARGS", requires = "decisions")]
    criterion: Vec<String>,
}

/// Time limits of the VM: its start and end, and a round of all cases (twice its duration under
/// emulation).
const START: Duration = Duration::from_secs(900);
const ROUND: Duration = Duration::from_secs(3600);

/// The command `cargo xtask bench`.
pub fn main(flags: &Flags) -> Result<u8> {
    if flags.decisions {
        return decisions::run(&flags.criterion);
    }
    if flags.inside {
        return inside::run(&flags.plan(), &flags.cases(), flags.kernel.name(), &folder());
    }
    install::packages(&[install::BUILD, install::VM, install::MEASURE, install::PEERS])?;
    install::RUBLK_OPTIMIZED.install(process::run)?;
    kublk::install()?;
    eprintln!("xtask: building the daemon (release)");
    build::daemon()?;
    fs::create_dir_all(folder()).with_context(|| format!("cannot create {}", folder().display()))?;
    let itself = env::current_exe().context("cannot tell where this program is")?;
    let mut command = vec![itself.to_string_lossy().into_owned(), "bench".into(), "--inside".into()];
    command.extend(flags.words());
    let options = vm::Options {
        kernel: flags.kernel,
        clock: flags.clock,
        cpus: flags.cpus,
        memory: "3G".to_owned(),
        timeout: Some(START + ROUND * flags.rounds as u32),
        files: vm::Files::Host { share: vec![folder()] },
        check_dmesg: true,
    };
    env::set_current_dir(workspace::root())?;
    vm::run(&options, &vm::Command::Run(command))
}

/// Folder of the reports.
fn folder() -> PathBuf {
    workspace::target().join("bench")
}

impl Flags {
    /// Arguments of this program in the guest.
    fn words(&self) -> Vec<String> {
        let mut words = vec![
            format!("--rounds={}", self.rounds),
            format!("--queues={}", self.queues),
            format!("--kernel={}", self.kernel.name()),
        ];
        words.extend(self.quick.then(|| "--quick".to_owned()));
        words.extend(self.only.iter().map(|case| format!("--only={}", case.name())));
        words
    }

    fn plan(&self) -> Plan {
        let Flags { rounds, queues, .. } = *self;
        if self.quick {
            return Plan { rounds: 2, seconds: 2, seconds_of_rates: 3, queues };
        }
        Plan { rounds, seconds: 4, seconds_of_rates: 10, queues }
    }

    fn cases(&self) -> Vec<Case> {
        if self.only.is_empty() { Case::value_variants().to_vec() } else { self.only.clone() }
    }
}
