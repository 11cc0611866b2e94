//! Starts QEMU, and finds out whether KVM works on this host.
//!
//! A `/dev/kvm` that exists, and even one that opens, may still fail to run a stock kernel (nested
//! virtualisation, missing CPU features). KVM is therefore tested: the guest's own kernel must
//! reach its first program. Emulation has no requirements.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::kernel::Kernel;
use crate::lock;
use crate::workspace;

/// Executor of the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's CPU, on the host's clock.
    Kvm,
    /// Emulation on the host's clock.
    Tcg,
    /// Emulation on the counted clock.
    TcgClock,
}

impl Accelerator {
    /// Default number of virtual CPUs.
    ///
    /// On the counted clock all virtual CPUs share one instruction count, so each seems to be busy
    /// while a different one works: a throttled request was charged for 12.7 us of the daemon with
    /// two virtual CPUs and for 7.8 us with one. With three threads on two virtual CPUs, the number
    /// of requests in a queue thread's turn also varies by itself; on one it does not.
    pub fn cpus(self) -> u32 {
        if self == Accelerator::TcgClock { 1 } else { 2 }
    }
}

/// What the guest's time is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Clock {
    /// The host's
    Host,
    /// A nanosecond for each instruction; emulates, with or without KVM
    Instructions,
    /// The host's with KVM, instructions without
    Auto,
}

/// Time limit of the KVM test. A kernel under KVM boots in about 1 s.
const PROBE_LIMIT: Duration = Duration::from_secs(8);

/// CPU model under emulation: every feature that QEMU emulates, except these.
///
/// `cx16`: QEMU before 8.0 computes the flags after cmpxchg16b from an earlier instruction. An
/// interrupt before the next comparison saves these wrong flags, and the return from it loads some
/// of their bits as system flags (TF among them). In the guest's kernel only the memory allocator
/// has this instruction. The kernel ends with a double fault (often on the counted clock) or runs
/// single-stepped (`WARNING: ... exc_debug_kernel`, once in a long run on the host's clock).
///
/// `smap`, `smep`, `la57`: QEMU drops its TLB at each change of the page table, which is at most
/// wake-ups. With `smap` it fills two TLBs for the kernel, and with `la57` each entry takes five
/// steps instead of four. A trial at 1600 requests a second takes 31 s of the host's time with
/// these features and 25 s without.
const EMULATED: &str = "max,-cx16,-smap,-smep,-la57";

/// CPU model on the counted clock, which also lacks these features.
///
/// `erms`, `fsrm`: each byte that `rep movsb` copies counts as an instruction. Without these flags
/// the kernel copies 8 bytes with each instruction, which is close to the cost on a real processor.
/// With them, two thirds of the daemon's cost of a 4k request would be the copy.
const COUNTED: &str = "max,-cx16,-smap,-smep,-la57,-erms,-fsrm";

/// Accelerator for a guest with this clock on this host.
pub fn accelerator(kernel: &Kernel, initramfs: &Path, clock: Clock) -> Result<Accelerator> {
    fit(clock, || has_kvm(kernel, initramfs))
}

fn fit(clock: Clock, has_kvm: impl Fn() -> Result<bool>) -> Result<Accelerator> {
    Ok(match clock {
        Clock::Instructions => Accelerator::TcgClock,
        Clock::Host | Clock::Auto if has_kvm()? => Accelerator::Kvm,
        Clock::Host => Accelerator::Tcg,
        Clock::Auto => Accelerator::TcgClock,
    })
}

/// Whether KVM works on this host. The answer is stored and valid until the host's next boot.
fn has_kvm(kernel: &Kernel, initramfs: &Path) -> Result<bool> {
    if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(false);
    }
    let memo = workspace::vm().join("kvm");
    let _one_at_a_time = lock::acquire(&memo.with_extension("lock"))?;
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let (works, fails) = (format!("{} works", host.trim()), format!("{} fails", host.trim()));
    let known = fs::read_to_string(&memo).unwrap_or_default();
    if known == works || known == fails {
        return Ok(known == works);
    }
    let has_kvm = boots_with_kvm(kernel, initramfs)?;
    if !has_kvm {
        eprintln!("xtask: /dev/kvm is there but cannot boot the guest; emulating (slower)");
    }
    fs::write(&memo, if has_kvm { works } else { fails })?;
    Ok(has_kvm)
}

fn boots_with_kvm(kernel: &Kernel, initramfs: &Path) -> Result<bool> {
    let console = workspace::vm().join("kvm.console");
    let accelerator = Accelerator::Kvm;
    let mut probe =
        qemu(&Boot { accelerator, kernel, initramfs, cpus: 1, memory: "256M", extra: "vm.probe", seed: None });
    probe.args(["-serial", &format!("file:{}", comma(&console))]);
    let mut child = probe.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let child = child.as_mut().map_err(|error| anyhow::anyhow!("cannot start qemu-system-x86_64: {error}"))?;
    let until = Instant::now() + PROBE_LIMIT;
    while child.try_wait()?.is_none() {
        if Instant::now() > until {
            child.kill()?;
            child.wait()?;
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    let said = fs::read(&console).unwrap_or_default();
    let _ = fs::remove_file(&console);
    Ok(String::from_utf8_lossy(&said).contains("init: alive"))
}

/// Parameters of QEMU.
pub struct Boot<'a> {
    pub accelerator: Accelerator,
    pub kernel: &'a Kernel,
    pub initramfs: &'a Path,
    pub cpus: u32,
    /// Memory in QEMU's syntax.
    pub memory: &'a str,
    /// Words to add to the kernel's command line.
    pub extra: &'a str,
    /// Seed of random numbers, for a guest whose files are all in the initramfs.
    pub seed: Option<u32>,
}

/// Date at which a deterministic guest boots.
const BEGIN: &str = "2026-01-01T00:00:00";

/// QEMU's command line, except the devices that carry a run's files and output.
pub fn qemu(boot: &Boot<'_>) -> Command {
    // PDEATHSIG: the kernel kills QEMU when the thread that started it ends, so no guest outlives a
    // run, even a killed run.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64", "-nodefaults", "-no-user-config"]);
    command.args(["-display", "none", "-no-reboot", "-M", "pc", "-nic", "none"]);
    // QEMU names its threads; `placement` finds them by name.
    command.args(["-name", "guest,debug-threads=on"]);
    match boot.accelerator {
        Accelerator::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
        Accelerator::Tcg => command.args(["-accel", "tcg,thread=multi", "-cpu", EMULATED]),
        // `sleep=off`: when no virtual CPU is busy, the clock jumps to the next timer.
        // `thread=single`: virtual CPUs take turns on one thread, because they share one
        // instruction count.
        Accelerator::TcgClock => {
            command.args(["-accel", "tcg,thread=single", "-cpu", COUNTED, "-icount", "shift=0,sleep=off"])
        }
    };
    command.args(["-smp", &boot.cpus.to_string(), "-m", boot.memory]);
    command.arg("-kernel").arg(&boot.kernel.image).arg("-initrd").arg(boot.initramfs);
    // panic=-1 with -no-reboot: a panic ends QEMU at once. oops=panic: results after an oops prove nothing.
    // loglevel=5: warnings and worse reach the serial console, in case the guest never sends its log.
    // nowatchdog, rcu_cpu_stall_suppress: a busy host stalls virtual CPUs, which is no fault of the guest.
    let mut line =
        "console=ttyS0 loglevel=5 panic=-1 oops=panic nowatchdog rcupdate.rcu_cpu_stall_suppress=1 mitigations=off"
            .to_owned();
    if let (Some(seed), Accelerator::TcgClock) = (boot.seed, boot.accelerator) {
        // Fixed for a deterministic guest: the date, the output of the processor's random number
        // generator, and the addresses of the kernel and of programs. Fixed program addresses also
        // save time: QEMU keeps translated code by address, so a program that starts again at the
        // same address costs the host a tenth (120 starts of ours: 15 s, and less than 1 s without
        // randomization).
        command.args(["-seed", &seed.to_string(), "-rtc", &format!("base={BEGIN},clock=vm")]);
        line.push_str(" nokaslr norandmaps");
    }
    command.args(["-append", format!("{line} {}", boot.extra).trim_end()]);
    command
}

/// A path as the value of a QEMU option, in which a comma must be doubled.
pub fn comma(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// Adds a folder of the host that the guest mounts by `tag`.
pub fn virtfs(command: &mut Command, folder: &Path, tag: &str, readonly: bool) {
    let readonly = if readonly { ",readonly=on" } else { "" };
    let path = comma(folder);
    // multidevs=remap: the host's root spans several file systems, and their inode numbers would
    // collide.
    let option = format!("local,path={path},mount_tag={tag},security_model=none,multidevs=remap{readonly}");
    command.args(["-virtfs", &option]);
}

/// Starts QEMU.
pub fn spawn(command: &mut Command) -> Result<std::process::Child> {
    command.spawn().context("cannot start qemu-system-x86_64 through setpriv (packages qemu-system-x86, util-linux)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_instructions_gets_no_kvm() {
        // KVM has no instruction count. For `auto`, KVM is preferred to the counted clock.
        let fit = |clock, kvm| fit(clock, || Ok(kvm)).unwrap();
        assert_eq!(fit(Clock::Instructions, true), Accelerator::TcgClock);
        assert_eq!([true, false].map(|kvm| fit(Clock::Auto, kvm)), [Accelerator::Kvm, Accelerator::TcgClock]);
        assert_eq!([true, false].map(|kvm| fit(Clock::Host, kvm)), [Accelerator::Kvm, Accelerator::Tcg]);
    }
}
