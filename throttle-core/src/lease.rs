//! Credit that a queue pays for in advance, so that its requests skip the lock.
//!
//! ```text
//!   with the lock   ask, ask, ask, ask ─► pays 8              ask ─► 3 back, pays 10          ask ─► …
//!   without it                             └─► Go × 5, 1 ms over ┘    └─► Go × 10, all spent ──┘
//! ```
//!
//! While a tree of groups is *clearly* below its limits, a queue with frequent requests gets a
//! lease: operations and bytes that are charged at once to every bucket on the way up, and spent
//! within [`LEASE_NS`] without touching shared state.
//!
//! The bound. A grant leaves each bucket at a level of at most `capacity / 16 - rate · 1 ms`. All
//! live leases of a bucket were granted within the last 1 ms, and at most `rate · 1 ms` of their
//! charges has drained. Their unspent credit is therefore at most `capacity / 16` at every instant,
//! and a window of time sees at most `rate · T + capacity + capacity / 16 + one request`. A pool
//! that drains within 16 ms has no room for a lease: near a limit, and under a short burst, every
//! decision is exact.
//!
//! The refund. The next ask of the queue gives the unspent credit back to the buckets that paid it;
//! so do a request that is held and the end of the queue. A bucket takes back no credit that it
//! would have drained anyway ([`crate::bucket::Bucket::refund`]): a level never falls below the one
//! that the spent part alone would have left. A bucket near empty errs on that side, by the drain
//! and the refunds between grant and ask. A change of limits or places, and a resumption, end all
//! leases without a refund. A queue that falls silent keeps its unspent credit charged until it asks
//! again: at most one lease of each direction.

use crate::bucket::Mark;
use crate::charge::ChargeTable;
use crate::cost::Operation;
use crate::limits::LimitKind;
use crate::pass::Pass;
use crate::planted::{Fault, planted};
use crate::time::Time;

/// The duration of a lease.
pub(crate) const LEASE_NS: u64 = 1_000_000;

/// The unspent credit of all leases is at most 1/16 of the capacity of each bucket.
pub(crate) const CLEARLY_BELOW: u128 = 16;

/// Requests that ask within 1 ms before the queue gets its first lease. A lease of which fewer are
/// spent is not worth the bookkeeping either, and the queue has to ask as often again.
const ASKS_MIN: u64 = 4;

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

impl Prepaid {
    const NOTHING: Self = Self { operations: 0, bytes: 0 };

    /// The units that a limit of this kind counts.
    pub const fn units(&self, kind: LimitKind) -> u64 {
        if kind.is_iops() { self.operations } else { self.bytes }
    }
}

/// A granted lease and its terms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grant {
    pub prepaid: Prepaid,
    /// The instant of the charge.
    pub paid_at: Time,
    /// The largest request that counts as one operation; a larger one is not covered by the lease.
    pub size_max: u64,
    /// The charge of each operation.
    pub charges: ChargeTable,
}

/// Unspent credit of a lease that has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unspent<'a> {
    pub left: Prepaid,
    /// The change count of the grant. After a change the buckets may be different ones: no refund.
    pub pass: Pass,
    /// The instant of the charge.
    pub paid_at: Time,
    /// The mark of each charged bucket, in the order of the charges.
    pub marks: &'a [Mark],
}

/// The lease of a queue for one direction, and the size of the next one.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    /// The unspent part of the grant; nothing without a lease.
    left: Prepaid,
    until: Time,
    /// The change count of the grant: a change ends the lease.
    pass: Pass,
    size_max: u64,
    charges: ChargeTable,
    /// Operations of the grant.
    granted: u64,
    paid_at: Time,
    /// The buckets that paid the lease.
    marks: Vec<Mark>,
    /// Operations spent of the last lease.
    spent: u64,
    /// Asks without a lease since `asks_since`, at most 1 ms ago.
    asks: u64,
    asks_since: Time,
}

impl Lease {
    /// No lease.
    pub const fn none() -> Self {
        Self {
            left: Prepaid::NOTHING,
            until: Time::ZERO,
            pass: Pass::FIRST,
            size_max: 0,
            charges: ChargeTable::DEFAULT,
            granted: 0,
            paid_at: Time::ZERO,
            marks: Vec::new(),
            spent: 0,
            asks: 0,
            asks_since: Time::ZERO,
        }
    }

    /// Whether the lease covers the request, which is then spent. The request must be of this
    /// lease's direction; `pass` is the present change count.
    pub fn spend(&mut self, operation: Operation, bytes: u64, pass: Pass, now: Time) -> bool {
        if self.left.operations == 0 || bytes > self.size_max || self.is_over(pass, now) {
            return false;
        }
        let cost = self.charges.cost(operation, bytes);
        if self.left.bytes < cost.bytes {
            return false;
        }
        self.left.operations -= u64::from(cost.is_operation);
        self.left.bytes -= cost.bytes;
        true
    }

    /// Whether the lease covers no request any more, regardless of its unspent credit.
    pub fn is_over(&self, pass: Pass, now: Time) -> bool {
        now >= self.until || pass != self.pass && !planted(Fault::LeaseOutlivesChange)
    }

    /// Ends the lease, and returns its unspent credit. A lease ends when a request asks, when a
    /// request is held (later ones may not overtake it), and with its queue.
    pub fn end(&mut self) -> Option<Unspent<'_>> {
        let left = std::mem::replace(&mut self.left, Prepaid::NOTHING);
        self.spent += std::mem::take(&mut self.granted) - left.operations;
        let Self { pass, paid_at, ref marks, .. } = *self;
        (left != Prepaid::NOTHING).then_some(Unspent { left, pass, paid_at, marks })
    }

    /// The lease to ask for together with a request of `bytes` that is not covered; the last lease
    /// has ended. Twice the operations spent of a lease that began less than 2 ms ago, if those are
    /// at least 4; otherwise 8, with the fourth ask within 1 ms, or nothing.
    pub fn wants(&mut self, bytes: u64, now: Time) -> Option<Prepaid> {
        debug_assert_eq!(self.left, Prepaid::NOTHING);
        let spent = std::mem::take(&mut self.spent);
        let operations = if spent >= ASKS_MIN && now.nanos_since(self.paid_at) < 2 * LEASE_NS {
            (2 * spent).clamp(OPERATIONS_MIN, OPERATIONS_MAX)
        } else {
            if now.nanos_since(self.asks_since) >= LEASE_NS {
                (self.asks, self.asks_since) = (0, now);
            }
            self.asks += 1;
            if self.asks < ASKS_MIN {
                return None;
            }
            OPERATIONS_MIN
        };
        self.asks = 0;
        Some(Prepaid { operations, bytes: operations.saturating_mul(bytes) })
    }

    /// Space for the marks of the buckets that pay the next lease, empty.
    pub fn marks(&mut self) -> &mut Vec<Mark> {
        self.marks.clear();
        &mut self.marks
    }

    /// Takes the lease granted at `now`, with the change count of that instant.
    pub fn take(&mut self, grant: Grant, pass: Pass, now: Time) {
        let Grant { prepaid, paid_at, size_max, charges } = grant;
        *self = Self {
            left: prepaid,
            until: now.plus_nanos(LEASE_NS),
            pass,
            size_max,
            charges,
            granted: prepaid.operations,
            paid_at,
            marks: std::mem::take(&mut self.marks),
            spent: 0,
            asks: 0,
            asks_since: now,
        };
    }

    /// Forgets the asks and the spent lease: the next lease takes as many asks as the first one.
    pub fn forget(&mut self) {
        (self.spent, self.asks) = (0, 0);
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

    fn grant(operations: u64, bytes: u64, at: Time) -> Grant {
        let prepaid = Prepaid { operations, bytes };
        Grant { prepaid, paid_at: at, size_max: 8192, charges: ChargeTable::DEFAULT }
    }

    fn spend(lease: &mut Lease, bytes: u64, now: Time) -> bool {
        lease.spend(Operation::Read, bytes, Pass::FIRST, now)
    }

    /// Reads of 4 KiB, one per 10 us, until `end_us`; returns how many of them were not covered.
    fn ask(lease: &mut Lease, start_us: u64, end_us: u64) -> u32 {
        let mut asked = 0;
        for us in (start_us..end_us).step_by(EACH_US as usize) {
            let now = Time::from_nanos(us * 1_000);
            if !spend(lease, 4096, now) {
                asked += 1;
                lease.end();
                if let Some(Prepaid { operations, bytes }) = lease.wants(4096, now) {
                    lease.take(grant(operations, bytes, now), Pass::FIRST, now);
                }
            }
        }
        asked
    }

    #[test]
    fn busy_queue_asks_about_once_a_millisecond() {
        // 100 requests a millisecond: 4 asks, then leases of 8, 16, 32, 64 and 128 operations. From
        // then on a lease covers 99 requests and ends by time, so 10 ms see 10 asks, and one more
        // where the count starts within a lease.
        let mut lease = Lease::none();
        ask(&mut lease, 0, 5_000);
        let asked = ask(&mut lease, 5_000, 15_000);
        assert!(asked <= 11, "{asked} of 1000 requests asked");
    }

    #[test]
    fn first_lease_takes_four_asks_within_a_millisecond() {
        // Four requests in 1.2 ms get none; four in 0.9 ms get 8 operations.
        let asks = |gap_us: u64| {
            let mut lease = Lease::none();
            let at = |index| Time::from_nanos((10_000 + index * gap_us) * 1_000);
            [0, 1, 2, 3].map(|index| lease.wants(4096, at(index)).map(|prepaid| prepaid.operations))
        };
        assert_eq!(asks(400), [None; 4]);
        assert_eq!(asks(300), [None, None, None, Some(8)]);
    }

    #[test]
    fn next_lease_is_twice_the_spent_part_of_the_last() {
        // 20 granted, 7 spent: 14 next. 3 spent are not worth a lease.
        let wants_after = |spent| {
            let mut lease = Lease::none();
            lease.take(grant(20, 20 * 4096, Time::ZERO), Pass::FIRST, Time::ZERO);
            (0..spent).for_each(|_| assert!(spend(&mut lease, 4096, Time::ZERO)));
            let unspent = lease.end().map(|unspent| unspent.left);
            assert_eq!(unspent, Some(Prepaid { operations: 20 - spent, bytes: (20 - spent) * 4096 }));
            lease.wants(4096, Time::from_nanos(LEASE_NS)).map(|prepaid| prepaid.operations)
        };
        assert_eq!(wants_after(7), Some(14));
        assert_eq!(wants_after(3), None);
    }

    #[test]
    fn lease_ends_with_its_time_its_bytes_or_a_change() {
        let at = |ns| Time::from_nanos(ns);
        let mut lease = Lease::none();
        lease.take(grant(10, 10_000, at(0)), Pass::FIRST, at(0));
        assert!(!spend(&mut lease, 8193, at(1)), "counts as more than one operation");
        assert!(spend(&mut lease, 8192, at(1)));
        assert!(!spend(&mut lease, 4096, at(2)), "1808 bytes are left");
        assert!(!lease.spend(Operation::Read, 512, Pass::SECOND, at(2)), "limits have changed");
        assert!(spend(&mut lease, 512, at(LEASE_NS - 1)));
        assert!(!spend(&mut lease, 512, at(LEASE_NS)));
        assert_eq!(lease.end().map(|unspent| unspent.left), Some(Prepaid { operations: 8, bytes: 1296 }));
        assert!(lease.end().is_none(), "credit is returned once");
        assert!(!spend(&mut lease, 512, at(1)));
    }
}
