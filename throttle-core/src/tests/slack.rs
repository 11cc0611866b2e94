//! Timer slack: requests that wait behind others of their device go together, several per timer,
//! and no device gets a different rate by it.

use std::sync::Arc;

use super::world::{OneChange, World, limits};
use crate::cost::Operation;
use crate::gate::Gate;
use crate::group::MemberOptions;
use crate::limits::{Limit, LimitKind, Limits};
use crate::planted::{Fault, is_found};
use crate::request::Request;
use crate::throttle::Doorbell;
use crate::time::Time;

/// A bell for a gate that its test polls anyway.
pub struct Silent;

impl Doorbell for Silent {
    fn ring(&self) {}
}

/// The distinct instants at which requests went that had to wait.
fn instants(world: &World) -> Vec<Time> {
    let mut instants: Vec<Time> = world.went.iter().map(|went| went.at).filter(|&at| at > Time::ZERO).collect();
    instants.dedup();
    instants
}

#[test]
fn a_timer_for_each_millisecond_serves_any_rate() {
    // At 20,000 a second, 20 requests fall due in a millisecond. 2,001 go at once (capacity 2,000);
    // the 999 left are due by 49.95 ms, and the last may be late by 1 ms. In the first 2 ms the
    // slack is half of the wait of the first request: from 0.05 ms, one period, the wait grows by
    // half with each timer, so nine timers are within 0.05 x 1.5^9 = 1.9 ms.
    let mut world = World::as_in_daemon();
    let group = world.group("iops-total=20000");
    let (_, queue) = world.simple(group);
    world.reads(queue, 3000, 4096);
    world.run_until(Time::from_nanos(50_950_000));
    assert_eq!(world.went.len(), 3000);
    let instants = instants(&world);
    assert!(instants.len() <= 9 + 49, "{} instants in 50 ms", instants.len());
    for at in instants {
        // No request goes early, and each timer takes all due requests.
        let gone = world.went.iter().filter(|went| went.at <= at).count() as u64;
        assert_eq!(gone, (2001 + at.as_nanos() / 50_000).min(3000), "at {at:?}");
    }
}

/// Four devices of depth 1 under 5,000 a second, capacity 500: each has a single request, and its
/// client waits for it. Each request waits 0.8 ms; when it is next, after 0.6 ms, it may not be
/// late by half of that.
fn expect_who_waits_alone_to_go_at_its_instant() {
    let mut world = World::as_in_daemon();
    let group = world.group("iops-total=5000");
    let queues = [(); 4].map(|()| world.simple(group).1);
    world.reads(queues[0], 501, 4096);
    for queue in queues {
        world.request(queue, Operation::Read, 4096);
    }
    for number in 1..=20 {
        world.run_until(Time::from_nanos(number * 200_000));
        let last = world.went.last().unwrap();
        assert_eq!(last.at, world.now, "number {number}");
        world.request(last.queue, Operation::Read, 4096);
    }
}

#[test]
fn who_waits_alone_goes_at_its_instant() {
    expect_who_waits_alone_to_go_at_its_instant();
    assert!(is_found(Fault::LonelyWait, expect_who_waits_alone_to_go_at_its_instant));
}

/// B keeps 32 requests waiting, A sends its next request 50 us after its last went, both under
/// 10,000 a second. Returns the number of requests of each that go in 0.1 s, once the capacity is used up.
fn shares_of_depth_one_and_many() -> (usize, usize) {
    let mut world = World::as_in_daemon();
    let group = world.group("iops-total=10000");
    let [(_, a), (member_b, b)] = [world.simple(group), world.simple(group)];
    world.reads(b, 1_000, 4096);
    let (mut sent, mut seen, mut gone, mut last) = (0, 0, 0, 0);
    for now in (0..200_000_000).step_by(10_000) {
        world.run_until(Time::from_nanos(now));
        for went in world.went[seen..].iter().filter(|went| went.queue == a) {
            (gone, last) = (gone + 1, went.at.as_nanos());
        }
        seen = world.went.len();
        if gone == sent && now >= last + 50_000 {
            world.request(a, Operation::Read, 4096);
            sent += 1;
        }
        let held = world.throttle.held(member_b).count;
        if held < 32 {
            world.reads(b, 32 - held, 4096);
        }
    }
    let late =
        |queue| world.went.iter().filter(|went| went.queue == queue && went.at.as_nanos() >= 100_000_000).count();
    (late(a), late(b))
}

#[test]
fn who_has_one_request_at_a_time_is_not_kept_waiting_for_the_company_of_others() {
    // Half of the rate, 500 of 1,000: a request falls due each 100 us, and A needs 50 us. With B's
    // timers, 1 ms apart, A would get 100. A millisecond at either end is worth 10.
    let (a, b) = shares_of_depth_one_and_many();
    assert!(a + b >= 990 && a >= 490, "A {a}, B {b} of 1,000");
}

/// A limit of 100,000 a second with a pool of 20 (0.2 ms): rate earned while the pool is empty is
/// lost. Returns the number of requests of a backlog that go in 20 ms.
fn served_by_a_small_pool() -> usize {
    let mut world = World::as_in_daemon();
    let limit = Limit { avg: 100_000, max: 100_000, burst_length_ns: 200_000 };
    let options =
        MemberOptions { limits: Limits::UNLIMITED.with(LimitKind::IopsTotal, limit), ..MemberOptions::default() };
    let member = world.throttle.join(&options, world.now);
    world.throttle.go_live(member);
    let queue = world.queue(member);
    world.reads(queue, 2_400, 4096);
    world.run_until(Time::from_nanos(20_000_000));
    world.went.len()
}

#[test]
fn a_limit_that_forgives_little_loses_no_rate() {
    // 21 at once and 2,000 in 20 ms; the last batch may be late by an eighth of 0.2 ms: 2.5
    // requests, and one for rounding.
    let expect = |served: usize| assert!((2_017..=2_021).contains(&served), "{served} of 2,021");
    expect(served_by_a_small_pool());
    assert!(is_found(Fault::SlackWithoutEnd, || expect(served_by_a_small_pool())));
}

#[test]
fn a_limit_that_forgives_little_counts_for_its_whole_tree() {
    // The small pool may come or go with a change of limits or of a group, and the deadline is that
    // of the tree.
    let mut world = World::as_in_daemon();
    let group = world.group("iops-total=100000");
    let (member, queue) = world.simple(group);
    // 12 ms of requests; at each check the next request has waited for more than 2 ms.
    world.reads(queue, 10_001 + 1_200, 4096);
    let mut slack_under = |limits: &Limits| {
        world.run_until(world.now.plus_nanos(2_500_000));
        world.throttle.set_member_limits(member, limits, world.now);
        // A further request makes the thread poll and get a new deadline.
        world.reads(queue, 1, 4096);
        world.deadline(queue).expect("more than one waits").nanos_since(world.now)
    };
    assert_eq!(slack_under(&limits("")), 1_000_000);
    let limit = Limit { avg: 100_000, max: 100_000, burst_length_ns: 200_000 };
    assert_eq!(slack_under(&Limits::UNLIMITED.with(LimitKind::IopsWrite, limit)), 25_000);
    assert_eq!(slack_under(&limits("")), 1_000_000);
}

#[test]
fn a_shallow_queue_is_late_by_half_of_what_it_waits_at_most() {
    // Depth 4 under 10,000 a second: each request waits 0.4 ms, shorter than a timer period of 1
    // ms.
    let mut world = World::as_in_daemon();
    let group = world.group("iops-total=10000");
    let (member, queue) = world.simple(group);
    world.reads(queue, 1_001, 4096);
    let mut sent = Vec::new();
    for now in (0..50_000_000).step_by(10_000) {
        world.run_until(Time::from_nanos(now));
        for _ in world.throttle.held(member).count..4 {
            world.request(queue, Operation::Read, 4096);
            sent.push(world.now);
        }
    }
    let went = world.went.iter().skip(1_001).map(|went| went.at);
    let waits: Vec<u64> = sent.iter().zip(went).map(|(sent, went)| went.nanos_since(*sent)).collect();
    assert!(waits.len() >= 495, "{} of 500", waits.len());
    // 0.4 ms, half of that, and the client's step of 10 us.
    let longest = waits.iter().max();
    assert!(longest <= Some(&610_000), "{longest:?}");
}

/// Ten requests wait under 20,000 a second, all submitted at one instant: the deadline for the
/// first if they arrived then, and if they may have arrived up to 1 ms before.
#[test]
fn who_was_there_while_his_thread_slept_waits_for_company_as_long() {
    let deadline_if_there_since = |since: u64| {
        let mut world = World::as_in_daemon();
        let group = world.group("iops-total=20000");
        let (member, _) = world.simple(group);
        let mut gate = Gate::new(world.throttle.clone(), member, 64, Arc::new(Silent));
        let now = Time::from_nanos(1_000_000);
        let of = |tag| Request { tag, operation: Operation::Read, bytes: 4096, since: Time::from_nanos(since) };
        let mut went = Vec::new();
        gate.request_all(&(0..2_001).map(of).collect::<Vec<_>>(), now, &mut went);
        assert_eq!(went.len(), 2_001, "the capacity, and one more");
        gate.request_all(&(2_001..2_011).map(of).collect::<Vec<_>>(), now, &mut went);
        gate.poll(now, false, &mut went);
        let deadline = gate.deadline().unwrap().nanos_since(now);
        world.throttle.drain(member, now);
        gate.poll(now, true, &mut went);
        assert_eq!(went.len(), 2_011);
        deadline
    };
    assert_eq!(deadline_if_there_since(1_000_000), 50_000, "when the first is due");
    assert_eq!(deadline_if_there_since(0), 500_000, "half of what it has waited");
}
