//! `cargo xtask`: the entry point for every chore of this workspace.
//!
//! ```text
//!   ci ──► test ──► e2e         steps of cargo, then the end-to-end suite ─┐
//!          simulate             the example traces, in virtual time        │
//!          dist                 the Debian package                         │
//!          bench                ours against its peers, judged by bars ────┤
//!          demo                 the main job, on this host or in the VM ───┤
//!                                                                          ▼
//!          vm ──┬─ kernel       Debian's kernel, fetched and unpacked
//!               ├─ initramfs    the files for its boot
//!               ├─ machine      QEMU's command line; whether KVM works
//!               └─ session      a boot: output, exit status, end
//! ```
//!
//! Every chore installs the packages that it needs (as root) or prints the command that does.
//! Nothing is pinned to a machine: all fetched and built files lie below the cargo target
//! directory.

mod apt;
mod bench;
mod blockstat;
mod build;
mod ci;
mod daemon;
mod demo;
mod dist;
mod e2e;
mod fio;
mod install;
mod kublk;
mod lock;
mod process;
mod simulate;
mod tally;
mod test;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Chores of the ublk-throttle workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    Demo(demo::Flags),
    Test(test::Flags),
    Bench(bench::Flags),
    Vm(vm::Flags),
    /// Build the Debian package: program, systemd unit, manual pages, completions
    Dist,
    /// Play the example traces in virtual time and print what the limits did to them
    Simulate,
    /// Do what the CI service does: .ci/run, without input, at most 90 minutes
    Ci,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().chore {
        Chore::Demo(flags) => demo::main(&flags),
        Chore::Test(flags) => test::main(&flags),
        Chore::Bench(flags) => bench::main(&flags),
        Chore::Simulate => simulate::main(),
        Chore::Dist => dist::main(),
        Chore::Vm(flags) => vm::main(flags),
        Chore::Ci => ci::main(),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
