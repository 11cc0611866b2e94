//! The kernel's ublk driver and libublk: no module outside this one uses either.
//!
//! ```text
//!   control   /dev/ublk-control   ADD, SET_PARAMS, GET_INFO, GET_FEATURES; START, STOP, DEL for the helper processes
//!   params    the kernel's parameters of a disk, from the geometry of its backend
//!   queue     /dev/ublkcN         one ring: FETCH, COMMIT, the backend's entries, the wait
//!   batch     of these, FETCH and COMMIT for many requests at a time, where the driver can
//!   leftovers the driver's state after a server died during recovery, repaired for the next server
//! ```
//!
//! libublk provides the character device, the mapped io descriptors and the queue's ring. The wait,
//! the commits and the control commands are implemented here, because libublk 0.4.8
//! * gets out of step for ever when a signal interrupts a control command: from then on each
//!   command finds the completion of an earlier one;
//! * stops the device itself at the end of its own loop, which a daemon must never do (see
//!   [`crate::helper`]);
//! * drops commits silently once one command was aborted, and ignores a FETCH that failed;
//! * waits 20 s at a time, where a throttle needs the next deadline.
//!
//! So none of its counters is used: every entry of the ring is made, counted and reaped by `queue`.

mod batch;
pub mod control;
pub mod features;
pub mod leftovers;
pub mod params;
pub mod queue;

use std::{fs, io, thread};

use libublk::sys;

/// The mark of a device made by this program: the upper half of the 64 bits that the driver stores
/// for its server.
const MAGIC: u64 = 0x7562_746c << 32;

/// The maker of a device: stored by the driver as long as the device lives, readable by every
/// process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner(u64);

impl Owner {
    /// The mark of one device of this program, distinguished from the rest of them by `nonce`: an
    /// id may be given to a foreign device between two commands.
    pub const fn ours(nonce: u32) -> Self {
        Self(MAGIC | nonce as u64)
    }

    /// The bits as the driver stores them.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The nonce, if this program made the device.
    pub const fn nonce(self) -> Option<u32> {
        if self.0 & (u32::MAX as u64) << 32 == MAGIC { Some(self.0 as u32) } else { None }
    }

    /// The mark in the bits that the driver stores.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// The driver's state of a device's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskState {
    /// There is no disk, not yet or not any more.
    Dead,
    /// The disk is served, or its server died a moment ago.
    Live,
    /// The server has died; requests wait for the next one.
    Quiesced,
    /// The server has died; requests fail.
    Failing,
}

impl DiskState {
    const fn of(state: u16) -> Self {
        match state as u32 {
            sys::UBLK_S_DEV_DEAD => Self::Dead,
            sys::UBLK_S_DEV_LIVE => Self::Live,
            sys::UBLK_S_DEV_QUIESCED => Self::Quiesced,
            _ => Self::Failing,
        }
    }
}

/// The driver's description of a device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceInfo {
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// May be fewer than asked for: the driver gives no more than there are CPUs.
    pub queues: u16,
    /// Requests that a queue takes at the same time.
    pub depth: u16,
    /// The longest read or write, in bytes.
    pub request_bytes_max: u32,
    /// The maker of the device.
    pub owner: Owner,
    /// The process that serves it; -1 or a stale one without a server.
    pub server: i32,
    /// The state of the disk.
    pub state: DiskState,
    /// Whether the disk outlives its server.
    pub is_recoverable: bool,
    /// How the data of its requests gets to the server.
    pub transfer: Transfer,
}

impl DeviceInfo {
    /// Whether the disk has outlived its server: its users wait for the next one.
    pub fn waits_for_a_server(&self) -> bool {
        self.is_recoverable && self.state != DiskState::Dead && self.living_server().is_none()
    }

    /// The process that serves the device, in words. The number alone proves little: the kernel
    /// keeps that of a dead server, and a different process may have it by now.
    pub fn living_server(&self) -> Option<String> {
        let node = format!("/dev/ublkc{}", self.id);
        let mut files = fs::read_dir(format!("/proc/{}/fd", self.server)).ok()?.filter_map(Result::ok);
        let has_it = files.any(|file| fs::read_link(file.path()).is_ok_and(|to| to.ends_with(&node)));
        let name = fs::read_to_string(format!("/proc/{}/comm", self.server)).unwrap_or_default();
        has_it.then(|| format!("{} (pid {})", name.trim(), self.server))
    }
}

/// How the data of a request gets from the kernel to its server and back. Fixed by ADD for the life
/// of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// The kernel copies: the data of a write into the buffer of its tag before delivery, the data
    /// of a read out of it at the commit.
    Copied,
    /// Zero copy: from delivery to commit the client's pages are in the ring's table of buffers,
    /// under the number of the tag (`UBLK_F_AUTO_BUF_REG`, Linux 6.16).
    Registered,
}

impl Transfer {
    /// The word in `list` and in the log.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Copied => "copy",
            Self::Registered => "zero-copy",
        }
    }

    /// The work that a STOP may have to wait for, in words.
    pub const fn stop_waits_for(self) -> &'static str {
        match self {
            Self::Copied => "STOP: the kernel waits for requests",
            Self::Registered => {
                "STOP: the kernel waits for the backend, which has the pages of the clients (zero copy)"
            }
        }
    }

    const fn flags(self) -> u64 {
        match self {
            Self::Copied => 0,
            Self::Registered => sys::UBLK_F_AUTO_BUF_REG as u64,
        }
    }

    const fn of(flags: u64) -> Self {
        if flags & Self::Registered.flags() != 0 { Self::Registered } else { Self::Copied }
    }
}

impl From<sys::ublksrv_ctrl_dev_info> for DeviceInfo {
    fn from(info: sys::ublksrv_ctrl_dev_info) -> Self {
        Self {
            id: info.dev_id,
            queues: info.nr_hw_queues,
            depth: info.queue_depth,
            request_bytes_max: info.max_io_buf_bytes,
            owner: Owner(info.ublksrv_flags),
            server: info.ublksrv_pid,
            state: DiskState::of(info.state),
            is_recoverable: info.flags & u64::from(sys::UBLK_F_USER_RECOVERY) != 0,
            transfer: Transfer::of(info.flags),
        }
    }
}

/// Runs `ask`, which sends commands to the driver, in a thread that ends with it, on behalf of a
/// thread that lives on.
///
/// The driver rejects commands that must not sleep, so the kernel makes a worker (`iou-wrk`) for
/// the thread that sends one. That worker lives as long as the thread, and wakes every 5 s to see
/// whether it may end, which it never may.
fn aside<T: Send>(ask: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let asking = thread::Builder::new().name("control".to_owned()).spawn_scoped(scope, ask)?;
        Ok(asking.join().expect("a panic ends the process"))
    })
}
