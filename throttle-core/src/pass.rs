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

/// The change count at which a queue had no limit above it, or got a lease ([`crate::lease`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pass(u64);

impl Pass {
    /// The count before any change.
    pub const FIRST: Self = Self(0);

    /// The count after one change.
    #[cfg(test)]
    pub const SECOND: Self = Self(1);
}

/// Counts the changes after which a queue may get its first limit, or a lease may have been charged
/// to buckets that its queue has left. Aligned away from the lock's cache lines, which threads write
/// all the time.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Changes(AtomicU64);

impl Changes {
    /// Counts a change. Call it under the lock under which the change is made.
    pub fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// The current count. Under that lock it is exact. A thread without the lock may read an older
    /// count, but not one older than a change that it knows of: that change is counted before the
    /// lock is released. No read depends on this load, so it is relaxed.
    pub fn pass(&self) -> Pass {
        Pass(self.0.load(Ordering::Relaxed))
    }
}
