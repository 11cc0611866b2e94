//! A queue of a device and its ring, as seen by the thread that owns both.
//!
//! ```text
//!             entries: offers and answers, backend, poll of the bell, timer of the look
//!   thread ───────────────────────────────────────────────────► ring ──► kernel
//!          ◄─────────────────────────────────────────────────── ring ◄──
//!             events: Delivered │ Aborted │ Over │ Refused │ Backend │ Bell │ Look
//!
//!   user_data   63 │ 62..32 │ 31..16 │ 15..0
//!               own│ serial │ kind   │ tag        own = 0: FETCH or COMMIT of one tag, in libublk's numbering too
//! ```
//!
//! A turn is one system call, which submits the prepared entries, waits, and reaps. This module
//! makes no decisions. Offers and answers are a command for each tag, or, where the driver can, one
//! command for all of a turn (`batch`).

#![allow(unsafe_code, reason = "entries carry addresses; only this file and `batch` hand them to a ring")]

use std::cell::RefCell;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::thread;
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::ctrl::UblkCtrlBuilder;
use libublk::io::{UblkDev, UblkQueue};
use libublk::{UblkError, UblkFlags, sys, ublk_init_task_ring, with_task_io_ring_mut};
use throttle_core::time::Time;

use super::batch::Batch;
use super::{DeviceInfo, Transfer};
use crate::error::{Class, Failure, OrFail, Outcome};
use crate::{clock, log};

/// An entry for the ring.
pub type Entry = squeue::Entry;

/// The open character device. Its queues borrow it; the id can be freed once it and they are
/// dropped.
pub struct CharDevice(UblkDev);

impl CharDevice {
    /// Opens `/dev/ublkcN` of a device that ADD has made. Its queues register it as fixed file 0,
    /// their only one.
    pub fn open(info: &DeviceInfo) -> Outcome<Self> {
        // libublk sends control commands in this call.
        super::aside(|| Self::open_here(info)).or_fail(Class::Resource, "cannot start a thread")?
    }

    fn open_here(info: &DeviceInfo) -> Outcome<Self> {
        let what = || format!("/dev/ublkc{}", info.id);
        let handle = log::quietly(|| {
            UblkCtrlBuilder::default()
                .name("ublk-throttle")
                .id(info.id as i32)
                .nr_queues(info.queues)
                .depth(info.depth)
                .io_buf_bytes(info.request_bytes_max)
                .dev_flags(UblkFlags::empty())
                .build()
        })
        .map_err(|cause| failure(Class::Failed, what(), &cause))?;
        let (sq, cq) = ring_sizes(info.depth);
        UblkDev::new(
            "ublk-throttle".to_owned(),
            |dev| {
                dev.tgt.sq_depth = sq;
                dev.tgt.cq_depth = cq;
                Ok(())
            },
            &handle,
        )
        .map(Self)
        // libublk reports every failure to open it, of any kind, as EACCES after 3 s.
        .map_err(|_| Failure::new(Class::Node, format!("{} did not become available within 3 s", what())))
    }
}

/// The entries and completions that a queue can have at once. In one turn a tag's entry may go to
/// the backend, be given up and its request answered; the poll of the bell and the timer of the
/// look may be armed as well. The room for completions is larger, in case a thread is kept from
/// reaping them.
const fn ring_sizes(depth: u16) -> (u16, u16) {
    (depth * 2 + 2, depth * 4 + 64)
}

/// A request of the kernel, copied out of the shared memory at delivery: the kernel reuses that
/// after the commit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    /// `UBLK_IO_OP_*`.
    pub operation: u32,
    /// The write must be durable when it completes.
    pub is_fua: bool,
    /// Write-zeroes that must keep the space allocated.
    pub keeps_space: bool,
    /// The offset, in bytes.
    pub offset: u64,
    /// The length, in bytes.
    pub length: u64,
}

impl Descriptor {
    fn of(described: &sys::ublksrv_io_desc) -> Self {
        let operation = described.op_flags & 0xff;
        // A flush covers the whole disk: the kernel leaves its sector at -1.
        let has_range = operation != sys::UBLK_IO_OP_FLUSH;
        Self {
            operation,
            is_fua: described.op_flags & sys::UBLK_IO_F_FUA != 0,
            keeps_space: described.op_flags & sys::UBLK_IO_F_NOUNMAP != 0,
            offset: if has_range { described.start_sector * SECTOR } else { 0 },
            length: if has_range { u64::from(described.nr_sectors) * SECTOR } else { 0 },
        }
    }
}

/// The kernel's unit, for any block size of the disk.
const SECTOR: u64 = 512;

/// `UBLK_IO_OP_*` of the requests that a device serves.
pub mod operation {
    pub use libublk::sys::{
        UBLK_IO_OP_DISCARD as DISCARD, UBLK_IO_OP_FLUSH as FLUSH, UBLK_IO_OP_READ as READ, UBLK_IO_OP_WRITE as WRITE,
        UBLK_IO_OP_WRITE_ZEROES as WRITE_ZEROES,
    };
}

/// A completion of the ring, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The kernel delivered a request under this tag.
    Delivered(u16),
    /// The kernel will deliver nothing more under this tag: the device is being stopped.
    Aborted(u16),
    /// [`Self::Aborted`] for every tag that the kernel has, or gets.
    Over,
    /// FETCH or COMMIT of this tag was refused, with this errno.
    Refused(u16, i32),
    /// The backend has completed the entry of this tag and serial number: bytes or -errno.
    Backend(u16, u32, i32),
    /// The bell was rung.
    Bell {
        /// Whether the poll is still armed. If not, [`QueueRing::watch_bell`] must be submitted
        /// again.
        is_armed: bool,
    },
    /// [`LOOK_AFTER`] has passed since [`QueueRing::look_later`] was submitted.
    Look,
}

/// The interval after which a queue checks whether it is still in use.
pub const LOOK_AFTER: Duration = Duration::from_secs(2);
/// [`LOOK_AFTER`] for the kernel.
static LOOK_TIMESPEC: types::Timespec = types::Timespec::new().sec(LOOK_AFTER.as_secs());

/// How long a request waits if the kernel had no thread for it. Threads end with their work, so a
/// moment may be enough.
static PAUSE_TIMESPEC: types::Timespec = types::Timespec::new().nsec(10_000_000);

const OWN: u64 = 1 << 63;
/// Serial numbers of backend entries are below this.
const SERIALS: u32 = 1 << 31;
const KIND_BACKEND: u64 = 1 << 16;
const KIND_BELL: u64 = 2 << 16;
const KIND_LOOK: u64 = 3 << 16;

/// `user_data` of an entry whose completion is ignored.
const NOTHING: u64 = OWN | 4 << 16;
/// `user_data` of a FETCH of [`Batch`].
pub(super) const FETCHED: u64 = OWN | 5 << 16;
/// `user_data` of a PREP or COMMIT of [`Batch`].
pub(super) const ANSWERED: u64 = OWN | 6 << 16;

/// `IORING_ENTER_*` of io_uring_enter(2), for which the crate has no safe call. ABS_TIMER: Linux
/// 6.12; NO_IOWAIT: where `IORING_FEAT_NO_IOWAIT` is set.
const ENTER_GETEVENTS: u32 = 1 << 0;
const ENTER_EXT_ARG: u32 = 1 << 3;
const ENTER_REGISTERED_RING: u32 = 1 << 4;
const ENTER_ABS_TIMER: u32 = 1 << 5;
const ENTER_NO_IOWAIT: u32 = 1 << 7;

/// `IORING_REGISTER_RING_FDS` of io_uring_register(2).
const REGISTER_RING_FDS: u32 = 20;

/// The limit of a turn's wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Until an event.
    Forever,
    /// Until an event, after a yield to the threads that share the CPU.
    AfterOthers,
    /// Until an event, but at most until this instant of CLOCK_MONOTONIC. The kernel gets the
    /// instant, not the time left: the time between the thread's reading of the clock and the
    /// kernel's would lengthen each wait.
    Until(Time),
    /// Until this instant, regardless of events: the thread does not wait at its ring, so no
    /// completion wakes it.
    Through(Time),
}

/// The ring and the io descriptors of a queue.
pub struct QueueRing<'a> {
    queue: ManuallyDrop<UblkQueue<'a>>,
    door: Door,
    commands: Commands,
    has_offers: bool,
}

impl Drop for QueueRing<'_> {
    fn drop(&mut self) {
        if self.has_offers && !is_ring_closed() {
            return self.unmap();
        }
        // SAFETY: dropped here, and used nowhere after.
        unsafe { ManuallyDrop::drop(&mut self.queue) }
    }
}

/// Closes the ring of the calling thread, by an empty one in its place. False if no ring can be
/// made.
fn is_ring_closed() -> bool {
    IoUring::new(1).is_ok_and(|empty| {
        with_task_io_ring_mut(|ring| *ring = empty);
        true
    })
}

/// The commands that fetch and answer requests.
enum Commands {
    Single(Single),
    Batched(Batch),
}

/// A command for each request: FETCH or COMMIT.
struct Single {
    queue: u16,
    transfer: Transfer,
    /// To be submitted with the next wait.
    gathered: Vec<Entry>,
}

impl<'a> QueueRing<'a> {
    /// Makes the ring of the calling thread and maps the descriptors of queue `id`. A thread has at
    /// most one queue.
    pub fn open(device: &'a CharDevice, id: u16) -> Outcome<Self> {
        let (sq, cq) = (device.0.tgt.sq_depth, device.0.tgt.cq_depth);
        ublk_init_task_ring(|cell| {
            let ring = new_ring(sq.into(), cq.into()).map_err(UblkError::IOError)?;
            cell.set(RefCell::new(ring)).map_err(|_| UblkError::OtherError(-libc::EEXIST))
        })
        .map_err(|cause| failure(Class::Resource, format!("ring of queue {id}"), &cause))?;
        let door = with_task_io_ring_mut(|ring| Door::registered(ring));
        let queue = UblkQueue::new(id, &device.0)
            .map_err(|cause| failure(Class::Failed, format!("queue {id} of /dev/ublkc{}", device.id()), &cause))?;
        let (flags, depth) = (device.0.dev_info.flags, device.0.dev_info.queue_depth);
        let transfer = Transfer::of(flags);
        let commands = if flags & u64::from(sys::UBLK_F_BATCH_IO) != 0 {
            Commands::Batched(with_task_io_ring_mut(|ring| Batch::new(ring, id, depth, transfer))?)
        } else {
            Commands::Single(Single { queue: id, transfer, gathered: Vec::with_capacity(depth.into()) })
        };
        Ok(Self { queue: ManuallyDrop::new(queue), door, commands, has_offers: false })
    }

    /// To be called if the queue ends while the kernel has offers of it, of a device that was not
    /// started or not recovered. The offers end with the thread.
    ///
    /// Before Linux 6.13, unregistering the file table of a ring waits for every request that uses
    /// one of its files. libublk unregisters the table when its queue is dropped, and offers end at
    /// STOP or with the thread: the drop would wait for ever. Therefore `drop` closes the ring
    /// first.
    pub fn leave_offers(&mut self) {
        self.has_offers = true;
    }

    /// The fallback without a new ring: unmaps the descriptors only, as the character device stays
    /// open with them. libublk's data of the queue is leaked, some bytes for each tag.
    fn unmap(&self) {
        let first = std::ptr::from_ref(self.queue.get_iod(0)).cast_mut().cast();
        let bytes = usize::from(self.queue.dev.dev_info.queue_depth) * size_of::<sys::ublksrv_io_desc>();
        // SAFETY: libublk mapped the descriptors of the queue from the first one on, whole pages,
        // to which munmap(2) rounds up. No access follows: `queue` is neither used nor dropped.
        unsafe { libc::munmap(first, bytes) };
    }

    /// Offers `tag` to the kernel with the next wait. If data is copied, that of a write is copied
    /// into `buffer` and that of a read out of it; with zero copy `buffer` is null.
    pub fn offer(&mut self, tag: u16, buffer: *mut u8) {
        match &mut self.commands {
            Commands::Single(single) => single.gather(sys::UBLK_U_IO_FETCH_REQ, tag, buffer, -1),
            Commands::Batched(batch) => batch.gather(tag, buffer, 0),
        }
    }

    /// Answers the request under `tag` (bytes or -errno) with the next wait, and offers the tag
    /// again.
    pub fn commit(&mut self, tag: u16, buffer: *mut u8, result: i32) {
        match &mut self.commands {
            Commands::Single(single) => single.gather(sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, buffer, result),
            Commands::Batched(batch) => batch.gather(tag, buffer, result),
        }
    }

    /// Whether some offers or answers have not reached the kernel.
    pub fn is_unsent(&self) -> bool {
        match &self.commands {
            Commands::Single(single) => !single.gathered.is_empty(),
            Commands::Batched(batch) => batch.is_unsent(),
        }
    }

    /// Marks an entry as the backend's, for the request under `tag`. `serial` comes back with its
    /// completion; [`Self::next_serial`] keeps it below 2^31.
    pub fn backend(entry: Entry, tag: u16, serial: u32) -> Entry {
        debug_assert!(serial < SERIALS);
        entry.user_data(OWN | u64::from(serial) << 32 | KIND_BACKEND | u64::from(tag))
    }

    /// The serial number after `serial`.
    pub const fn next_serial(serial: u32) -> u32 {
        (serial + 1) % SERIALS
    }

    /// Polls an eventfd: every ring of it is an event, until an event reports that the poll is not
    /// armed any more.
    pub fn watch_bell(bell: RawFd) -> Entry {
        opcode::PollAdd::new(types::Fd(bell), libc::POLLIN as u32).multi(true).build().user_data(OWN | KIND_BELL)
    }

    /// A timer for one event after [`LOOK_AFTER`], which serves all turns until then. If the limit
    /// of the waits served instead, each turn would set and cancel a timer of its own.
    pub fn look_later() -> Entry {
        opcode::Timeout::new(&raw const LOOK_TIMESPEC).build().user_data(OWN | KIND_LOOK)
    }

    /// A timer of 10 ms; for [`QueueRing::backend`], in place of an entry that could not be carried
    /// out.
    pub fn pause() -> Entry {
        opcode::Timeout::new(&raw const PAUSE_TIMESPEC).build()
    }

    /// The request of the kernel under `tag`. To be read once, at delivery.
    pub fn descriptor(&self, tag: u16) -> Descriptor {
        Descriptor::of(self.queue.get_iod(tag))
    }

    /// Submits `entries` (and empties it), waits, and adds the events to `events`.
    ///
    /// Data is copied during this call only: first the data of committed reads out, then the data
    /// of delivered writes in. May return without an event, after the time limit or for no reason:
    /// the caller reads the clock.
    pub fn turn(&mut self, entries: &mut Vec<Entry>, wait: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        let (door, commands) = (self.door, &mut self.commands);
        with_task_io_ring_mut(|ring| {
            // SAFETY: io_uring(7): memory and descriptors that an entry names must live until its
            // completion. The descriptors are the fixed file, the bell and those of the backend's
            // lane, which outlive the ring's use; the buffers are those of
            // [`crate::queue::buffers`], which the queue unmaps only when no backend entry is in
            // flight and no request is delivered.
            let least = unsafe { commands.submit(ring) };
            // SAFETY: as above.
            unsafe { push_all(ring, entries) };
            let reaped = match wait {
                Wait::Forever => enter_and_reap(door, ring, least, None, commands, events)?,
                Wait::AfterOthers => {
                    submit(door, ring)?;
                    thread::yield_now();
                    enter_and_reap(door, ring, least, None, commands, events)?
                }
                Wait::Until(instant) => enter_and_reap(door, ring, least, Some(instant), commands, events)?,
                Wait::Through(instant) => {
                    if !ring.submission().is_empty() {
                        submit(door, ring)?;
                    }
                    clock::sleep_until(instant);
                    while enter_and_reap_more(door, ring, commands, events)? >= GIVEN_AT_ONCE {}
                    return Ok(());
                }
            };
            // Since Linux 6.13 a wait that slept returns no more completions than it asked for: of
            // 32 requests only the first, which would make a turn of its own, and wake its client
            // for one answer.
            if reaped == least as usize && ring.submission().taskrun() {
                enter_and_reap_more(door, ring, commands, events)?;
            }
            Ok(())
        })
    }
}

impl Commands {
    /// Submits the gathered commands. Returns the number of completions to wait for.
    ///
    /// # Safety
    ///
    /// The gathered buffers must be valid, each until its tag is gathered with a new buffer or the
    /// ring has gone.
    unsafe fn submit(&mut self, ring: &mut IoUring) -> u32 {
        match self {
            Self::Single(single) => {
                // SAFETY: the caller's promise.
                unsafe { push_all(ring, &mut single.gathered) };
                1
            }
            Self::Batched(batch) => {
                // SAFETY: the caller's promise.
                unsafe { batch.submit(&mut ring.submission()) };
                batch.least()
            }
        }
    }

    /// Adds the events of a completion.
    fn apply(&mut self, completion: &cqueue::Entry, events: &mut Vec<Event>) {
        match (completion.user_data() & (OWN | 0xffff_0000), self) {
            (FETCHED, Self::Batched(batch)) => batch.fetched(completion, events),
            (ANSWERED, Self::Batched(batch)) => batch.answered(completion.result(), events),
            (NOTHING, _) => {}
            _ => events.push(event(completion)),
        }
    }
}

impl Single {
    /// For zero copy the entry has a second address: `struct ublk_auto_buf_reg`, whose lowest 16
    /// bits are the index in the ring's table where the next request's pages shall be. Without its
    /// FALLBACK flag a request for which the kernel has no memory to do so (a few hundred bytes)
    /// fails with EIO.
    fn gather(&mut self, operation: u32, tag: u16, buffer: *mut u8, result: i32) {
        debug_assert_eq!(buffer.is_null(), self.transfer != Transfer::Copied);
        let bytes = tag_command(self.queue, tag, result, buffer as u64);
        let table_index = (self.transfer == Transfer::Registered).then_some(tag.into());
        let command = opcode::UringCmd16::new(types::Fixed(0), operation).addr(table_index).cmd(bytes);
        self.gathered.push(command.build().user_data(tag.into()));
    }
}

/// `struct ublksrv_io_cmd`: q_id u16, tag u16, result i32, addr u64.
pub(super) fn tag_command(queue: u16, tag: u16, result: i32, address: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..2].copy_from_slice(&queue.to_ne_bytes());
    bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
    bytes[4..8].copy_from_slice(&result.to_ne_bytes());
    bytes[8..16].copy_from_slice(&address.to_ne_bytes());
    bytes
}

/// Moves `entries` to the submission queue, for the next enter.
///
/// # Safety
///
/// All memory that the entries name must be valid until their completions.
unsafe fn push_all(ring: &mut IoUring, entries: &mut Vec<Entry>) {
    // SAFETY: the caller's promise.
    let is_full = unsafe { ring.submission().push_multiple(entries) }.is_err();
    assert!(!is_full, "{} entries for a ring made for twice the depth", entries.len());
    entries.clear();
}

/// The name of a ring for io_uring_enter(2): its descriptor, or the number under which the calling
/// thread has registered it. The number saves the kernel a reference to a file that a second thread
/// could close. The crate keeps that number where the next call does not find it.
#[derive(Clone, Copy)]
struct Door {
    number: i32,
    flags: u32,
}

impl Door {
    /// The ring by its descriptor, usable by any thread.
    fn of(ring: &IoUring) -> Self {
        Self { number: ring.as_raw_fd(), flags: 0 }
    }

    /// The ring by a number, for the calling thread alone, until that ends. If none is free
    /// (io_uring_register(2): 16 per thread, Linux 5.18), by its descriptor: a matter of speed
    /// only.
    fn registered(ring: &IoUring) -> Self {
        let mut update = RingUpdate { number: RingUpdate::ANY, _reserved: 0, descriptor: ring.as_raw_fd() as u64 };
        // SAFETY: io_uring_register(2): one `struct io_uring_rsrc_update`, which lives until the call returns.
        let registered = unsafe {
            libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), REGISTER_RING_FDS, &raw mut update, 1)
        };
        if registered == 1 {
            Self { number: update.number as i32, flags: ENTER_REGISTERED_RING }
        } else {
            Self::of(ring)
        }
    }

    /// io_uring_enter(2).
    ///
    /// # Safety
    ///
    /// The ring must exist, `entries` must be in its submission queue, and all memory that they
    /// name must be valid until their completions.
    unsafe fn enter(
        self,
        entries: u32,
        least: u32,
        flags: u32,
        arguments: Option<&types::SubmitArgs<'_, '_>>,
    ) -> io::Result<()> {
        let at = arguments.map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the caller's promise; the kernel reads the size only with the flag for arguments.
        let entered = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.number,
                entries,
                least,
                flags | self.flags,
                at,
                size_of::<types::SubmitArgs<'_, '_>>(),
            )
        };
        if entered < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// `struct io_uring_rsrc_update` for a ring: any number and the descriptor go in, the number comes
/// out.
#[repr(C)]
struct RingUpdate {
    number: u32,
    _reserved: u32,
    descriptor: u64,
}

impl RingUpdate {
    const ANY: u32 = u32::MAX;
}

/// A wait that does not sleep returns at least so many of the completions that have come; fewer
/// mean that it returned all.
const GIVEN_AT_ONCE: usize = 20;

/// Adds completions that have come since to `events`, without waiting; returns their number. An
/// enter with a submission returns twice as many as one without, therefore a NOP is submitted where
/// each request is a completion.
fn enter_and_reap_more(
    door: Door,
    ring: &mut IoUring,
    commands: &mut Commands,
    events: &mut Vec<Event>,
) -> io::Result<usize> {
    let is_single = matches!(commands, Commands::Single(_));
    if is_single {
        // SAFETY: io_uring(7): the entry names no memory. If the submission queue is full, the
        // entries in it serve as well.
        let _ = unsafe { ring.submission().push(&opcode::Nop::new().build().user_data(NOTHING)) };
    }
    Ok(enter_and_reap(door, ring, 0, None, commands, events)?.saturating_sub(is_single.into()))
}

/// Submits the prepared entries, waits for `least` completions, at most until an instant, and adds
/// the events to `events`; returns the number of completions.
fn enter_and_reap(
    door: Door,
    ring: &mut IoUring,
    least: u32,
    until: Option<Time>,
    commands: &mut Commands,
    events: &mut Vec<Event>,
) -> io::Result<usize> {
    enter(door, ring, least, until)?;
    let mut reaped = 0;
    for completion in ring.completion() {
        reaped += 1;
        commands.apply(&completion, events);
    }
    Ok(reaped)
}

/// Waits until so many backend entries of the calling thread, whose queue is gone, have completed.
/// All memory that they name must live until then.
pub fn outlast(mut entries: usize) -> io::Result<()> {
    while entries > 0 {
        with_task_io_ring_mut(|ring| {
            enter(Door::of(ring), ring, 1, None)?;
            let came = ring.completion().filter(|completion| matches!(event(completion), Event::Backend(..))).count();
            entries = entries.saturating_sub(came);
            io::Result::Ok(())
        })?;
    }
    Ok(())
}

/// Submits the prepared entries, and waits for `least` completions, at most until an instant.
fn enter(door: Door, ring: &mut IoUring, least: u32, until: Option<Time>) -> io::Result<()> {
    let timespec;
    let (arguments, is_absolute) = match until {
        None => (types::SubmitArgs::new(), 0),
        Some(instant) => {
            timespec = types::Timespec::from(Duration::from_nanos(instant.as_nanos()));
            (types::SubmitArgs::new().timespec(&timespec), ENTER_ABS_TIMER)
        }
    };
    // A queue always has offers in flight: waiting for their completions must not count as iowait.
    let is_idle = if ring.params().is_feature_no_iowait() { ENTER_NO_IOWAIT } else { 0 };
    let flags = ENTER_GETEVENTS | ENTER_EXT_ARG | is_absolute | is_idle;
    let entries = ring.submission().len() as u32;
    // SAFETY: io_uring_enter(2): with EXT_ARG the argument is a `struct io_uring_getevents_arg`,
    // which SubmitArgs is; the timespec that it points to lives until the call returns. `entries`
    // is the length of the submission queue.
    unless_harmless(unsafe { door.enter(entries, least, flags, Some(&arguments)) })
}

/// Submits the prepared entries, and reaps nothing.
fn submit(door: Door, ring: &mut IoUring) -> io::Result<()> {
    let entries = ring.submission().len() as u32;
    // SAFETY: io_uring_enter(2): without an argument. `entries` is the length of the submission
    // queue.
    unless_harmless(unsafe { door.enter(entries, 0, 0, None) })
}

fn unless_harmless(entered: io::Result<()>) -> io::Result<()> {
    match entered {
        Ok(()) => Ok(()),
        // The time is up, a debugger or the freezer interrupted the call, or completions must be
        // reaped first.
        Err(cause) => match cause.raw_os_error() {
            Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
            _ => Err(cause),
        },
    }
}

impl CharDevice {
    fn id(&self) -> u32 {
        self.0.dev_info.dev_id
    }
}

/// DEFER_TASKRUN: requests are delivered, and their data copied, only while the thread waits.
/// Between two waits only the thread touches its buffers, on which
/// [`crate::queue::buffers::Buffers::release`] relies.
fn new_ring(sq: u32, cq: u32) -> io::Result<IoUring> {
    IoUring::builder().setup_cqsize(cq).setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().build(sq)
}

fn event(completion: &cqueue::Entry) -> Event {
    let (data, result) = (completion.user_data(), completion.result());
    let tag = data as u16;
    match data & (OWN | 0xffff_0000) {
        0 if result == sys::UBLK_IO_RES_OK as i32 => Event::Delivered(tag),
        0 if result == sys::UBLK_IO_RES_ABORT => Event::Aborted(tag),
        0 => Event::Refused(tag, -result),
        kind if kind == OWN | KIND_LOOK => Event::Look,
        kind if kind == OWN | KIND_BACKEND => Event::Backend(tag, (data >> 32) as u32 % SERIALS, result),
        _ => Event::Bell { is_armed: cqueue::more(completion.flags()) },
    }
}

fn failure(class: Class, what: impl std::fmt::Display, cause: &UblkError) -> Failure {
    let errno = match cause {
        UblkError::OtherError(code) | UblkError::UringIOError(code) => Some(-code),
        UblkError::IOError(cause) => cause.raw_os_error(),
        _ => None,
    };
    match errno {
        // ECANCELED means, as in `control`, that the kernel could not make a worker for the
        // command.
        Some(libc::ECANCELED) => failure(class, what, &UblkError::OtherError(-libc::EAGAIN)),
        Some(errno) => Err::<(), _>(io::Error::from_raw_os_error(errno)).or_fail(class, what).unwrap_err(),
        None => Failure::new(class, format!("{what}: {cause}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_has_no_range() {
        // mkfs.ext4 sends one at its end; its sector is u64::MAX and must not be multiplied.
        let flush =
            sys::ublksrv_io_desc { op_flags: sys::UBLK_IO_OP_FLUSH, start_sector: u64::MAX, ..Default::default() };
        let described = Descriptor::of(&flush);
        assert_eq!((described.offset, described.length), (0, 0));
    }

    #[test]
    fn the_flags_of_a_write_are_told() {
        let op_flags = sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_F_FUA;
        let write = sys::ublksrv_io_desc { op_flags, nr_sectors: 8, start_sector: 16, ..Default::default() };
        let described = Descriptor::of(&write);
        assert!(described.is_fua && !described.keeps_space);
        assert_eq!((described.operation, described.offset, described.length), (operation::WRITE, 8192, 4096));
    }

    #[test]
    fn a_registered_ring_is_entered_by_its_number() {
        // The crate loses the number together with the handle that registers it: each turn then
        // used the descriptor again.
        let mut ring = IoUring::new(2).unwrap();
        let door = Door::registered(&ring);
        assert_eq!((door.number, door.flags), (0, ENTER_REGISTERED_RING));
        for door in [door, Door::of(&ring)] {
            // SAFETY: the entry names no memory.
            unsafe { ring.submission().push(&opcode::Nop::new().build()) }.unwrap();
            enter(door, &mut ring, 1, Some(Time::ZERO)).unwrap();
            assert_eq!(ring.completion().count(), 1);
        }
    }

    #[test]
    fn a_ring_has_room_for_every_tag_the_bell_and_the_look_at_the_largest_depth() {
        // 4096 is the driver's largest depth; sizes are 16 bits in libublk, and io_uring takes up to 65536 completions.
        let (sq, cq) = ring_sizes(4096);
        assert_eq!((sq, cq), (8194, 16448));
        let (sq, _) = ring_sizes(1);
        assert!(sq >= 4, "an entry and a command of the tag, the bell and the look");
    }
}
