//! A small virtual machine with this host's programs and a different kernel: real ublk on a host
//! without it.
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
//! With `--in-memory` the guest has only the files of the host that it gets before it boots
//! ([`image`]), and its output comes through serial ports. On the counted clock such a guest is
//! deterministic: the same command executes the same instructions.
//!
//! No port, socket or path is fixed, so any number of VMs run side by side. The guest dies with
//! this program, however that ends (`setpriv --pdeathsig`). The guest has no network and no udevd.
//! On the host's clock the virtual CPUs are bound to separate CPUs of the host; a deterministic
//! guest has one CPU of the host to itself ([`placement`]). On the counted clock ([`Clock`]) the
//! guest's time is the number of executed instructions: the host's load does not show in a time,
//! and neither do effects that instructions do not count (caches, two processors at once). When all
//! virtual CPUs are idle, the counted clock jumps to the next timer at once. The clock therefore
//! runs ahead while the guest waits for a file of the host.

mod image;
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
    #[arg(long, value_name = "DIR", conflicts_with = "in_memory")]
    share: Vec<PathBuf>,
    /// All files are in the guest's memory before it begins: usual programs, those of --with, and nothing else of this host
    #[arg(long)]
    in_memory: bool,
    /// A file or folder of this host that such a guest has, at the same path; may be given several times
    #[arg(long, value_name = "PATH", requires = "in_memory")]
    with: Vec<PathBuf>,
    /// Seed of the random numbers that such a guest gets; with --clock instructions, another seed is another order of events
    #[arg(long, requires = "in_memory", default_value_t = 1)]
    seed: u32,
    /// Fail (126) when the kernel logged a warning, BUG, oops or hung task while the command ran
    #[arg(long)]
    check_dmesg: bool,
    /// The command and its arguments
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Options of a boot.
pub struct Options {
    /// Kernel of the guest.
    pub kernel: Kernel,
    /// Clock of the guest.
    pub clock: Clock,
    /// Virtual CPUs; `None`: the default of the accelerator (`Accelerator::cpus`).
    pub cpus: Option<u32>,
    /// Memory in QEMU's syntax.
    pub memory: String,
    /// Time limit after which the guest is killed.
    pub timeout: Option<Duration>,
    /// Source of the guest's files.
    pub files: Files,
    /// Whether a complaint in the kernel's log is a failure.
    pub check_dmesg: bool,
}

/// Source of a guest's files.
pub enum Files {
    /// The host's file system, over 9p while the guest runs.
    Host {
        /// Folders that the guest may write to.
        share: Vec<PathBuf>,
    },
    /// The initramfs: all files are in memory before the guest boots.
    Image {
        /// Files and folders of the host that the image has besides the usual programs.
        with: Vec<PathBuf>,
        /// Seed of random numbers. On the counted clock, runs with the same files and the same seed
        /// are identical.
        seed: u32,
    },
}

impl Default for Options {
    fn default() -> Self {
        Options {
            kernel: Kernel::Lts,
            clock: Clock::Host,
            cpus: None,
            memory: "2G".to_owned(),
            timeout: Some(Duration::from_secs(900)),
            files: Files::Host { share: Vec::new() },
            check_dmesg: false,
        }
    }
}

/// The command `cargo xtask vm`.
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
        files: if flags.in_memory {
            Files::Image { with: flags.with, seed: flags.seed }
        } else {
            Files::Host { share: flags.share }
        },
        check_dmesg: flags.check_dmesg,
    };
    let command = if shell { Command::Shell } else { Command::Run(flags.command) };
    run(&options, &command)
}

/// Clock that a guest gets on this host for the wanted `clock`: instructions or the host's.
pub fn clock(kernel: Kernel, clock: Clock) -> Result<Clock> {
    let kernel = kernel::fetch(kernel)?;
    let counts = machine::accelerator(&kernel, &initramfs::build(&kernel)?, clock)? == machine::Accelerator::TcgClock;
    Ok(if counts { Clock::Instructions } else { Clock::Host })
}

/// Boots the guest, runs the command and reports errors. Returns the exit code (see [`Flags`]).
pub fn run(options: &Options, command: &Command) -> Result<u8> {
    install::packages(&[install::VM])?;
    let kernel = kernel::fetch(options.kernel)?;
    let small = initramfs::build(&kernel)?;
    let accelerator = machine::accelerator(&kernel, &small, options.clock)?;
    let initramfs = match &options.files {
        Files::Host { .. } => small,
        Files::Image { with, .. } => image::build(&kernel, with)?,
    };
    let ended = session::run(options, command, &kernel, &initramfs, accelerator)
        .with_context(|| format!("the VM with kernel {} did not run", kernel.release))?;
    Ok(ended.report(options))
}
