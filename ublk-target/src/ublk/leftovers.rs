//! Repairs the driver's state of a device after its server died while it recovered the device, for
//! the next server.
//!
//! ```text
//!   before Linux 6.15, if the server died after   START_RECOVERY of the next server
//!   its own START_RECOVERY                        EINVAL
//!   mapping the descriptors                       EINVAL, and so is mapping them: for ever
//!   offering some of the queues                   an oops, with the lock of the device held
//!   offering all of them                          as after any death
//! ```
//!
//! These drivers forget the process that mapped the descriptors and the tags that it offered only
//! in START_RECOVERY, and expect there that every tag was offered. The cure is to offer the missing
//! tags, in a thread that ends at once: the state is then that after any death. Newer drivers
//! forget when the character device is closed.
//!
//! After a death the driver queues work in the kernel that takes back every offer of the device,
//! and does not report when it has run. If it ran after the next server has offered its tags, it
//! would take those back, and the disk would be live without a server. Therefore [`make_good`]
//! makes the kernel finish this work first.

#![allow(unsafe_code, reason = "entries carry addresses; these name none of ours")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use libublk::sys;

use super::DeviceInfo;
use super::features::AUTO_BUF_REG;
use super::queue::tag_command;

/// Limit until the driver has taken back the offers made here, and closed the device.
const CLOSE_LIMIT: Duration = Duration::from_millis(200);
const LOOK: Duration = Duration::from_millis(1);

/// Reading this file runs work on every CPU, behind the work that is queued there already, and
/// waits for it (the kernel's `schedule_on_each_cpu`, whose queue the driver's `schedule_work`
/// shares).
const RUNS_WORK: &str = "/proc/sys/vm/stat_refresh";

/// An address that no process may map (`vm.mmap_min_addr`).
const NOWHERE: u64 = 4096;

/// Whether a driver with these features repairs its state itself. Drivers do since Linux 6.15, but
/// the features show it only since 6.16. With 6.15 the repair finds nothing to do, and does no
/// harm.
pub const fn are_cleared_by_the_driver(features: u64) -> bool {
    features & (1 << AUTO_BUF_REG) != 0
}

/// Repairs the state of a quiesced device after its server died during recovery. `EBUSY` as long as
/// the last file of the dead server is not closed: to be tried again.
pub fn make_good(info: &DeviceInfo) -> io::Result<()> {
    offer_and_leave(info, 0..info.queues)?;
    // The device can be opened only after all of these offers were taken back, so the work that
    // follows is queued or running by now.
    let began = Instant::now();
    while let Err(cause) = open(info) {
        if cause.raw_os_error() != Some(libc::EBUSY) || began.elapsed() >= CLOSE_LIMIT {
            return Err(cause);
        }
        thread::sleep(LOOK);
    }
    // Kernels for a single CPU have no such file; with them, late work is noticed only if it runs
    // before the end of the recovery.
    let _ = fs::read(RUNS_WORK);
    Ok(())
}

/// Offers every tag of these queues that is not offered yet, as a server would that dies right
/// after. No request is delivered before END_RECOVERY.
pub fn offer_and_leave(info: &DeviceInfo, queues: Range<u16>) -> io::Result<()> {
    let device = open(info)?;
    // The driver checks whether the thread that offered a queue has ended.
    super::aside(|| {
        let mut ring = IoUring::new(u32::from(info.depth))?;
        for queue in queues {
            for tag in 0..info.depth {
                let file = types::Fd(device.as_raw_fd());
                let offer = opcode::UringCmd16::new(file, sys::UBLK_U_IO_FETCH_REQ);
                let entry = offer.cmd(tag_command(queue, tag, -1, NOWHERE)).build();
                // SAFETY: the descriptor is open until the ring has gone; the address is never that of memory.
                unsafe { ring.submission().push(&entry) }.expect("room for every tag");
            }
            ring.submit()?;
            // Completions that come at once are refusals, of tags that are offered already.
            ring.completion().for_each(drop);
        }
        Ok(())
    })?
}

fn open(info: &DeviceInfo) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(format!("/dev/ublkc{}", info.id))
}
