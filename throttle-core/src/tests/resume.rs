//! A process ends, and its successor resumes from the levels that it left: the limits hold over
//! both.

use proptest::prelude::*;

use super::world::World;
use crate::bucket::{Bucket, UNIT};
use crate::cost::Operation::{Read, Write};
use crate::limiter::Level;
use crate::limits::{Limit, LimitKind};
use crate::planted::{Fault, is_found};
use crate::time::Time;

const SECOND_NS: u64 = 1_000_000_000;

/// The number of requests that a group of such limits dispatches over all phases, with requests
/// always waiting. A phase is the life of a process and the time until the next one starts, in
/// nanoseconds.
fn served(text: &str, phases: &[(u64, u64)]) -> usize {
    let mut kept: Option<(Vec<Level>, u64)> = None;
    let mut served = 0;
    for &(life_ns, down_ns) in phases {
        let mut world = World::unchecked();
        let group = world.group(text);
        if let Some((levels, elapsed_ns)) = &kept {
            world.throttle.resume_group(group, levels, *elapsed_ns, world.now);
        }
        let (_, queue) = world.simple(group);
        let end = world.now.plus_nanos(life_ns);
        let mut arrived = 0;
        loop {
            let wanted = world.went.len() as u32 + 32;
            world.reads(queue, wanted - arrived, 4096);
            arrived = wanted;
            world.run_until(world.now);
            if world.went.len() as u32 + 32 > arrived {
                continue;
            }
            match world.next_deadline().filter(|&at| at <= end) {
                Some(at) => world.run_until(at),
                None => break,
            }
        }
        world.run_until(end);
        served += world.went.len();
        kept = Some((world.throttle.group_levels(group, world.now), down_ns));
    }
    served
}

#[test]
fn restarts_grant_no_burst() {
    // 10/s, or 100/s for 5 s: 500 more at most. Ten lives of 1 s with 1 s between them: 20 s, and
    // the request at the brim. A process that forgets levels dispatches 100 and more in each life.
    let life = || {
        let served = served("iops-total=10 iops-total-max=100 iops-total-max-length=5", &[(SECOND_NS, SECOND_NS); 10]);
        assert!((500..=500 + 200 + 1).contains(&served), "{served}");
    };
    life();
    assert!(is_found(Fault::ResumeEmpty, life), "a restart that gives credit was not found");
}

#[test]
fn debt_outlives_its_program() {
    // 1 MiB at 4096 B/s is a wait of 255.9 s. After 55.9 s under the first process and 100 s
    // without a process, 100 s are left.
    let mut world = World::new();
    let group = world.group("bps-total=4096");
    let (_, queue) = world.simple(group);
    world.request(queue, Write, 1_048_576);
    world.run_until_ms(55_900);
    let levels = world.throttle.group_levels(group, world.now);
    let mut world = World::new();
    let group = world.group("bps-total=4096");
    world.throttle.resume_group(group, &levels, 100 * SECOND_NS, world.now);
    let (_, queue) = world.simple(group);
    world.request(queue, Read, 512);
    world.run_until_ms(99_999);
    assert_eq!(world.went.len(), 0);
    world.run_until_ms(100_000);
    assert_eq!(world.went.len(), 1);
}

#[test]
fn who_waits_already_is_timed_anew() {
    // At 1/s the second request goes at 0.9 s; two more that the earlier process let through delay
    // it by 2 s.
    let mut world = World::new();
    let group = world.group("iops-total=1");
    let (_, queue) = world.simple(group);
    world.reads(queue, 2, 512);
    world.run_until_ms(0);
    assert_eq!(world.went.len(), 1);
    let mut left = world.throttle.group_levels(group, world.now);
    left[0].level += 2 * UNIT;
    world.throttle.resume_group(group, &left, 0, world.now);
    world.run_until_ms(2_800);
    assert_eq!(world.went.len(), 1);
    world.run_until_ms(2_900);
    assert_eq!(world.went.len(), 2);
}

#[test]
fn other_limits_keep_the_used_share_and_new_ones_begin_empty() {
    let mut world = World::new();
    let old = world.group("iops-total=100");
    let (_, queue) = world.simple(old);
    world.reads(queue, 11, 512);
    world.run_until_ms(0);
    let levels = world.throttle.group_levels(old, world.now);
    let new = world.group("iops-total=200 bps-read=1000");
    world.throttle.resume_group(new, &levels, 0, world.now);
    let left: Vec<_> = world
        .throttle
        .group_credit(new, world.now)
        .iter()
        .map(|credit| (credit.kind, credit.left, credit.debt))
        .collect();
    // Full, with the request at the brim as a debt; the bps limit has no noted level.
    assert_eq!(left, [(LimitKind::BpsRead, 100, 0), (LimitKind::IopsTotal, 0, 1)]);
}

proptest! {
    #[test]
    fn a_bucket_resumed_decides_as_the_one_that_was_left(
        avg in 1_u64..1_000_000,
        burst in prop::option::of((1_u64..20, 0_u64..10_000_000_000)),
        history in prop::collection::vec((1_u64..1_000_000, 0_u64..2_000_000_000), 0..50),
        down_ns in 0_u64..20_000_000_000,
        begins_ns in 0_u64..5_000_000_000,
    ) {
        // The instant at which the bucket takes the next request, counted from the restart: equal
        // to the nanosecond.
        let limit = match burst {
            Some((times, length_ns)) if length_ns > 0 => Limit { avg, max: avg * times, burst_length_ns: length_ns },
            _ => Limit::average(avg),
        };
        let mut one = Bucket::new(limit);
        let mut now = Time::ZERO;
        for (units, gap_ns) in history {
            now = now.plus_nanos(gap_ns);
            one.charge(u128::from(units) * UNIT, now);
        }
        let (level, burst_level) = one.levels(now);
        let begins = Time::from_nanos(begins_ns);
        let mut other = Bucket::new(limit);
        other.resume(Bucket::filled(limit, level, burst_level), down_ns, begins);
        prop_assert_eq!(other.levels(begins), one.levels(now.plus_nanos(down_ns)));
        let wait = |at: Option<Time>, from: Time| at.map(|at| at.nanos_since(from));
        prop_assert_eq!(wait(other.ready_at(begins), begins), wait(one.ready_at(now.plus_nanos(down_ns)), now.plus_nanos(down_ns)));
        // A second resume changes nothing: a noted level is never added to the present one.
        let before = other.levels(begins);
        other.resume(Bucket::filled(limit, before.0, before.1), 0, begins);
        prop_assert_eq!(other.levels(begins), before);
    }

    #[test]
    fn any_number_of_restarts_serves_no_more_than_one_life(
        rate in 1_u64..2_000,
        phases in prop::collection::vec((0_u64..300_000_000, 0_u64..300_000_000), 1..12),
    ) {
        // rate · T + capacity (a tenth of the rate) + the request at the brim, for any number of
        // restarts.
        let whole_ns: u64 = phases.iter().map(|(life_ns, down_ns)| life_ns + down_ns).sum();
        let most = u128::from(rate) * u128::from(whole_ns) / u128::from(SECOND_NS) + u128::from(rate) / 10 + 2;
        let served = served(&format!("iops-total={rate}"), &phases) as u128;
        prop_assert!(served <= most, "{} of at most {}", served, most);
    }

    #[test]
    fn what_nobody_noted_is_never_given_back(
        avg in 1_u64..2_000,
        burst in prop::option::of((1_u64..20, 1_u64..10)),
        lives in prop::collection::vec((0_u64..3_000_000_000, 0_u64..1_000_000_000, 0_u64..2_000_000_000), 1..8),
    ) {
        // Levels are noted, the process serves on for a while (always at its limit), is killed, and
        // is away for a while. All its lives together serve as many requests as one bucket does in
        // that time: avg · T + capacity + the request at the brim of each life.
        let limit = match burst {
            Some((times, seconds)) => Limit { avg, max: avg * times, burst_length_ns: seconds * SECOND_NS },
            None => Limit::average(avg),
        };
        let serve = |bucket: &mut Bucket, from: Time, for_ns: u64| {
            let (mut now, end, mut served) = (from, from.plus_nanos(for_ns), 0_u128);
            loop {
                now = bucket.ready_at(now).unwrap_or(now);
                if now > end {
                    return served;
                }
                bucket.charge(UNIT, now);
                served += 1;
            }
        };
        let capacity = Bucket::new(limit).credit(Time::ZERO).1;
        let (mut served, mut whole_ns, mut kept) = (0, 0, None);
        for &(noted_ns, blind_ns, down_ns) in &lives {
            let mut bucket = Bucket::new(limit);
            if let Some((level, elapsed_ns)) = kept {
                let Level { level, burst_level, .. } = level;
                bucket.resume(Bucket::filled(limit, level, burst_level), elapsed_ns, Time::ZERO);
            }
            served += serve(&mut bucket, Time::ZERO, noted_ns);
            let noted = Time::from_nanos(noted_ns);
            let (level, burst_level) = bucket.levels(noted);
            served += serve(&mut bucket, noted, blind_ns);
            let level = Level { kind: LimitKind::IopsTotal, limit, level, burst_level };
            kept = Some((level.at_most_after(blind_ns), down_ns));
            whole_ns += noted_ns + blind_ns + down_ns;
        }
        let most = u128::from(avg) * u128::from(whole_ns) / u128::from(SECOND_NS)
            + u128::from(capacity) + 2 + lives.len() as u128;
        prop_assert!(served <= most, "{} of at most {}", served, most);
    }
}
