//! Where the bytes of a device are.
//!
//! ```text
//!   Backend   opened once, shared by the queues of a device: geometry, lock, size
//!      └─ Lane   one for each queue: takes a request, says what comes of it
//!                  Done     answered on the spot (null; memory with a buffer)
//!                  Submit   an entry for the queue's ring (file, block; memory with the client's pages); its result comes
//!                           back through `settle`
//! ```
//!
//! A lane never waits for a device: what could wait goes through the ring. Results are those of the backend: a part is
//! continued until the whole is done, an error keeps its number. Throttling is over when a request arrives here.
//!
//! Each lane has the file open for itself ([`place::again`]): the kernel tells a failed write-back once to each opening, so a
//! flush through one queue cannot eat the error that a flush through another should have had. And the ring does not keep the
//! file among its fixed ones: what is registered beside the character device would keep that open as long as an entry is
//! under way, and the id of a removed device with it.

pub mod block;
mod epoch;
pub mod file;
mod limits;
pub mod memory;
pub mod null;
pub mod place;
mod range;
mod way;

use nix::errno::Errno;
use throttle_core::cost::Operation;
use ublk_throttle_config::{Backend as Description, Direct};

use crate::error::Outcome;
use crate::ublk::params::Geometry;
use crate::ublk::queue::Entry;

/// One request, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// Where it begins.
    pub offset: u64,
    /// How long it is; 0 for a flush.
    pub length: u64,
    /// A write that must be durable when it completes.
    pub is_fua: bool,
    /// Write-zeroes that must keep the space allocated.
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

/// Where the data of a request is.
#[derive(Debug)]
pub enum Data<'a> {
    /// In the buffer of its tag, of [`Request::data_length`].
    Buffer(&'a mut [u8]),
    /// In the ring's table of buffers, under this number: the pages of the client. Only for a backend that
    /// [takes it](Backend::takes_registered).
    Registered(u16),
}

/// What comes of a request.
#[derive(Debug)]
pub enum Step {
    /// It is finished, in full length or with an error.
    Done(Result<(), Errno>),
    /// The backend needs this entry on the ring.
    Submit(Entry),
}

/// The bytes of one device.
pub trait Backend: Send + Sync {
    /// Its shape when it was opened. Nothing but the size changes.
    fn geometry(&self) -> Geometry;

    /// The part of one queue.
    fn lane(&self, depth: u16) -> Outcome<Box<dyn Lane>>;

    /// Makes room for a device of `size` bytes, where it can. Never takes away what is there.
    fn resize(&self, size: u64) -> Outcome<()>;

    /// Whether its lanes take [`Data::Registered`]: those that hand data to the ring.
    fn takes_registered(&self) -> bool {
        false
    }

    /// Whether it looks at what is written and fills what is read. If not, the data of a write is gone when it is delivered, and that
    /// of a read is zero.
    fn wants_data(&self) -> bool {
        true
    }

    /// Whether it goes around the page cache; `None` where there is none.
    fn is_direct(&self) -> Option<bool> {
        None
    }

    /// The file behind it: its device and inode number, for whoever wants to know whether the path still leads there.
    fn identity(&self) -> Option<(u64, u64)> {
        None
    }

    /// What is to be told when a new device begins to use it.
    fn remarks(&self) -> &[Remark] {
        &[]
    }
}

/// What the user of a backend may not have meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// In the log: `W-…`.
    pub code: &'static str,
    /// In words.
    pub text: String,
}

/// A backend as one queue thread uses it.
pub trait Lane {
    /// A request begins: it is issued next, perhaps more than once.
    fn begin(&mut self, _tag: u16, _request: &Request) {}

    /// Does the rest of a request of which `done` bytes are done, 0 for a new one. `data` is all of it.
    fn issue(&mut self, tag: u16, request: &Request, data: Data<'_>, done: usize) -> Step;

    /// The outcome of a request that went through the ring, as its client is to see it.
    fn settle(&mut self, _tag: u16, _request: &Request, outcome: Result<(), Errno>) -> Result<(), Errno> {
        outcome
    }
}

/// What the completion of an entry means for its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Finished.
    Done(Result<(), Errno>),
    /// So many bytes are done; [`Lane::issue`] has to be called for the rest.
    Continue(usize),
    /// The kernel had no thread for it: [`Lane::issue`] has to be called again, a moment later.
    Again,
}

/// Reads the `result` of an entry (bytes or -errno) of a request that had `done` bytes done.
pub fn progress(request: &Request, done: usize, result: i32) -> Progress {
    if result < 0 {
        return match Errno::from_raw(-result) {
            // The kernel gave up waiting, nothing happened: again from the same place.
            Errno::EINTR => Progress::Continue(done),
            // Only who has asked for it cancels an entry, and we do not: a flush or a buffered write needs a thread of the kernel,
            // and the host or our control group has reached its limit of threads.
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
        // A file shorter than the device, or a medium that takes nothing: going on would go on for ever.
        _ if result == 0 => Progress::Done(Err(Errno::EIO)),
        part => Progress::Continue(part),
    }
}

/// An error as a client may see it. EAGAIN would make the block layer try for ever; ENODEV is the mark of an aborted
/// command between kernel and server. EBUSY is a lack of resources to the block layer, which then waits for one.
pub fn presentable(errno: Errno) -> Errno {
    match errno {
        Errno::EAGAIN | Errno::ENODEV | Errno::EBUSY => Errno::EIO,
        other => other,
    }
}

/// Opens what the configuration describes, for a device with logical blocks of `block` bytes if that was said.
pub fn open(description: &Description, is_read_only: bool, block: Option<u32>) -> Outcome<Box<dyn Backend>> {
    let is_shared = description.is_shared();
    Ok(match description {
        Description::File { path, size, create, direct, .. } => {
            let (size, create, direct) = (*size, *create, *direct);
            Box::new(file::open(path, &file::Wanted { size, create, direct, is_read_only, is_shared, block })?)
        }
        Description::Block { path, direct, .. } => {
            // Every block device has it.
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
        // The kernel would take a short write for a whole one on some versions: data lost without a word.
        assert_eq!(progress(&READ, 0, 1024), Progress::Continue(1024));
        assert_eq!(progress(&READ, 1024, 3072), Progress::Done(Ok(())));
    }

    #[test]
    fn nothing_read_is_an_error() {
        // A file truncated below the device: without this the rest of the buffer would be handed out.
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
        // fallocate and fsync answer 0, whatever the length of the range.
        let discard = Request { operation: Operation::Discard, length: 1 << 30, ..READ };
        assert_eq!(progress(&discard, 0, 0), Progress::Done(Ok(())));
    }
}
