//! What the process does to itself before its first thread: threads inherit all of it, but not the preference.
//!
//! | what | why | if not permitted |
//! | --- | --- | --- |
//! | all signals blocked but SIGABRT | an interrupted control command loses its answer; one thread reads them from a descriptor | (always is) |
//! | IO_FLUSHER | memory is written back through us: waiting for memory would be waiting for ourselves | a line |
//! | memory locked | a daemon that must be paged in from its own disk never comes back | a line |
//! | own mount namespace | the last process of a namespace unmounts what is in it, perhaps our own disk | silent: only where mounts are shared |
//! | more descriptors | three for each queue | a line |
//! | the control thread preferred | commands are answered while queues and their users want every CPU | a line |

use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};

use crate::error::{Class, OrFail, Outcome};
use crate::rights::{CAP_IPC_LOCK, has_capability};
use crate::{log, sys};

/// Of the control thread: three times the weight of a thread that nobody prefers, and shorter turns than usual (3 ms with eight CPUs
/// and more, 1.5 with two). It waits for commands nearly always; what it takes from others is what they ask for.
const NICE: i32 = -5;
const TURN: Duration = Duration::from_millis(1);

/// Prepares the process; only blocking the signals may fail.
pub fn prepare() -> Outcome<()> {
    let mut blocked = SigSet::all();
    // Has no handler, so it interrupts nothing: it ends the process. What asks for a core of a daemon that hangs; the unit's watchdog
    // does not wait for one, and sends SIGKILL.
    blocked.remove(Signal::SIGABRT);
    blocked.thread_block().or_fail(Class::Failed, "cannot block signals")?;
    if let Err(cause) = sys::become_io_flusher() {
        log::warn("W-IO-FLUSHER", format_args!("not permitted ({cause}): may wait for itself when memory is short"));
    }
    // With a limit and without the right, later allocations would fail instead.
    let locked = if has_capability(CAP_IPC_LOCK) { sys::lock_memory() } else { Err(nix::errno::Errno::EPERM.into()) };
    if let Err(cause) = locked {
        log::warn("W-MLOCK", format_args!("memory is not locked ({cause}): it may be paged out"));
    }
    if let Err(cause) = raise_descriptors() {
        log::warn("W-NOFILE", format_args!("the limit of open files stays as it is ({cause})"));
    }
    if let Err(cause) = sys::prefer_this_thread(NICE, TURN) {
        log::warn("W-NICE", format_args!("not permitted ({cause}): commands wait for a CPU like everybody else"));
    }
    leave_mount_namespace();
    Ok(())
}

fn raise_descriptors() -> nix::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) }
}

/// Only where the mounts of the host are shared: ours then follow them in both directions of time, mounts and unmounts.
/// Elsewhere a copy would keep file systems busy that the host has unmounted.
fn leave_mount_namespace() {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if !is_root_shared(&mountinfo) {
        return;
    }
    let left = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>));
    if let Err(cause) = left {
        log::warn("W-MOUNT-NAMESPACE", format_args!("not permitted ({cause}): shares the mounts of the host"));
    }
}

/// A line: `21 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw`; optional fields stand between the options and the dash.
fn is_root_shared(mountinfo: &str) -> bool {
    mountinfo.lines().any(|line| {
        let mut fields = line.split(' ').skip(4);
        fields.next() == Some("/") && fields.take_while(|field| *field != "-").any(|field| field.starts_with("shared:"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_root_is_recognised_and_a_private_one_is_not() {
        let shared = "22 1 8:1 / /boot rw shared:9 - ext4 /dev/sda1 rw\n21 1 8:2 / / rw shared:1 - ext4 /dev/sda2 rw\n";
        let private = "22 1 8:1 / /boot rw shared:9 - ext4 /dev/sda1 rw\n21 1 8:2 / / rw - ext4 /dev/sda2 rw\n";
        assert!(is_root_shared(shared));
        assert!(!is_root_shared(private));
        assert!(!is_root_shared(""));
    }
}
