//! Fast path for queues without any limit above them: their requests skip the lock.
//!
//! ```text
//!   queue thread   ask once ─► Pass(7) ─► is it still 7? Go ─► Go ─► …   one load of a rarely written line
//!   anyone         change limits or places, under the lock ─► 8 ─► the next request asks again
//! ```
//!
//! A request that reads the old count goes as if it had arrived before the change. A thread that
//! knows of the change reads the new count: the count is incremented before the lock is released.

use crate::sync::atomic::{AtomicU64, Ordering};

/// The change count at which a queue had no limit above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pass(u64);

/// Counts the changes after which a queue may get its first limit. Aligned away from the lock's
/// cache lines, which threads write all the time.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Changes(AtomicU64);

impl Changes {
    /// Counts a change. Call it under the lock under which the change is made.
    pub fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// The current pass. Call it under that lock, for a queue without limits above it.
    pub fn pass(&self) -> Pass {
        Pass(self.0.load(Ordering::Relaxed))
    }

    /// Whether no change was counted since the pass was given.
    pub fn has_none_since(&self, Pass(count): Pass) -> bool {
        // Relaxed: no read depends on this load, and a change that this thread knows of is already
        // counted.
        self.0.load(Ordering::Relaxed) == count
    }
}
