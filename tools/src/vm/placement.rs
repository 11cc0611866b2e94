//! Where QEMU's threads run on the host, and which of them goes first.
//!
//! ```text
//!   thread        host CPUs           why
//!   CPU 0/TCG     0, 2, 4, ...        two virtual CPUs on one host CPU: one spins for a lock of the guest's that the other
//!   CPU 1/TCG     1, 3, 5, ...        holds, until the host's scheduler changes its mind, which is 2 to 4 ms
//!   main loop     any, before others  it delivers the guest's timers; behind a busy virtual CPU they would be as late
//! ```
//!
//! Left alone, a scheduler often puts a thread on the CPU of the one that woke it; virtual CPUs wake each other all the time. A
//! machine of metal has no such thing, so what it would do to a time measured in the guest says nothing of the guest.

use std::fs;
use std::process::{Command, Stdio};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// What has been seen to.
#[derive(Debug, PartialEq, Eq)]
pub enum Placed {
    /// All of it.
    Yes,
    /// QEMU has not started all of its threads.
    NotYet,
    /// The host does not let us, for this reason.
    Refused(String),
}

/// Spreads the threads of the QEMU with this process ID, whose threads have names.
pub fn place(qemu: u32, cpus: u32) -> Placed {
    match virtual_cpus(qemu) {
        found if found.len() < cpus as usize => Placed::NotYet,
        found => spread(&found).and_then(|()| first(qemu)).map_or_else(Placed::Refused, |()| Placed::Yes),
    }
}

/// Number and thread ID of each virtual CPU.
fn virtual_cpus(qemu: u32) -> Vec<(usize, i32)> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{qemu}/task")) else { return Vec::new() };
    let named = tasks.flatten().filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        Some((number(&name)?, task.file_name().to_str()?.parse().ok()?))
    });
    named.collect()
}

/// `CPU 3/TCG` is the thread of virtual CPU 3.
fn number(name: &str) -> Option<usize> {
    name.strip_prefix("CPU ")?.split_once('/')?.0.parse().ok()
}

fn spread(virtual_cpus: &[(usize, i32)]) -> Result<(), String> {
    let told = |error| format!("cannot bind virtual CPUs to CPUs: {error}");
    let ours = sched_getaffinity(Pid::from_raw(0)).map_err(told)?;
    let host: Vec<usize> = (0..CpuSet::count()).filter(|&cpu| ours.is_set(cpu).unwrap_or(false)).collect();
    for &(number, thread) in virtual_cpus {
        let mut set = CpuSet::new();
        for cpu in share(&host, virtual_cpus.len(), number) {
            set.set(cpu).map_err(told)?;
        }
        sched_setaffinity(Pid::from_raw(thread), &set).map_err(told)?;
    }
    Ok(())
}

/// The host's CPUs for one of `virtual_cpus`: no two have one in common as long as there are enough.
fn share(host: &[usize], virtual_cpus: usize, number: usize) -> impl Iterator<Item = usize> {
    let shares = virtual_cpus.min(host.len()).max(1);
    host.iter().copied().skip(number % shares).step_by(shares)
}

/// The main loop, and not the threads it starts, goes before everything that has no priority.
fn first(qemu: u32) -> Result<(), String> {
    let mut chrt = Command::new("chrt");
    chrt.args(["--reset-on-fork", "--fifo", "--pid", "1", &qemu.to_string()]);
    let told = |reason: &str| format!("cannot put its main loop first: {}", reason.trim());
    let ended = chrt.stdin(Stdio::null()).output().map_err(|error| told(&format!("chrt: {error}")))?;
    if ended.status.success() { Ok(()) } else { Err(told(&String::from_utf8_lossy(&ended.stderr))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_cpus_are_told_by_name() {
        assert_eq!((number("CPU 0/TCG\n"), number("CPU 12/KVM\n")), (Some(0), Some(12)));
        assert_eq!((number("qemu-system-x86\n"), number("worker\n"), number("CPU x/TCG")), (None, None, None));
    }

    #[test]
    fn virtual_cpus_share_no_cpu_while_there_are_enough() {
        let all = |host: &[usize], count| -> Vec<Vec<usize>> {
            (0..count).map(|number| share(host, count, number).collect()).collect()
        };
        assert_eq!(all(&[0, 1], 2), [[0], [1]]);
        // The host's numbers may have gaps; the last CPU is left to somebody, too.
        assert_eq!(all(&[2, 3, 6, 7, 8], 2), [vec![2, 6, 8], vec![3, 7]]);
        // More virtual ones than there are: as even as it gets.
        assert_eq!(all(&[0, 1], 3), [[0], [1], [0]]);
        assert_eq!(all(&[5], 2), [[5], [5]]);
    }

    #[test]
    fn process_without_virtual_cpus_is_waited_for() {
        assert_eq!(place(std::process::id(), 2), Placed::NotYet);
    }
}
