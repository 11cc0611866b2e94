//! Leave to go without asking, for a queue that no limit is above.
//!
//! ```text
//!   queue thread   ask once ─► Pass(7) ─► is it still 7? Go ─► Go ─► …   one load of a line that nobody writes
//!   anyone         change limits or places, under the lock ─► 8 ─► the next request asks again
//! ```
//!
//! A request that finds the count as it was goes as if it had come before the change. Who knows that the change was made has the new
//! count: it was counted before the lock was given back.

use crate::sync::atomic::{AtomicU64, Ordering};

/// Given to a queue above which there was no limit when so many changes had been made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pass(u64);

/// Counts the changes after which there may be a limit where there was none. Away from what the lock is made of, which others
/// write all the time.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Changes(AtomicU64);

impl Changes {
    /// To be called under the lock under which the change is made.
    pub fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// To be called under that lock, when no limit is there.
    pub fn pass(&self) -> Pass {
        Pass(self.0.load(Ordering::Relaxed))
    }

    /// Whether nothing has changed since.
    pub fn has_none_since(&self, Pass(count): Pass) -> bool {
        // Relaxed: nothing is read on the strength of it, and a change that one knows of is one that has been counted.
        self.0.load(Ordering::Relaxed) == count
    }
}
