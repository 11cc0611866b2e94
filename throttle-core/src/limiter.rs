//! Up to six buckets, charged all together or not at all.
//!
//! ```text
//!   a read of 8 KiB           bps-total  bps-read  bps-write  iops-total  iops-read  iops-write
//!   is asked of and charged      8192      8192        ·           1          1          ·
//! ```
//!
//! The wait is the largest of the four, not their sum. There is no "take from one, fail on the next, put back": asking
//! changes no level, and charging cannot fail.

use crate::bucket::{Bucket, NanoUnits, UNIT};
use crate::cost::{Cost, Direction};
use crate::limits::{LimitKind, Limits};
use crate::time::Time;

/// The state of one set of limits.
#[derive(Clone, Debug)]
pub struct Limiter {
    /// Indexed by [`LimitKind`]; `None` where there is no limit.
    buckets: [Option<Bucket>; 6],
    iops_size: u64,
}

impl Limiter {
    /// Empty buckets for `limits`, which must be sound ([`Limits::violations`]).
    pub fn new(limits: &Limits) -> Self {
        debug_assert_eq!(limits.violations(), []);
        let buckets = LimitKind::ALL.map(|kind| {
            let limit = limits.get(kind);
            (!limit.is_unlimited()).then(|| Bucket::new(limit))
        });
        Self { buckets, iops_size: limits.iops_size }
    }

    /// When every bucket takes a request of this cost, `None` if all take it now.
    pub fn ready_at(&mut self, cost: &Cost, now: Time) -> Option<Time> {
        let mut latest = None;
        self.for_each_charge(cost, |bucket, _| latest = latest.max(bucket.ready_at(now)));
        latest
    }

    /// Counts a request as let through at `now`, in all its buckets.
    pub fn charge(&mut self, cost: &Cost, now: Time) {
        self.for_each_charge(cost, |bucket, units| bucket.charge(units, now));
    }

    /// Calls `with` for each bucket that this cost is charged to.
    fn for_each_charge(&mut self, cost: &Cost, mut with: impl FnMut(&mut Bucket, NanoUnits)) {
        let bytes = u128::from(cost.bytes) * UNIT;
        let operations = if cost.is_operation { self.operations(cost.bytes) } else { 0 };
        let (bps_own, iops_own) = match cost.direction {
            Direction::Read => (LimitKind::BpsRead, LimitKind::IopsRead),
            Direction::Write => (LimitKind::BpsWrite, LimitKind::IopsWrite),
        };
        for (kind, units) in
            [(LimitKind::BpsTotal, bytes), (bps_own, bytes), (LimitKind::IopsTotal, operations), (iops_own, operations)]
        {
            if units > 0
                && let Some(bucket) = &mut self.buckets[kind as usize]
            {
                with(bucket, units);
            }
        }
    }

    /// How many operations a request of `bytes` counts as: a fraction above 1 where it is larger than `iops-size`.
    fn operations(&self, bytes: u64) -> NanoUnits {
        if self.iops_size > 0 && bytes > self.iops_size {
            // Rounded up by less than 10^-9 operation: never above the limit.
            (u128::from(bytes) * UNIT).div_ceil(u128::from(self.iops_size))
        } else {
            UNIT
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::Operation;
    use crate::limits::Limit;

    fn at_ms(ms: u64) -> Time {
        Time::from_nanos(ms * 1_000_000)
    }

    #[test]
    fn wait_is_the_largest_of_the_buckets() {
        // 1 op/s blocks for 0.9 s, 4096 B/s by 4 KiB for 0.9 s, and by 8 KiB for 1.9 s.
        let limits = Limits::UNLIMITED
            .with(LimitKind::IopsTotal, Limit::average(1))
            .with(LimitKind::BpsRead, Limit::average(4096));
        let mut limiter = Limiter::new(&limits);
        limiter.charge(&Cost::of(Operation::Read, 8192), at_ms(0));
        assert_eq!(limiter.ready_at(&Cost::of(Operation::Read, 1), at_ms(0)), Some(at_ms(1900)));
        assert_eq!(limiter.ready_at(&Cost::of(Operation::Write, 1), at_ms(0)), Some(at_ms(900)));
    }

    #[test]
    fn asking_changes_nothing() {
        let limits = Limits::UNLIMITED.with(LimitKind::IopsTotal, Limit::average(10));
        let mut limiter = Limiter::new(&limits);
        let read = Cost::of(Operation::Read, 512);
        for _ in 0..1000 {
            assert_eq!(limiter.ready_at(&read, at_ms(0)), None);
        }
    }

    #[test]
    fn request_waits_only_for_what_it_is_charged_to() {
        let limits = Limits::UNLIMITED.with(LimitKind::BpsTotal, Limit::average(1000));
        let mut limiter = Limiter::new(&limits);
        limiter.charge(&Cost::of(Operation::Write, 1_000_000), at_ms(0));
        assert!(limiter.ready_at(&Cost::of(Operation::Read, 1), at_ms(0)).is_some());
        assert_eq!(limiter.ready_at(&Cost::of(Operation::Discard, 1 << 40), at_ms(0)), None);
        assert_eq!(limiter.ready_at(&Cost::of(Operation::Flush, 0), at_ms(0)), None);
    }

    #[test]
    fn large_request_counts_as_a_fraction_of_operations() {
        // iops-size 4096: 10 KiB are 2.5 operations; at 10/s, capacity 1, that is a wait of 150 ms.
        let mut limits = Limits::UNLIMITED.with(LimitKind::IopsTotal, Limit::average(10));
        limits.iops_size = 4096;
        let mut limiter = Limiter::new(&limits);
        limiter.charge(&Cost::of(Operation::Read, 10_240), at_ms(0));
        assert_eq!(limiter.ready_at(&Cost::of(Operation::Read, 512), at_ms(0)), Some(at_ms(150)));
    }
}
