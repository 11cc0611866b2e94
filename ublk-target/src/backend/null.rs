//! Nothing: reads give zeros, writes vanish. For measuring what is above.

use super::{Backend, Data, Lane, Request, Step};
use crate::error::Outcome;
use crate::ublk::params::{Discard, Geometry, Hints};

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
            hints: Hints::NONE,
        };
        Self { geometry }
    }
}

impl Backend for Null {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn lane(&self, _depth: u16) -> Outcome<Box<dyn Lane>> {
        Ok(Box::new(NullLane))
    }

    fn wants_data(&self) -> bool {
        false
    }

    fn resize(&self, _size: u64) -> Outcome<()> {
        Ok(())
    }
}

struct NullLane;

impl Lane for NullLane {
    fn issue(&mut self, _tag: u16, _request: &Request, _data: Data<'_>, _done: usize) -> Step {
        // What is read is zero already: see `Backend::wants_data`.
        Step::Done(Ok(()))
    }
}
