//! What a server that died while it recovered a device has left in the driver, brought to where the next one may begin.
//!
//! ```text
//!   before Linux 6.15, when it died after     START_RECOVERY of the next one
//!   its own START_RECOVERY                    EINVAL
//!   mapping the descriptors                   EINVAL, and so is mapping them: for ever
//!   offering some of the queues               an oops, with the lock of the device held
//!   offering all of them                      as after any death
//! ```
//!
//! The driver forgets who mapped and what was offered in START_RECOVERY only, and expects there that all was. So what is not offered
//! is, by a thread that ends at once: then it is as after any death. Newer drivers forget when the character device is closed.
//!
//! The driver ends a death with work of the kernel's that takes back every offer of the device. Nothing says when it has run; if
//! that were after the next server has offered, it would take those back, and the disk would be live with nobody to serve it. So
//! the kernel is made to finish it first.

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

/// Until the driver has taken back what was offered here, and closed the device.
const CLOSE_LIMIT: Duration = Duration::from_millis(200);
const LOOK: Duration = Duration::from_millis(1);

/// Reading it runs a piece of work on every CPU, behind those that wait there already (`schedule_on_each_cpu` of the kernel, which the
/// driver's `schedule_work` shares the queue with), and waits for it.
const RUNS_WORK: &str = "/proc/sys/vm/stat_refresh";

/// An address that no process may map (`vm.mmap_min_addr`).
const NOWHERE: u64 = 4096;

/// Whether the driver with these abilities leaves nothing: it does not since Linux 6.15, and tells nothing of that before 6.16. In between
/// there is nothing to make good, and it does no harm.
pub const fn are_cleared_by_the_driver(features: u64) -> bool {
    features & (1 << AUTO_BUF_REG) != 0
}

/// Makes good what a server that died during recovery has left of a quiesced device. `EBUSY` as long as the dead one's last file is
/// not closed: to be tried again.
pub fn make_good(info: &DeviceInfo) -> io::Result<()> {
    offer_and_leave(info, 0..info.queues)?;
    // Closed only after all of its offers were taken back; so the work that follows them waits or runs by now.
    let began = Instant::now();
    while let Err(cause) = open(info) {
        if cause.raw_os_error() != Some(libc::EBUSY) || began.elapsed() >= CLOSE_LIMIT {
            return Err(cause);
        }
        thread::sleep(LOOK);
    }
    // Kernels for a single CPU have no such file: there what is to come is seen only if it comes before the end of the recovery.
    let _ = fs::read(RUNS_WORK);
    Ok(())
}

/// Offers every tag of these queues that is not offered, as a server does that dies then. No request is handed over before
/// END_RECOVERY.
pub fn offer_and_leave(info: &DeviceInfo, queues: Range<u16>) -> io::Result<()> {
    let device = open(info)?;
    // The driver looks at whether the thread that offered a queue has ended.
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
            // Refusals: of what is offered.
            ring.completion().for_each(drop);
        }
        Ok(())
    })?
}

fn open(info: &DeviceInfo) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(format!("/dev/ublkc{}", info.id))
}
