//! A set of up to six buckets, charged all together or not at all.
//!
//! ```text
//!   a read of 8 KiB           bps-total  bps-read  bps-write  iops-total  iops-read  iops-write
//!   is asked of and charged      8192      8192        ·           1          1          ·
//! ```
//!
//! The wait is the largest of the four, not their sum. A check changes no level and a charge cannot
//! fail, so no charge of a request is ever taken back ("take from one, fail on the next, put
//! back"). Only unspent credit of a lease is ([`crate::lease`]).

use crate::bits::ones;
use crate::bucket::{Bucket, Mark, NanoUnits, UNIT};
use crate::cost::{Cost, Direction};
use crate::lease::{CLEARLY_BELOW, LEASE_NS, Prepaid, Unspent};
use crate::limits::{Limit, LimitKind, Limits};
use crate::planted::{Fault, planted};
use crate::time::Time;

/// The state of one set of limits.
#[derive(Clone, Debug)]
pub struct Limiter {
    /// Indexed by [`LimitKind`]; `None` where there is no limit.
    buckets: [Option<Bucket>; 6],
    /// For each [`Direction`], the buckets that exist, a bit for each [`LimitKind`]. Empty for most
    /// devices of a group.
    asked: [u8; Direction::ALL.len()],
    limits: Limits,
}

/// The credit of one limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credit {
    /// Which limit.
    pub kind: LimitKind,
    /// Units (bytes or operations, rounded down) that may go at once before the limit holds
    /// requests.
    pub left: u64,
    /// The most that `left` can be.
    pub capacity: u64,
    /// Units above the capacity, for which later requests wait.
    pub debt: u64,
}

/// The level of one limit: a process leaves it to its successor, so that a restart grants no
/// credit.
///
/// Prepaid units ([`crate::lease`]) count as used until the unspent part returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// Which limit.
    pub kind: LimitKind,
    /// The limit itself, not unlimited.
    pub limit: Limit,
    /// Nano-units let through and not drained yet; above the capacity they are a debt.
    pub level: NanoUnits,
    /// The level of the burst bucket; 0 if the burst is at most 1 s long.
    pub burst_level: NanoUnits,
}

impl Level {
    /// The largest possible level after `blind_ns` in which the process served requests and noted
    /// no level: as full as the limit allows, or the noted debt above that.
    ///
    /// A request passes only while the level is not above the capacity, so the only part not
    /// counted here is the debt of the last request.
    pub fn at_most_after(self, blind_ns: u64) -> Self {
        if blind_ns == 0 {
            return self;
        }
        let (level, burst_level) = Bucket::filled(self.limit, self.level, self.burst_level).at_most_after(blind_ns);
        Self { level, burst_level, ..self }
    }
}

impl Limiter {
    /// Empty buckets for `limits`, which must be sound ([`Limits::violations`]).
    pub fn new(limits: &Limits) -> Self {
        debug_assert_eq!(limits.violations(), []);
        let buckets = LimitKind::ALL.map(|kind| {
            let limit = limits.get(kind);
            (!limit.is_unlimited()).then(|| Bucket::new(limit))
        });
        Self { asked: asked(&buckets), buckets, limits: *limits }
    }

    /// The instant at which every bucket takes a request of this cost; `None` if that is now.
    pub fn ready_at(&mut self, cost: &Cost, now: Time) -> Option<Time> {
        let mut latest = None;
        self.for_each_in(self.charged(cost), |_, bucket| latest = latest.max(bucket.ready_at(now)));
        latest
    }

    /// Whether a bucket would not have taken a request of this cost at `since`, computed from its
    /// present level.
    pub(crate) fn was_blocked(&mut self, cost: &Cost, since: Time, now: Time) -> bool {
        let mut was_blocked = false;
        self.for_each_in(self.charged(cost), |_, bucket| was_blocked |= bucket.was_blocked(since, now));
        was_blocked
    }

    /// Charges a request at `now` to all its buckets.
    pub fn charge(&mut self, cost: &Cost, now: Time) {
        self.for_each_charge(cost, |bucket, units| bucket.charge(units, now));
    }

    /// The operations and bytes that can be prepaid in a direction for [`LEASE_NS`]: unspent
    /// credit is at most 1 / [`CLEARLY_BELOW`] of each capacity.
    pub(crate) fn room(&mut self, direction: Direction, now: Time) -> Prepaid {
        let mut room = Prepaid { operations: u64::MAX, bytes: u64::MAX };
        self.for_each_in(self.asked[direction as usize], |kind, bucket| {
            let free = bucket.room(CLEARLY_BELOW, LEASE_NS, now);
            let least = if kind.is_iops() { &mut room.operations } else { &mut room.bytes };
            *least = free.min(*least);
        });
        room
    }

    /// Charges prepaid operations and bytes in a direction; appends a mark for each charged bucket.
    pub(crate) fn prepay(&mut self, direction: Direction, prepaid: Prepaid, marks: &mut Vec<Mark>, now: Time) {
        self.for_each_in(self.asked[direction as usize], |kind, bucket| {
            marks.push(bucket.prepay(prepaid.units(kind), now));
        });
    }

    /// Returns unspent operations and bytes to the buckets that [`Self::prepay`] charged, one mark
    /// each. The limits must not have changed since.
    pub(crate) fn refund(
        &mut self,
        direction: Direction,
        unspent: &Unspent<'_>,
        marks: &mut impl Iterator<Item = Mark>,
        now: Time,
    ) {
        self.for_each_in(self.asked[direction as usize], |kind, bucket| {
            let mark = marks.next().expect("a mark for each bucket that was charged");
            bucket.refund(unspent.left.units(kind), mark, unspent.paid_at, now);
        });
    }

    /// The delay of a poll, in nanoseconds, by which no limit of the set loses rate.
    pub(crate) fn patience_ns(&self) -> u64 {
        self.buckets.iter().flatten().map(Bucket::patience_ns).min().unwrap_or(u64::MAX)
    }

    /// The largest request that counts as one operation.
    pub(crate) fn size_max(&self) -> u64 {
        if self.limits.iops_size > 0 { self.limits.iops_size } else { u64::MAX }
    }

    /// The kinds of limits that are set, in the order of [`LimitKind`].
    pub(crate) fn kinds(&self) -> LimitKinds {
        LimitKinds(self.asked[0] | self.asked[1])
    }

    /// The bucket of a limit that is set.
    pub(crate) fn bucket(&mut self, kind: LimitKind) -> &mut Bucket {
        self.buckets[kind as usize].as_mut().expect("the limit is set")
    }

    /// The rate of a limit that is set, in units a second.
    pub(crate) fn rate(&self, kind: LimitKind) -> u64 {
        self.limits.get(kind).avg
    }

    /// The units of a limit that a request of this cost is charged.
    pub(crate) fn units(&self, kind: LimitKind, cost: &Cost) -> NanoUnits {
        if kind.is_iops() { self.operations(cost.bytes) } else { u128::from(cost.bytes) * UNIT }
    }

    /// Changes the limits and keeps the used share of each bucket. Equal limits change nothing.
    pub(crate) fn reconfigure(&mut self, limits: &Limits, now: Time) {
        debug_assert_eq!(limits.violations(), []);
        for kind in LimitKind::ALL {
            let limit = limits.get(kind);
            let bucket = &mut self.buckets[kind as usize];
            match bucket {
                Some(_) if limit.is_unlimited() => *bucket = None,
                Some(bucket) if limit != self.limits.get(kind) => bucket.reconfigure(limit, now),
                Some(_) => {}
                None if limit.is_unlimited() => {}
                None => *bucket = Some(Bucket::new(limit)),
            }
        }
        self.asked = asked(&self.buckets);
        self.limits = *limits;
    }

    /// The credit of each limit, in the order of [`LimitKind`].
    pub(crate) fn credit(&mut self, now: Time) -> Vec<Credit> {
        let each = LimitKind::ALL.into_iter().zip(&mut self.buckets);
        each.filter_map(|(kind, bucket)| {
            let (left, capacity, debt) = bucket.as_mut()?.credit(now);
            Some(Credit { kind, left, capacity, debt })
        })
        .collect()
    }

    /// The level of each limit, in the order of [`LimitKind`].
    pub(crate) fn levels(&mut self, now: Time) -> Vec<Level> {
        let limits = &self.limits;
        let each = LimitKind::ALL.into_iter().zip(&mut self.buckets);
        each.filter_map(|(kind, bucket)| {
            let (level, burst_level) = bucket.as_mut()?.levels(now);
            Some(Level { kind, limit: limits.get(kind), level, burst_level })
        })
        .collect()
    }

    /// Resumes from `levels`, noted `elapsed_ns` ago. Levels only rise; a level of a limit that is
    /// no longer set is ignored.
    pub(crate) fn resume(&mut self, levels: &[Level], elapsed_ns: u64, now: Time) {
        for kept in levels {
            debug_assert!(!kept.limit.is_unlimited());
            if let Some(bucket) = &mut self.buckets[kept.kind as usize]
                && !planted(Fault::ResumeEmpty)
            {
                bucket.resume(Bucket::filled(kept.limit, kept.level, kept.burst_level), elapsed_ns, now);
            }
        }
    }

    /// The buckets to which this cost is charged, a bit for each [`LimitKind`].
    fn charged(&self, cost: &Cost) -> u8 {
        let bytes = if cost.bytes > 0 { BPS } else { 0 };
        let operations = if cost.is_operation { !BPS } else { 0 };
        self.asked[cost.direction as usize] & (bytes | operations)
    }

    /// Calls `with` for each bucket to which `cost` is charged, with the units.
    fn for_each_charge(&mut self, cost: &Cost, mut with: impl FnMut(&mut Bucket, NanoUnits)) {
        let charged = self.charged(cost);
        if charged == 0 {
            return;
        }
        let bytes = u128::from(cost.bytes) * UNIT;
        let operations = self.operations(cost.bytes);
        self.for_each_in(charged, |kind, bucket| with(bucket, if kind.is_iops() { operations } else { bytes }));
    }

    /// Calls `with` for each existing bucket of `kinds`, a bit for each [`LimitKind`].
    fn for_each_in(&mut self, kinds: u8, mut with: impl FnMut(LimitKind, &mut Bucket)) {
        for kind in ones(kinds) {
            if let Some(bucket) = &mut self.buckets[kind] {
                with(LimitKind::ALL[kind], bucket);
            }
        }
    }

    /// The operations that a request of `bytes` counts as: a fraction above 1 if it is larger than
    /// `iops-size`.
    fn operations(&self, bytes: u64) -> NanoUnits {
        if self.limits.iops_size > 0 && bytes > self.limits.iops_size {
            // Rounded up by less than 10^-9 operation: never above the limit.
            (u128::from(bytes) * UNIT).div_ceil(u128::from(self.limits.iops_size))
        } else {
            UNIT
        }
    }
}

/// A set of limits by their kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LimitKinds(u8);

impl LimitKinds {
    /// The kinds that are not unlimited.
    pub fn of(limits: &Limits) -> Self {
        let set = LimitKind::ALL.into_iter().filter(|&kind| !limits.get(kind).is_unlimited());
        Self(set.fold(0, |bits, kind| bits | 1 << kind as u8))
    }

    /// Calls `with` for each kind, in the order of [`LimitKind`].
    pub fn map<T>(self, with: impl Fn(LimitKind) -> T) -> impl Iterator<Item = T> {
        ones(self.0).map(move |kind| with(LimitKind::ALL[kind]))
    }
}

/// The bps buckets, a bit for each [`LimitKind`].
const BPS: u8 = 1 << LimitKind::BpsTotal as u8 | 1 << LimitKind::BpsRead as u8 | 1 << LimitKind::BpsWrite as u8;

/// For each direction, the existing buckets that its requests wait for.
fn asked(buckets: &[Option<Bucket>; 6]) -> [u8; Direction::ALL.len()] {
    Direction::ALL.map(|direction| {
        let kinds = match direction {
            Direction::Read => [LimitKind::BpsTotal, LimitKind::BpsRead, LimitKind::IopsTotal, LimitKind::IopsRead],
            Direction::Write => [LimitKind::BpsTotal, LimitKind::BpsWrite, LimitKind::IopsTotal, LimitKind::IopsWrite],
        };
        let there = kinds.into_iter().filter(|&kind| buckets[kind as usize].is_some());
        there.fold(0, |bits, kind| bits | 1 << kind as u8)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::charge::ChargeTable;
    use crate::cost::Operation;

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
        limiter.charge(&ChargeTable::DEFAULT.cost(Operation::Read, 8192), at_ms(0));
        assert_eq!(limiter.ready_at(&ChargeTable::DEFAULT.cost(Operation::Read, 1), at_ms(0)), Some(at_ms(1900)));
        assert_eq!(limiter.ready_at(&ChargeTable::DEFAULT.cost(Operation::Write, 1), at_ms(0)), Some(at_ms(900)));
    }

    #[test]
    fn asking_changes_nothing() {
        let limits = Limits::UNLIMITED.with(LimitKind::IopsTotal, Limit::average(10));
        let mut limiter = Limiter::new(&limits);
        let read = ChargeTable::DEFAULT.cost(Operation::Read, 512);
        for _ in 0..1000 {
            assert_eq!(limiter.ready_at(&read, at_ms(0)), None);
        }
    }

    #[test]
    fn request_waits_only_for_what_it_is_charged_to() {
        let limits = Limits::UNLIMITED.with(LimitKind::BpsTotal, Limit::average(1000));
        let mut limiter = Limiter::new(&limits);
        limiter.charge(&ChargeTable::DEFAULT.cost(Operation::Write, 1_000_000), at_ms(0));
        assert!(limiter.ready_at(&ChargeTable::DEFAULT.cost(Operation::Read, 1), at_ms(0)).is_some());
        assert_eq!(limiter.ready_at(&ChargeTable::DEFAULT.cost(Operation::Discard, 1 << 40), at_ms(0)), None);
        assert_eq!(limiter.ready_at(&ChargeTable::DEFAULT.cost(Operation::Flush, 0), at_ms(0)), None);
    }

    #[test]
    fn large_request_counts_as_a_fraction_of_operations() {
        // iops-size 4096: 10 KiB are 2.5 operations; at 10/s, capacity 1, that is a wait of 150 ms.
        let mut limits = Limits::UNLIMITED.with(LimitKind::IopsTotal, Limit::average(10));
        limits.iops_size = 4096;
        let mut limiter = Limiter::new(&limits);
        limiter.charge(&ChargeTable::DEFAULT.cost(Operation::Read, 10_240), at_ms(0));
        assert_eq!(limiter.ready_at(&ChargeTable::DEFAULT.cost(Operation::Read, 512), at_ms(0)), Some(at_ms(150)));
    }
}
