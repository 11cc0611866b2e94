//! Failures of QEMU's throttle groups, each replayed. The numbers (R1, U2 …) name the failure in
//! `ARCHITECTURE.md`.

use super::world::{OneChange, World};
use crate::cost::Operation;
use crate::group::{HeldSummary, MemberOptions, StillBusy};
use crate::planted::{Fault, is_found};
use crate::time::Time;

#[test]
fn r1_queue_with_restart_work_outstanding_cannot_retire() {
    // Restart work posted to a queue must run before the queue retires.
    let mut world = World::new();
    let group = world.group("iops-total=10");
    let (a, queue) = world.simple(group);
    world.reads(queue, 3, 4096);
    assert_eq!(world.retire(queue), Err(StillBusy { held: 1, restart_work: 0, queues: 0 }));
    world.throttle.drain(a, world.now);
    assert_eq!(world.retire(queue), Err(StillBusy { held: 0, restart_work: 1, queues: 0 }));
    assert_eq!(world.throttle.leave(a, world.now), Err(StillBusy { held: 0, restart_work: 0, queues: 1 }));
    world.poll(queue);
    assert_eq!(world.times_ms(queue), [0.0; 3]);
    assert_eq!(world.retire(queue), Ok(()));
    assert_eq!(world.throttle.leave(a, world.now), Ok(()));
    assert_eq!(world.throttle.remove_group(group, world.now), Ok(()));
}

#[test]
fn r4_member_that_leaves_hands_the_deadline_on() {
    // A's queue owns the deadline of both. When A is drained, B's queue must learn it, or B hangs.
    let mut world = World::new();
    let group = world.group("iops-total=10");
    let (a, qa) = world.simple(group);
    let (_, qb) = world.simple(group);
    world.reads(qa, 3, 4096);
    world.reads(qb, 1, 4096);
    assert!(world.deadline(qa).is_some() && world.deadline(qb).is_none());
    world.throttle.drain(a, world.now);
    world.run_until_ms(0);
    assert_eq!(world.retire(qa), Ok(()));
    assert_eq!(world.throttle.leave(a, world.now), Ok(()));
    world.run_until_ms(10_000);
    // A's third was charged when it was dispatched, so B waits behind all three: (3 - 1) / 10/s.
    assert_eq!(world.times_ms(qb), [200.0]);
}

#[test]
fn r5_drain_of_the_only_waiter_leaves_nothing_armed() {
    let mut world = World::new();
    let group = world.group("iops-total=1");
    let (a, queue) = world.simple(group);
    world.reads(queue, 5, 4096);
    world.throttle.drain(a, world.now);
    world.poll(queue);
    assert_eq!(world.deadline(queue), None);
    assert_eq!(world.throttle.held(a), HeldSummary::default());
}

#[test]
fn f50_r6_draining_member_does_not_wait_for_the_turns_of_others() {
    let mut world = World::new();
    let group = world.group("iops-total=1");
    let (a, qa) = world.simple(group);
    let (_, qb) = world.simple(group);
    world.reads(qb, 4, 4096);
    world.reads(qa, 3, 4096);
    world.throttle.drain(a, world.now);
    world.poll(qa);
    assert_eq!(world.times_ms(qa), [0.0; 3]);
    world.request(qa, Operation::Write, 4096);
    assert_eq!(world.times_ms(qa), [0.0; 4]);
}

#[test]
fn r12_member_that_left_is_in_nobodys_way() {
    // B leaves while A waits: the group goes on with A alone, and ends when A has left too.
    let mut world = World::new();
    let group = world.group("iops-total=10");
    let (a, qa) = world.simple(group);
    let (b, qb) = world.simple(group);
    world.reads(qb, 2, 4096);
    world.reads(qa, 4, 4096);
    world.throttle.drain(b, world.now);
    world.poll(qb);
    assert_eq!(world.retire(qb), Ok(()));
    assert_eq!(world.throttle.leave(b, world.now), Ok(()));
    world.run_until_ms(1_000);
    // B's two were charged: the level is 2 against a capacity of 1.
    assert_eq!(world.times_ms(qa), [100.0, 200.0, 300.0, 400.0]);
    assert_eq!(world.retire(qa), Ok(()));
    assert_eq!(world.throttle.leave(a, world.now), Ok(()));
    assert_eq!(world.throttle.remove_group(group, world.now), Ok(()));
}

#[test]
fn r13_change_of_group_does_not_end_a_drain() {
    // I9: requests after the move are still not held, under any limits of the new group.
    let mut world = World::new();
    let group = world.group("iops-total=10");
    let other = world.group("iops-total=1");
    let (a, qa) = world.simple(group);
    world.throttle.drain(a, world.now);
    world.throttle.set_group(a, Some(other), world.now);
    world.reads(qa, 20, 4096);
    assert_eq!(world.times_ms(qa), [0.0; 20]);
}

/// A removal of A that fails after its drain, 2 s in; B waits in the same group.
fn removal_that_fails() {
    let mut world = World::new();
    let group = world.group("iops-total=10");
    let (a, qa) = world.simple(group);
    let (_, qb) = world.simple(group);
    world.reads(qa, 5, 4096);
    world.run_until_ms(2_000);
    world.throttle.drain(a, world.now);
    world.reads(qa, 3, 4096);
    world.throttle.end_drain(a);
    world.reads(qa, 4, 4096);
    world.reads(qb, 1, 4096);
    world.run_until_ms(4_000);
    // Three passed while A drained, uncharged; then 10/s with a capacity of 1, and B has its turn.
    assert_eq!(world.times_ms(qa)[5..], [2000.0, 2000.0, 2000.0, 2000.0, 2000.0, 2200.0, 2300.0]);
    assert_eq!(world.times_ms(qb), [2100.0]);
    world.throttle.drain(a, world.now);
    assert_eq!(world.retire(qa), Ok(()));
    assert_eq!(world.throttle.leave(a, world.now), Ok(()));
}

#[test]
fn f70_a_removal_that_fails_ends_its_drain_and_the_limits_hold_again() {
    // A device that stays without limits takes rate that its neighbours are promised.
    removal_that_fails();
    assert!(is_found(Fault::DrainForEver, removal_that_fails), "a drain that does not end was not found");
}

#[test]
fn a_device_that_starts_is_not_limited_by_the_end_of_a_drain() {
    // `end_drain` only ends a drain: during the start, the kernel and udev still read the new disk.
    let mut world = World::new();
    let group = world.group("iops-total=1");
    let options = MemberOptions { group: Some(group), ..MemberOptions::default() };
    let member = world.throttle.join(&options, world.now);
    let queue = world.queue(member);
    world.throttle.end_drain(member);
    world.reads(queue, 20, 4096);
    assert_eq!(world.times_ms(queue), [0.0; 20]);
}

#[test]
fn r15_one_busy_member_of_three_is_not_starved() {
    let mut world = World::new();
    let group = world.group("iops-total=10");
    let (_, qa) = world.simple(group);
    let (_, idle_b) = world.simple(group);
    let (_, idle_c) = world.simple(group);
    world.reads(idle_b, 1, 4096);
    world.reads(idle_c, 1, 4096);
    world.reads(qa, 3, 4096);
    world.run_until_ms(1_000);
    assert_eq!(world.times_ms(qa), [100.0, 200.0, 300.0]);
}

#[test]
fn u2_removal_at_one_iops_does_not_wait_for_the_limit() {
    // 32 held at 1 IOPS would take 31 s; a drain dispatches them at once.
    let mut world = World::new();
    let group = world.group("iops-total=1");
    let (a, queue) = world.simple(group);
    world.reads(queue, 32, 4096);
    world.run_until_ms(50);
    world.throttle.drain(a, world.now);
    world.run_until_ms(51);
    assert_eq!(world.went.len(), 32);
    assert_eq!(world.retire(queue), Ok(()));
}

/// A and B share 400/s; A holds 32 and is removed, and sends 500 more while it goes.
fn neighbour_through_a_removal() {
    let mut world = World::new();
    let group = world.group("iops-total=400");
    let (a, qa) = world.simple(group);
    let (_, qb) = world.simple(group);
    world.reads(qa, 73, 4096);
    world.run_until_ms(0);
    world.throttle.drain(a, world.now);
    world.reads(qb, 3, 4096);
    world.reads(qa, 500, 4096);
    assert_eq!(world.times_ms(qa), [0.0; 573]);
    world.run_until_ms(1_000);
    // 20 of the 32 are charged: 50 ms. The first request of B waits for them, the next two only for
    // their turn.
    assert_eq!(world.times_ms(qb), [52.5, 55.0, 57.5]);
}

#[test]
fn removal_makes_a_neighbour_wait_no_more_than_50_ms_longer() {
    // At 400/s 532 requests are more than a second: a pause for a neighbour that has no part in the
    // removal.
    neighbour_through_a_removal();
    assert!(is_found(Fault::DrainChargesAll, neighbour_through_a_removal), "a drain that charges all was not found");
}

#[test]
fn u4_drain_of_a_neighbour_lets_nothing_else_pass() {
    let mut world = World::new();
    let group = world.group("iops-total=10");
    let (a, qa) = world.simple(group);
    let (_, qb) = world.simple(group);
    world.reads(qa, 2, 4096);
    world.reads(qb, 2, 4096);
    world.throttle.drain(a, world.now);
    world.reads(qb, 1, 4096);
    assert_eq!(world.times_ms(qb), [] as [f64; 0]);
}

#[test]
fn r42_queue_of_an_exempt_or_idle_device_retires_at_once() {
    let mut world = World::new();
    let group = world.group("iops-total=1");
    let limits = super::world::limits("bps-total=1");
    let member = world.throttle.join(&MemberOptions { limits, group: Some(group), weight: 100 }, world.now);
    let queue = world.queue(member);
    // Exempt: the partition scan is neither limited nor charged …
    world.reads(queue, 20, 4096);
    assert_eq!(world.went.len(), 20);
    // … so the first request of a client finds empty buckets.
    world.throttle.go_live(member);
    world.reads(queue, 1, 4096);
    assert_eq!(world.went.len(), 21);
    assert_eq!(world.retire(queue), Ok(()));
    assert_eq!(world.throttle.leave(member, world.now), Ok(()));
}

#[test]
fn two_queues_of_one_device_keep_arrival_order() {
    // The member's order is that of arrival, across both queues.
    let mut world = World::new();
    let group = world.group("iops-total=10");
    let member = world.device(Some(group), "");
    let (first, second) = (world.queue(member), world.queue(member));
    world.reads(first, 1, 4096);
    world.reads(first, 1, 4096);
    world.reads(second, 1, 4096);
    world.reads(first, 1, 4096);
    world.reads(second, 1, 4096);
    world.run_until_ms(1_000);
    let order: Vec<_> = world.went.iter().map(|went| went.queue).collect();
    assert_eq!(order, [first, first, second, first, second]);
}

#[test]
fn two_members_share_by_turns() {
    let mut world = World::new();
    let group = world.group("iops-total=100");
    let (_, qa) = world.simple(group);
    let (_, qb) = world.simple(group);
    world.reads(qa, 60, 4096);
    world.reads(qb, 60, 4096);
    let by_then = |world: &World, queue| world.went.iter().filter(|went| went.queue == queue).count();
    let before = [by_then(&world, qa), by_then(&world, qb)];
    world.run_until_ms(500);
    let after = [by_then(&world, qa), by_then(&world, qb)];
    assert_eq!(after[0] - before[0], 25);
    assert_eq!(after[1] - before[1], 25);
}

#[test]
fn limit_of_a_device_holds_beside_that_of_its_group_and_lends_the_rest() {
    // A alone may do 10/s; B takes what A leaves of the group's 100/s. The wait is the largest, not the sum.
    let mut world = World::new();
    let group = world.group("iops-total=100");
    let a = world.device(Some(group), "iops-total=10");
    let qa = world.queue(a);
    let (_, qb) = world.simple(group);
    world.reads(qa, 64, 4096);
    world.reads(qb, 150, 4096);
    world.run_until_ms(100);
    let start = world.went.len();
    let a_start = world.times_ms(qa).len();
    world.run_until_ms(1_100);
    assert_eq!(world.went.len() - start, 100);
    assert_eq!(world.times_ms(qa).len() - a_start, 10);
}

#[test]
fn late_and_spurious_turns_change_nothing() {
    // The queues are polled each 4 ms, so each poll is up to 2 ms after a request is due: no rate
    // is lost or gained, as draining uses the elapsed time (lateness < capacity / avg = 100 ms).
    let mut world = World::new();
    let group = world.group("iops-total=100");
    let (_, qa) = world.simple(group);
    let (_, qb) = world.simple(group);
    world.reads(qa, 60, 4096);
    world.reads(qb, 60, 4096);
    for step in 1..=250_u64 {
        world.now = Time::from_nanos(step * 4_000_000);
        world.poll(qb);
        world.poll(qa);
        world.poll(qb);
    }
    assert_eq!(world.went.len(), 11 + 100);
}

#[test]
fn flush_passes_a_full_bucket_and_costs_nothing() {
    let mut world = World::new();
    let group = world.group("iops-total=1 bps-total=1");
    let (_, queue) = world.simple(group);
    world.request(queue, Operation::Write, 1_000_000);
    world.request(queue, Operation::Write, 1_000_000);
    world.request(queue, Operation::Flush, 0);
    assert_eq!(world.went.len(), 2);
    assert_eq!(world.went[1].operation, Operation::Flush);
}

#[test]
fn restart_work_is_not_overtaken_by_a_later_request() {
    // B's turn dispatches A's last read; A's next arrives before A has collected it, and must go
    // behind it.
    let mut world = World::new();
    let group = world.group("iops-total=100");
    let (_, qa) = world.simple(group);
    let (_, qb) = world.simple(group);
    world.reads(qa, 12, 4096);
    world.now = Time::from_nanos(500_000_000);
    world.request(qb, Operation::Read, 4096);
    world.arrives(qa, Operation::Read, 4096);
    world.poll(qa);
    let order: Vec<_> = world.went.iter().filter(|went| went.queue == qa).map(|went| went.number).collect();
    assert_eq!(order, (0..13).collect::<Vec<_>>());
}
