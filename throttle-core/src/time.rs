//! The instant that a caller passes in. No code below the queue loop reads a clock.

/// Nanoseconds since an arbitrary start: `CLOCK_MONOTONIC` in the daemon, virtual time in tests.
///
/// Instants of different threads may arrive slightly out of order (each read its clock before it took the lock); every
/// bucket keeps the latest it has seen, so an earlier one gives no credit and takes none away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(u64);

impl Time {
    /// The start of the clock.
    pub const ZERO: Self = Self(0);

    /// The instant `nanos` after the start.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the start.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// The instant `nanos` later; the end of the clock (some 584 years on) stands for everything beyond it.
    #[must_use]
    pub const fn plus_nanos(self, nanos: u64) -> Self {
        Self(self.0.saturating_add(nanos))
    }

    /// Nanoseconds from `earlier` to here, 0 if `earlier` is not earlier.
    pub const fn nanos_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}
