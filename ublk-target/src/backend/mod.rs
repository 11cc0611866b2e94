//! The backends of devices: where their data is kept.
//!
//! ```text
//!   Backend   opened once, shared by the queues of a device: geometry, lock, size
//!      └─ Lane   one for each queue: takes a request, returns the next step
//!                  Done     complete at once (null; memory with a buffer)
//!                  Submit   an entry for the queue's ring (file, block; memory with the client's pages); its result
//!                           comes back through `settle`
//! ```
//!
//! A lane never blocks: an operation that could wait goes through the ring. The backend decides the
//! result: after a partial transfer the rest is issued again, and an error keeps its number.
//! Throttling is over when a request arrives here.
//!
//! Each lane has its own open file description ([`place::again`]). The kernel reports a failed
//! write-back once to each of them, so a flush through one queue cannot take the error that a flush
//! through a second queue should report. The file is not a fixed file of the ring: while an entry on
//! it were in flight, the ring would keep the fixed file beside it open, too: the character device,
//! and with it the id of a removed device.

pub mod block;
mod epoch;
pub mod file;
mod limits;
pub mod memory;
pub mod null;
pub mod place;
mod range;
mod refused;
mod way;

use nix::errno::Errno;
use throttle_core::cost::Operation;
use ublk_throttle_config::{Backend as Description, Direct};

pub use refused::Refused;

use crate::error::Outcome;
use crate::ublk::params::Geometry;
use crate::ublk::queue::Entry;

/// A request, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The operation.
    pub operation: Operation,
    /// The start of its range.
    pub offset: u64,
    /// The length of its range; 0 for a flush.
    pub length: u64,
    /// The write must be durable when it completes.
    pub is_fua: bool,
    /// The write-zeroes must keep the space allocated.
    pub keeps_space: bool,
}

impl Request {
    /// The length of the data in the buffer of its tag.
    pub const fn data_length(&self) -> usize {
        match self.operation {
            Operation::Read | Operation::Write => self.length as usize,
            Operation::Flush | Operation::Discard | Operation::WriteZeroes { .. } => 0,
        }
    }
}

/// The place of the data of a request.
#[derive(Debug)]
pub enum Data<'a> {
    /// The buffer of its tag, [`Request::data_length`] bytes.
    Buffer(&'a mut [u8]),
    /// The pages of the client, under this index in the ring's table of buffers. Only for a backend
    /// that [takes it](Backend::takes_registered).
    Registered(u16),
}

/// The next step of a request.
#[derive(Debug)]
pub enum Step {
    /// The request is complete, in full length or with an error.
    Done(Result<(), Errno>),
    /// The queue must submit this entry to its ring.
    Submit(Entry),
}

/// The storage of one device.
pub trait Backend: Send + Sync {
    /// The geometry at the time of opening. Only the size changes later.
    fn geometry(&self) -> Geometry;

    /// Makes the lane of one queue of `depth` tags.
    fn lane(&self, depth: u16) -> Outcome<Box<dyn Lane>>;

    /// Makes room for a device of `size` bytes, if the backend can. Never removes data.
    fn resize(&self, size: u64) -> Outcome<()>;

    /// Whether the lanes take [`Data::Registered`]: true if they hand data to the ring.
    fn takes_registered(&self) -> bool {
        false
    }

    /// The reason why the pages of a write must not change until it is done, in words; `None` where a
    /// change harms nothing.
    ///
    /// A file system on the device changes pages during their write, unless its disk asks for stable
    /// pages. A ublk disk has no parameter for that.
    fn needs_stable_pages(&self) -> Option<&str> {
        None
    }

    /// Whether the backend uses the data of writes and provides that of reads. If not, the data of
    /// a write is dropped on delivery, and a read returns zeros.
    fn wants_data(&self) -> bool {
        true
    }

    /// Whether I/O bypasses the page cache; `None` if the backend has none.
    fn is_direct(&self) -> Option<bool> {
        None
    }

    /// Device and inode number of the file behind the backend, to check later whether the path
    /// still leads to that file.
    fn identity(&self) -> Option<(u64, u64)> {
        None
    }

    /// The remarks to log when a new device begins to use the backend.
    fn remarks(&self) -> &[Remark] {
        &[]
    }
}

/// A property of a backend that its user may not have intended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// The code in the log: `W-…`.
    pub code: &'static str,
    /// The text of the warning.
    pub text: String,
}

/// The part of a backend that one queue thread uses.
pub trait Lane {
    /// Announces a request, which is issued next, perhaps more than once.
    fn begin(&mut self, _tag: u16, _request: &Request) {}

    /// Continues a request of which `done` bytes are done; 0 for a new one. `data` covers the whole
    /// request.
    fn issue(&mut self, tag: u16, request: &Request, data: Data<'_>, done: usize) -> Step;

    /// The final outcome of a request that went through the ring, for its client.
    fn settle(&mut self, _tag: u16, _request: &Request, outcome: Result<(), Errno>) -> Result<(), Errno> {
        outcome
    }
}

/// The effect of a completed entry on its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The request is complete.
    Done(Result<(), Errno>),
    /// So many bytes are done; [`Lane::issue`] must be called for the rest.
    Continue(usize),
    /// The kernel could not make a thread for the entry; [`Lane::issue`] must be called again, a
    /// moment later.
    Again,
}

/// Interprets the `result` of an entry (bytes or -errno) of a request that had `done` bytes done.
pub fn progress(request: &Request, done: usize, result: i32) -> Progress {
    if result < 0 {
        return match Errno::from_raw(-result) {
            // The kernel stopped waiting before anything happened: continue from the same offset.
            Errno::EINTR => Progress::Continue(done),
            // The daemon cancels no entry. The kernel cancels an entry that needs a worker thread
            // (a flush, a buffered write) when the host or our control group has reached its limit
            // of threads.
            Errno::ECANCELED => Progress::Again,
            errno => Progress::Done(Err(presentable(errno))),
        };
    }
    let length = request.data_length();
    if length == 0 {
        return Progress::Done(Ok(()));
    }
    match done + result as usize {
        all if all >= length => Progress::Done(Ok(())),
        // The file is shorter than the device, or the medium takes no data: a retry would repeat
        // for ever.
        _ if result == 0 => Progress::Done(Err(Errno::EIO)),
        part => Progress::Continue(part),
    }
}

/// The error that a client gets for `errno`. EAGAIN would make the block layer retry for ever;
/// ENODEV means an aborted command between kernel and server; for the block layer, EBUSY is a lack
/// of resources, which it waits for.
pub fn presentable(errno: Errno) -> Errno {
    match errno {
        Errno::EAGAIN | Errno::ENODEV | Errno::EBUSY => Errno::EIO,
        other => other,
    }
}

/// Opens the backend that the configuration describes, for a device with logical blocks of `block`
/// bytes if given.
pub fn open(description: &Description, is_read_only: bool, block: Option<u32>) -> Result<Box<dyn Backend>, Refused> {
    let is_shared = description.is_shared();
    Ok(match description {
        Description::File { path, size, create, direct, .. } => {
            let (size, create, direct) = (*size, *create, *direct);
            Box::new(file::open(path, &file::Wanted { size, create, direct, is_read_only, is_shared, block })?)
        }
        Description::Block { path, direct, .. } => {
            // Every block device supports O_DIRECT.
            let is_direct = *direct != Direct::Off;
            Box::new(block::open(path, &block::Wanted { is_direct, is_read_only, is_shared, block })?)
        }
        Description::Memory { size } => Box::new(memory::open(*size, is_read_only, block)?),
        Description::Null { size } => Box::new(null::Null::new(*size, is_read_only, block)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Request =
        Request { operation: Operation::Read, offset: 0, length: 4096, is_fua: false, keeps_space: false };

    #[test]
    fn f23_a_part_is_continued_and_the_whole_is_done() {
        // Some kernel versions take a short write for a whole one, and data would be lost silently.
        assert_eq!(progress(&READ, 0, 1024), Progress::Continue(1024));
        assert_eq!(progress(&READ, 1024, 3072), Progress::Done(Ok(())));
    }

    #[test]
    fn nothing_read_is_an_error() {
        // The file was truncated below the size of the device. Without the error, the rest of the
        // buffer would reach the client.
        assert_eq!(progress(&READ, 1024, 0), Progress::Done(Err(Errno::EIO)));
    }

    #[test]
    fn errors_keep_their_number_but_for_those_with_another_meaning() {
        assert_eq!(progress(&READ, 0, -libc::ENOSPC), Progress::Done(Err(Errno::ENOSPC)));
        assert_eq!(progress(&READ, 0, -libc::EAGAIN), Progress::Done(Err(Errno::EIO)));
        assert_eq!(progress(&READ, 0, -libc::ENODEV), Progress::Done(Err(Errno::EIO)));
        assert_eq!(progress(&READ, 0, -libc::EBUSY), Progress::Done(Err(Errno::EIO)));
        assert_eq!(progress(&READ, 512, -libc::EINTR), Progress::Continue(512));
        assert_eq!(progress(&READ, 512, -libc::ECANCELED), Progress::Again);
    }

    #[test]
    fn a_request_without_data_is_done_when_its_entry_is() {
        // fallocate and fsync return 0 for a range of any length.
        let discard = Request { operation: Operation::Discard, length: 1 << 30, ..READ };
        assert_eq!(progress(&discard, 0, 0), Progress::Done(Ok(())));
    }
}
