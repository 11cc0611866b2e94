//! Credit that a queue pays for in advance, so that its requests skip the lock.
//!
//! ```text
//!   far below the limits:   request ─► Go, and 32 more prepaid ─► Go ─► Go ─► … without the lock
//!                                                  └─ ends after 1 ms, or when something is held
//! ```
//!
//! While a tree of groups is *clearly* below its limits (no bucket on the way up more than a
//! sixteenth full), a queue with frequent requests gets a lease: operations and bytes that are
//! charged at once and spent without touching shared state.
//!
//! The error of a lease: its requests were charged up to [`LEASE_NS`] before they go, so a window
//! of time may see up to a sixteenth of a capacity more than `rate · T + capacity + one request`.
//! Unspent credit is lost to the group: at most as much again as was spent, and only while the
//! group is clearly below its limits. Near the limits no lease is given and every decision is
//! exact.

use crate::charge::ChargeTable;
use crate::cost::Operation;
use crate::time::Time;

/// The duration of a lease.
pub(crate) const LEASE_NS: u64 = 1_000_000;

/// A bucket grants a lease only up to 1/16 of its capacity.
pub(crate) const CLEARLY_BELOW: u128 = 16;

/// The smallest lease, in operations: fewer are not worth the bookkeeping.
const OPERATIONS_MIN: u64 = 8;

/// The largest lease, in operations.
const OPERATIONS_MAX: u64 = 4096;

/// Operations and bytes of one direction that a queue wants or has been granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prepaid {
    pub operations: u64,
    pub bytes: u64,
}

/// A granted lease and its terms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grant {
    pub prepaid: Prepaid,
    /// The largest request that counts as one operation; a larger one is not covered by the lease.
    pub size_max: u64,
    /// The charge of each operation.
    pub charges: ChargeTable,
}

/// The lease of a queue for one direction, and the size of the next one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lease {
    grant: Option<Grant>,
    until: Time,
    /// Requests spent since the last grant or refusal.
    spent: u64,
    wants: u64,
    asked_at: Time,
}

impl Lease {
    /// No lease.
    pub const fn none() -> Self {
        Self { grant: None, until: Time::ZERO, spent: 0, wants: 0, asked_at: Time::ZERO }
    }

    /// Whether the lease covers the request, which is then spent. The request must be of this
    /// lease's direction.
    pub fn spend(&mut self, operation: Operation, bytes: u64, now: Time) -> bool {
        let Some(grant) = &mut self.grant else { return false };
        if now >= self.until || bytes > grant.size_max {
            return false;
        }
        let cost = grant.charges.cost(operation, bytes);
        let prepaid = &mut grant.prepaid;
        if prepaid.operations == 0 || prepaid.bytes < cost.bytes {
            return false;
        }
        prepaid.operations -= u64::from(cost.is_operation);
        prepaid.bytes -= cost.bytes;
        self.spent += 1;
        true
    }

    /// The lease to ask for together with a request of `bytes` that is not covered. A queue that
    /// asks again within 1 ms wants twice as much as before (8 to 4096 operations); within 2 ms, if
    /// it spent at least 8, as much as it spent; otherwise nothing.
    pub fn wants(&mut self, bytes: u64, now: Time) -> Option<Prepaid> {
        let since_ns = now.nanos_since(self.asked_at);
        self.asked_at = now;
        self.wants = if since_ns < LEASE_NS {
            (self.wants * 2).clamp(OPERATIONS_MIN, OPERATIONS_MAX)
        } else if self.spent >= OPERATIONS_MIN && since_ns < 2 * LEASE_NS {
            self.spent
        } else {
            0
        };
        self.grant = None;
        self.spent = 0;
        (self.wants > 0).then_some(Prepaid { operations: self.wants, bytes: self.wants.saturating_mul(bytes) })
    }

    /// Takes the lease granted at `now`, or `None` after a refusal.
    pub fn take(&mut self, grant: Option<Grant>, now: Time) {
        self.grant = grant;
        self.until = now.plus_nanos(LEASE_NS);
    }

    /// Ends the lease: a request is held, and later ones may not overtake it.
    pub fn end(&mut self) {
        *self = Self::none();
    }
}

/// The part of `wanted` that fits in `room`, or `None` if that is not worth a lease.
pub(crate) fn within(wanted: Prepaid, room: Prepaid) -> Option<Prepaid> {
    let operations = wanted.operations.min(room.operations);
    let bytes = wanted.bytes.min(room.bytes);
    (operations >= OPERATIONS_MIN && bytes >= wanted.bytes / wanted.operations * OPERATIONS_MIN)
        .then_some(Prepaid { operations, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    const EACH_US: u64 = 10;

    /// Reads of 4 KiB, one per 10 us, until `end_us`; returns how many of them were not covered.
    fn ask(lease: &mut Lease, start_us: u64, end_us: u64) -> u32 {
        let mut asked = 0;
        for us in (start_us..end_us).step_by(EACH_US as usize) {
            let now = Time::from_nanos(us * 1_000);
            if !lease.spend(Operation::Read, 4096, now) {
                asked += 1;
                let grant = lease.wants(4096, now).map(|prepaid| Grant {
                    prepaid,
                    size_max: u64::MAX,
                    charges: ChargeTable::DEFAULT,
                });
                lease.take(grant, now);
            }
        }
        asked
    }

    #[test]
    fn busy_queue_asks_about_once_a_millisecond() {
        // 100 requests a millisecond; doubling from 8 takes a few turns.
        let mut lease = Lease::none();
        ask(&mut lease, 0, 5_000);
        let asked = ask(&mut lease, 5_000, 15_000);
        assert!(asked <= 20, "{asked} of 1000 requests asked");
    }

    #[test]
    fn slow_queue_gets_none() {
        // One request per 2 ms: a lease would only lose credit.
        let mut lease = Lease::none();
        for ms in (10..100).step_by(2) {
            let now = Time::from_nanos(ms * 1_000_000);
            assert!(!lease.spend(Operation::Read, 4096, now));
            assert_eq!(lease.wants(4096, now), None);
        }
    }

    #[test]
    fn lease_ends_with_its_time_its_bytes_or_when_something_is_held() {
        let grant =
            Grant { prepaid: Prepaid { operations: 10, bytes: 10_000 }, size_max: 8192, charges: ChargeTable::DEFAULT };
        let at = |ns| Time::from_nanos(ns);
        let mut lease = Lease::none();
        lease.take(Some(grant), at(0));
        assert!(!lease.spend(Operation::Read, 8193, at(1)), "counts as more than one operation");
        assert!(lease.spend(Operation::Read, 8192, at(1)));
        assert!(!lease.spend(Operation::Read, 4096, at(2)), "1808 bytes are left");
        assert!(lease.spend(Operation::Read, 512, at(LEASE_NS - 1)));
        assert!(!lease.spend(Operation::Read, 512, at(LEASE_NS)));
        lease.take(Some(grant), at(0));
        lease.end();
        assert!(!lease.spend(Operation::Read, 512, at(1)));
    }
}
