//! A histogram of waits for percentiles, in bounded space.
//!
//! ```text
//!   waits below 512 ns     a slot each
//!   512 … 1023 ns          256 slots of 2 ns
//!   1024 … 2047 ns         256 slots of 4 ns, and so on: 256 slots for each power of two
//! ```
//!
//! So a percentile is rounded up by at most 1/256 = 0.4 %, and a million requests take no more
//! memory than a hundred. The largest wait is kept exactly.

/// Slots for each power of two.
const SLOTS: u64 = 256;

/// Counts of waits in nanoseconds.
#[derive(Clone, Debug, Default)]
pub(super) struct Histogram {
    /// Counts by slot, up to the slot of the largest wait.
    counts: Vec<u64>,
    count: u64,
    max: u64,
}

impl Histogram {
    /// Counts a wait.
    pub fn add(&mut self, wait_ns: u64) {
        let slot = slot(wait_ns);
        if slot >= self.counts.len() {
            self.counts.resize(slot + 1, 0);
        }
        self.counts[slot] += 1;
        self.count += 1;
        self.max = self.max.max(wait_ns);
    }

    /// The wait that `percent` of all requests did not exceed; 0 for an empty histogram.
    pub fn percentile(&self, percent: u64) -> u64 {
        let wanted = (u128::from(self.count) * u128::from(percent)).div_ceil(100);
        let mut seen = 0;
        for (slot, count) in self.counts.iter().enumerate() {
            seen += u128::from(*count);
            if seen >= wanted {
                return last_of(slot).min(self.max);
            }
        }
        self.max
    }

    /// The longest wait.
    pub fn max(&self) -> u64 {
        self.max
    }
}

/// The slot of a wait: its highest 9 bits, offset by the number of slots for shorter waits.
fn slot(wait_ns: u64) -> usize {
    let shift = (u64::BITS - wait_ns.leading_zeros()).saturating_sub(9);
    (u64::from(shift) * SLOTS + (wait_ns >> shift)) as usize
}

/// The longest wait of a slot.
fn last_of(slot: usize) -> u64 {
    let slot = slot as u64;
    if slot < 2 * SLOTS {
        return slot;
    }
    let shift = slot / SLOTS - 1;
    let first = (slot - shift * SLOTS) << shift;
    first + ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wait_is_in_a_slot_that_ends_within_half_a_percent_above_it() {
        for power in 0..64 {
            for wait in [1_u64 << power, (1 << power) + (1 << power) / 3, (1 << power) - 1, u64::MAX] {
                let last = last_of(slot(wait));
                assert!(last >= wait && last - wait <= wait / 256, "{wait}: {last}");
                assert_eq!(slot(last), slot(wait));
            }
        }
    }

    #[test]
    fn slots_follow_each_other_without_a_gap() {
        for wait in (0..100_000).chain([(1 << 40) - 1, (1 << 63) - 1]) {
            let next = slot(last_of(slot(wait)) + 1);
            assert_eq!(next, slot(wait) + 1);
        }
    }

    #[test]
    fn percentiles_are_those_of_a_sorted_list() {
        // The nearest-rank definition: of 200 waits the 50th percentile is the 100th.
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentile(99), 0);
        (1..=200).rev().for_each(|wait| histogram.add(wait));
        assert_eq!([50, 90, 99, 100].map(|percent| histogram.percentile(percent)), [100, 180, 198, 200]);
        histogram.add(1_000_003);
        assert_eq!(histogram.max(), 1_000_003);
        assert_eq!(histogram.percentile(100), 1_000_003);
    }
}
