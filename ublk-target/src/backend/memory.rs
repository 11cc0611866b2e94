//! A backend in memory: a file without a name (memfd).
//!
//! ```text
//!   pages of the client   READ_FIXED, WRITE_FIXED, which the ring does at once   one copy, no buffer
//!   buffer of the tag     pread, pwrite, on the spot                             two copies
//! ```
//!
//! Memory never blocks: with the data in the tag's buffer already, a system call costs less than a
//! round through the ring. Pages come with the first write and go with a discard; all of them are
//! gone with the device.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use throttle_core::cost::Operation;

use super::{Backend, Data, Lane, Request, Step, place, presentable, range};
use crate::error::{Class, OrFail, Outcome};
use crate::ublk::params::{Discard, Geometry, Hints};

/// A piece of memory.
pub struct Memory {
    memory: File,
    geometry: Geometry,
}

/// Makes `size` bytes of memory that read as zeros.
pub fn open(size: u64, is_read_only: bool, block: Option<u32>) -> Outcome<Memory> {
    let memory = memfd_create(c"ublk-throttle", MFdFlags::MFD_CLOEXEC)
        .map(File::from)
        .or_fail(Class::Resource, "cannot make a memory device")?;
    memory.set_len(size).or_fail(Class::Backing, format!("memory of {size} bytes"))?;
    let geometry = Geometry {
        size,
        logical_block: block.unwrap_or(512),
        physical_block: 4096,
        memory_alignment: 1,
        is_read_only,
        has_volatile_cache: false,
        discard: Some(Discard { granularity: 4096, bytes_max: u64::MAX }),
        write_zeroes_bytes_max: u64::MAX,
        hints: Hints::NONE,
    };
    Ok(Memory { memory, geometry })
}

impl Backend for Memory {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn lane(&self, _depth: u16) -> Outcome<Box<dyn Lane>> {
        Ok(Box::new(MemoryLane { memory: place::again(&self.memory)? }))
    }

    fn takes_registered(&self) -> bool {
        true
    }

    fn resize(&self, size: u64) -> Outcome<()> {
        // The file only ever grows: data behind the end of a device that shrank is there again if
        // it grows.
        let length = self.memory.metadata().or_fail(Class::Backing, "memory")?.len();
        if size <= length {
            return Ok(());
        }
        self.memory.set_len(size).or_fail(Class::Backing, format!("memory of {size} bytes"))
    }
}

struct MemoryLane {
    memory: File,
}

impl Lane for MemoryLane {
    fn issue(&mut self, _tag: u16, request: &Request, data: Data<'_>, done: usize) -> Step {
        let result = match (request.operation, data) {
            (Operation::Read, Data::Buffer(data)) => self.memory.read_exact_at(data, request.offset),
            (Operation::Write, Data::Buffer(data)) => self.memory.write_all_at(data, request.offset),
            (Operation::Read, data) => return Step::Submit(range::read(&self.memory, request, data, done)),
            (Operation::Write, data) => return Step::Submit(range::write(&self.memory, request, data, done)),
            (Operation::Flush, _) => Ok(()),
            // Memory does not guarantee its space, so a hole also serves write-zeroes that keep the
            // space.
            (Operation::Discard | Operation::WriteZeroes { .. }, _) => punch(&self.memory, request).map_err(Into::into),
        };
        Step::Done(result.map_err(|cause| match cause.raw_os_error() {
            Some(code) => presentable(Errno::from_raw(code)),
            None => Errno::EIO,
        }))
    }
}

fn punch(memory: &File, request: &Request) -> Result<(), Errno> {
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(memory, hole, request.offset as i64, request.length as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issue(lane: &mut dyn Lane, operation: Operation, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let length = data.len() as u64;
        let request = Request { operation, offset, length, is_fua: false, keeps_space: false };
        match lane.issue(0, &request, Data::Buffer(data), 0) {
            Step::Done(result) => result,
            Step::Submit(_) => panic!("memory is served on the spot"),
        }
    }

    #[test]
    fn what_one_queue_writes_another_reads_until_it_is_discarded() {
        let memory = open(1 << 20, false, None).unwrap();
        let (mut one, mut other) = (memory.lane(1).unwrap(), memory.lane(1).unwrap());
        issue(&mut *one, Operation::Write, 8192, &mut [7; 4096]).unwrap();
        let mut read = [1; 4096];
        issue(&mut *other, Operation::Read, 8192, &mut read).unwrap();
        assert_eq!(read, [7; 4096]);
        issue(&mut *other, Operation::Discard, 8192, &mut [0; 4096]).unwrap();
        issue(&mut *one, Operation::Read, 8192, &mut read).unwrap();
        assert_eq!(read, [0; 4096]);
    }

    #[test]
    fn reading_behind_the_end_is_an_error() {
        // The kernel never sends this; if it did, the buffer must not be handed out unfilled.
        let memory = open(4096, false, None).unwrap();
        assert_eq!(issue(&mut *memory.lane(1).unwrap(), Operation::Read, 4096, &mut [0; 512]), Err(Errno::EIO));
    }
}
