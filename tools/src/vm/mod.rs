//! A small virtual machine with this host's programs and another kernel: real ublk where the host has none.
//!
//! ```text
//!   host                                      guest
//!   / ───────────── 9p, read-only ──────────► overlay with a tmpfs on top = /      (writes vanish with the guest)
//!   target/vm/out-N ─ 9p, writable ─────────► the same path                        (results come back)
//!   --share DIR ──── 9p, writable ──────────► the same path
//!   stdout, stderr ◄─ two virtio ports ────── COMMAND, in the workspace
//!   out-N/console ◄── serial port ─────────── kernel
//!   out-N/status ◄─── written last ────────── exit status of COMMAND, or no such file: then the run has failed
//! ```
//!
//! No port, socket or path is fixed, so any number of VMs run side by side. The guest dies with this program, however
//! that ends (`setpriv --pdeathsig`). There is no network and no udevd in the guest. Its processors are kept apart on the
//! host's ([`placement`]), or its time is the number of instructions it has executed ([`Clock`]): then nothing that the host does can
//! be seen in a time, and nothing that instructions do not tell (a cache, two processors at once). Where nobody has anything to do
//! until a timer is due, it is due at once; so while all wait for the host, for a file of it, time flies.

mod initramfs;
mod kernel;
mod kernel_log;
mod machine;
mod out;
mod placement;
mod session;

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use crate::install;
pub use kernel::Wanted as Kernel;
pub use machine::Clock;
pub use session::Command;

/// Run a command (or a shell) in a VM whose kernel has ublk
///
/// The command sees this host's files (writes stay in the guest's memory, except below --share and $XTASK_VM_OUT; /tmp
/// and /run are empty but for the workspace and the target directory, should they lie there), runs as root in the
/// workspace, and its exit status is this program's. Without a command: a shell on the serial console;
/// `exit` ends the VM.
///
/// Own exit codes: 124 the time limit passed, 125 the guest ended without a status, 126 --check-dmesg found something.
#[derive(Args)]
pub struct Flags {
    /// Which kernel: 6.12 (the oldest supported) or newest (that Debian has)
    #[arg(long, default_value = "6.12")]
    kernel: Kernel,
    /// What the guest's time is
    #[arg(long, value_enum, default_value_t = Clock::Host)]
    clock: Clock,
    /// Virtual CPUs [default: 2, where an instruction is a nanosecond 1]
    #[arg(long)]
    cpus: Option<u32>,
    /// Memory, as QEMU writes it; what the guest writes to files counts too
    #[arg(long, default_value = "2G")]
    memory: String,
    /// Kill the guest after this many seconds (0: never) [default: 900, a shell: never]
    #[arg(long, value_name = "SECS")]
    timeout: Option<u64>,
    /// A folder that the guest may write to, at the same path; may be given several times
    #[arg(long, value_name = "DIR")]
    share: Vec<PathBuf>,
    /// Fail (126) when the kernel logged a warning, BUG, oops or hung task while the command ran
    #[arg(long)]
    check_dmesg: bool,
    /// The command and its arguments
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// What to boot and how.
pub struct Options {
    /// Which kernel.
    pub kernel: Kernel,
    /// What its time is.
    pub clock: Clock,
    /// Virtual CPUs, if not as many as befits what runs them.
    pub cpus: Option<u32>,
    /// Memory, in QEMU's words.
    pub memory: String,
    /// The guest is killed after this long.
    pub timeout: Option<Duration>,
    /// Folders that the guest may write to.
    pub share: Vec<PathBuf>,
    /// Whether trouble in the kernel's log is a failure.
    pub check_dmesg: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            kernel: Kernel::Lts,
            clock: Clock::Host,
            cpus: None,
            memory: "2G".to_owned(),
            timeout: Some(Duration::from_secs(900)),
            share: Vec::new(),
            check_dmesg: false,
        }
    }
}

/// The chore `vm`.
pub fn main(flags: Flags) -> Result<u8> {
    let shell = flags.command.is_empty();
    if shell && !io::stdin().is_terminal() {
        anyhow::bail!("no command given and standard input is no terminal; say: cargo xtask vm -- COMMAND");
    }
    let timeout = match flags.timeout {
        Some(0) => None,
        Some(seconds) => Some(Duration::from_secs(seconds)),
        None if shell => None,
        None => Options::default().timeout,
    };
    let options = Options {
        kernel: flags.kernel,
        clock: flags.clock,
        cpus: flags.cpus,
        memory: flags.memory,
        timeout,
        share: flags.share,
        check_dmesg: flags.check_dmesg,
    };
    let command = if shell { Command::Shell } else { Command::Run(flags.command) };
    run(&options, &command)
}

/// Boots, runs the command, says what went wrong; the exit code (see [`Flags`]).
pub fn run(options: &Options, command: &Command) -> Result<u8> {
    install::packages(&[install::VM])?;
    let kernel = kernel::fetch(options.kernel)?;
    let initramfs = initramfs::build(&kernel)?;
    let accelerator = machine::accelerator(&kernel, &initramfs, options.clock)?;
    let ended = session::run(options, command, &kernel, &initramfs, accelerator)
        .with_context(|| format!("the VM with kernel {} did not run", kernel.release))?;
    Ok(ended.report(options))
}
