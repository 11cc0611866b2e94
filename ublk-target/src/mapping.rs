//! Anonymous memory that the kernel is given addresses of: pages of its own, zero until they are written to.

#![allow(unsafe_code, reason = "an anonymous mapping; who slices it keeps the slices apart")]

use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// `madvise(2)`: gives pages back, also of memory that is locked. Linux 5.18.
const MADV_DONTNEED_LOCKED: libc::c_int = 24;

/// A mapping, unmapped when dropped. Whoever hands its addresses on drops it last.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    length: NonZeroUsize,
}

impl Mapping {
    /// New memory of `length` bytes, page aligned, zero. Takes up memory only where it is touched, a page at a time.
    pub fn new(length: usize) -> Result<Self, Errno> {
        let length = NonZeroUsize::new(length).ok_or(Errno::EINVAL)?;
        let (access, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
        // SAFETY: mmap(2): a new anonymous mapping, at an address the kernel chooses, overlaps nothing.
        let start = unsafe { mmap_anonymous(None, length, access, flags | MapFlags::MAP_NORESERVE) }?;
        // One request of 4 KiB in each buffer of a queue would else take up all of it: 64 MiB for a queue of 128.
        // SAFETY: madvise(2) of what was mapped a line above. A kernel without huge pages refuses it, and needs none of it.
        unsafe { libc::madvise(start.as_ptr(), length.get(), libc::MADV_NOHUGEPAGE) };
        Ok(Self { start: start.cast(), length })
    }

    /// Where `offset` bytes from its start are.
    pub fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.length.get(), "byte {offset} of a mapping of {}", self.length);
        // SAFETY: in the mapping, by the line above.
        unsafe { self.start.add(offset) }
    }

    /// Gives all of its memory back; it reads as zeros from here on. `&mut`: what was there is lost.
    pub fn release(&mut self) {
        // SAFETY: madvise(2) of a whole mapping of ours. Fails where the kernel does not know the advice, and then the memory stays.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.length.get(), MADV_DONTNEED_LOCKED) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: munmap(2) of exactly what was mapped. Cannot fail for whole mappings.
        let _ = unsafe { munmap(self.start.cast(), self.length.get()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_one_is_refused() {
        // mmap(2) does so, too; a length of 0 cannot be unmapped.
        assert_eq!(Mapping::new(0).unwrap_err(), Errno::EINVAL);
    }

    #[test]
    #[should_panic(expected = "byte 4096 of a mapping of 4096")]
    fn nothing_behind_its_end_has_an_address() {
        let _ = Mapping::new(4096).unwrap().at(4096);
    }
}
