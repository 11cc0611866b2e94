//! The memory that data passes through: one buffer for each tag of a queue.
//!
//! ```text
//!   mapping  │ tag 0 │ tag 1 │ tag 2 │ …            each of request_bytes_max, page aligned, zero at first
//! ```
//!
//! The kernel copies the data of a write in before it delivers the request, and the data of a read
//! out at the commit. Pages take up memory only once they are touched (4 KiB at a time, not 2 MiB),
//! and are given back when the queue has not been used for a while. Before a read is committed, all
//! of its length must have been filled: the rest would be the data of an earlier request.
//!
//! For a backend without data ([`crate::backend::Backend::wants_data`]) all tags share one buffer,
//! which is zero at each commit:
//!
//! ```text
//!   one enter    commits, each read copied out ─► wait ─► deliveries, each write copied in      ring of DEFER_TASKRUN
//!   then         every write that was delivered is wiped, before anything is committed
//! ```
//!
//! One buffer stays in the CPU's caches for the next copy, where each of 128 would have to be
//! fetched.
//!
//! A tag whose request is given up while the backend still has its buffer gets a fresh one. The old
//! one stays mapped and is not used again, until all are unmapped together.
//!
//! A queue whose data is not copied ([`crate::ublk::Transfer`]) has no buffers: all addresses are
//! null.

#![allow(unsafe_code, reason = "slices of a mapping; tags keep them apart")]

use std::ptr::NonNull;

use nix::errno::Errno;

use crate::error::{Class, OrFail, Outcome};
use crate::mapping::Mapping;

/// The buffers of a queue.
pub struct Buffers {
    each: usize,
    /// The address of each tag's buffer; empty without buffers.
    of_tag: Vec<NonNull<u8>>,
    /// `Some` if all tags share one buffer: the bytes from its start that have pages of their own.
    /// The rest was never written, so it maps the kernel's zero page; before about Linux 6.13 the
    /// kernel had to look that page up by a slow path for each read that it copied out.
    one: Option<usize>,
    /// The mapping of all buffers, then those of fresh ones. The queue keeps them until no entry is
    /// in flight.
    mappings: Vec<Mapping>,
}

impl Buffers {
    /// Maps `depth` buffers of `each` bytes, a multiple of the page size.
    pub fn map(depth: u16, each: u32) -> Outcome<Self> {
        let each = each as usize;
        let mapping = Mapping::new(each * usize::from(depth))
            .or_fail(Class::Resource, format!("cannot map the buffers of {depth} requests of {each} bytes"))?;
        let of_tag = (0..usize::from(depth)).map(|tag| mapping.at(tag * each)).collect();
        Ok(Self { each, of_tag, one: None, mappings: vec![mapping] })
    }

    /// Maps one buffer of `each` bytes for `depth` tags, for a backend without data.
    pub fn map_one(depth: u16, each: u32) -> Outcome<Self> {
        let each = each as usize;
        let mapping = Mapping::new(each).or_fail(Class::Resource, format!("cannot map a buffer of {each} bytes"))?;
        Ok(Self { each, of_tag: vec![mapping.at(0); depth.into()], one: Some(0), mappings: vec![mapping] })
    }

    /// For a queue that needs no buffers.
    pub const fn none() -> Self {
        Self { each: 0, of_tag: Vec::new(), one: None, mappings: Vec::new() }
    }

    /// To be called for each delivered request, before any further step of any of them: wipes the
    /// data of a write from a buffer that all tags share.
    pub fn delivered(&mut self, tag: u16, is_write: bool, length: u64) {
        let Some(own) = self.one else { return };
        let length = self.each.min(usize::try_from(length).unwrap_or(usize::MAX));
        if is_write || length > own {
            self.slice(tag, length).fill(0);
            self.one = Some(own.max(length));
        }
    }

    /// Gives `tag` a fresh buffer, if it has one. The old one stays mapped, for the entry that has
    /// its address.
    pub fn replace(&mut self, tag: u16) -> Result<(), Errno> {
        if let Some(of_tag) = self.of_tag.get_mut(usize::from(tag)) {
            let mapping = Mapping::new(self.each)?;
            *of_tag = mapping.at(0);
            self.mappings.push(mapping);
        }
        Ok(())
    }

    /// Gives all memory back; it reads as zeros from here on.
    ///
    /// Only to be called while every tag is with the kernel, the last wait has delivered nothing,
    /// and no entry that was given up is in flight: otherwise the data of a write is lost.
    pub fn release(&mut self) {
        self.mappings.iter_mut().for_each(Mapping::release);
        self.one = self.one.map(|_| 0);
    }

    /// The address of the buffer of `tag`, for the kernel; null without buffers.
    pub fn address(&self, tag: u16) -> *mut u8 {
        self.of_tag.get(usize::from(tag)).map_or(std::ptr::null_mut(), |buffer| buffer.as_ptr())
    }

    /// The first `length` bytes of the buffer of `tag`.
    ///
    /// Only to be called while the tag is owned, that is after delivery and before the commit, with
    /// no backend entry of it in flight: then neither the kernel nor any entry touches these bytes.
    pub fn slice(&mut self, tag: u16, length: usize) -> &mut [u8] {
        assert!(length <= self.each, "{length} bytes in a buffer of {}", self.each);
        if length == 0 {
            return &mut [];
        }
        // SAFETY: `length` bytes from there are in a mapping and initialised (zero at first);
        // `&mut self` excludes a second slice, and the rule above excludes the kernel.
        unsafe { std::slice::from_raw_parts_mut(self.address(tag), length) }
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

    #[test]
    fn memory_that_was_given_back_is_zero() {
        let mut buffers = Buffers::map(2, 8192).unwrap();
        buffers.slice(1, 8192).fill(7);
        buffers.release();
        assert!(buffers.slice(1, 8192).iter().all(|byte| *byte == 0));
    }

    #[test]
    fn the_one_buffer_of_all_tags_shows_nobody_what_was_written() {
        // A write under tag 0, then reads under both tags, shorter and longer; also after the
        // memory was given back.
        let mut buffers = Buffers::map_one(2, 8192).unwrap();
        assert_eq!(buffers.address(0), buffers.address(1));
        for _ in 0..2 {
            buffers.slice(0, 8192).fill(9);
            buffers.delivered(1, false, 512);
            buffers.delivered(0, true, 8192);
            for length in [512, 8192] {
                buffers.delivered(1, false, length);
                assert!(buffers.slice(1, length as usize).iter().all(|byte| *byte == 0));
            }
            buffers.release();
        }
        // Longer than any request that is served; the kernel does not send it.
        buffers.delivered(0, true, u64::MAX);
    }

    #[test]
    fn a_queue_without_buffers_has_no_addresses() {
        // The kernel refuses commands that name a buffer which it does not want.
        let mut buffers = Buffers::none();
        assert!(buffers.address(3).is_null());
        assert_eq!(buffers.replace(3), Ok(()));
        assert!(buffers.slice(3, 0).is_empty());
    }

    #[test]
    fn a_fresh_buffer_leaves_the_old_one_where_it_was() {
        // The backend may still write into the old one, or read from it.
        let mut buffers = Buffers::map(2, 4096).unwrap();
        buffers.slice(1, 4096).fill(7);
        let old = buffers.address(1);
        buffers.replace(1).unwrap();
        assert_ne!(buffers.address(1), old);
        assert!(buffers.slice(1, 4096).iter().all(|byte| *byte == 0));
        buffers.slice(1, 4096).fill(8);
        // SAFETY: mapped until `buffers` is dropped, and no slice of it exists.
        assert_eq!(unsafe { old.read() }, 7);
    }
}
