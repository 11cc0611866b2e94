//! Settings of the process, made before its first thread: threads inherit all of them except the
//! priority.
//!
//! | setting | reason | if not permitted |
//! | --- | --- | --- |
//! | all signals but SIGABRT blocked | an interrupted control command loses its answer | always permitted |
//! | IO_FLUSHER | memory is written back through the daemon, which must not wait for it | a warning |
//! | memory locked | a daemon that must be paged in from its own disk hangs for ever; helpers are not locked | a warning |
//! | own mount namespace, if `/` is shared | the last process of one unmounts all, perhaps our own disk | a warning |
//! | limit of open files raised | each queue needs three descriptors | a warning |
//! | control thread with priority | commands are answered while queues and clients want every CPU | a warning |
//!
//! One thread reads the blocked signals from a descriptor.

use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};

use crate::error::{Class, OrFail, Outcome};
use crate::rights::{CAP_IPC_LOCK, has_capability};
use crate::{log, sys};

/// Priority of the control thread: three times the weight of a thread with nice 0, and a shorter
/// time slice than the default (3 ms with eight CPUs and more, 1.5 with two). The thread sleeps
/// nearly always; its CPU time is for the commands that clients wait for.
const NICE: i32 = -5;
const TURN: Duration = Duration::from_millis(1);

/// Prepares the process. Fails only if the signals cannot be blocked; a step that is not permitted
/// is a warning.
pub fn prepare() -> Outcome<()> {
    let mut blocked = SigSet::all();
    // SIGABRT has no handler, so it interrupts no system call: it ends the process. An operator
    // gets a core dump of a hanging daemon with it. The watchdog of the systemd unit does not wait
    // for one and sends SIGKILL.
    blocked.remove(Signal::SIGABRT);
    blocked.thread_block().or_fail(Class::Failed, "cannot block signals")?;
    if let Err(cause) = sys::become_io_flusher() {
        log::warn("W-IO-FLUSHER", format_args!("not permitted ({cause}): may wait for itself when memory is short"));
    }
    // Without CAP_IPC_LOCK, memory could be locked up to a limit, but later allocations would fail.
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

/// Gives the process a mount namespace of its own, a slave of the host's: mounts and unmounts of
/// the host reach it, its own do not reach the host. Only where `/` is shared: a copy of private
/// mounts would keep file systems busy that the host has unmounted.
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

/// Whether `/` is a shared mount, according to the text of `/proc/self/mountinfo`. A line:
/// `21 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw`. Optional fields stand between the mount options
/// and the dash.
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
