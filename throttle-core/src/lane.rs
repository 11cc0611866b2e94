//! The lane of a request: the set of buckets that it waits for, all that the scheduler needs of its
//! kind.
//!
//! | lane           | waits for                                    | requests                              |
//! |----------------|----------------------------------------------|---------------------------------------|
//! | read           | bps-total, bps-read, iops-total, iops-read   | reads                                 |
//! | read, no data  | iops-total, iops-read                        | reads charged as operations only      |
//! | write          | bps-total, bps-write, iops-total, iops-write | writes                                |
//! | write, no data | iops-total, iops-write                       | discard, write-zeroes, flush, charged |
//! |                |                                              | as operations only                    |
//!
//! All requests of a lane are ready at the same instant, regardless of their sizes, because a
//! bucket does not look at the size of the request that it takes.

use crate::bits::ones;
use crate::cost::{Cost, Direction};

/// A set of requests that wait for the same buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lane(u8);

impl Lane {
    /// The number of lanes.
    pub const COUNT: usize = 4;

    /// All lanes, in index order.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT as u8).map(Self)
    }

    /// The lane of a request that is charged `cost`, which must not be free.
    pub fn of(cost: &Cost) -> Self {
        debug_assert!(cost.is_operation);
        Self(cost.direction as u8 * 2 + u8::from(cost.bytes == 0))
    }

    /// The direction of its requests.
    pub const fn direction(self) -> Direction {
        if self.0 < 2 { Direction::Read } else { Direction::Write }
    }

    /// A cost that waits for the same buckets as every request in this lane.
    pub const fn probe(self) -> Cost {
        Cost { direction: self.direction(), is_operation: true, bytes: (1 - self.0 % 2) as u64 }
    }

    /// For arrays with an element for each lane.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A set of lanes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lanes(u8);

impl Lanes {
    /// Adds a lane.
    pub const fn insert(&mut self, lane: Lane) {
        self.0 |= 1 << lane.0;
    }

    /// Whether the set has the lane.
    pub const fn contains(self, lane: Lane) -> bool {
        self.0 & (1 << lane.0) != 0
    }

    /// The lanes in either set.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The lanes of the set, in index order.
    pub fn iter(self) -> impl Iterator<Item = Lane> {
        ones(self.0).map(Lane)
    }
}

impl FromIterator<Lane> for Lanes {
    fn from_iter<I: IntoIterator<Item = Lane>>(lanes: I) -> Self {
        let mut all = Self::default();
        lanes.into_iter().for_each(|lane| all.insert(lane));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_each_lane_that_was_put_in() {
        for bits in 0..1_u8 << Lane::COUNT {
            let wanted: Vec<Lane> = Lane::all().filter(|lane| bits & 1 << lane.0 != 0).collect();
            let lanes: Lanes = wanted.iter().rev().copied().collect();
            assert_eq!(lanes.iter().collect::<Vec<_>>(), wanted);
            assert!(Lane::all().all(|lane| lanes.contains(lane) == wanted.contains(&lane)));
            assert_eq!(lanes.or(Lanes(0b0101)).0, bits | 0b0101);
        }
    }
}
