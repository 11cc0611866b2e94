//! Shows the product's main job: two devices share a limit, a device is removed under load, and
//! nothing is left behind.
//!
//! ```text
//!   host has ublk and root?  yes ──► here
//!                            no ───► in the VM: this program again, `demo --inside`
//!
//!   fio   vol0 ▇▇▇▇▇▇▇▇▇▇▇  ▇▇▇▇▇▇▇✕ removed          500/s, then none
//!         vol1 ▇▇▇▇▇▇▇▇▇▇▇  ▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇       500/s, then 1000/s, no error
//!              shared       removal                SIGTERM: no device, no process, no file
//! ```
//!
//! fio or the kernel's counters measure every number of the table, never the daemon.

mod leftovers;
mod table;
mod tour;

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;

use crate::vm;
use crate::workspace;
use crate::{build, install};

/// Show the main job: two devices share a limit, one is removed under load
///
/// Builds the daemon, starts it with config/examples/quickstart.yaml on this host if it has ublk and you are root, else
/// in a VM; loads the devices with fio, prints configured against measured, removes a device under load, stops the
/// daemon and looks for anything left behind. Ends with 0 only if every rate was within 1 %.
#[derive(Args)]
pub struct Flags {
    /// Use the VM even where this host has ublk
    #[arg(long)]
    vm: bool,
    /// The VM's kernel
    #[arg(long, default_value = "6.12")]
    kernel: vm::Kernel,
    /// Already where the devices are to be; the binary is built
    #[arg(long, hide = true)]
    inside: bool,
}

/// The command `cargo xtask demo`.
pub fn main(flags: &Flags) -> Result<u8> {
    let binary = build::daemon_path("release");
    if flags.inside {
        return tour::run(&binary);
    }
    install::packages(&[install::BUILD, install::MEASURE])?;
    eprintln!("xtask: building the daemon (release)");
    build::daemon()?;
    if !flags.vm && host_has_ublk() {
        eprintln!("xtask: this host has ublk: the devices come up here");
        return tour::run(&binary);
    }
    eprintln!("xtask: no ublk for us on this host: the devices come up in a VM");
    let itself = env::current_exe().context("cannot tell where this program is")?;
    let command = [itself.to_string_lossy().into_owned(), "demo".into(), "--inside".into()];
    let options = vm::Options { kernel: flags.kernel, check_dmesg: true, ..vm::Options::default() };
    env::set_current_dir(workspace::root())?;
    let code = vm::run(&options, &vm::Command::Run(command.to_vec()))?;
    if code != 0
        && let Some(load) = overload()
    {
        eprintln!(
            "xtask: the load average of this host is {load}: an emulated machine that gets no processor misses rates; \
             try again when the host is less busy"
        );
    }
    Ok(code)
}

/// The host's load average, if it exceeds the number of the host's processors by more than 1.
fn overload() -> Option<f64> {
    let load: f64 = std::fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()?;
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
    (load > processors as f64 + 1.0).then_some(load)
}

fn host_has_ublk() -> bool {
    if !nix::unistd::geteuid().is_root() {
        return false;
    }
    // modprobe fails if the driver is built in or missing; the device node decides.
    let _ = Command::new("modprobe").arg("-q").arg("ublk_drv").status();
    Path::new("/dev/ublk-control").exists()
}
