//! `cargo xtask`: the one entry for every chore of this workspace.
//!
//! ```text
//!   cargo xtask vm -- COMMAND ──► vm ──┬─ kernel      which kernel, fetched how
//!                                      ├─ initramfs   what it boots from
//!                                      └─ machine     how QEMU is started, whether KVM works
//! ```
//!
//! Every chore installs what it needs (as root) or says the one command that does. Nothing is pinned to a machine: all
//! that is fetched or built lies below the cargo target directory.

mod install;
mod lock;
mod process;
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
    Vm(vm::Flags),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().chore {
        Chore::Vm(flags) => vm::main(flags),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
