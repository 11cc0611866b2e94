//! The worked examples that explain QEMU's throttle, each to the nanosecond.

use super::world::World;
use crate::cost::Operation;
use crate::time::Time;

#[test]
fn a_hundred_iops_let_eleven_go_at_once_then_one_each_ten_ms() {
    // Capacity 10, and the eleventh finds the level at the brim, not above it.
    let mut world = World::new();
    let group = world.group("iops-total=100");
    let (_, queue) = world.simple(group);
    world.reads(queue, 15, 4096);
    world.run_until_ms(100);
    let mut expected = vec![0.0; 11];
    expected.extend([10.0, 20.0, 30.0, 40.0]);
    assert_eq!(world.times_ms(queue), expected);
}

#[test]
fn one_iops_goes_at_0_and_from_0_9_s_on_each_second() {
    let mut world = World::new();
    let group = world.group("iops-total=1");
    let (_, queue) = world.simple(group);
    world.reads(queue, 4, 4096);
    world.run_until_ms(10_000);
    assert_eq!(world.times_ms(queue), [0.0, 900.0, 1900.0, 2900.0]);
}

#[test]
fn bytes_are_waited_for_after_the_request_that_used_them() {
    // bps-read 4096: 4 KiB leave a debt of 3686.4 B = 0.9 s; the first 2 KiB then one of 2048 B = 0.5 s.
    let mut world = World::new();
    let group = world.group("bps-read=4096");
    let (_, queue) = world.simple(group);
    for bytes in [4096, 2048, 2048] {
        world.request(queue, Operation::Read, bytes);
    }
    world.run_until_ms(10_000);
    assert_eq!(world.times_ms(queue), [0.0, 900.0, 1400.0]);
}

/// Keeps 32 requests waiting on one queue until `end_ms`.
fn backlogged(text: &str, end_ms: u64) -> World {
    let mut world = World::new();
    let group = world.group(text);
    let (_, queue) = world.simple(group);
    let depth = 32;
    world.reads(queue, depth, 4096);
    let end = Time::from_nanos(end_ms * 1_000_000);
    let mut arrived = depth as usize;
    loop {
        while arrived < world.went.len() + depth as usize {
            world.request(queue, Operation::Read, 4096);
            arrived += 1;
        }
        match world.deadline(queue) {
            Some(at) if at <= end => world.run_until(at),
            _ => break,
        }
    }
    world
}

#[test]
fn a_burst_of_four_seconds_is_a_rate_and_ends_when_the_bucket_is_full() {
    // iops 10, max 70, length 4: 8 at once (max / 10 = 7, and the request at the brim), then 70/s
    // until the bucket holds 280 units: 70 t + 8 - 10 t = 281 at t = 4.55 s; from then on 10/s.
    let world = backlogged("iops-total=10 iops-total-max=70 iops-total-max-length=4", 8_000);
    assert_eq!(world.count_by_ms(0), 8);
    assert_eq!(world.count_by_ms(1_000), 78);
    assert_eq!(world.count_by_ms(2_000), 148);
    assert_eq!(world.count_by_ms(3_000), 218);
    assert_eq!(world.count_by_ms(4_000), 288);
    let after_5_s = world.count_by_ms(5_000);
    assert_eq!(world.count_by_ms(6_000), after_5_s + 10);
    assert_eq!(world.count_by_ms(8_000), after_5_s + 30);
    // Over all: capacity 280 + 10/s + the request at the brim.
    assert_eq!(world.count_by_ms(8_000), 280 + 80 + 1);
}

#[test]
fn a_pool_of_one_second_goes_at_any_speed() {
    // Without a length above 1 s, max is a pool: 71 at once, then 10/s.
    let world = backlogged("iops-total=10 iops-total-max=70", 2_000);
    assert_eq!(world.count_by_ms(0), 71);
    assert_eq!(world.count_by_ms(1_000), 81);
}

#[test]
fn a_minute_of_burst_at_2000_then_100() {
    // iops 100, max 2000, length 60: 201 at once and 2000/s up to 120,201 at 60 s. The bucket holds
    // 120,000 units and fills at 1900/s, so it is full at 120,000 / 1900 = 63.158 s; 100/s from
    // there. By 63.158 s every request n with n - 6315.8 <= 120,000 has gone, n = 0 … 126,315.
    let went = backlogged_counting("iops-total=100 iops-total-max=2000 iops-total-max-length=60", 70_000);
    assert_eq!(count(&went, 60_000), 120_201);
    assert_eq!(count(&went, 63_158), 126_316);
    assert_eq!(count(&went, 69_158), 126_916);
}

/// As [`backlogged`] on a bare limiter, for runs of more than 100,000 requests: the instants at
/// which requests went.
fn backlogged_counting(text: &str, end_ms: u64) -> Vec<Time> {
    let mut limiter = crate::limiter::Limiter::new(&super::world::limits(text));
    let cost = crate::charge::ChargeTable::DEFAULT.cost(Operation::Read, 4096);
    let mut went = Vec::new();
    let mut now = Time::ZERO;
    while now.as_nanos() <= end_ms * 1_000_000 {
        match limiter.ready_at(&cost, now) {
            Some(later) => now = later,
            None => {
                limiter.charge(&cost, now);
                went.push(now);
            }
        }
    }
    went
}

fn count(went: &[Time], ms: u64) -> usize {
    went.iter().filter(|at| at.as_nanos() <= ms * 1_000_000).count()
}

#[test]
fn a_discard_waits_behind_the_writes_of_its_device_although_no_byte_of_it_is_charged() {
    // Capacity 100,000 bytes. The fourth write goes when the level, three writes, has drained to the
    // capacity: (3 · 1,048,576 - 100,000) / 1,000,000 s. A flush is free and overtakes.
    let mut world = World::new();
    let group = world.group("bps-total=1000000");
    let (_, queue) = world.simple(group);
    for _ in 0..4 {
        world.request(queue, Operation::Write, 1 << 20);
    }
    world.request(queue, Operation::Discard, 4096);
    world.request(queue, Operation::Flush, 0);
    world.run_until_ms(10_000);
    let numbers: Vec<u32> = world.went.iter().map(|went| went.number).collect();
    assert_eq!(numbers, [0, 5, 1, 2, 3, 4]);
    assert_eq!(world.went[5].at.as_nanos(), 3_045_728_000);
}
