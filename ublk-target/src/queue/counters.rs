//! The counters of a queue: written by its thread alone, read by any thread.
//!
//! An addition is a load and a store, both relaxed, because there is one writer, and a reader wants
//! recent values, not a consistent set. Counting costs no locked instruction and shares no cache
//! line with another queue.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use throttle_core::cost::Operation;
use throttle_core::time::Time;

use crate::device::DeviceStats;
use crate::histogram::{Histogram, SLOTS, slot};

/// An error this recent still counts against the health of a device.
const ERROR_MEMORY: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Counts {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

/// The counters of one queue.
pub struct Counters {
    /// In the order of [`DeviceStats::operations`].
    operations: [Counts; 5],
    held: AtomicU64,
    wait: Box<[AtomicU64]>,
    service: Box<[AtomicU64]>,
    lateness: Box<[AtomicU64]>,
    /// When the backend last answered with success; 0 = never.
    succeeded_at_ns: AtomicU64,
    /// When the backend last answered with an error; 0 = never.
    failed_at_ns: AtomicU64,
}

impl Default for Counters {
    /// All zero.
    fn default() -> Self {
        let slots = || (0..SLOTS).map(|_| AtomicU64::new(0)).collect();
        Self {
            operations: Default::default(),
            held: AtomicU64::new(0),
            wait: slots(),
            service: slots(),
            lateness: slots(),
            succeeded_at_ns: AtomicU64::new(0),
            failed_at_ns: AtomicU64::new(0),
        }
    }
}

impl Counters {
    /// A request goes to the backend; `waited_ns` if it was held before.
    pub fn let_through(&self, operation: Operation, bytes: u64, waited_ns: Option<u64>) {
        let counts = &self.operations[index(operation)];
        add(&counts.requests, 1);
        add(&counts.bytes, bytes);
        if let Some(waited_ns) = waited_ns {
            add(&self.held, 1);
            count(&self.wait, waited_ns);
        }
    }

    /// The backend has answered a request after `service_ns`.
    pub fn answered(&self, service_ns: u64, is_error: bool, now: Time) {
        count(&self.service, service_ns);
        let at = if is_error { &self.failed_at_ns } else { &self.succeeded_at_ns };
        at.store(now.as_nanos(), Ordering::Relaxed);
    }

    /// The thread polls the gate this much after the deadline that it waited for. At most once a
    /// turn, and not for requests that need no deadline.
    pub fn late(&self, lateness_ns: u64) {
        count(&self.lateness, lateness_ns);
    }

    /// A request is answered with an error, from the backend or from the queue itself.
    pub fn failed(&self, operation: Operation) {
        add(&self.operations[index(operation)].errors, 1);
    }

    /// Requests answered with an error so far.
    pub fn errors(&self) -> u64 {
        self.operations.iter().map(|counts| counts.errors.load(Ordering::Relaxed)).sum()
    }

    /// All counters, at about the same moment.
    pub fn snapshot(&self) -> DeviceStats {
        let read = |of: &AtomicU64| of.load(Ordering::Relaxed);
        let histogram = |of: &[AtomicU64]| Histogram::from_slots(of.iter().map(read));
        let mut stats = DeviceStats {
            held_total: read(&self.held),
            wait: histogram(&self.wait),
            service: histogram(&self.service),
            lateness: histogram(&self.lateness),
            ..DeviceStats::default()
        };
        for (told, counts) in stats.operations_mut().into_iter().zip(&self.operations) {
            (told.requests, told.bytes) = (read(&counts.requests), read(&counts.bytes));
            told.errors = read(&counts.errors);
        }
        stats
    }
}

/// Whether the last answer of the backend of these queues was an error, or the last error is less
/// than 10 s ago. A success that is followed by no error for 10 s ends it.
pub fn is_degraded<'a>(queues: impl Iterator<Item = &'a Counters>, now: Time) -> bool {
    let (mut succeeded, mut failed) = (0, 0);
    for queue in queues {
        succeeded = succeeded.max(queue.succeeded_at_ns.load(Ordering::Relaxed));
        failed = failed.max(queue.failed_at_ns.load(Ordering::Relaxed));
    }
    let is_recent = now.as_nanos().saturating_sub(failed) < ERROR_MEMORY.as_nanos() as u64;
    failed != 0 && (is_recent || failed > succeeded)
}

const fn index(operation: Operation) -> usize {
    match operation {
        Operation::Read => 0,
        Operation::Write => 1,
        Operation::Flush => 2,
        Operation::Discard => 3,
        Operation::WriteZeroes { .. } => 4,
    }
}

fn add(to: &AtomicU64, by: u64) {
    to.store(to.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

fn count(slots: &[AtomicU64], ns: u64) {
    add(&slots[slot(ns)], 1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_is_told_by_operation() {
        let counters = Counters::default();
        counters.let_through(Operation::Write, 4096, None);
        counters.let_through(Operation::Write, 512, Some(5_000_000));
        counters.let_through(Operation::Discard, 1 << 30, None);
        counters.failed(Operation::Discard);
        counters.late(70_000);
        let stats = counters.snapshot();
        assert_eq!((stats.write.requests, stats.write.bytes), (2, 4608));
        assert_eq!((stats.discard.requests, stats.discard.errors), (1, 1));
        assert_eq!((stats.held_total, stats.wait.count()), (1, 1));
        let median = stats.wait.percentile(50.0);
        assert!((5_000_000..5_312_500).contains(&median), "{median} ns for 5 ms");
        assert_eq!((stats.lateness.count(), stats.service.count()), (1, 0));
        assert!((70_000..74_375).contains(&stats.lateness.max()), "{} ns for 70 us", stats.lateness.max());
    }

    #[test]
    fn a_backend_that_fails_is_degraded_until_it_has_answered_well_for_a_while() {
        // Both conditions: without new requests a device does not recover from an error. The next
        // success may come to a different queue than the error.
        let (queues, at) = ([Counters::default(), Counters::default()], |s: u64| Time::from_nanos(s * 1_000_000_000));
        let is_degraded = |s| is_degraded(queues.iter(), at(s));
        assert!(!is_degraded(1));
        queues[0].answered(0, true, at(1));
        assert!(is_degraded(60), "its last answer was an error");
        queues[1].answered(0, false, at(60));
        assert!(!is_degraded(60));
        queues[0].answered(0, true, at(61));
        queues[0].answered(0, false, at(62));
        assert!(is_degraded(70));
        assert!(!is_degraded(71));
    }
}
