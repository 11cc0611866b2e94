//! Control commands on `/dev/ublk-control`, one at a time, each waited for.
//!
//! ```text
//!   struct ublksrv_ctrl_cmd, 32 of the 80 bytes of a large submission entry:
//!   dev_id u32 │ queue_id u16 │ len u16 │ addr u64 │ data u64 │ dev_path_len u16, pad │ reserved u32
//! ```
//!
//! The daemon itself may send SET_PARAMS, GET_INFO, GET_QUEUE_AFFINITY and GET_FEATURES, and before
//! a device serves also GET_PARAMS and START_RECOVERY. Only a helper process may send START,
//! END_RECOVERY, STOP, TRY_STOP, DEL and UPDATE_SIZE: they can wait for requests that the daemon
//! holds, and a process killed in such a wait never dies. ADD is for helpers as well: on Linux
//! 6.18.4 it never returns.

#![allow(unsafe_code, reason = "submission entries carry addresses; each buffer is ours and outlives its command")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::sys;
use nix::errno::Errno;
use nix::sched::CpuSet;

use super::params::{Disk, Params};
use super::{DeviceInfo, Owner, Transfer};
use crate::error::{Class, Failure, OrFail, Outcome};

/// The file that takes control commands.
pub const CONTROL_PATH: &str = "/dev/ublk-control";

/// The driver's unit of sizes.
const SECTOR: u64 = 512;

/// CPUs in an affinity mask: the capacity of `CpuSet`.
const CPUS_MAX: usize = 1024;

/// Requests in flight at the death of a server are given to the next one. Without the second flag
/// they would fail.
const RECOVERABLE: u64 = (sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE) as u64;

/// A handle on the driver.
pub struct Control {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    device: File,
    sequence: u64,
    /// Whether each command is sent by a thread of its own.
    is_aside: bool,
}

/// The part of a command that differs from command to command.
#[derive(Default)]
struct Command<'a> {
    operation: u32,
    id: u32,
    data: u64,
    buffer: Option<&'a mut [u8]>,
}

/// The parameters of an ADD, without id and owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewDevice {
    /// Queues wanted.
    pub queues: u16,
    /// Depth of each.
    pub depth: u16,
    /// The longest read or write, in bytes.
    pub request_bytes_max: u32,
    /// Whether the disk outlives its server: requests in flight, and new ones, then wait for the
    /// next server.
    pub is_recoverable: bool,
    /// How data gets to the server; a kernel without zero copy gives [`Transfer::Copied`].
    pub transfer: Transfer,
}

const RECOVERABLE_WORD: &str = "recoverable";
const UNRECOVERABLE_WORD: &str = "unrecoverable";

impl NewDevice {
    /// The parameters as words of a helper's command line.
    pub fn words(&self) -> [String; 5] {
        let numbers = [u32::from(self.queues), self.depth.into(), self.request_bytes_max];
        let [queues, depth, bytes] = numbers.map(|number| number.to_string());
        let is_recoverable = if self.is_recoverable { RECOVERABLE_WORD } else { UNRECOVERABLE_WORD };
        [queues, depth, bytes, is_recoverable.to_owned(), self.transfer.word().to_owned()]
    }

    /// Parses the result of [`Self::words`]; `None` for any other words.
    pub fn of_words(words: &[&str]) -> Option<Self> {
        let [queues, depth, bytes, is_recoverable, transfer] = words else { return None };
        Some(Self {
            queues: queues.parse().ok()?,
            depth: depth.parse().ok()?,
            request_bytes_max: bytes.parse().ok()?,
            is_recoverable: match *is_recoverable {
                RECOVERABLE_WORD => true,
                UNRECOVERABLE_WORD => false,
                _ => return None,
            },
            transfer: [Transfer::Copied, Transfer::Registered].into_iter().find(|it| it.word() == *transfer)?,
        })
    }
}

impl Control {
    /// Opens the driver. If it is missing, the error names the cure.
    pub fn open() -> Outcome<Self> {
        let device = OpenOptions::new().read(true).write(true).open(CONTROL_PATH).map_err(no_driver)?;
        let ring = IoUring::builder().build(4).map_err(no_uring)?;
        Ok(Self { ring, device, sequence: 0, is_aside: false })
    }

    /// Opens the driver for a thread that lives on: each command is sent by a thread that ends with
    /// it.
    ///
    /// See [`super::aside`].
    pub fn open_aside() -> Outcome<Self> {
        Ok(Self { is_aside: true, ..Self::open()? })
    }

    /// All optional features of the driver, as bits.
    pub fn features(&mut self) -> Result<u64, Errno> {
        let mut bits = [0; 8];
        self.run(Command { operation: sys::UBLK_U_CMD_GET_FEATURES, buffer: Some(&mut bits), ..no_device() })?;
        Ok(u64::from_ne_bytes(bits))
    }

    /// ADD with this id, or with any free one: `/dev/ublkcN` appears, for process `server` to open.
    /// Unless the device is recoverable, its requests and its disk fail when the server dies. For
    /// helpers only.
    pub fn add(&mut self, id: Option<u32>, owner: Owner, server: u32, wanted: &NewDevice) -> Result<DeviceInfo, Errno> {
        let mut info = sys::ublksrv_ctrl_dev_info {
            nr_hw_queues: wanted.queues,
            queue_depth: wanted.depth,
            max_io_buf_bytes: wanted.request_bytes_max,
            dev_id: id.unwrap_or(u32::MAX),
            ublksrv_pid: server.cast_signed(),
            ublksrv_flags: owner.bits(),
            flags: wanted.transfer.flags()
                | batch_flag(wanted.depth)
                | if wanted.is_recoverable { RECOVERABLE } else { 0 },
            ..Default::default()
        };
        let id = info.dev_id;
        let buffer = Some(bytes_of_info(&mut info));
        self.run(Command { operation: sys::UBLK_U_CMD_ADD_DEV, id, buffer, ..no_device() })?;
        Ok(info.into())
    }

    /// GET_INFO: the driver's description of device `id`; `ENODEV` if it does not exist.
    pub fn info(&mut self, id: u32) -> Result<DeviceInfo, Errno> {
        let mut info = sys::ublksrv_ctrl_dev_info::default();
        let buffer = Some(bytes_of_info(&mut info));
        self.run(Command { operation: sys::UBLK_U_CMD_GET_DEV_INFO, id, buffer, ..no_device() })?;
        Ok(info.into())
    }

    /// All devices of the kernel that this program made, each with its nonce.
    pub fn ours(&mut self) -> Outcome<Vec<(u32, DeviceInfo)>> {
        let names = match fs::read_dir("/sys/class/ublk-char") {
            Ok(names) => names,
            // Without this directory the host has no ublk devices.
            Err(_) => return Ok(Vec::new()),
        };
        let mut devices = Vec::new();
        for name in names.filter_map(Result::ok) {
            let name = name.file_name();
            let Some(id) = name.to_string_lossy().strip_prefix("ublkc").and_then(|id| id.parse().ok()) else {
                continue;
            };
            match self.info(id) {
                Ok(info) => devices.extend(info.owner.nonce().map(|nonce| (nonce, info))),
                Err(Errno::ENODEV) => {}
                Err(errno) => return Err(errno).or_fail(Class::Failed, format!("asking about device {id}")),
            }
        }
        Ok(devices)
    }

    /// SET_PARAMS: describes the disk, before START.
    pub fn set_params(&mut self, id: u32, params: &Params) -> Result<(), Errno> {
        let mut params = *params;
        params.len = size_of_val(&params) as u32;
        let buffer = Some(bytes_of_params(&mut params));
        self.run(Command { operation: sys::UBLK_U_CMD_SET_PARAMS, id, buffer, ..no_device() })
    }

    /// GET_PARAMS: the description of the disk. Waits for a STOP of the device, which may wait for
    /// requests of its server: that server must not call this.
    pub fn params(&mut self, id: u32) -> Result<Disk, Errno> {
        let mut params = Params { len: size_of::<Params>() as u32, ..Default::default() };
        let buffer = Some(bytes_of_params(&mut params));
        self.run(Command { operation: sys::UBLK_U_CMD_GET_PARAMS, id, buffer, ..no_device() })?;
        Ok(Disk(params))
    }

    /// START_USER_RECOVERY: the device is to have a new server. `EBUSY` as long as the kernel has
    /// not finished with the old one.
    pub fn start_recovery(&mut self, id: u32) -> Result<(), Errno> {
        self.run(Command { operation: sys::UBLK_U_CMD_START_USER_RECOVERY, id, ..no_device() })
    }

    /// END_USER_RECOVERY: from now on process `server` serves, which has offered every tag. For
    /// helpers only.
    pub fn end_recovery(&mut self, id: u32, server: u32) -> Result<(), Errno> {
        self.run(Command { operation: sys::UBLK_U_CMD_END_USER_RECOVERY, id, data: server.into(), ..no_device() })
    }

    /// GET_QUEUE_AFFINITY: the CPUs whose requests come to `queue`.
    pub fn affinity(&mut self, id: u32, queue: u16) -> Result<CpuSet, Errno> {
        let mut mask = [0; CPUS_MAX / 8];
        let buffer = Some(&mut mask[..]);
        let data = u64::from(queue);
        self.run(Command { operation: sys::UBLK_U_CMD_GET_QUEUE_AFFINITY, id, data, buffer })?;
        let mut cpus = CpuSet::new();
        for cpu in (0..CPUS_MAX).filter(|cpu| mask[cpu / 8] & (1 << (cpu % 8)) != 0) {
            cpus.set(cpu)?;
        }
        Ok(cpus)
    }

    /// START: the disk appears. `server` must be the process that has `/dev/ublkcN` open. For helpers only.
    pub fn start(&mut self, id: u32, server: u32) -> Result<(), Errno> {
        self.run(Command { operation: sys::UBLK_U_CMD_START_DEV, id, data: server.into(), ..no_device() })
    }

    /// STOP: the disk is removed, after every request in flight was answered. For helpers only.
    pub fn stop(&mut self, id: u32) -> Result<(), Errno> {
        self.run(Command { operation: sys::UBLK_U_CMD_STOP_DEV, id, ..no_device() })
    }

    /// TRY_STOP: STOP of a disk without openers. `EBUSY`: the disk is open, and unchanged. Only a
    /// driver with SAFE_STOP_DEV knows the command (Linux 7.0). For helpers only.
    pub fn try_stop(&mut self, id: u32) -> Result<(), Errno> {
        self.run(Command { operation: sys::UBLK_U_CMD_TRY_STOP_DEV, id, ..no_device() })
    }

    /// DEL, in the variant that does not wait: the id is free once the last user has closed the
    /// device. For helpers only.
    pub fn delete(&mut self, id: u32) -> Result<(), Errno> {
        self.run(Command { operation: sys::UBLK_U_CMD_DEL_DEV_ASYNC, id, ..no_device() })
    }

    /// UPDATE_SIZE: the disk has `size` bytes from now on. For helpers only.
    pub fn update_size(&mut self, id: u32, size: u64) -> Result<(), Errno> {
        self.run(Command { operation: sys::UBLK_U_CMD_UPDATE_SIZE, id, data: size / SECTOR, ..no_device() })
    }

    /// Makes the io_uring worker that a command needs, as it may sleep; `EAGAIN` if no thread is
    /// left. A ring keeps its last worker, so a later command cannot fail for the lack of one.
    pub fn have_worker(&mut self) -> Result<(), Errno> {
        // ASYNC: a worker carries out the NOP, though a NOP cannot sleep.
        let entry = opcode::Nop::new().build().flags(squeue::Flags::ASYNC);
        // SAFETY: the entry refers to nothing.
        unsafe { self.complete(entry.into()) }
    }

    fn run(&mut self, command: Command<'_>) -> Result<(), Errno> {
        if !self.is_aside {
            return self.carry_out(command);
        }
        super::aside(|| self.carry_out(command)).map_err(|_| Errno::EAGAIN)?
    }

    fn carry_out(&mut self, command: Command<'_>) -> Result<(), Errno> {
        let (address, length) = match command.buffer {
            Some(buffer) => (buffer.as_mut_ptr() as u64, buffer.len() as u16),
            None => (0, 0),
        };
        let mut bytes = [0; 80];
        bytes[0..4].copy_from_slice(&command.id.to_ne_bytes());
        // The queue id is unused: GET_QUEUE_AFFINITY has its queue in `data`.
        bytes[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
        bytes[6..8].copy_from_slice(&length.to_ne_bytes());
        bytes[8..16].copy_from_slice(&address.to_ne_bytes());
        bytes[16..24].copy_from_slice(&command.data.to_ne_bytes());
        let entry = opcode::UringCmd80::new(types::Fd(self.device.as_raw_fd()), command.operation).cmd(bytes).build();
        // SAFETY: the descriptor and the buffer that the entry names outlive the call.
        unsafe { self.complete(entry) }
    }

    /// Submits an entry and waits for its completion.
    ///
    /// # Safety
    /// The descriptors and buffers that the entry names must live until the call returns.
    unsafe fn complete(&mut self, entry: squeue::Entry128) -> Result<(), Errno> {
        self.sequence += 1;
        let entry = entry.user_data(self.sequence);
        // SAFETY: the caller's promise; the call does not return before the completion of exactly
        // this entry.
        unsafe { self.ring.submission().push(&entry) }.expect("the ring has room: one command at a time");
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                // A stop signal, a debugger or the freezer interrupts even with all signals
                // blocked. The command goes on.
                Err(cause) if matches!(cause.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(cause) => panic!("io_uring_enter on the control ring: {cause}"),
            }
            if let Some(done) = self.ring.completion().find(|done| done.user_data() == self.sequence) {
                return match Errno::from_raw(-done.result()) {
                    _ if done.result() >= 0 => Ok(()),
                    // No command is ever cancelled, so the kernel could not make the worker for it.
                    Errno::ECANCELED => Err(Errno::EAGAIN),
                    errno => Err(errno),
                };
            }
        }
    }
}

/// A command without a device yet: the driver expects -1 as the id.
fn no_device() -> Command<'static> {
    Command { id: u32::MAX, ..Command::default() }
}

/// Batches, wherever the driver can; it clears flags that it does not know. With a depth of 1 the
/// driver refuses the device (Linux 7.3: its list of arrived requests needs room for two), and
/// batches would gain nothing.
const fn batch_flag(depth: u16) -> u64 {
    if depth > 1 { sys::UBLK_F_BATCH_IO as u64 } else { 0 }
}

fn bytes_of_info(info: &mut sys::ublksrv_ctrl_dev_info) -> &mut [u8] {
    // SAFETY: a `repr(C)` structure of integers without padding (64 bytes, linux/ublk_cmd.h): every byte is
    // initialised and every pattern is valid, so the kernel may write into it.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::from_mut(info).cast(), size_of_val(info)) }
}

fn bytes_of_params(params: &mut Params) -> &mut [u8] {
    // SAFETY: as above, 120 bytes without padding.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::from_mut(params).cast(), size_of_val(params)) }
}

fn no_driver(cause: io::Error) -> Failure {
    match cause.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Failure::new(
            Class::NoKernel,
            format!(
                "this kernel has no ublk driver: {CONTROL_PATH} is missing; run `modprobe ublk_drv` \
                 (Linux 6.0 or later with CONFIG_BLK_DEV_UBLK)"
            ),
        ),
        Some(libc::EACCES | libc::EPERM) => {
            Failure::new(Class::Perm, format!("{CONTROL_PATH} may not be opened; run as root"))
        }
        _ => Err::<(), _>(cause).or_fail(Class::NoKernel, format!("cannot open {CONTROL_PATH}")).unwrap_err(),
    }
}

/// The failure of a ring that could not be made, with its cure.
pub fn no_uring(cause: io::Error) -> Failure {
    match cause.raw_os_error() {
        Some(libc::EPERM) => Failure::new(
            Class::NoUring,
            "io_uring is switched off here; run `sysctl kernel.io_uring_disabled=0`, or allow it in the container's \
             seccomp profile",
        ),
        Some(libc::ENOSYS) => Failure::new(
            Class::NoUring,
            "this kernel has no io_uring; it must be built with CONFIG_IO_URING, and a container must not filter it",
        ),
        _ => Err::<(), _>(cause).or_fail(Class::NoUring, "cannot make an io_uring").unwrap_err(),
    }
}
