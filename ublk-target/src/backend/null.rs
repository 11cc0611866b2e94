//! Nothing: reads give zeros, writes vanish. For measuring what is above.

use throttle_core::cost::Operation;

use super::{Backend, Data, Lane, Request, Step};
use crate::error::Outcome;
use crate::ublk::params::{Discard, Geometry};

/// A device that keeps nothing.
pub struct Null {
    geometry: Geometry,
}

impl Null {
    /// Of `size` bytes.
    pub const fn new(size: u64, is_read_only: bool, block: Option<u32>) -> Self {
        let logical_block = match block {
            Some(block) => block,
            None => 512,
        };
        let geometry = Geometry {
            size,
            logical_block,
            physical_block: 4096,
            memory_alignment: 1,
            is_read_only,
            has_volatile_cache: false,
            discard: Some(Discard { granularity: 4096, bytes_max: u64::MAX }),
            write_zeroes_bytes_max: u64::MAX,
        };
        Self { geometry }
    }
}

impl Backend for Null {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn lane(&self, depth: u16) -> Outcome<Box<dyn Lane>> {
        Ok(Box::new(NullLane { written: vec![0; depth.into()] }))
    }

    fn resize(&self, _size: u64) -> Outcome<()> {
        Ok(())
    }
}

struct NullLane {
    /// For each tag: how much of its buffer, from the start, may hold the data of a write.
    written: Vec<usize>,
}

impl Lane for NullLane {
    fn issue(&mut self, tag: u16, request: &Request, data: Data<'_>, _done: usize) -> Step {
        let data = data.buffer();
        let written = &mut self.written[usize::from(tag)];
        match request.operation {
            Operation::Write => *written = (*written).max(data.len()),
            // Buffers are zero at first, so only what a write has left needs to be wiped.
            Operation::Read => {
                let dirty = data.len().min(*written);
                data[..dirty].fill(0);
                if dirty == *written {
                    *written = 0;
                }
            }
            Operation::Flush | Operation::Discard | Operation::WriteZeroes { .. } => {}
        }
        Step::Done(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issue(lane: &mut dyn Lane, operation: Operation, data: &mut [u8]) {
        let length = data.len() as u64;
        let request = Request { operation, offset: 0, length, is_fua: false, keeps_space: false };
        assert!(matches!(lane.issue(0, &request, Data::Buffer(data), 0), Step::Done(Ok(()))));
    }

    #[test]
    fn a_read_never_shows_what_was_written_under_the_same_tag() {
        // The buffer is that of the tag: an 8 KiB write, then a short read, then a long one.
        let mut lane = Null::new(1 << 30, false, None).lane(1).unwrap();
        let mut buffer = [9; 8192];
        issue(&mut *lane, Operation::Write, &mut buffer);
        issue(&mut *lane, Operation::Read, &mut buffer[..4096]);
        assert_eq!(buffer[..4096], [0; 4096]);
        issue(&mut *lane, Operation::Read, &mut buffer);
        assert_eq!(buffer, [0; 8192]);
    }
}
