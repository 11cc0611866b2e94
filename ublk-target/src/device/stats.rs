//! Counts and times of a device, which only grow: for `stats`, in total or over an interval.

use serde::{Deserialize, Serialize};

use crate::histogram::Histogram;

/// The counts of one kind of operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationStats {
    /// Requests that went to the backend.
    pub requests: u64,
    /// Sum of the lengths of their ranges, in bytes.
    pub bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// All counts and times since the start of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStats {
    /// Reads.
    pub read: OperationStats,
    /// Writes.
    pub write: OperationStats,
    /// Flushes.
    pub flush: OperationStats,
    /// Discards.
    pub discard: OperationStats,
    /// Write-zeroes.
    pub write_zeroes: OperationStats,
    /// Requests that a limit held.
    pub held_total: u64,
    /// The times for which requests were held. A request that was not held does not count.
    pub wait: Histogram,
    /// The times from the hand-over of a request to the backend until its answer.
    pub service: Histogram,
    /// The times from the deadline that a queue thread waited for until it polled the gate. Counted
    /// for each deadline, not for each request.
    #[serde(default)]
    pub lateness: Histogram,
}

impl DeviceStats {
    /// The operations with their names, in the order of a table.
    pub fn operations(&self) -> [(&'static str, OperationStats); 5] {
        [
            ("read", self.read),
            ("write", self.write),
            ("flush", self.flush),
            ("discard", self.discard),
            ("write-zeroes", self.write_zeroes),
        ]
    }

    /// The sum over all operations.
    pub fn total(&self) -> OperationStats {
        let sum = |of: fn(&OperationStats) -> u64| self.operations().iter().map(|(_, stats)| of(stats)).sum();
        OperationStats { requests: sum(|of| of.requests), bytes: sum(|of| of.bytes), errors: sum(|of| of.errors) }
    }

    /// Adds the counts and times of a second device or queue.
    pub fn add(&mut self, other: &Self) {
        let all = other.operations();
        for (mine, (_, theirs)) in self.operations_mut().into_iter().zip(all) {
            mine.requests += theirs.requests;
            mine.bytes += theirs.bytes;
            mine.errors += theirs.errors;
        }
        self.held_total += other.held_total;
        self.wait.add(&other.wait);
        self.service.add(&other.service);
        self.lateness.add(&other.lateness);
    }

    /// The difference from `earlier`, an earlier state of the same counts.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut rest = self.clone();
        let all = earlier.operations();
        for (mine, (_, theirs)) in rest.operations_mut().into_iter().zip(all) {
            mine.requests = mine.requests.saturating_sub(theirs.requests);
            mine.bytes = mine.bytes.saturating_sub(theirs.bytes);
            mine.errors = mine.errors.saturating_sub(theirs.errors);
        }
        rest.held_total = rest.held_total.saturating_sub(earlier.held_total);
        rest.wait = self.wait.since(&earlier.wait);
        rest.service = self.service.since(&earlier.service);
        rest.lateness = self.lateness.since(&earlier.lateness);
        rest
    }

    /// In the order of [`Self::operations`].
    pub fn operations_mut(&mut self) -> [&mut OperationStats; 5] {
        [&mut self.read, &mut self.write, &mut self.flush, &mut self.discard, &mut self.write_zeroes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_the_difference_of_two_states() {
        let lateness = Histogram::from_slots([1, 1].into_iter());
        let mut first = DeviceStats { held_total: 1, lateness, ..DeviceStats::default() };
        first.read = OperationStats { requests: 10, bytes: 40_960, errors: 1 };
        let second = DeviceStats {
            write: OperationStats { requests: 2, bytes: 8192, errors: 0 },
            held_total: 3,
            lateness: Histogram::from_slots([0, 5].into_iter()),
            ..DeviceStats::default()
        };
        let mut both = first.clone();
        both.add(&second);
        assert_eq!(both.total(), OperationStats { requests: 12, bytes: 49_152, errors: 1 });
        assert_eq!(both.since(&first), second);
    }
}
