//! A histogram of durations for percentiles, in bounded space. Histograms of queues, devices and
//! groups can be added up.
//!
//! ```text
//!   below 32 ns        a slot each
//!   32 … 63 ns         16 slots of 2 ns
//!   64 … 127 ns        16 slots of 4 ns, and so on: 16 slots for each power of two, up to five hours
//! ```
//!
//! A percentile is the end of its slot: rounded up by at most 1/16 = 6.25 %.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Slots for each power of two.
const EACH: u64 = 16;
/// The last power of two that has slots of its own; longer durations count in its last slot.
const SHIFT_MAX: u32 = 39;

/// The number of slots.
pub const SLOTS: usize = (SHIFT_MAX as usize + 2) * EACH as usize;

/// Counts of durations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Histogram {
    /// Slot → count, for the slots with a count.
    counts: BTreeMap<u16, u64>,
}

impl Histogram {
    /// From the counts of all slots, in their order.
    pub fn from_slots(counts: impl Iterator<Item = u64>) -> Self {
        Self { counts: (0..).zip(counts).filter(|(_, count)| *count > 0).collect() }
    }

    /// The number of durations counted.
    pub fn count(&self) -> u64 {
        self.counts.values().sum()
    }

    /// The duration in nanoseconds that `percent` of all did not exceed; 0 for an empty histogram.
    pub fn percentile(&self, percent: f64) -> u64 {
        let wanted = ((self.count() as f64 * percent / 100.0).ceil() as u64).max(1);
        let mut seen = 0;
        for (slot, count) in &self.counts {
            seen += count;
            if seen >= wanted {
                return last_of(*slot);
            }
        }
        self.max()
    }

    /// The longest duration, in nanoseconds; 0 for an empty histogram.
    pub fn max(&self) -> u64 {
        self.counts.keys().next_back().map_or(0, |slot| last_of(*slot))
    }

    /// Adds the counts of a second histogram.
    pub fn add(&mut self, other: &Self) {
        for (slot, count) in &other.counts {
            *self.counts.entry(*slot).or_default() += count;
        }
    }

    /// The durations counted after `earlier`, an earlier state of the same histogram.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |slot: &u16| earlier.counts.get(slot).copied().unwrap_or(0);
        let later = self.counts.iter().map(|(slot, count)| (*slot, count.saturating_sub(before(slot))));
        Self { counts: later.filter(|(_, count)| *count > 0).collect() }
    }
}

/// The slot of a duration: its highest 5 bits, offset by the number of slots for shorter durations.
pub fn slot(ns: u64) -> usize {
    let shift = (u64::BITS - ns.leading_zeros()).saturating_sub(5);
    if shift > SHIFT_MAX {
        return SLOTS - 1;
    }
    (u64::from(shift) * EACH + (ns >> shift)) as usize
}

/// The longest duration of a slot.
fn last_of(slot: u16) -> u64 {
    // A slot number from the socket may be out of range.
    let slot = u64::from(slot).min(SLOTS as u64 - 1);
    if slot < 2 * EACH {
        return slot;
    }
    let shift = slot / EACH - 1;
    let first = (slot - shift * EACH) << shift;
    first + ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(durations: impl IntoIterator<Item = u64>) -> Histogram {
        let mut counts = [0; SLOTS];
        durations.into_iter().for_each(|ns| counts[slot(ns)] += 1);
        Histogram::from_slots(counts.into_iter())
    }

    #[test]
    fn every_duration_is_in_a_slot_that_ends_within_a_sixteenth_above_it() {
        for power in 0..44 {
            for ns in [1_u64 << power, (1 << power) + (1 << power) / 3, (1 << power) - 1] {
                let last = last_of(slot(ns) as u16);
                assert!(last >= ns && last - ns <= ns / 16, "{ns}: {last}");
                assert_eq!(slot(last), slot(ns));
                assert_eq!(slot(last + 1), (slot(ns) + 1).min(SLOTS - 1), "no gap after {last}");
            }
        }
        assert_eq!(slot(u64::MAX), SLOTS - 1);
    }

    #[test]
    fn percentiles_are_those_of_a_sorted_list_rounded_up() {
        // The nearest-rank definition: of 200 the 50th percentile is the 100th.
        assert_eq!(Histogram::default().percentile(99.0), 0);
        let histogram = of(1..=200);
        for (percent, exact) in [(50.0, 100), (90.0, 180), (99.0, 198), (100.0, 200)] {
            let told = histogram.percentile(percent);
            assert!(told >= exact && told - exact <= exact / 16, "{percent} %: {told}, exactly {exact}");
        }
        assert_eq!(histogram.count(), 200);
    }

    #[test]
    fn what_is_added_up_can_be_told_apart_again() {
        // Sums over queues, and the difference of an interval.
        let (one, other) = (of([5, 100, 100]), of([100, 1 << 50]));
        let mut both = one.clone();
        both.add(&other);
        assert_eq!(both.count(), 5);
        assert_eq!(both.since(&one), other);
        assert_eq!(both.max(), last_of(SLOTS as u16 - 1));
    }

    #[test]
    fn it_travels_as_json() {
        let histogram = of([5, 100, 1 << 30]);
        let text = serde_json::to_string(&histogram).unwrap();
        assert_eq!(serde_json::from_str::<Histogram>(&text).unwrap(), histogram);
    }
}
