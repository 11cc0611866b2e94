//! Leases, the credit that queues pay for in advance: the limits hold in every window, and unspent
//! credit returns to the buckets that paid it.

use proptest::prelude::*;

use super::world::{OneChange, World, limits};
use crate::bucket::UNIT;
use crate::cost::Operation::{self, Flush, Read, Write};
use crate::group::{Change, GroupOptions, MemberOptions};
use crate::ids::GroupId;
use crate::limits::{Limit, LimitKind, Limits, SECOND_NS};
use crate::planted::{Fault, is_found};
use crate::time::Time;

fn us(us: u64) -> Time {
    Time::from_nanos(us * 1_000)
}

fn iops(avg: u64, max: u64, burst_length_ns: u64) -> Limits {
    Limits::UNLIMITED.with(LimitKind::IopsTotal, Limit { avg, max, burst_length_ns })
}

/// A group of these limits in a world with leases.
fn world_of(limits: Limits) -> (World, GroupId) {
    let world = World::with_leases();
    let options = GroupOptions { limits, ..GroupOptions::default() };
    let group = world.throttle.add_group(&options, world.now).expect("a root");
    (world, group)
}

/// The units below the brim of the only limit of a group.
fn credit(world: &World, group: GroupId) -> u64 {
    world.throttle.group_credit(group, world.now)[0].left
}

/// Measures the requests that go, independently of the code under test: the largest excess of the
/// units in any window over `rate · T`.
///
/// The excess of the windows that end now drains by the rate and starts anew at 0, like the level
/// of a bucket that is charged when a request really goes.
struct Meter {
    rate: u64,
    excess: u128,
    at: Time,
    /// The largest excess before a request: the last request of a window is not counted.
    most: u128,
}

impl Meter {
    fn new(rate: u64) -> Self {
        Self { rate, excess: 0, at: Time::ZERO, most: 0 }
    }

    fn goes(&mut self, units: u128, at: Time) {
        self.excess = self.excess.saturating_sub(u128::from(self.rate) * u128::from(at.nanos_since(self.at)));
        self.at = at;
        self.most = self.most.max(self.excess);
        self.excess += units;
    }

    /// Fails unless every window saw at most `rate · T + capacity + capacity / 16 + one request`.
    fn expect_within(&self, capacity: u128, limit: &str) {
        let most = capacity + capacity / 16;
        assert!(self.most <= most, "{limit}: {} of {most} nano-units before the last request", self.most);
    }
}

/// The meters of one limit: for its average and, above a burst of 1 s, for its burst rate.
struct Meters(Vec<(Meter, u128)>);

impl Meters {
    fn of(Limit { avg, max, burst_length_ns }: Limit) -> Self {
        let tenth = |rate: u64| u128::from(rate) * u128::from(SECOND_NS) / 10;
        let mut meters =
            vec![(Meter::new(avg), if max > 0 { u128::from(max) * u128::from(burst_length_ns) } else { tenth(avg) })];
        if max > 0 && burst_length_ns > SECOND_NS {
            meters.push((Meter::new(max), tenth(max)));
        }
        Self(meters)
    }

    fn goes(&mut self, units: u64, at: Time) {
        self.0.iter_mut().for_each(|(meter, _)| meter.goes(u128::from(units) * UNIT, at));
    }

    fn expect_within(&self, limit: &str) {
        self.0.iter().for_each(|(meter, capacity)| meter.expect_within(*capacity, limit));
    }
}

/// The most requests that go at one instant: 64 queues ask `asks` times each within 1 ms, and then
/// send until a request of theirs is held.
fn at_one_instant(limits: Limits, queues: usize, asks: u64) -> usize {
    let (mut world, group) = world_of(limits);
    let queues: Vec<usize> = (0..queues).map(|_| world.simple(group).1).collect();
    let all = asks * queues.len() as u64;
    for request in 0..all {
        world.run_until(Time::from_nanos(SECOND_NS + request * 999_000 / all));
        world.request(queues[(request % queues.len() as u64) as usize], Read, 4096);
    }
    world.run_until(Time::from_nanos(SECOND_NS + 999_000));
    let before = world.went.len();
    for queue in queues {
        while world.throttle.held(world.member(queue)).count == 0 {
            world.request(queue, Read, 4096);
            world.run_until(world.now);
        }
    }
    world.went.len() - before
}

#[test]
fn credit_hoarded_by_many_queues_is_a_sixteenth_of_a_short_pool() {
    // (limit, queues): the capacity, a sixteenth of it, and the request at the brim. The pool of 20
    // ms is the only one that has room for leases.
    for (avg, length_ns, queues, most) in [
        (1_000_000, 200_000, 64, 213),
        (1_000_000, 1_000_000, 64, 1_063),
        (200_000, 1_000_000, 16, 213),
        (1_000_000, 16_000_000, 64, 17_001),
        (1_000_000, 20_000_000, 64, 21_251),
    ] {
        for asks in 2..8 {
            let went = at_one_instant(iops(avg, avg, length_ns), queues, asks);
            assert!(went <= most, "{went} of {most} after {asks} asks, burst of {length_ns} ns");
        }
    }
}

/// Plays queues that each send `count` requests, 10 us apart, every `period_us`; returns the credit
/// of the group that is missing one period after the last request.
fn missing_after(seconds: u64, limits: Limits, queues: u64, count: u64, period_us: u64) -> u64 {
    let (mut world, group) = world_of(limits);
    let queues: Vec<usize> = (0..queues).map(|_| world.simple(group).1).collect();
    for start_us in (0..seconds * 1_000_000).step_by(period_us as usize) {
        for request in 0..count {
            for &queue in &queues {
                world.run_until(us(start_us + request * 10));
                world.arrives(queue, Read, 4096);
            }
        }
    }
    world.run_until(world.now.plus_nanos(period_us * 1_000));
    level(&world, group)
}

#[test]
fn leases_of_a_group_below_its_average_leave_the_burst_alone() {
    // 42 % of the average, as single requests, in pairs, and in trains of 10, 40 and 160 that take
    // leases; and four queues at a quarter of that. The bar is 0.1 % of the burst.
    let slow = iops(4_000, 20_000, 60 * SECOND_NS);
    for (queues, count, period_us) in
        [(1, 1, 600), (1, 2, 1_200), (1, 10, 6_000), (1, 40, 24_000), (1, 160, 96_000), (4, 10, 24_000)]
    {
        let missing = missing_after(60, slow, queues, count, period_us);
        assert!(missing <= 1_200, "{missing} of 1,200,000 are gone: {queues} queues, {count} each {period_us} us");
    }
    // The same part of 400,000 a second, with a lease of each queue in nearly every millisecond.
    let fast = iops(400_000, 400_000, 3 * SECOND_NS);
    for (queues, period_us) in [(1, 6), (4, 24)] {
        let missing = missing_after(2, fast, queues, 1, period_us);
        assert!(missing <= 1_200, "{missing} of 1,200,000 are gone: {queues} queues, each {period_us} us");
    }
}

/// Raises the level of the only limit of a group by `units`.
fn fill(world: &World, group: GroupId, units: u64) {
    let mut levels = world.throttle.group_levels(group, world.now);
    levels[0].level += u128::from(units) * UNIT;
    world.throttle.resume_group(group, &levels, 0, world.now);
}

/// The credit of a group after 10 s of trains, beside the credit after the same requests with a
/// decision for each.
fn credit_with_and_without_leases(queues: u64, count: u64, period_us: u64) -> [u64; 2] {
    [World::with_leases(), World::unchecked()].map(|mut world| {
        let options = GroupOptions { limits: iops(4_000, 20_000, 60 * SECOND_NS), ..GroupOptions::default() };
        let group = world.throttle.add_group(&options, world.now).expect("a root");
        let queues: Vec<usize> = (0..queues).map(|_| world.simple(group).1).collect();
        // 23,000 a second more drain than arrive, in 10 s: the level stays above 0, and below the
        // 75,000 at which leases end.
        fill(&world, group, 40_000);
        for start_us in (0..10_000_000).step_by(period_us as usize) {
            for request in 0..count {
                for &queue in &queues {
                    world.run_until(us(start_us + request * 10));
                    world.arrives(queue, Read, 4096);
                }
            }
        }
        credit(&world, group)
    })
}

#[test]
fn credit_left_is_true_to_within_one_lease() {
    // 1,667 requests a second arrive and 4,000 drain: 40,000 are 16,670 after 10 s. A lease is twice
    // the train before, or 8 at least, and each queue may have one charged and unspent.
    for (queues, count, period_us) in [(1, 1, 600), (1, 10, 6_000), (1, 40, 24_000), (1, 160, 96_000), (4, 10, 24_000)]
    {
        let [with, without] = credit_with_and_without_leases(queues, count, period_us);
        let lease = (2 * count).max(8) * queues;
        assert!(with <= without && without - with <= lease, "{with}, {without} without leases, lease of {lease}");
    }
}

/// A queue of a group that has sent four reads at once, and so has a lease of 8 operations. The
/// level of the group is 1,012 operations then; the limit should have a capacity of 100,000 or more.
fn world_with_a_lease(limits: Limits) -> (World, GroupId, usize) {
    let (mut world, group) = world_of(limits);
    world.run_until_ms(1_000);
    fill(&world, group, 1_000);
    let (_, queue) = world.simple(group);
    world.reads(queue, 4, 512);
    assert_eq!(level(&world, group), 1_000 + 4 + 8);
    (world, group, queue)
}

/// The level of the only limit of a group, in units.
fn level(world: &World, group: GroupId) -> u64 {
    let credit = world.throttle.group_credit(group, world.now)[0];
    credit.capacity - credit.left + credit.debt
}

/// 10 operations drain in 1 ms, and the capacity is 100,000.
fn ten_a_millisecond() -> Limits {
    iops(10_000, 100_000, SECOND_NS)
}

#[test]
fn next_ask_returns_unspent_credit() {
    // 3 of 8 are spent, and 5 return 1 ms later, when 10 have drained. 3 are too few for a lease.
    let (mut world, group, queue) = world_with_a_lease(ten_a_millisecond());
    world.reads(queue, 3, 512);
    assert_eq!(level(&world, group), 1_012);
    world.run_until_ms(1_001);
    world.reads(queue, 1, 512);
    assert_eq!(level(&world, group), 1_000 + 4 + 3 - 10 + 1);
}

#[test]
fn held_request_returns_the_credit_of_both_directions() {
    // The reads are in advance by 8; a write is held by the limit of its device on writes.
    let (mut world, group, queue) = world_with_a_lease(ten_a_millisecond());
    let member = world.member(queue);
    world.throttle.set_member_limits(member, &limits("bps-write=1000"), world.now);
    world.reads(queue, 4, 512);
    assert_eq!(level(&world, group), 1_012 + 4 + 8, "a change voids 8, and a new lease takes 8");
    world.request(queue, Write, 512);
    assert_eq!(level(&world, group), 1_012 + 4 + 8 + 1, "the first write passes");
    world.request(queue, Write, 512);
    assert_eq!(world.throttle.held(member).count, 1);
    assert_eq!(level(&world, group), 1_012 + 4 + 1, "the second is held");
}

#[test]
fn end_of_a_queue_returns_its_credit() {
    // Retired, alone and after a drain.
    for drains in [false, true] {
        let (mut world, group, queue) = world_with_a_lease(ten_a_millisecond());
        if drains {
            world.throttle.drain(world.member(queue), world.now);
        }
        assert_eq!(world.retire(queue), Ok(()));
        assert_eq!(level(&world, group), 1_004);
    }
}

#[test]
fn returned_credit_dispatches_requests_that_wait_for_it() {
    // 10,000 a second with a capacity of 1,000, of which 40 are in use. A has 8 prepaid; B has sent
    // more than the limit allows. 1 ms later, 971 requests may go: when A sends a write, which waits
    // for its turn, when it sends a flush, which is free, and when the queue of A ends.
    for end in 0..3 {
        let (mut world, group) = world_of(limits("iops-total=10000"));
        let [(_, a), (_, b)] = [(); 2].map(|()| world.simple(group));
        world.run_until_ms(1_000);
        fill(&world, group, 40);
        world.reads(a, 4, 512);
        world.reads(b, 1_100, 512);
        world.run_until_ms(1_001);
        assert_eq!(world.went.len(), 963, "8 are prepaid");
        match end {
            0 => world.request(a, Write, 512),
            1 => world.request(a, Flush, 0),
            _ => assert_eq!(world.retire(a), Ok(())),
        }
        world.run_until_ms(1_001);
        assert_eq!(world.went.iter().filter(|went| went.operation == Read).count(), 971, "end {end}");
        world.throttle.assert_invariants();
    }
}

#[test]
fn credit_that_has_drained_returns_to_nobody() {
    // 8 prepaid by A and its 4 requests drain within 1.2 ms, as the bucket is otherwise empty. 20
    // requests of B are charged, and then A asks: 20 + 1 are spent, and 8 of them prepaid by B.
    let level_after = || {
        let (mut world, group) = world_of(ten_a_millisecond());
        let [(_, a), (_, b)] = [(); 2].map(|()| world.simple(group));
        world.run_until_ms(1_000);
        world.reads(a, 4, 512);
        world.run_until(us(1_002_000));
        world.reads(b, 4 + 8 + 8, 512);
        let before = level(&world, group);
        world.reads(a, 1, 512);
        assert_eq!(level(&world, group), before + 1);
    };
    level_after();
    assert!(is_found(Fault::RefundDrained, level_after), "credit that returns twice was not found");
}

#[test]
fn change_of_limits_voids_unspent_credit() {
    // The level of 1,012 is 2,024 of twice the capacity, and a refund of 8 would not be 8 of the old
    // ones. After the change the lease covers no request, so that 9 more are asked for: 4, and then
    // 8 prepaid of which 5 are spent.
    let level_after = || {
        let (mut world, group, queue) = world_with_a_lease(ten_a_millisecond());
        world.throttle.set_group_limits(group, &iops(10_000, 200_000, SECOND_NS), world.now);
        assert_eq!(level(&world, group), 2_024);
        world.reads(queue, 9, 512);
        assert_eq!(level(&world, group), 2_024 + 4 + 8);
    };
    level_after();
    for fault in [Fault::RefundAfterChange, Fault::LeaseOutlivesChange] {
        assert!(is_found(fault, level_after), "{fault:?} was not found");
    }
}

#[test]
fn lease_paid_in_one_group_is_not_spent_in_another() {
    // The 8 stay charged to the old group, and each request after the move to the new one.
    let levels_after = || {
        let (mut world, old, queue) = world_with_a_lease(ten_a_millisecond());
        let new = world
            .throttle
            .add_group(&GroupOptions { limits: ten_a_millisecond(), ..GroupOptions::default() }, world.now);
        let new = new.expect("a root");
        fill(&world, new, 100);
        world.throttle.set_group(world.member(queue), Some(new), world.now);
        world.reads(queue, 3, 512);
        assert_eq!((level(&world, old), level(&world, new)), (1_012, 103));
    };
    levels_after();
    for fault in [Fault::RefundAfterChange, Fault::LeaseOutlivesChange] {
        assert!(is_found(fault, levels_after), "{fault:?} was not found");
    }
}

#[test]
fn resumed_level_is_not_lowered_by_a_refund() {
    // An earlier process left 5,000, more than the present level: 8 of those are not unspent.
    let (mut world, group, queue) = world_with_a_lease(ten_a_millisecond());
    fill(&world, group, 5_000 - 1_012);
    world.reads(queue, 1, 512);
    assert_eq!(level(&world, group), 5_001);
}

#[derive(Clone, Debug)]
enum Step {
    /// A queue sends requests at a steady pace.
    Send { queue: usize, count: u32, gap_us: u64, operation: Operation, bytes: u64 },
    /// The queues send in turn, `count` requests each at a steady pace, so that many have leases.
    Hoard { count: u32, within_us: u64 },
    /// Every queue sends at one instant until one request of its device is held, or `count`.
    Burst { count: u32 },
    /// Time passes.
    Wait { us: u64 },
    /// A device moves to a group.
    Move { device: usize, group: usize },
    /// All limits, places and levels are set to those in force.
    Again,
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = prop_oneof![Just(512), Just(4096), 1_u64..100_000];
    let operation = prop_oneof![3 => Just(Read), 1 => Just(Write)];
    prop_oneof![
        8 => (any::<usize>(), 1_u32..40, 0_u64..300, operation, bytes)
            .prop_map(|(queue, count, gap_us, operation, bytes)| Step::Send { queue, count, gap_us, operation, bytes }),
        2 => (4_u32..8, 0_u64..1_000).prop_map(|(count, within_us)| Step::Hoard { count, within_us }),
        3 => (1_u32..300).prop_map(|count| Step::Burst { count }),
        3 => prop_oneof![0_u64..1_500, 0_u64..100_000].prop_map(|us| Step::Wait { us }),
        1 => (any::<usize>(), any::<usize>()).prop_map(|(device, group)| Step::Move { device, group }),
        1 => Just(Step::Again),
    ]
}

/// A plain average, or a burst of 200 us to 60 s. Rates are large enough for leases, and small
/// enough for the limit to be reached.
fn limit(scale: u64) -> impl Strategy<Value = Limit> {
    let rate = prop_oneof![2_000_u64..50_000, 50_000_u64..2_000_000].prop_map(move |rate| rate * scale);
    let length_ns = prop_oneof![200_000_u64..5_000_000, 5_000_000_u64..100_000_000, 100_000_000..60 * SECOND_NS];
    (rate, prop::option::of((1_u64..20, length_ns))).prop_map(|(avg, burst)| match burst {
        Some((times, burst_length_ns)) => Limit { avg, max: avg * times, burst_length_ns },
        None => Limit::average(avg),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn leases_keep_every_window_within_a_sixteenth_of_the_capacity(
        iops in [limit(1), limit(1)],
        bps in prop::option::of(limit(4096)),
        own in prop::option::of(limit(1)),
        queues in prop_oneof![1_usize..4, 4_usize..64],
        steps in prop::collection::vec(step(), 1..80),
    ) {
        // Two groups; devices of two queues, the first device with a limit of its own on reads. In
        // each window a limit sees at most rate · T + capacity + capacity / 16 + the last request,
        // by a meter that counts when requests really go.
        let mut world = World::with_leases();
        let of_group = iops.map(|iops| Limits::UNLIMITED.with(LimitKind::IopsTotal, iops));
        let of_group = of_group.map(|limits| bps.map_or(limits, |bps| limits.with(LimitKind::BpsTotal, bps)));
        let groups = of_group.map(|limits| {
            let options = GroupOptions { limits, ..GroupOptions::default() };
            world.throttle.add_group(&options, world.now).expect("a root")
        });
        let own = own.map_or(Limits::UNLIMITED, |own| Limits::UNLIMITED.with(LimitKind::IopsRead, own));
        let mut devices = Vec::new();
        let mut group_of = Vec::new();
        for queue in 0..queues {
            if queue % 2 == 0 {
                let limits = if devices.is_empty() { own } else { Limits::UNLIMITED };
                let options = MemberOptions { limits, group: Some(groups[0]), ..MemberOptions::default() };
                let member = world.throttle.join(&options, world.now);
                world.throttle.go_live(member);
                devices.push(member);
                group_of.push(0);
            }
            world.queue(devices[queue / 2]);
        }
        let mut meters_iops = iops.map(Meters::of);
        let mut meters_bps = bps.map(|bps| [Meters::of(bps), Meters::of(bps)]);
        let mut meters_own = Meters::of(own.get(LimitKind::IopsRead));
        let mut seen = 0;
        let mut measure = |world: &World, group_of: &[usize]| {
            // The order within one instant is that of the threads' turns, not that of the dispatches: the largest
            // request may be the last.
            let mut batch = world.went[seen..].to_vec();
            batch.sort_by_key(|went| (went.at, went.bytes));
            for went in batch {
                let device = went.queue / 2;
                meters_iops[group_of[device]].goes(1, went.at);
                if let Some(meters) = &mut meters_bps {
                    meters[group_of[device]].goes(went.bytes, went.at);
                }
                if device == 0 && went.operation == Read {
                    meters_own.goes(1, went.at);
                }
            }
            seen = world.went.len();
            meters_iops.iter().for_each(|meters| meters.expect_within("iops of a group"));
            meters_bps.iter().flatten().for_each(|meters| meters.expect_within("bytes of a group"));
            if !own.is_unlimited() {
                meters_own.expect_within("reads of a device");
            }
        };
        for step in steps {
            match step {
                Step::Send { queue, count, gap_us, operation, bytes } => {
                    for _ in 0..count {
                        world.request(queue % queues, operation, bytes);
                        world.run_until(world.now.plus_nanos(gap_us * 1_000));
                    }
                }
                Step::Hoard { count, within_us } => {
                    let gap_ns = within_us * 1_000 / (queues as u64 * u64::from(count));
                    for queue in (0..count).flat_map(|_| 0..queues) {
                        world.request(queue, Read, 512);
                        world.run_until(world.now.plus_nanos(gap_ns));
                    }
                }
                Step::Burst { count } => {
                    for queue in 0..queues {
                        for _ in 0..count {
                            if world.throttle.held(devices[queue / 2]).count > 0 {
                                break;
                            }
                            world.request(queue, Read, 512);
                            world.run_until(world.now);
                        }
                    }
                }
                Step::Wait { us } => world.run_until(world.now.plus_nanos(us * 1_000)),
                Step::Move { device, group } => {
                    let (device, group) = (device % devices.len(), group % groups.len());
                    world.throttle.set_group(devices[device], Some(groups[group]), world.now);
                    measure(&world, &group_of);
                    group_of[device] = group;
                }
                Step::Again => {
                    let same = |group| Change::GroupLimits(groups[group], of_group[group]);
                    prop_assert_eq!(world.throttle.apply(&[same(0), same(1)], world.now), Ok(()));
                    for group in groups {
                        let levels = world.throttle.group_levels(group, world.now);
                        world.throttle.resume_group(group, &levels, 0, world.now);
                    }
                }
            }
            world.run_until(world.now);
            world.throttle.assert_invariants();
            measure(&world, &group_of);
        }
    }
}
