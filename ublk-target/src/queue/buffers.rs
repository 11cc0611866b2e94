//! The memory that data passes through: one buffer for each tag of a queue.
//!
//! ```text
//!   mapping  │ tag 0 │ tag 1 │ tag 2 │ …            each of request_bytes_max, page aligned, zero at first
//! ```
//!
//! The kernel copies the data of a write in before it delivers the request, and the data of a read out at the commit. Pages
//! take up memory only once they are touched. Whoever commits a read must have filled all of its length: the rest would be
//! the data of an earlier request.

#![allow(unsafe_code, reason = "an anonymous mapping and slices of it; tags keep the slices apart")]

use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::error::{Class, OrFail, Outcome};

/// The buffers of a queue.
pub struct Buffers {
    base: NonNull<u8>,
    each: usize,
    depth: u16,
}

impl Buffers {
    /// Maps `depth` buffers of `each` bytes, a multiple of the page size.
    pub fn map(depth: u16, each: u32) -> Outcome<Self> {
        let each = each as usize;
        let length = NonZeroUsize::new(each * usize::from(depth)).expect("depth and buffer are at least 1");
        let (access, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
        // SAFETY: mmap(2): a new anonymous mapping, at an address the kernel chooses, overlaps nothing.
        let base = unsafe { mmap_anonymous(None, length, access, flags | MapFlags::MAP_NORESERVE) }
            .or_fail(Class::Resource, format!("cannot map {length} bytes of buffers ({depth} requests of {each})"))?;
        Ok(Self { base: base.cast(), each, depth })
    }

    /// The address of the buffer of `tag`, for the kernel.
    pub fn address(&self, tag: u16) -> *mut u8 {
        assert!(tag < self.depth, "tag {tag} of {}", self.depth);
        // SAFETY: below `depth` buffers of `each` bytes the address lies in the mapping.
        unsafe { self.base.as_ptr().add(usize::from(tag) * self.each) }
    }

    /// The first `length` bytes of the buffer of `tag`.
    ///
    /// Only to be called while the tag is ours, that is after delivery and before the commit, with no backend entry of it
    /// outstanding: then neither the kernel nor anyone else touches them.
    pub fn slice(&mut self, tag: u16, length: usize) -> &mut [u8] {
        assert!(length <= self.each, "{length} bytes in a buffer of {}", self.each);
        // SAFETY: `length` bytes from there are in the mapping and initialised (zero at first); `&mut self` keeps every
        // other slice away, and the rule above the kernel.
        unsafe { std::slice::from_raw_parts_mut(self.address(tag), length) }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: munmap(2) of exactly what `map` mapped; no slice outlives `self`. Cannot fail for a whole mapping.
        let _ = unsafe { munmap(self.base.cast(), self.each * usize::from(self.depth)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_aligned_and_apart() {
        // O_DIRECT needs the alignment; a fresh buffer must not show old memory to a client.
        let mut buffers = Buffers::map(3, 8192).unwrap();
        for tag in 0..3 {
            assert_eq!(buffers.address(tag) as usize % 4096, 0);
            assert!(buffers.slice(tag, 8192).iter().all(|byte| *byte == 0));
            buffers.slice(tag, 8192).fill(tag as u8 + 1);
        }
        assert_eq!(buffers.slice(0, 8192)[8191], 1);
        assert_eq!(buffers.slice(1, 8192)[0], 2);
    }
}
