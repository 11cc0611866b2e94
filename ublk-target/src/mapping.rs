//! Anonymous memory for addresses that are passed to the kernel. A mapping shares no page with any further
//! allocation, and reads as zeros until it is written to.

#![allow(unsafe_code, reason = "an anonymous mapping; who slices it keeps the slices apart")]

use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Advice of `madvise(2)`: gives pages back, also those of locked memory. Since Linux 5.18.
const MADV_DONTNEED_LOCKED: libc::c_int = 24;

/// A mapping, unmapped on drop. The owner drops it only after the last use of its addresses.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    length: NonZeroUsize,
}

impl Mapping {
    /// Maps `length` bytes, page aligned and zero. Each page takes up memory from its first use on.
    pub fn new(length: usize) -> Result<Self, Errno> {
        let length = NonZeroUsize::new(length).ok_or(Errno::EINVAL)?;
        let (access, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
        // SAFETY: mmap(2): a new anonymous mapping, at an address the kernel chooses, overlaps nothing.
        let start = unsafe { mmap_anonymous(None, length, access, flags | MapFlags::MAP_NORESERVE) }?;
        // With huge pages, one request of 4 KiB in each buffer of a queue would make the whole mapping
        // resident: 64 MiB for a queue of 128.
        // SAFETY: madvise(2) of the mapping made above. A kernel without huge pages refuses the advice and
        // does not need it.
        unsafe { libc::madvise(start.as_ptr(), length.get(), libc::MADV_NOHUGEPAGE) };
        Ok(Self { start: start.cast(), length })
    }

    /// The address `offset` bytes from the start. Panics unless it lies in the mapping.
    pub fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.length.get(), "byte {offset} of a mapping of {}", self.length);
        // SAFETY: the address lies in the mapping, by the assertion above.
        unsafe { self.start.add(offset) }
    }

    /// Gives all memory back. The mapping then reads as zeros; its data is lost, hence `&mut`.
    pub fn release(&mut self) {
        // SAFETY: madvise(2) of the whole mapping. A kernel that does not know the advice returns an error,
        // and the memory stays in use.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.length.get(), MADV_DONTNEED_LOCKED) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: munmap(2) of exactly the range that was mapped; it cannot fail for a whole mapping.
        let _ = unsafe { munmap(self.start.cast(), self.length.get()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_one_is_refused() {
        // mmap(2) refuses a length of 0 as well, and munmap(2) could not unmap it.
        assert_eq!(Mapping::new(0).unwrap_err(), Errno::EINVAL);
    }

    #[test]
    #[should_panic(expected = "byte 4096 of a mapping of 4096")]
    fn nothing_behind_its_end_has_an_address() {
        let _ = Mapping::new(4096).unwrap().at(4096);
    }
}
