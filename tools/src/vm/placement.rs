//! Placement of QEMU's threads on the host's CPUs, and their priority.
//!
//! ```text
//!   thread        host CPUs           reason
//!   CPU 0/TCG     0, 2, 4, ...        On one shared host CPU, a virtual CPU spins for a guest lock that the second one
//!   CPU 1/TCG     1, 3, 5, ...        holds, until the host's scheduler switches after 2 to 4 ms.
//!   main loop     any, before others  It delivers the guest's timers. Behind a busy virtual CPU they would be as late.
//! ```
//!
//! By default a scheduler often places a thread on the CPU of the thread that woke it, and virtual
//! CPUs wake each other all the time. A physical machine has no such effect, so its influence on a
//! time measured in the guest says nothing about the guest.

use std::fs;
use std::process::{Command, Stdio};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// State of the placement.
#[derive(Debug, PartialEq, Eq)]
pub enum Placed {
    /// All threads are placed.
    Yes,
    /// QEMU has not started all of its threads yet.
    NotYet,
    /// The host refuses, for this reason.
    Refused(String),
}

/// Places the threads of the QEMU with this process ID. QEMU must name its threads.
pub fn place(qemu: u32, cpus: u32) -> Placed {
    match virtual_cpus(qemu) {
        found if found.len() < cpus as usize => Placed::NotYet,
        found => spread(&found).and_then(|()| first(qemu)).map_or_else(Placed::Refused, |()| Placed::Yes),
    }
}

/// Index and thread ID of each virtual CPU.
fn virtual_cpus(qemu: u32) -> Vec<(usize, i32)> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{qemu}/task")) else { return Vec::new() };
    let named = tasks.flatten().filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        Some((number(&name)?, task.file_name().to_str()?.parse().ok()?))
    });
    named.collect()
}

/// Index of a virtual CPU from its thread's name: 3 from `CPU 3/TCG`.
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

/// Host CPUs of virtual CPU `number`, in disjoint sets as long as the host has enough CPUs.
fn share(host: &[usize], virtual_cpus: usize, number: usize) -> impl Iterator<Item = usize> {
    let shares = virtual_cpus.min(host.len()).max(1);
    host.iter().copied().skip(number % shares).step_by(shares)
}

/// Gives QEMU's main loop, but not the threads that it starts, a real-time priority (SCHED_FIFO 1),
/// ahead of all threads without one.
fn first(qemu: u32) -> Result<(), String> {
    let mut chrt = Command::new("chrt");
    chrt.args(["--reset-on-fork", "--fifo", "--pid", "1", &qemu.to_string()]);
    let told = |reason: &str| format!("cannot put its main loop first: {}", reason.trim());
    let ended = chrt.stdin(Stdio::null()).output().map_err(|error| told(&format!("chrt: {error}")))?;
    if ended.status.success() { Ok(()) } else { Err(told(&String::from_utf8_lossy(&ended.stderr))) }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier};
    use std::thread;

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
        // The host's CPU numbers may have gaps; with an odd number of CPUs the last one is used,
        // too.
        assert_eq!(all(&[2, 3, 6, 7, 8], 2), [vec![2, 6, 8], vec![3, 7]]);
        // More virtual CPUs than host CPUs share them as evenly as possible.
        assert_eq!(all(&[0, 1], 3), [[0], [1], [0]]);
        assert_eq!(all(&[5], 2), [[5], [5]]);
    }

    #[test]
    fn virtual_cpus_are_waited_for_and_bound() {
        // Threads of this process with QEMU's thread names stand in for QEMU's.
        let us = std::process::id();
        assert_eq!(place(us, 2), Placed::NotYet);
        let meeting = Arc::new(Barrier::new(3));
        let threads = [0, 1].map(|cpu| {
            let meeting = Arc::clone(&meeting);
            let stand_in = move || {
                meeting.wait();
                meeting.wait();
                sched_getaffinity(Pid::from_raw(0)).unwrap()
            };
            thread::Builder::new().name(format!("CPU {cpu}/TCG")).spawn(stand_in).unwrap()
        });
        meeting.wait();
        let found = virtual_cpus(us);
        spread(&found).unwrap();
        meeting.wait();
        let bound = threads.map(|thread| thread.join().unwrap());
        assert_eq!(found.len(), 2);
        let ours = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let all = (0..CpuSet::count()).filter(|&cpu| ours.is_set(cpu).unwrap());
        for cpu in all.clone() {
            let times = bound.iter().filter(|set| set.is_set(cpu).unwrap()).count();
            // On a host with a single CPU both threads get it.
            assert_eq!(times, if all.clone().count() == 1 { 2 } else { 1 }, "CPU {cpu}");
        }
    }

    #[test]
    fn main_loop_goes_first_or_it_is_said_why_not() {
        let mut qemu = Command::new("sleep").arg("60").spawn().unwrap();
        let done = first(qemu.id());
        let stat = fs::read_to_string(format!("/proc/{}/stat", qemu.id())).unwrap();
        qemu.kill().and_then(|()| qemu.wait()).unwrap();
        // proc_pid_stat(5): field 41 is the policy, field 40 the priority. The name `sleep` has no
        // space, so `split` finds them.
        let field = |number: usize| stat.split(' ').nth(number - 1).unwrap();
        match done {
            Ok(()) => assert_eq!((field(40), field(41)), ("1", "1"), "SCHED_FIFO is 1"),
            Err(reason) => assert!(reason.contains("main loop first: ") && field(41) == "0", "{reason}"),
        }
    }
}
