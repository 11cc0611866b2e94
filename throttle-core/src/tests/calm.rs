//! Threads that sleep until a deadline regardless of new requests, because no new request could go
//! before it.

use super::world::World;
use crate::cost::Operation;
use crate::ids::MemberId;
use crate::planted::{Fault, is_found};
use crate::time::Time;

/// Two devices under one limit that hold ten requests each, in turn; usually at 10,000 a second,
/// capacity 1,000.
struct Pair {
    world: World,
    members: [MemberId; 2],
    queues: [usize; 2],
}

impl Pair {
    fn new(limit: &str) -> Self {
        let mut world = World::as_in_daemon();
        let group = world.group(limit);
        let [(first, a), (second, b)] = [world.simple(group), world.simple(group)];
        world.reads(a, 1001, 4096);
        assert_eq!(world.went.len(), 1001, "the capacity, and one more");
        for _ in 0..10 {
            world.request(a, Operation::Read, 4096);
            world.request(b, Operation::Read, 4096);
        }
        Self { world, members: [first, second], queues: [a, b] }
    }

    /// Runs for 1 ms, in which ten of the twenty go: with timer slack, some of both per timer.
    fn run(&mut self) {
        self.world.run_until(Time::from_nanos(1_000_000));
    }
}

/// Both threads poll at the next deadline by themselves: the first to poll finds the due requests
/// of both, and rings no queue.
#[test]
fn who_has_got_restart_work_and_holds_more_looks_in_with_its_group() {
    let mut pair = Pair::new("iops-total=10000");
    pair.run();
    let [a, b] = pair.queues;
    let deadline = pair.world.deadline(a).unwrap();
    assert_eq!(pair.world.deadline(b), Some(deadline));
    assert!(pair.world.is_calm(a) && pair.world.is_calm(b));
    for (first, second) in [(a, b), (b, a)] {
        let mut pair = Pair::new("iops-total=10000");
        pair.run();
        let world = &mut pair.world;
        let before = world.went.len();
        world.now = deadline;
        world.poll(first);
        assert!(!world.is_rung(second), "its instant has come");
        world.poll(second);
        let gone: Vec<usize> = world.went[before..].iter().map(|went| went.queue).collect();
        assert!(gone.contains(&first) && gone.contains(&second), "{gone:?}");
    }
}

/// At 10,000 a second two more requests are due after 0.2 ms. They wait for the timer slack, as do
/// new requests.
#[test]
fn who_is_late_for_the_common_instant_sleeps_through_to_the_next_as_well() {
    let mut pair = Pair::new("iops-total=10000");
    pair.run();
    let [first, second] = pair.queues;
    let deadline = pair.world.deadline(first).unwrap();
    pair.world.now = deadline;
    pair.world.poll(first);
    pair.world.now = deadline.plus_nanos(200_000);
    pair.world.poll(second);
    let next = pair.world.deadline(first).unwrap();
    assert!(next > pair.world.now && pair.world.is_calm(first));
    assert_eq!(pair.world.deadline(second), Some(next));
    assert!(pair.world.is_calm(second));
}

/// A drain dispatches everything at once: the queue is rung, although its thread knows a later
/// deadline.
fn expect_a_ring_before_the_instant() {
    let mut pair = Pair::new("iops-total=10000");
    pair.run();
    for (member, queue) in pair.members.into_iter().zip(pair.queues) {
        assert!(pair.world.deadline(queue).unwrap() > pair.world.now);
        pair.world.throttle.drain(member, pair.world.now);
        assert!(pair.world.is_rung(queue), "its requests may go now");
        pair.world.poll(queue);
    }
}

#[test]
fn what_happens_before_the_instant_is_rung_for() {
    expect_a_ring_before_the_instant();
    assert!(is_found(Fault::ToldIsEnough, expect_a_ring_before_the_instant));
}

/// A write without a limit passes at once, so a thread that holds reads must wake up for it.
fn expect_writes_to_be_heard() {
    let mut pair = Pair::new("iops-read=10000");
    pair.run();
    for queue in pair.queues {
        assert!(!pair.world.is_calm(queue));
    }
}

#[test]
fn nobody_sleeps_through_what_may_go_at_once() {
    expect_writes_to_be_heard();
    assert!(is_found(Fault::CalmForAll, expect_writes_to_be_heard));
}

#[test]
fn nobody_sleeps_for_long_or_for_a_single_request() {
    // 500 a second, capacity 50: the next deadline is 2 ms away.
    let mut world = World::as_in_daemon();
    let group = world.group("iops-total=500");
    let (_, queue) = world.simple(group);
    world.reads(queue, 51 + 10, 4096);
    assert!(world.deadline(queue).is_some() && !world.is_calm(queue), "2 ms");

    // 5,000 a second, capacity 500: 0.2 ms, but the client waits for its only request and may send
    // its next then.
    let mut world = World::as_in_daemon();
    let group = world.group("iops-total=5000");
    let (_, queue) = world.simple(group);
    world.reads(queue, 501 + 1, 4096);
    assert!(world.deadline(queue).is_some() && !world.is_calm(queue), "a single request");
    world.request(queue, Operation::Read, 4096);
    assert!(world.is_calm(queue), "two");

    // Without timer slack no thread sleeps through requests.
    let mut world = World::new();
    let group = world.group("iops-total=10000");
    let (_, queue) = world.simple(group);
    world.reads(queue, 1001 + 10, 4096);
    assert!(world.deadline(queue).is_some() && !world.is_calm(queue), "exact");
}
