//! A leaky bucket: the units let through lately, and the instant at which it takes the next
//! request.
//!
//! ```text
//!            charge (any size, even past the brim)
//!               │
//!               ▼
//!        ╷             ╷
//!        │- - - - - - -│ ─ capacity = max · burst_length, or avg / 10 where max is unset
//!        │▒▒▒▒▒▒▒▒▒▒▒▒▒│ ─ level
//!        └──────┬──────┘
//!               ▼ drains at avg units a second
//! ```
//!
//! A request passes while `level` is not above the capacity, and is charged whole; its part above
//! the brim is a debt that later requests wait for. So a request larger than the capacity is never
//! stuck and never split.
//!
//! A burst longer than 1 s has a second bucket inside: `burst_level` drains at `max` and blocks
//! above `max / 10`, which turns `max` from a pool that may be emptied at once into a rate.
//!
//! The meaning is that of QEMU's `LeakyBucket` (`util/throttle.c`). The arithmetic is not: levels are integers in
//! *nano-units* (10⁻⁹ byte or operation), so that `avg` units a second is exactly `avg` nano-units a nanosecond and
//! draining loses no remainder, however often it is done.

use crate::limits::{Limit, SECOND_NS};
use crate::planted::{Fault, planted};
use crate::time::Time;

/// 10⁻⁹ of a byte or an operation.
pub type NanoUnits = u128;

/// Nano-units in a unit.
pub const UNIT: NanoUnits = 1_000_000_000;

/// The part of a second that a rate without a burst may run ahead: QEMU's 100 ms.
const HEADROOM_NS: u128 = SECOND_NS as u128 / 10;

/// The state of one limit.
#[derive(Clone, Debug)]
pub struct Bucket {
    avg: u64,
    max: u64,
    capacity: NanoUnits,
    /// Bound of `burst_level`; `None` where the burst is no longer than a second.
    burst_capacity: Option<NanoUnits>,
    level: NanoUnits,
    burst_level: NanoUnits,
    /// The latest instant seen, up to which the levels have been drained.
    drained_at: Time,
    /// Units of all refunds so far, modulo 2^64.
    refunded: u64,
}

/// The state of a bucket after an advance payment: bounds a later refund.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    level: NanoUnits,
    burst_level: NanoUnits,
    refunded: u64,
}

impl Bucket {
    /// An empty bucket. The limit must be sound ([`crate::limits::Limits::violations`]) and not unlimited.
    pub fn new(limit: Limit) -> Self {
        debug_assert!(!limit.is_unlimited());
        let is_rate = limit.max > 0 && limit.burst_length_ns > SECOND_NS;
        Self {
            avg: limit.avg,
            max: limit.max,
            capacity: if limit.max > 0 {
                u128::from(limit.max) * u128::from(limit.burst_length_ns)
            } else {
                u128::from(limit.avg) * HEADROOM_NS
            },
            burst_capacity: is_rate.then(|| u128::from(limit.max) * HEADROOM_NS),
            level: 0,
            burst_level: 0,
            drained_at: Time::ZERO,
            refunded: 0,
        }
    }

    /// The instant at which the bucket takes the next request if no request is charged before;
    /// `None` if that is now.
    ///
    /// Rounded up to the next nanosecond, so the bucket takes the request at the returned instant.
    /// The cost of the request does not matter: see the module's head.
    pub fn ready_at(&mut self, now: Time) -> Option<Time> {
        self.fits_at(0, now)
    }

    /// The instant at which the bucket takes a request and leaves room for `units` below the brim,
    /// or for half of the capacity if that is less; `None` if that is now.
    pub(crate) fn fits_at(&mut self, units: NanoUnits, now: Time) -> Option<Time> {
        self.drain(now);
        let brim = |capacity: NanoUnits| capacity - units.min(capacity / 2);
        let mut wait_ns = blocked_for(self.level, brim(self.capacity), self.avg);
        if let Some(burst_capacity) = self.burst_capacity {
            wait_ns = wait_ns.max(blocked_for(self.burst_level, brim(burst_capacity), self.max));
        }
        (wait_ns > 0).then(|| self.drained_at.plus_nanos(wait_ns))
    }

    /// Whether the bucket takes a request at `then` if it is charged `units` now and nothing else
    /// until then.
    pub(crate) fn is_open_after(&mut self, units: NanoUnits, then: Time, now: Time) -> bool {
        self.drain(now);
        let elapsed_ns = u128::from(then.nanos_since(now));
        let is_below = |level: NanoUnits, capacity: NanoUnits, rate: u64| {
            level.saturating_add(units) <= capacity.saturating_add(u128::from(rate) * elapsed_ns)
        };
        is_below(self.level, self.capacity, self.avg)
            && self.burst_capacity.is_none_or(|capacity| is_below(self.burst_level, capacity, self.max))
    }

    /// Whether the bucket does not run empty by `then` if it is charged nothing until then.
    pub(crate) fn lasts(&mut self, then: Time, now: Time) -> bool {
        self.drain(now);
        self.level >= u128::from(self.avg) * u128::from(then.nanos_since(now))
    }

    /// Whether the bucket took no request at `since`. Valid if none was charged from then to `now`
    /// and the bucket has not been empty.
    pub(crate) fn was_blocked(&mut self, since: Time, now: Time) -> bool {
        self.drain(now);
        let drained = |rate: u64| u128::from(rate) * u128::from(now.nanos_since(since));
        let was_above = |level: NanoUnits, capacity, rate| level.saturating_add(drained(rate)) > capacity;
        was_above(self.level, self.capacity, self.avg)
            || self.burst_capacity.is_some_and(|capacity| was_above(self.burst_level, capacity, self.max))
    }

    /// Counts `cost` as let through at `now`.
    pub fn charge(&mut self, cost: NanoUnits, now: Time) {
        // Drain first: a charge added before the drain would be drained by the time before the
        // charge.
        self.drain(now);
        self.level = self.level.saturating_add(cost);
        if self.burst_capacity.is_some() {
            self.burst_level = self.burst_level.saturating_add(cost);
        }
    }

    /// The delay of a poll by which the limit loses no rate, in nanoseconds: a bucket at its brim
    /// is empty after this time, and rate earned beyond it is lost.
    pub(crate) fn patience_ns(&self) -> u64 {
        let burst = self.burst_capacity.map_or(u128::MAX, |capacity| capacity / u128::from(self.max));
        u64::try_from((self.capacity / u128::from(self.avg)).min(burst)).unwrap_or(u64::MAX)
    }

    /// Units that can be prepaid for `ahead_ns` such that the unspent units of all payments in any
    /// such time are at most `1 / part` of the capacity; drained up to `now`.
    ///
    /// The bucket drains at most `rate · ahead_ns` of those payments, so the level may rise to
    /// `capacity / part - rate · ahead_ns`.
    pub(crate) fn room(&mut self, part: u128, ahead_ns: u64, now: Time) -> u64 {
        self.drain(now);
        let up_to =
            |capacity: NanoUnits, rate| (capacity / part).saturating_sub(u128::from(rate) * u128::from(ahead_ns));
        let mut room = up_to(self.capacity, self.avg).saturating_sub(self.level);
        if let Some(burst_capacity) = self.burst_capacity {
            room = room.min(up_to(burst_capacity, self.max).saturating_sub(self.burst_level));
        }
        u64::try_from(room / UNIT).unwrap_or(u64::MAX)
    }

    /// Charges units in advance, of which [`Self::refund`] may return a part.
    pub(crate) fn prepay(&mut self, units: u64, now: Time) -> Mark {
        self.charge(u128::from(units) * UNIT, now);
        Mark { level: self.level, burst_level: self.burst_level, refunded: self.refunded }
    }

    /// Takes back unspent units that were prepaid at `paid_at`, except those that have drained:
    /// without that payment the bucket would have been empty at times, and that drain would have
    /// been lost.
    ///
    /// The refund that keeps to this is `units` or the lowest level since the payment, whichever is
    /// less. The level after the payment, less the drain and all refunds since, is at most that
    /// lowest level: charges only raise it. Returned credit therefore cannot return twice, and the
    /// levels never fall below those without the payment.
    pub(crate) fn refund(&mut self, units: u64, mark: Mark, paid_at: Time, now: Time) {
        self.drain(now);
        let nano = u128::from(units) * UNIT;
        let since_ns = u128::from(self.drained_at.nanos_since(paid_at));
        let refunded = u128::from(self.refunded.wrapping_sub(mark.refunded)) * UNIT;
        let returned = |level: NanoUnits, rate: u64| {
            if planted(Fault::RefundDrained) {
                return nano;
            }
            nano.min(level.saturating_sub(u128::from(rate) * since_ns).saturating_sub(refunded))
        };
        self.level = self.level.saturating_sub(returned(mark.level, self.avg));
        self.burst_level = self.burst_level.saturating_sub(returned(mark.burst_level, self.max));
        self.refunded = self.refunded.wrapping_add(units);
    }

    /// Units left below the brim, the capacity in units, and units above the brim; drained up to
    /// `now`.
    pub(crate) fn credit(&mut self, now: Time) -> (u64, u64, u64) {
        self.drain(now);
        let units = |nano: NanoUnits| u64::try_from(nano / UNIT).unwrap_or(u64::MAX);
        (
            units(self.capacity.saturating_sub(self.level)),
            units(self.capacity),
            units(self.level.saturating_sub(self.capacity)),
        )
    }

    /// The level and the burst level; drained up to `now`.
    pub(crate) fn levels(&mut self, now: Time) -> (NanoUnits, NanoUnits) {
        self.drain(now);
        (self.level, self.burst_level)
    }

    /// Resumes from `other`, last drained `elapsed_ns` ago: levels rise to those that `other` has
    /// by now.
    pub(crate) fn resume(&mut self, other: Self, elapsed_ns: u64, now: Time) {
        self.drain(now);
        let mut other = Self { drained_at: Time::ZERO, ..other };
        other.drain(Time::from_nanos(elapsed_ns));
        let carried = other.carried_over(self.clone());
        self.level = self.level.max(carried.level);
        self.burst_level = self.burst_level.max(carried.burst_level);
    }

    /// A bucket of that limit with those levels.
    pub(crate) fn filled(limit: Limit, level: NanoUnits, burst_level: NanoUnits) -> Self {
        let empty = Self::new(limit);
        Self { level, burst_level: if empty.burst_capacity.is_some() { burst_level } else { 0 }, ..empty }
    }

    /// The largest possible levels `blind_ns` later for any charges in that time, except the debt
    /// of the last request.
    pub(crate) fn at_most_after(&self, blind_ns: u64) -> (NanoUnits, NanoUnits) {
        let Some(burst_capacity) = self.burst_capacity else { return (self.level.max(self.capacity), 0) };
        // A burst passes `max` units a second, and besides as many as its own bucket holds.
        let passed = u128::from(self.max) * u128::from(blind_ns) + burst_capacity;
        let level = self.level.saturating_add(passed).min(self.capacity).max(self.level);
        (level, self.burst_level.max(burst_capacity))
    }

    /// Changes the limit and keeps the used share of the capacity. A debt is kept in units.
    pub(crate) fn reconfigure(&mut self, limit: Limit, now: Time) {
        self.drain(now);
        *self = self.carried_over(Self::new(limit));
    }

    /// `to`, with the same used share as `self`.
    fn carried_over(&self, to: Self) -> Self {
        Self {
            level: carry_over(self.level, self.capacity, to.capacity),
            burst_level: match (self.burst_capacity, to.burst_capacity) {
                (Some(old), Some(new)) => carry_over(self.burst_level, old, new),
                _ => 0,
            },
            drained_at: self.drained_at,
            ..to
        }
    }

    fn drain(&mut self, now: Time) {
        let elapsed_ns = u128::from(now.nanos_since(self.drained_at));
        if elapsed_ns == 0 {
            return;
        }
        self.drained_at = now;
        // At most 10^15 · 2^64 < 2^114: no overflow.
        self.level = self.level.saturating_sub(u128::from(self.avg) * elapsed_ns);
        self.burst_level = self.burst_level.saturating_sub(u128::from(self.max) * elapsed_ns);
    }
}

/// Nanoseconds until `level` has drained to `capacity` at `rate` units a second, rounded up, at most `u64::MAX`.
fn blocked_for(level: NanoUnits, capacity: NanoUnits, rate: u64) -> u64 {
    let excess = level.saturating_sub(capacity);
    if excess == 0 {
        return 0;
    }
    u64::try_from(excess.div_ceil(u128::from(rate))).unwrap_or(u64::MAX)
}

/// The level that uses the same share of `new` as `level` does of `old`, rounded up. The part above
/// the brim is a debt and is carried over in units.
fn carry_over(level: NanoUnits, old: NanoUnits, new: NanoUnits) -> NanoUnits {
    if old == new {
        return level;
    }
    let debt = level.saturating_sub(old);
    let used = level - debt;
    // used <= old, so the result is at most `new`. A capacity is up to 10^24 nano-units, and the
    // product of two may not fit 128 bits: if so, scale both down by 2^20 (an error of at most
    // 10^-6 of the capacity, upwards).
    let used = match used.checked_mul(new) {
        Some(product) => product.div_ceil(old),
        None => (((used >> 20) + 1) * (new >> 20) / (old >> 20) + 1) << 20,
    };
    used.min(new).saturating_add(debt)
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::limits::VALUE_MAX;
    use proptest::prelude::*;

    fn ms(ms: u64) -> Time {
        Time::from_nanos(ms * 1_000_000)
    }

    #[test]
    fn bucket_without_max_runs_ahead_by_a_tenth_of_a_second() {
        // 100/s: capacity 10, and a request passes while the level is not above it, so 11 pass at once.
        let mut bucket = Bucket::new(Limit::average(100));
        for _ in 0..11 {
            assert_eq!(bucket.ready_at(ms(0)), None);
            bucket.charge(UNIT, ms(0));
        }
        assert_eq!(bucket.ready_at(ms(0)), Some(ms(10)));
        assert_eq!(bucket.ready_at(ms(10)), None);
    }

    #[test]
    fn f38_request_above_the_capacity_passes_and_leaves_a_debt() {
        let mut bucket = Bucket::new(Limit::average(4096));
        assert_eq!(bucket.ready_at(ms(0)), None);
        bucket.charge(1_048_576 * UNIT, ms(0));
        // (1 MiB - 409.6 B) / 4096 B/s = 255.9 s.
        assert_eq!(bucket.ready_at(ms(0)), Some(ms(255_900)));
    }

    #[test]
    fn f42_time_that_goes_back_gives_no_credit() {
        let mut bucket = Bucket::new(Limit::average(10));
        bucket.charge(100 * UNIT, ms(1000));
        let ready = bucket.ready_at(ms(1000));
        assert_eq!(bucket.ready_at(ms(0)), ready);
        assert_eq!(bucket.ready_at(ms(1000)), ready);
        // A century without a request empties the bucket, and gives no credit beyond that.
        let much_later = ms(100 * 365 * 86_400_000);
        assert_eq!(bucket.ready_at(much_later), None);
        bucket.charge(2 * UNIT, much_later);
        assert_eq!(bucket.ready_at(much_later), Some(Time::from_nanos(much_later.as_nanos() + 100_000_000)));
    }

    #[test]
    fn waits_never_overflow_to_none() {
        // U5: 10^12 bytes at 100 B/s once became "no wait" in QEMU.
        let mut bucket = Bucket::new(Limit::average(100));
        bucket.charge(1_000_000_000_000 * UNIT, ms(0));
        assert_eq!(bucket.ready_at(ms(0)), Some(Time::from_nanos((10_000_000_000 * SECOND_NS) - 100_000_000)));
        let mut bucket = Bucket::new(Limit::average(1));
        bucket.charge((1 << 63) * UNIT, ms(0));
        assert_eq!(bucket.ready_at(ms(0)), Some(Time::from_nanos(u64::MAX)));
    }

    fn corner() -> impl Strategy<Value = u64> {
        prop_oneof![
            Just(1),
            Just(2),
            (1_u64 << 31) - 1..=(1 << 31) + 1,
            (1_u64 << 32) - 1..=(1 << 32) + 1,
            VALUE_MAX - 1..=VALUE_MAX,
            1..=VALUE_MAX,
        ]
    }

    fn sound_limit() -> impl Strategy<Value = Limit> {
        (corner(), corner(), prop_oneof![Just(1), 1..4 * SECOND_NS, Just(4_294_967_300 * SECOND_NS)], any::<bool>())
            .prop_filter_map("unsound", |(avg, max, burst_length_ns, has_max)| {
                let limit = if has_max { Limit { avg, max, burst_length_ns } } else { Limit::average(avg) };
                let mut found = crate::limits::Limits::UNLIMITED;
                found.set(crate::limits::LimitKind::IopsTotal, limit);
                found.violations().is_empty().then_some(limit)
            })
    }

    proptest! {
        #[test]
        fn asking_again_at_the_returned_instant_is_never_too_early(
            limit in sound_limit(),
            steps in prop::collection::vec((1_u64..=1 << 63, 0_u64..10 * SECOND_NS), 1..20),
        ) {
            // The wait is finite and exact: the bucket refuses 1 ns before the returned instant and
            // takes at it.
            let mut bucket = Bucket::new(limit);
            let mut now = Time::ZERO;
            for (units, gap_ns) in steps {
                now = now.plus_nanos(gap_ns);
                bucket.charge(u128::from(units) * UNIT, now);
                let Some(ready) = bucket.ready_at(now) else { continue };
                prop_assert!(ready > now);
                if ready < Time::from_nanos(u64::MAX) {
                    let mut earlier = bucket.clone();
                    prop_assert_eq!(earlier.ready_at(Time::from_nanos(ready.as_nanos() - 1)), Some(ready));
                    prop_assert_eq!(bucket.ready_at(ready), None);
                    now = ready;
                }
            }
        }

        #[test]
        fn every_window_stays_within_rate_and_capacity(
            avg in 1_u64..10_000,
            gaps_ns in prop::collection::vec(0_u64..20_000_000, 2..200),
        ) {
            // Between any two instants, served <= avg · T + capacity + the request that passes at
            // the brim.
            let mut bucket = Bucket::new(Limit::average(avg));
            let mut served: Vec<Time> = Vec::new();
            let mut now = Time::ZERO;
            for gap_ns in gaps_ns {
                now = now.plus_nanos(gap_ns);
                if bucket.ready_at(now).is_none() {
                    bucket.charge(UNIT, now);
                    served.push(now);
                }
            }
            for (first, &start) in served.iter().enumerate() {
                for (count, &end) in (1_u128..).zip(&served[first..]) {
                    let window_ns = u128::from(end.nanos_since(start));
                    let allowed = u128::from(avg) * (window_ns + HEADROOM_NS) + UNIT;
                    prop_assert!(count * UNIT <= allowed, "{count} requests in {window_ns} ns at {avg}/s");
                }
            }
        }

        #[test]
        fn refunds_leave_at_least_the_level_of_the_spent_part(
            (avg, max) in (1_u64..2_000, 1_u64..4),
            is_rate in any::<bool>(),
            events in prop::collection::vec((0..3_usize, 0..4_usize, 0_u64..100, 0_u64..100, 0_u64..20_000_000), 1..100),
        ) {
            // Up to four payments are open at a time. Replay: a second bucket is charged the spent
            // part of each payment, at the instant of the payment. Each refund leaves at least the
            // levels of that bucket, and a refund of the only payment exactly those.
            let burst_length_ns = if is_rate { 2 * SECOND_NS } else { SECOND_NS };
            let limit = Limit { avg, max: avg * max, burst_length_ns };
            let mut bucket = Bucket::new(limit);
            // Units and instant of every charge: all units while the payment is open.
            let mut charges: Vec<(u64, Time)> = Vec::new();
            let mut open: [Option<(usize, Mark)>; 4] = [None; 4];
            let mut now = ms(1);
            for (what, payer, units, part, gap_ns) in events {
                match (what, open[payer]) {
                    (0, _) => {
                        bucket.charge(u128::from(units) * UNIT, now);
                        charges.push((units, now));
                    }
                    (_, None) => {
                        open[payer] = Some((charges.len(), bucket.prepay(units, now)));
                        charges.push((units, now));
                    }
                    (_, Some((paid, mark))) => {
                        let (all, paid_at) = charges[paid];
                        let unspent = all * part / 99;
                        charges[paid].0 -= unspent;
                        bucket.refund(unspent, mark, paid_at, now);
                        open[payer] = None;
                        let mut spent = Bucket::new(limit);
                        charges.iter().for_each(|&(units, at)| spent.charge(u128::from(units) * UNIT, at));
                        let (level, burst_level) = bucket.levels(now);
                        let (least, burst_least) = spent.levels(now);
                        prop_assert!(level >= least && burst_level >= burst_least, "{level} {least} {burst_level} {burst_least}");
                        if charges.len() == 1 {
                            prop_assert_eq!((level, burst_level), (least, burst_least));
                        }
                    }
                }
                now = now.plus_nanos(gap_ns);
            }
        }

        #[test]
        fn used_share_is_kept_over_a_change(old in 1_u128..10_u128.pow(24), new in 1_u128..10_u128.pow(24), part in 0.0..1.0_f64) {
            // Never less of the new capacity than of the old one (no gift), and more by no more than 2^-18.
            let used = ((old as f64 * part) as u128).min(old);
            let carried = carry_over(used, old, new);
            prop_assert!(carried <= new);
            let (before, after) = (used as f64 / old as f64, carried as f64 / new as f64);
            prop_assert!(after >= before - 1e-12, "{before} became {after}");
            prop_assert!(after <= before + 4e-6 + 1.0 / new as f64, "{before} became {after}");
            // A debt is carried over in units for any change of the capacity.
            prop_assert_eq!(carry_over(old + 12_345, old, new), new + 12_345);
        }
    }
}
