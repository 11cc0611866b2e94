//! Requests fetched and answered in batches (`UBLK_F_BATCH_IO`, Linux 7.0).
//!
//! ```text
//!   PREP    once      [tag, buffer] of every tag              offers the tags
//!   FETCH   multishot a buffer full of tags at a time         delivers, until ENODEV: the queue is being stopped
//!   COMMIT  a turn    [tag, result, buffer] of each answer    answers, and offers the tags again
//!
//!   memory  │ ring of free buffers │ buffer 0 │ buffer 1 │ …    each of [`TAGS`] tags
//! ```
//!
//! Without batches each request is a command of its own, submitted, completed and accounted for by
//! the ring. Here the ring sees one command a turn, for any number of requests.

#![allow(
    unsafe_code,
    reason = "entries carry addresses, and the kernel writes into memory of ours; this file keeps it apart"
)]

use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::sys;

use super::Transfer;
use super::queue::{ANSWERED, Entry, Event, FETCHED};
use crate::error::{Class, OrFail, Outcome};
use crate::mapping::Mapping;

/// The most tags that the driver delivers at a time.
const TAGS: usize = 128;
/// Buffers for tags: each delivery takes one until it is read. If they run out, the next turn
/// fetches anew.
const BUFFERS: u16 = 16;
/// The number of the buffer group, the only one of the ring.
const GROUP: u16 = 0;
/// The ring of free buffers has a page to itself, as the kernel requires.
const RING_BYTES: usize = 4096;
const BUFFER_BYTES: usize = TAGS * size_of::<u16>();
const MEMORY_BYTES: usize = RING_BYTES + BUFFERS as usize * BUFFER_BYTES;

/// `IORING_URING_CMD_MULTISHOT`, Linux 6.19; the crate has no name for it.
const MULTISHOT: u32 = 1 << 1;
/// The offsets of `uring_cmd_flags` and `buf_group` in a `struct io_uring_sqe`.
const AT_COMMAND_FLAGS: usize = 28;
const AT_GROUP: usize = 40;

/// `struct ublk_elem_header`: tag u16, buf_index u16, result i32. If data is copied, the address of
/// the buffer follows, u64.
const HEADER_BYTES: usize = 8;
const ELEMENT_BYTES: usize = 16;

/// The commands of a queue that fetches and answers in batches.
pub(super) struct Batch {
    queue: u16,
    transfer: Transfer,
    /// The offers or answers since the last PREP or COMMIT, as bytes: elements, or their headers.
    gathered: Vec<u8>,
    /// The elements of the PREP or COMMIT in flight. The kernel reads them, so they must not move.
    under_way: Vec<u8>,
    /// Every tag has been offered, so the next command is a COMMIT, not a PREP.
    is_offered: bool,
    is_fetching: bool,
    /// The kernel delivers nothing more.
    is_over: bool,
    tags: TagBuffers,
}

impl Batch {
    /// For `queue` of `depth` tags, on the ring of this thread.
    pub(super) fn new(ring: &IoUring, queue: u16, depth: u16, transfer: Transfer) -> Outcome<Self> {
        let room = usize::from(depth) * ELEMENT_BYTES;
        Ok(Self {
            queue,
            transfer,
            gathered: Vec::with_capacity(room),
            under_way: Vec::with_capacity(room),
            is_offered: false,
            is_fetching: false,
            is_over: false,
            tags: TagBuffers::register(ring)?,
        })
    }

    /// Adds an offer or an answer: the buffer of `tag` from now on, and the result of its request,
    /// if it had one.
    pub(super) fn gather(&mut self, tag: u16, buffer: *mut u8, result: i32) {
        debug_assert_eq!(buffer.is_null(), self.transfer != Transfer::Copied);
        let element = element(tag, buffer, result);
        match self.transfer {
            Transfer::Copied => self.gathered.extend_from_slice(&element),
            Transfer::Registered => self.gathered.extend_from_slice(&element[..HEADER_BYTES]),
        }
    }

    /// Whether elements are gathered or in flight.
    pub(super) fn is_unsent(&self) -> bool {
        !self.gathered.is_empty() || !self.under_way.is_empty()
    }

    /// The number of completions to wait for, so that one of them is not that of the PREP or COMMIT
    /// submitted with the wait.
    pub(super) fn least(&self) -> u32 {
        // That completion is enough if no delivery can follow, or if elements wait to be submitted
        // after it.
        if self.under_way.is_empty() || self.is_over || !self.gathered.is_empty() { 1 } else { 2 }
    }

    /// Submits the gathered elements, and then a FETCH if none is in flight. The order matters: a
    /// FETCH that finds requests delivers them at once, and their data must not be copied in before
    /// that of the answered reads is copied out.
    ///
    /// # Safety
    ///
    /// The gathered buffers must be valid, each until its tag is gathered with a new buffer or the
    /// ring has gone.
    pub(super) unsafe fn submit(&mut self, submission: &mut squeue::SubmissionQueue<'_>) {
        if self.under_way.is_empty() && !self.gathered.is_empty() {
            std::mem::swap(&mut self.under_way, &mut self.gathered);
            let operation = if self.is_offered { sys::UBLK_U_IO_COMMIT_IO_CMDS } else { sys::UBLK_U_IO_PREP_IO_CMDS };
            self.is_offered = true;
            let entry = command(operation, self.queue, self.transfer, &self.under_way).user_data(ANSWERED);
            // SAFETY: the elements stay where they are until the completion of this entry has been seen.
            unsafe { submission.push(&entry) }.expect("a ring made for more");
        }
        if self.is_offered && !self.is_fetching && !self.is_over {
            self.is_fetching = true;
            let entry = fetch(self.queue).user_data(FETCHED);
            // SAFETY: the buffers of the group exist until `self` is dropped, which unregisters
            // them first.
            unsafe { submission.push(&entry) }.expect("a ring made for more");
        }
    }

    /// Applies the completion of a PREP or COMMIT: an event only if the kernel refused an element.
    pub(super) fn answered(&mut self, result: i32, events: &mut Vec<Event>) {
        let taken = usize::try_from(result).unwrap_or(0);
        // The result of a COMMIT is the number of bytes of the elements taken; that of a PREP is 0
        // if it took all.
        if result != 0 && taken != self.under_way.len() {
            let at = taken.min(self.under_way.len() - 2);
            let tag = u16::from_ne_bytes([self.under_way[at], self.under_way[at + 1]]);
            events.push(Event::Refused(tag, if result < 0 { -result } else { libc::EINVAL }));
        }
        self.under_way.clear();
    }

    /// Applies a completion of the FETCH.
    pub(super) fn fetched(&mut self, completion: &cqueue::Entry, events: &mut Vec<Event>) {
        let result = completion.result();
        if let Some(buffer) = cqueue::buffer_select(completion.flags()) {
            let bytes = usize::try_from(result).unwrap_or(0);
            events.extend(self.tags.read(buffer, bytes).iter().map(|tag| Event::Delivered(*tag)));
            self.tags.free(buffer);
        }
        if cqueue::more(completion.flags()) {
            return;
        }
        self.is_fetching = false;
        match result {
            0.. => {}
            sys::UBLK_IO_RES_ABORT => {
                self.is_over = true;
                events.push(Event::Over);
            }
            // No buffer was free, or no memory: the next turn fetches again.
            _ if matches!(-result, libc::ENOBUFS | libc::ENOMEM) => {}
            _ => events.push(Event::Refused(0, -result)),
        }
    }
}

/// The bytes of an element where data is, or is not, copied.
const fn element_bytes(transfer: Transfer) -> usize {
    match transfer {
        Transfer::Copied => ELEMENT_BYTES,
        Transfer::Registered => HEADER_BYTES,
    }
}

/// An element of a PREP or COMMIT. For zero copy it names the tag as the index in the ring's table
/// where the client's pages shall be.
fn element(tag: u16, buffer: *mut u8, result: i32) -> [u8; ELEMENT_BYTES] {
    let mut bytes = [0; ELEMENT_BYTES];
    bytes[0..2].copy_from_slice(&tag.to_ne_bytes());
    bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
    bytes[4..8].copy_from_slice(&result.to_ne_bytes());
    bytes[8..16].copy_from_slice(&(buffer as u64).to_ne_bytes());
    bytes
}

/// A PREP or COMMIT of these elements, with `struct ublk_batch_io`: q_id u16, flags u16, nr_elem
/// u16, elem_bytes u8, the rest zero.
fn command(operation: u32, queue: u16, transfer: Transfer, elements: &[u8]) -> Entry {
    let flags = if transfer == Transfer::Copied { sys::UBLK_BATCH_F_HAS_BUF_ADDR as u16 } else { 0 };
    let count = (elements.len() / element_bytes(transfer)) as u16;
    let mut bytes = [0; 16];
    bytes[0..2].copy_from_slice(&queue.to_ne_bytes());
    bytes[2..4].copy_from_slice(&flags.to_ne_bytes());
    bytes[4..6].copy_from_slice(&count.to_ne_bytes());
    bytes[6] = element_bytes(transfer) as u8;
    let address = Some(elements.as_ptr() as u64);
    opcode::UringCmd16::new(types::Fixed(0), operation).addr(address).cmd(bytes).build()
}

/// A FETCH, whose elements are tags, into buffers of the group.
fn fetch(queue: u16) -> Entry {
    let mut bytes = [0; 16];
    bytes[0..2].copy_from_slice(&queue.to_ne_bytes());
    bytes[6] = size_of::<u16>() as u8;
    let entry = opcode::UringCmd16::new(types::Fixed(0), sys::UBLK_U_IO_FETCH_IO_CMDS).cmd(bytes).build();
    // SAFETY: an entry is a `struct io_uring_sqe`, 64 bytes of integers; the size is checked by the compiler.
    let mut bytes: [u8; 64] = unsafe { std::mem::transmute(entry.flags(squeue::Flags::BUFFER_SELECT)) };
    bytes[AT_COMMAND_FLAGS..][..4].copy_from_slice(&MULTISHOT.to_ne_bytes());
    bytes[AT_GROUP..][..2].copy_from_slice(&GROUP.to_ne_bytes());
    // SAFETY: as above.
    unsafe { std::mem::transmute::<[u8; 64], Entry>(bytes) }
}

/// The buffers into which the kernel writes tags, and their ring.
struct TagBuffers {
    /// Unmapped only after the buffers were unregistered.
    memory: ManuallyDrop<Mapping>,
    tail: u16,
}

impl TagBuffers {
    fn register(ring: &IoUring) -> Outcome<Self> {
        let memory = Mapping::new(MEMORY_BYTES).or_fail(Class::Resource, "cannot map the memory for tags")?;
        // SAFETY: the ring of buffers stays until `drop`, which unregisters it first.
        unsafe { ring.submitter().register_buf_ring_with_flags(memory.at(0).as_ptr() as u64, BUFFERS, GROUP, 0) }
            .or_fail(Class::Resource, "cannot register the memory for tags")?;
        let mut buffers = Self { memory: ManuallyDrop::new(memory), tail: 0 };
        (0..BUFFERS).for_each(|buffer| buffers.free(buffer));
        Ok(buffers)
    }

    /// Reads the tags in the first `bytes` of a buffer.
    fn read(&self, buffer: u16, bytes: usize) -> &[u16] {
        assert!(buffer < BUFFERS && bytes <= BUFFER_BYTES, "{bytes} bytes in buffer {buffer}");
        // SAFETY: the buffer lies in the mapping, aligned. The kernel does not write to it before
        // `free`, which takes `&mut self`.
        unsafe { std::slice::from_raw_parts(self.buffer(buffer).cast().as_ptr(), bytes / size_of::<u16>()) }
    }

    /// Gives a buffer to the kernel.
    fn free(&mut self, buffer: u16) {
        let base = self.memory.at(0).cast::<types::BufRingEntry>();
        // SAFETY: indices below BUFFERS lie in the first page of the mapping. The kernel reads the
        // entry only once the tail has passed it. The tail stands in the page of the entries,
        // aligned, and is shared with the kernel, so it is written as an atomic.
        unsafe {
            let entry = &mut *base.add(usize::from(self.tail % BUFFERS)).as_ptr();
            entry.set_addr(self.buffer(buffer).as_ptr() as u64);
            entry.set_len(BUFFER_BYTES as u32);
            entry.set_bid(buffer);
            self.tail = self.tail.wrapping_add(1);
            let tail = types::BufRingEntry::tail(base.as_ptr()).cast_mut();
            AtomicU16::from_ptr(tail).store(self.tail, Ordering::Release);
        }
    }

    fn buffer(&self, buffer: u16) -> NonNull<u8> {
        self.memory.at(RING_BYTES + usize::from(buffer) * BUFFER_BYTES)
    }
}

impl Drop for TagBuffers {
    /// Unregisters first: a FETCH that is still in flight then finds no buffer, and delivers
    /// nothing any more.
    fn drop(&mut self) {
        let unregistered = libublk::with_task_io_ring_mut(|ring| ring.submitter().unregister_buf_ring(GROUP));
        if unregistered.is_ok() {
            // SAFETY: dropped here only, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(entry: Entry) -> [u8; 64] {
        // SAFETY: as in `fetch`.
        unsafe { std::mem::transmute(entry) }
    }

    #[test]
    fn an_element_is_laid_out_as_the_driver_reads_it() {
        // linux/ublk_cmd.h: the address comes right after the header, and the header begins with tag and index.
        assert_eq!(size_of::<sys::ublk_elem_header>(), HEADER_BYTES);
        let element = element(0x0102, 0x1000 as *mut u8, -5);
        assert_eq!(element[0..2], 0x0102_u16.to_ne_bytes());
        assert_eq!(element[2..4], 0x0102_u16.to_ne_bytes());
        assert_eq!(element[4..8], (-5_i32).to_ne_bytes());
        assert_eq!(element[8..16], 0x1000_u64.to_ne_bytes());
    }

    #[test]
    fn a_commit_tells_how_many_elements_there_are_and_how_long_each_is() {
        // The driver refuses a length that does not go with the flags, and reads past the end for a wrong count.
        let elements = [0; 3 * ELEMENT_BYTES];
        let bytes = bytes_of(command(sys::UBLK_U_IO_COMMIT_IO_CMDS, 7, Transfer::Copied, &elements));
        assert_eq!(bytes[16..24], (elements.as_ptr() as u64).to_ne_bytes());
        assert_eq!(bytes[48..55], [7, 0, 2, 0, 3, 0, 16]);
        let elements = [0; 2 * HEADER_BYTES];
        let bytes = bytes_of(command(sys::UBLK_U_IO_COMMIT_IO_CMDS, 7, Transfer::Registered, &elements));
        assert_eq!(bytes[48..55], [7, 0, 0, 0, 2, 0, 8]);
    }

    #[test]
    fn a_fetch_is_multishot_and_takes_buffers_of_the_group() {
        // Without either flag the driver refuses it.
        let bytes = bytes_of(fetch(7));
        assert_eq!(bytes[1] & (1 << 5), 1 << 5, "IOSQE_BUFFER_SELECT");
        assert_eq!(bytes[AT_COMMAND_FLAGS..][..4], 2_u32.to_ne_bytes());
        assert_eq!(bytes[AT_GROUP..][..2], GROUP.to_ne_bytes());
        assert_eq!(bytes[48..56], [7, 0, 0, 0, 0, 0, 2, 0]);
    }
}
