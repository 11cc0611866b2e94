//! Shares: by cost, by weight, at each level, for all sizes, depths and directions.

use super::world::World;
use crate::cost::Operation;
use crate::time::Time;

/// A client that keeps `depth` requests in flight: each answer is followed by the next request
/// after `think_us`.
#[derive(Clone, Copy)]
struct Client {
    queue: usize,
    operation: Operation,
    bytes: u64,
    depth: u32,
    think_us: u64,
}

fn client(queue: usize, operation: Operation, bytes: u64, depth: u32) -> Client {
    Client { queue, operation, bytes, depth, think_us: 100 }
}

/// Runs the clients, each on its own queue, and returns the bytes of each that went from `from_s`
/// to `to_s`.
fn bytes_let_go(world: &mut World, clients: &[Client], from_s: u64, to_s: u64) -> Vec<u64> {
    let at_s = |s: u64| Time::from_nanos(s * 1_000_000_000);
    // Requests about to arrive: instant and client. Few enough for a linear search.
    let mut arrivals: Vec<(Time, usize)> =
        (0..clients.len()).flat_map(|index| (0..clients[index].depth).map(move |_| (Time::ZERO, index))).collect();
    let mut bytes = vec![0; clients.len()];
    let mut seen = world.went.len();
    loop {
        while let Some(went) = world.went.get(seen).copied() {
            seen += 1;
            let index = clients.iter().position(|client| client.queue == went.queue).unwrap();
            if went.at >= at_s(from_s) && went.at < at_s(to_s) {
                bytes[index] += went.bytes;
            }
            arrivals.push((went.at.plus_nanos(clients[index].think_us * 1_000), index));
        }
        let next = arrivals.iter().enumerate().min_by_key(|(_, arrival)| arrival.0).map(|(place, _)| place);
        let deadline = world.next_deadline();
        match (next, deadline) {
            (Some(place), deadline) if deadline.is_none_or(|at| arrivals[place].0 <= at) => {
                let (at, index) = arrivals.swap_remove(place);
                if at >= at_s(to_s) {
                    return bytes;
                }
                world.run_until(at);
                world.request(clients[index].queue, clients[index].operation, clients[index].bytes);
                world.run_until(at);
            }
            (_, Some(at)) if at < at_s(to_s) => world.run_until(at),
            _ => return bytes,
        }
    }
}

/// Asserts that `parts` are in the ratio of `weights`, each within `tolerance` of its due.
#[track_caller]
fn assert_shares(parts: &[u64], weights: &[u64], tolerance: f64) {
    let total: u64 = parts.iter().sum();
    let weight: u64 = weights.iter().sum();
    for (part, own) in parts.iter().zip(weights) {
        let due = total as f64 * *own as f64 / weight as f64;
        assert!((*part as f64 / due - 1.0).abs() <= tolerance, "{parts:?} should stand as {weights:?}");
    }
}

use Operation::{Read, Write};

#[test]
fn small_and_large_requests_share_bytes_equally() {
    // QEMU: 14.2 : 35.9. Over 4 s of 50 MiB/s, one 64 KiB request is 0.06 % of a share.
    let mut world = World::unchecked();
    let group = world.group("bps-total=52428800");
    let (_, a) = world.simple(group);
    let (_, b) = world.simple(group);
    let parts = bytes_let_go(&mut world, &[client(a, Read, 4096, 32), client(b, Read, 65_536, 32)], 1, 5);
    assert_shares(&parts, &[1, 1], 0.01);
    assert!(parts.iter().sum::<u64>() as f64 >= 0.999 * 4.0 * 52_428_800.0, "the group's rate is used: {parts:?}");
}

#[test]
fn reads_and_writes_of_two_devices_share_a_total_equally() {
    // QEMU: 1.8 : 48.2.
    let mut world = World::unchecked();
    let group = world.group("bps-total=52428800");
    let (_, a) = world.simple(group);
    let (_, b) = world.simple(group);
    let parts = bytes_let_go(&mut world, &[client(a, Read, 4096, 32), client(b, Write, 131_072, 32)], 1, 5);
    assert_shares(&parts, &[1, 1], 0.01);
}

#[test]
fn reads_and_writes_of_one_device_share_a_total_equally() {
    let mut world = World::unchecked();
    let group = world.group("bps-total=10000000");
    let member = world.device(Some(group), "");
    let (a, b) = (world.queue(member), world.queue(member));
    let parts = bytes_let_go(&mut world, &[client(a, Read, 4096, 32), client(b, Write, 65_536, 32)], 1, 5);
    assert_shares(&parts, &[1, 1], 0.01);
}

#[test]
fn one_request_at_a_time_gets_the_same_as_thirty_two() {
    // QEMU: 641 : 1357. The qd1 client could do 10,000/s alone (100 us an answer), so half of 2000 is its due.
    let mut world = World::unchecked();
    let group = world.group("iops-total=2000");
    let (_, a) = world.simple(group);
    let (_, b) = world.simple(group);
    let parts = bytes_let_go(&mut world, &[client(a, Read, 4096, 32), client(b, Read, 4096, 1)], 1, 5);
    assert_shares(&parts, &[1, 1], 0.01);
}

#[test]
fn client_too_slow_for_its_share_lends_the_rest() {
    // 20 ms an answer: 50/s at most of 2000/s. The fast client takes the rest, and no rate is lost.
    let mut world = World::unchecked();
    let group = world.group("iops-total=2000");
    let (_, a) = world.simple(group);
    let (_, b) = world.simple(group);
    let slow = Client { think_us: 20_000, ..client(b, Read, 4096, 1) };
    let parts = bytes_let_go(&mut world, &[client(a, Read, 4096, 32), slow], 1, 5);
    let (fast, slow) = (parts[0] / 4096, parts[1] / 4096);
    assert!((190..=200).contains(&slow), "{slow}");
    assert!((7_999..=8_001).contains(&(fast + slow)), "{fast} + {slow}");
}

#[test]
fn weights_rule_whatever_the_sizes() {
    let mut world = World::unchecked();
    let group = world.group("bps-total=52428800");
    let queues = [100, 200, 400].map(|weight| {
        let member = world.weighted_device(Some(group), "", weight);
        world.queue(member)
    });
    let clients =
        [client(queues[0], Read, 131_072, 8), client(queues[1], Write, 4096, 64), client(queues[2], Read, 16_384, 32)];
    let parts = bytes_let_go(&mut world, &clients, 1, 6);
    assert_shares(&parts, &[1, 2, 4], 0.02);
}

#[test]
fn shares_hold_at_each_level() {
    // rack: tenant-a (weight 200, two devices 1 : 3) against vol3 (weight 100).
    let mut world = World::unchecked();
    let rack = world.group("bps-total=20000000");
    let tenant = world.group_below(Some(rack), "", 200);
    let queues = [(tenant, 100), (tenant, 300), (rack, 100)].map(|(group, weight)| {
        let member = world.weighted_device(Some(group), "", weight);
        world.queue(member)
    });
    let clients =
        [client(queues[0], Read, 4096, 32), client(queues[1], Write, 32_768, 32), client(queues[2], Read, 65_536, 32)];
    let parts = bytes_let_go(&mut world, &clients, 1, 6);
    assert_shares(&parts, &[2, 6, 4], 0.02);
}

#[test]
fn caps_on_each_level_hold_and_the_rest_is_lent() {
    // The tenant may do 5 MB/s of the rack's 20; its sibling takes the remaining 15. The wait is the
    // largest of all levels, not the sum.
    let mut world = World::unchecked();
    let rack = world.group("bps-total=20000000");
    let tenant = world.group_below(Some(rack), "bps-total=5000000", 100);
    let (_, a) = world.simple(tenant);
    let (_, b) = world.simple(tenant);
    let (_, c) = world.simple(rack);
    let clients = [client(a, Read, 4096, 32), client(b, Read, 65_536, 32), client(c, Write, 65_536, 32)];
    let parts = bytes_let_go(&mut world, &clients, 1, 6);
    assert_shares(&parts, &[25, 25, 150], 0.01);
    assert!(parts.iter().sum::<u64>() as f64 >= 0.998 * 5.0 * 20e6, "{parts:?}");
}

#[test]
fn only_limits_that_bind_count() {
    // bps binds: 5 MB/s each is 1221 operations of 4k and 76 of 64k. iops 2000 does not bind, and
    // must not make a 4k request, 0.41 ms of bytes, count for its 0.5 ms of operations.
    let mut world = World::unchecked();
    let group = world.group("bps-total=10000000 iops-total=2000");
    let (_, a) = world.simple(group);
    let (_, b) = world.simple(group);
    let clients = [client(a, Read, 4096, 32), client(b, Read, 65_536, 32)];
    let parts = bytes_let_go(&mut world, &clients, 2, 8);
    assert_shares(&parts, &[1, 1], 0.01);
}

#[test]
fn reads_do_not_pay_for_writes_where_nothing_limits_both() {
    // Separate limits: a device that writes as well still gets its half of the reads.
    let mut world = World::unchecked();
    let group = world.group("bps-read=10000000 bps-write=10000000");
    let both = world.device(Some(group), "");
    let (reads, writes) = (world.queue(both), world.queue(both));
    let (_, other) = world.simple(group);
    let clients = [client(reads, Read, 4096, 32), client(writes, Write, 65_536, 32), client(other, Read, 65_536, 32)];
    let parts = bytes_let_go(&mut world, &clients, 1, 6);
    assert_shares(&parts, &[1, 2, 1], 0.01);
}

#[test]
fn burst_is_shared_as_the_steady_rate_is() {
    // 1000/s for 10 s, then 100/s: half each, in the burst and after it.
    let mut world = World::unchecked();
    let group = world.group("iops-total=100 iops-total-max=1000 iops-total-max-length=10");
    let (_, a) = world.simple(group);
    let (_, b) = world.simple(group);
    let clients = [client(a, Read, 4096, 32), client(b, Read, 4096, 4)];
    let burst = bytes_let_go(&mut world, &clients, 1, 9);
    assert_shares(&burst, &[1, 1], 0.01);
    assert_eq!(burst.iter().sum::<u64>() / 4096, 8_000);
}

#[test]
fn short_pause_is_made_up_for_and_a_long_one_is_not_owed() {
    // B pauses after 1 s of equal shares. A pause of 50 ms is made up for: over the second with the
    // pause, both get the same. Of a pause of 500 ms, only LAG_MAX = 50 ms is: A had 500 ms alone,
    // B then 50 ms, and the rest is shared.
    for (pause_ms, due_of_b) in [(50, 500_i64), (500, 275)] {
        let mut world = World::unchecked();
        let group = world.group("iops-total=1000");
        let (_, a) = world.simple(group);
        let (_, b) = world.simple(group);
        bytes_let_go(&mut world, &[client(a, Read, 1, 8), client(b, Read, 1, 8)], 0, 1);
        // Held requests go; then B sends nothing for a while.
        world.run_until_ms(1_100);
        let seen = world.went.len();
        world.reads(a, 1_100, 1);
        world.run_until_ms(1_100 + pause_ms);
        world.reads(b, 1_100, 1);
        world.run_until_ms(2_100);
        let of_b = world.went[seen..].iter().filter(|went| went.queue == b).count() as i64;
        assert!((of_b - due_of_b).abs() <= 1, "{of_b} after a pause of {pause_ms} ms");
    }
}

#[test]
fn many_members_are_all_served() {
    // No starvation: 50 backlogged members with very different requests, one of the least weight.
    let mut world = World::unchecked();
    let group = world.group("bps-total=100000000");
    let clients: Vec<_> = (0..50_u64)
        .map(|index| {
            let member = world.weighted_device(Some(group), "", if index == 0 { 1 } else { 100 });
            client(world.queue(member), if index % 2 == 0 { Read } else { Write }, 4096 << (index % 6), 8)
        })
        .collect();
    let parts = bytes_let_go(&mut world, &clients, 1, 6);
    let mut weights = vec![100; 50];
    weights[0] = 1;
    // A share of 1/4901 of 500 MB is 102 kB: 25 requests, hence 4 % for one more or less; in the
    // larger shares 0.6 % a request.
    assert_shares(&parts[1..], &weights[1..], 0.02);
    assert!((98_000..=107_000).contains(&parts[0]), "{}", parts[0]);
}
