//! How QEMU is started, and whether KVM is any use here.
//!
//! `/dev/kvm` that exists, and even one that opens, may still fail to run a stock kernel (nested virtualisation, missing
//! CPU features). So it is tried: the guest's own kernel must reach its first program. Emulation needs nothing.

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

/// What executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's CPU.
    Kvm,
    /// Emulation.
    Tcg,
    /// Emulation that is the guest's clock, too.
    TcgClock,
}

impl Accelerator {
    /// Processors of a guest for which nobody asked for a number.
    ///
    /// Where all take turns at one count of instructions, each seems to be busy while another works: with two, a throttled request
    /// was charged for 12.7 us of the daemon, with one for 7.8. And how many requests a turn of a queue thread has varies by itself
    /// where three threads meet on two processors; on one it does not.
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

/// A kernel under KVM is up in about one second.
const PROBE_LIMIT: Duration = Duration::from_secs(8);

/// All that can be emulated, less this:
///
/// `cx16`: QEMU before 8.0 works out the flags of cmpxchg16b from those of some earlier instruction. An interrupt before
/// the next comparison keeps them, and the return from it takes their bits for those of the system. The guest's kernel,
/// whose allocator of memory is the one place that has this instruction, ends with a double fault, or finds itself
/// stepped through (`WARNING: ... exc_debug_kernel`): the first often where instructions are time, the second once in a
/// long run with the host's clock.
///
/// `smap`, `smep`, `la57`: QEMU drops its table of addresses at each change of the page table, which is at most wake-ups.
/// With `smap` it fills two tables for the kernel, and with `la57` each entry takes five steps instead of four. A trial
/// at 1600 requests a second takes 31 s of the host with them, 25 s without.
const EMULATED: &str = "max,-cx16,-smap,-smep,-la57";

/// The same where instructions are time.
///
/// `erms`, `fsrm`: a byte that `rep movsb` copies counts as one; the kernel takes eight at once where that is not said to be fast. That
/// is about what a processor does; else two thirds of what a request of 4k costs the daemon would be its copy.
const COUNTED: &str = "max,-cx16,-smap,-smep,-la57,-erms,-fsrm";

/// What runs a guest with this clock here.
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

/// Whether KVM works here; asked once for each boot of the host.
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

/// What QEMU is started with.
pub struct Boot<'a> {
    pub accelerator: Accelerator,
    pub kernel: &'a Kernel,
    pub initramfs: &'a Path,
    pub cpus: u32,
    /// In QEMU's words.
    pub memory: &'a str,
    /// More for the kernel's command line.
    pub extra: &'a str,
    /// Of its random numbers, for a guest whose files are all in the initramfs.
    pub seed: Option<u32>,
}

/// When a deterministic guest begins.
const BEGIN: &str = "2026-01-01T00:00:00";

/// QEMU with everything but devices that carry a run's files and output.
pub fn qemu(boot: &Boot<'_>) -> Command {
    // The kernel kills QEMU when the thread that started it is gone: no guest outlives a run, even one that was killed.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64", "-nodefaults", "-no-user-config"]);
    command.args(["-display", "none", "-no-reboot", "-M", "pc", "-nic", "none"]);
    // Its threads have names, by which `placement` knows them.
    command.args(["-name", "guest,debug-threads=on"]);
    match boot.accelerator {
        Accelerator::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
        Accelerator::Tcg => command.args(["-accel", "tcg,thread=multi", "-cpu", EMULATED]),
        // Without sleep, time in which no processor has anything to do is over at once. Turns, as there is one count.
        Accelerator::TcgClock => {
            command.args(["-accel", "tcg,thread=single", "-cpu", COUNTED, "-icount", "shift=0,sleep=off"])
        }
    };
    command.args(["-smp", &boot.cpus.to_string(), "-m", boot.memory]);
    command.arg("-kernel").arg(&boot.kernel.image).arg("-initrd").arg(boot.initramfs);
    // panic=-1 with -no-reboot: a panic ends QEMU at once. An oops is a panic: what comes after one proves nothing.
    // loglevel=5: warnings and worse reach the serial console, for the guest that never tells more.
    // nowatchdog, rcu_cpu_stall_suppress: a busy host lets virtual CPUs stand still; that is no fault of the guest's.
    let mut line =
        "console=ttyS0 loglevel=5 panic=-1 oops=panic nowatchdog rcupdate.rcu_cpu_stall_suppress=1 mitigations=off"
            .to_owned();
    if let (Some(seed), Accelerator::TcgClock) = (boot.seed, boot.accelerator) {
        // Nothing is left to chance: the date, what the processor's random number generator gives, where the kernel lies, and where
        // programs do. The last one is worth more: QEMU keeps the code that it has translated by its address, so a program that
        // starts at the same one again costs the host a tenth (120 starts of ours: 15 s, and less than 1 s without randomization).
        command.args(["-seed", &seed.to_string(), "-rtc", &format!("base={BEGIN},clock=vm")]);
        line.push_str(" nokaslr norandmaps");
    }
    command.args(["-append", format!("{line} {}", boot.extra).trim_end()]);
    command
}

/// A path inside a QEMU option, where a comma ends the value unless doubled.
pub fn comma(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// A folder of the host, for the guest to mount by `tag`.
pub fn virtfs(command: &mut Command, folder: &Path, tag: &str, readonly: bool) {
    let readonly = if readonly { ",readonly=on" } else { "" };
    let path = comma(folder);
    // remap: the host's root spans several file systems, whose inode numbers would collide.
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
        // Its time would be the host's. Left to us, KVM is better than a count.
        let fit = |clock, kvm| fit(clock, || Ok(kvm)).unwrap();
        assert_eq!(fit(Clock::Instructions, true), Accelerator::TcgClock);
        assert_eq!([true, false].map(|kvm| fit(Clock::Auto, kvm)), [Accelerator::Kvm, Accelerator::TcgClock]);
        assert_eq!([true, false].map(|kvm| fit(Clock::Host, kvm)), [Accelerator::Kvm, Accelerator::Tcg]);
    }
}
