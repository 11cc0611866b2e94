//! Placement of QEMU's threads on the host's CPUs, and their priority.
//!
//! On the host's clock ([`Placement::Spread`]):
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
//!
//! On the counted clock ([`Placement::InTurns`]):
//!
//! ```text
//!   thread          host CPU                       reason
//!   ALL CPUs/TCG    one, SCHED_FIFO 2              No thread interrupts a turn of a virtual CPU.
//!   main loop       that one, SCHED_FIFO 1         The main loop runs only while the virtual CPUs wait.
//! ```
//!
//! When the last virtual CPU has halted, the thread of the virtual CPUs stops its own timer, which
//! ends a turn after 100 ms, and waits; the main loop then moves the clock to the next timer of the
//! guest. On a second host CPU the main loop may move the clock before that timer is stopped. From
//! then on, turns end at other instructions, and two runs of the same guest differ by some
//! microseconds: without this placement, about once in 20 s of a guest that does I/O.

use std::fmt::Display;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::lock::{self, Lock};

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

/// Where QEMU's threads are to run.
pub enum Placement {
    /// Where the host puts them.
    Anywhere,
    /// So many virtual CPUs, each on host CPUs of its own.
    Spread(u32),
    /// All threads in turns on one host CPU; `None` if no host CPU is free of such a guest.
    InTurns(Option<HostCpu>),
}

impl Placement {
    /// The placement for virtual CPUs that take turns on the counted clock.
    pub fn in_turns() -> Self {
        Self::InTurns(our_cpus().unwrap_or_default().into_iter().find_map(HostCpu::take))
    }

    /// Places the threads of the QEMU with this process ID. QEMU must name its threads.
    pub fn place(&self, qemu: u32) -> Placed {
        let done = match self {
            Self::Anywhere => return Placed::Yes,
            Self::Spread(cpus) => {
                let found = virtual_cpus(qemu);
                if found.len() < *cpus as usize {
                    return Placed::NotYet;
                }
                spread(&found)
                    .and_then(|()| fifo(MAIN_LOOP, "--reset-on-fork", qemu))
                    .map_err(|error| format!("{error}; times measured in the guest will be worse"))
            }
            Self::InTurns(cpu) => {
                let Some(thread) =
                    threads(qemu).into_iter().find_map(|(id, name)| (name == "ALL CPUs/TCG\n").then_some(id))
                else {
                    return Placed::NotYet;
                };
                let cpu = cpu.as_ref().ok_or_else(|| "each CPU of the host has a guest already".to_owned());
                cpu.and_then(|cpu| take_turns(qemu, thread, cpu))
                    .map_err(|error| format!("{error}; a second run of this guest may differ by microseconds"))
            }
        };
        done.map_or_else(Placed::Refused, |()| Placed::Yes)
    }
}

/// A CPU of the host that belongs to one guest at a time.
pub struct HostCpu {
    number: usize,
    _lock: Lock,
}

impl HostCpu {
    /// The CPU, or `None` if a guest of any workspace or user has it.
    fn take(number: usize) -> Option<Self> {
        let lock = lock::of_existing(Path::new(&format!("/sys/devices/system/cpu/cpu{number}"))).ok()??;
        Some(Self { number, _lock: lock })
    }
}

/// Priority of the main loop, before all threads without a real-time priority.
const MAIN_LOOP: u32 = 1;

/// Priority of the thread of virtual CPUs that take turns.
const TURNS: u32 = 2;

/// Puts all threads of QEMU on one CPU, `virtual_cpus` before the others.
///
/// The priorities first: without them, one CPU may be a busy one.
fn take_turns(qemu: u32, virtual_cpus: i32, cpu: &HostCpu) -> Result<(), String> {
    fifo(MAIN_LOOP, "--all-tasks", qemu)?;
    fifo(TURNS, "--reset-on-fork", virtual_cpus)?;
    for (thread, _) in threads(qemu) {
        bind(thread, [cpu.number])?;
    }
    Ok(())
}

/// ID and name of each thread; the name ends with a line feed.
fn threads(qemu: u32) -> Vec<(i32, String)> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{qemu}/task")) else { return Vec::new() };
    let named = tasks.flatten().filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        Some((task.file_name().to_str()?.parse().ok()?, name))
    });
    named.collect()
}

/// Index and thread ID of each virtual CPU.
fn virtual_cpus(qemu: u32) -> Vec<(usize, i32)> {
    threads(qemu).into_iter().filter_map(|(id, name)| Some((number(&name)?, id))).collect()
}

/// Index of a virtual CPU from its thread's name: 3 from `CPU 3/TCG`.
fn number(name: &str) -> Option<usize> {
    name.strip_prefix("CPU ")?.split_once('/')?.0.parse().ok()
}

fn spread(virtual_cpus: &[(usize, i32)]) -> Result<(), String> {
    let host = our_cpus()?;
    for &(number, thread) in virtual_cpus {
        bind(thread, share(&host, virtual_cpus.len(), number))?;
    }
    Ok(())
}

/// The host's CPUs that this program may run on.
fn our_cpus() -> Result<Vec<usize>, String> {
    let ours = sched_getaffinity(Pid::from_raw(0)).map_err(unbound)?;
    Ok((0..CpuSet::count()).filter(|&cpu| ours.is_set(cpu).unwrap_or(false)).collect())
}

fn bind(thread: i32, cpus: impl IntoIterator<Item = usize>) -> Result<(), String> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(cpu).map_err(unbound)?;
    }
    sched_setaffinity(Pid::from_raw(thread), &set).map_err(unbound)
}

fn unbound(error: Errno) -> String {
    format!("cannot bind QEMU's threads to CPUs: {error}")
}

/// Host CPUs of virtual CPU `number`, in disjoint sets as long as the host has enough CPUs.
fn share(host: &[usize], virtual_cpus: usize, number: usize) -> impl Iterator<Item = usize> {
    let shares = virtual_cpus.min(host.len()).max(1);
    host.iter().copied().skip(number % shares).step_by(shares)
}

/// Gives a thread a real-time priority (SCHED_FIFO), ahead of all threads without one. `which` is
/// an option of chrt(1): the thread's process, or the thread without those that it starts later.
fn fifo(priority: u32, which: &str, thread: impl Display) -> Result<(), String> {
    let mut chrt = Command::new("chrt");
    chrt.args([which, "--fifo", "--pid", &priority.to_string(), &thread.to_string()]);
    let told = |reason: &str| format!("cannot put QEMU first: {}", reason.trim());
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
        assert_eq!(Placement::Spread(2).place(us), Placed::NotYet);
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

    /// Policy and priority of a process, from fields 41 and 40 of proc_pid_stat(5). The name `sleep`
    /// has no space, so `split` finds them.
    fn policy(process: u32) -> (String, String) {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
        let field = |number: usize| stat.split(' ').nth(number - 1).unwrap().to_owned();
        (field(41), field(40))
    }

    #[test]
    fn main_loop_goes_first_or_it_is_said_why_not() {
        let mut qemu = Command::new("sleep").arg("60").spawn().unwrap();
        let done = fifo(MAIN_LOOP, "--reset-on-fork", qemu.id());
        let found = policy(qemu.id());
        qemu.kill().and_then(|()| qemu.wait()).unwrap();
        match done {
            Ok(()) => assert_eq!(found, ("1".to_owned(), "1".to_owned()), "SCHED_FIFO is 1"),
            Err(reason) => assert!(reason.contains("put QEMU first: ") && found.0 == "0", "{reason}"),
        }
    }

    #[test]
    fn threads_that_take_turns_are_on_one_cpu_that_no_other_guest_has() {
        let cpu = our_cpus().unwrap().into_iter().find_map(HostCpu::take);
        let Some(cpu) = cpu else { return };
        assert!(HostCpu::take(cpu.number).is_none(), "it is taken");
        // A process of one thread stands in for QEMU: its main loop gets the priority of the thread
        // of the virtual CPUs as well.
        let mut qemu = Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(Placement::InTurns(None).place(qemu.id()), Placed::NotYet);
        let done = take_turns(qemu.id(), qemu.id() as i32, &cpu);
        let found = policy(qemu.id());
        let bound = sched_getaffinity(Pid::from_raw(qemu.id() as i32)).unwrap();
        qemu.kill().and_then(|()| qemu.wait()).unwrap();
        match done {
            Ok(()) => {
                assert_eq!(found, ("1".to_owned(), "2".to_owned()));
                assert_eq!(
                    (0..CpuSet::count()).filter(|&n| bound.is_set(n).unwrap()).collect::<Vec<_>>(),
                    [cpu.number]
                );
            }
            Err(reason) => assert!(reason.contains("put QEMU first: ") && found.0 == "0", "{reason}"),
        }
    }
}
