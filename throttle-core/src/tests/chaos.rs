//! Random histories: requests, late and spurious turns, removals, in any order. Every request goes
//! exactly once and in order, and all can be removed in the end; and while no device is removed, no
//! window of time sees more than the limits allow.

use proptest::prelude::*;

use super::world::{OneChange, World, limits};
use crate::cost::{Direction, Operation};
use crate::group::Change;
use crate::time::Time;

const QUEUES: usize = 5;

/// The device of each queue.
const DEVICE_OF: [usize; QUEUES] = [0, 0, 1, 2, 3];

#[derive(Clone, Debug)]
enum Step {
    /// A request arrives; the turn of its queue ends at once, or with the next step that polls it.
    Request { queue: usize, operation: Operation, bytes: u64, turn_ends: bool },
    /// Time passes without a turn: bells and deadlines are late.
    Stall { ns: u64 },
    /// Time passes and every queue takes its turns.
    Run { ns: u64 },
    /// A turn without a reason.
    Poll { queue: usize },
    /// The removal of the device of the queue begins.
    Drain { queue: usize },
    /// The removal of the device of the queue has failed.
    EndDrain { queue: usize },
    /// The device of the queue is removed, and a new one with as many queues takes its place.
    Replace { queue: usize },
    /// The device of the queue moves to a different group, or to none.
    Move { queue: usize, group: usize },
    /// A group moves below a different one, or to the top.
    Parent { group: usize, parent: usize },
    /// The limits of a group, or of the device of a queue, change.
    Limits { whose: usize, which: usize },
    /// The weight of the device of a queue changes.
    Weight { queue: usize, weight: u32 },
    /// Groups swap places, the device of a queue moves, and a group gets new limits, in one step.
    Several { groups: [usize; 3], queue: usize, which: usize },
}

/// Limits to change to; all of them pass every request within the hour at the end of a history.
const LIMITS: [&str; 6] = [
    "",
    "bps-total=1000000 iops-write=50",
    "iops-total=20",
    "bps-read=5000000 bps-write=400000",
    "iops-total=10 iops-total-max=70 iops-total-max-length=4",
    "bps-total=100000000 iops-total=100000 iops-size=4096",
];

const GROUPS: usize = 3;

fn step() -> impl Strategy<Value = Step> {
    let operation = prop_oneof![
        4 => Just(Operation::Read),
        4 => Just(Operation::Write),
        1 => Just(Operation::Flush),
        1 => Just(Operation::Discard),
        1 => Just(Operation::WriteZeroes { as_data: true }),
    ];
    prop_oneof![
        8 => (0..QUEUES, operation, 1_u64..300_000, any::<bool>())
            .prop_map(|(queue, operation, bytes, turn_ends)| Step::Request { queue, operation, bytes, turn_ends }),
        1 => (0_u64..400_000_000).prop_map(|ns| Step::Stall { ns }),
        3 => (0_u64..400_000_000).prop_map(|ns| Step::Run { ns }),
        2 => (0..QUEUES).prop_map(|queue| Step::Poll { queue }),
        1 => (0..QUEUES).prop_map(|queue| Step::Drain { queue }),
        1 => (0..QUEUES).prop_map(|queue| Step::EndDrain { queue }),
        1 => (0..QUEUES).prop_map(|queue| Step::Replace { queue }),
        1 => (0..QUEUES, 0..=GROUPS).prop_map(|(queue, group)| Step::Move { queue, group }),
        1 => (0..GROUPS, 0..=GROUPS).prop_map(|(group, parent)| Step::Parent { group, parent }),
        2 => (0..GROUPS + QUEUES, 0..LIMITS.len()).prop_map(|(whose, which)| Step::Limits { whose, which }),
        1 => (0..QUEUES, 1_u32..10_000).prop_map(|(queue, weight)| Step::Weight { queue, weight }),
        1 => (Just([0, 1, 2]).prop_shuffle(), 0..QUEUES, 0..LIMITS.len())
            .prop_map(|(groups, queue, which)| Step::Several { groups, queue, which }),
    ]
}

proptest! {
    // A request that overtakes restart work (f95) shows in one of 400 to 1400 histories.
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn every_request_goes_once_and_in_order(steps in prop::collection::vec(step(), 1..120)) {
        // Devices: A with two queues and B with one in a group, C with one and a limit of its own
        // in a group below that; D alone. A third group is a target for moves.
        let mut world = World::as_in_daemon();
        let group = world.group(LIMITS[1]);
        let below = world.group_below(Some(group), "", 200);
        let groups = [group, below, world.group("iops-total=30")];
        let places = [(Some(group), ""), (Some(group), ""), (Some(below), "iops-total=20"), (None, "iops-total=30")];
        let mut devices = places.map(|(group, own)| world.device(group, own));
        // Queue of the world for each queue of a step.
        let mut queues = DEVICE_OF.map(|device| world.queue(devices[device]));
        for step in steps {
            match step {
                Step::Request { queue, operation, bytes, turn_ends } => {
                    world.arrives(queues[queue], operation, bytes);
                    if turn_ends {
                        world.poll(queues[queue]);
                    }
                }
                Step::Stall { ns } => world.now = world.now.plus_nanos(ns),
                Step::Run { ns } => {
                    queues.iter().for_each(|&queue| world.poll(queue));
                    world.run_until(world.now.plus_nanos(ns));
                }
                Step::Poll { queue } => world.poll(queues[queue]),
                Step::Drain { queue } => world.throttle.drain(devices[DEVICE_OF[queue]], world.now),
                Step::EndDrain { queue } => world.throttle.end_drain(devices[DEVICE_OF[queue]]),
                Step::Replace { queue } => {
                    let device = DEVICE_OF[queue];
                    world.throttle.drain(devices[device], world.now);
                    let its = (0..QUEUES).filter(|&queue| DEVICE_OF[queue] == device);
                    for queue in its.clone() {
                        world.poll(queues[queue]);
                        prop_assert_eq!(world.retire(queues[queue]), Ok(()));
                    }
                    prop_assert_eq!(world.throttle.leave(devices[device], world.now), Ok(()));
                    devices[device] = world.device(places[device].0, places[device].1);
                    its.for_each(|queue| queues[queue] = world.queue(devices[device]));
                }
                Step::Move { queue, group } => {
                    world.throttle.set_group(devices[DEVICE_OF[queue]], groups.get(group).copied(), world.now);
                }
                Step::Parent { group, parent } => {
                    // Refused where it would make a cycle; the history goes on either way.
                    let _ = world.throttle.set_parent(groups[group], groups.get(parent).copied(), world.now);
                }
                Step::Limits { whose, which } => match groups.get(whose) {
                    Some(&group) => world.throttle.set_group_limits(group, &limits(LIMITS[which]), world.now),
                    None => {
                        let device = devices[DEVICE_OF[whose - GROUPS]];
                        world.throttle.set_member_limits(device, &limits(LIMITS[which]), world.now);
                    }
                },
                Step::Weight { queue, weight } => {
                    world.throttle.set_member_weight(devices[DEVICE_OF[queue]], weight, world.now);
                }
                Step::Several { groups: [top, middle, bottom], queue, which } => {
                    // Never a cycle, for any present places.
                    let changes = [
                        Change::GroupParent(groups[bottom], Some(groups[middle])),
                        Change::GroupParent(groups[middle], Some(groups[top])),
                        Change::GroupParent(groups[top], None),
                        Change::MemberGroup(devices[DEVICE_OF[queue]], Some(groups[middle])),
                        Change::GroupLimits(groups[bottom], limits(LIMITS[which])),
                    ];
                    prop_assert_eq!(world.throttle.apply(&changes, world.now), Ok(()));
                }
            }
            world.throttle.assert_invariants();
        }
        // Quiescence: given time, every request goes (no lost wake-up), and all can be removed.
        queues.iter().for_each(|&queue| world.poll(queue));
        world.run_until(world.now.plus_nanos(3_600_000_000_000));
        for queue in 0..world.queue_count() {
            prop_assert_eq!(world.deadline(queue), None, "nothing armed without a held request");
            let its: Vec<_> = world.went.iter().filter(|went| went.queue == queue).collect();
            // I6: arrival order in each direction, through drains too; flushes pass all others.
            for direction in Direction::ALL {
                let ordered: Vec<_> = its.iter()
                    .filter(|went| went.operation != Operation::Flush)
                    .filter(|went| went.operation.direction() == direction)
                    .map(|went| went.number)
                    .collect();
                prop_assert!(ordered.is_sorted(), "queue {} {:?}: {:?}", queue, direction, ordered);
            }
            let mut numbers: Vec<_> = its.iter().map(|went| went.number).collect();
            numbers.sort_unstable();
            prop_assert_eq!(numbers, (0..world.arrived(queue)).collect::<Vec<_>>(), "each request exactly once");
        }
        for queue in queues {
            prop_assert_eq!(world.retire(queue), Ok(()));
        }
        for device in devices {
            prop_assert_eq!(world.throttle.leave(device, world.now), Ok(()));
        }
        for group in groups {
            world.throttle.set_parent(group, None, world.now).unwrap();
        }
        for group in groups {
            prop_assert_eq!(world.throttle.remove_group(group, world.now), Ok(()));
        }
    }

}

proptest! {
    #[test]
    fn no_window_sees_more_than_the_limits_allow(
        steps in prop::collection::vec((0..4_usize, 1_u64..200_000, any::<bool>(), 0_u64..100_000_000), 1..150),
    ) {
        // Served in any window T <= rate · T + capacity + the request at the brim: for the group's
        // bytes, and for the operations of a member with a limit of its own.
        let mut world = World::new();
        let group = world.group("bps-total=1000000");
        let [a, b] = [(); 2].map(|()| world.device(Some(group), ""));
        let c = world.device(Some(group), "iops-total=20");
        for member in [a, a, b, c] {
            world.queue(member);
        }
        for (queue, bytes, is_read, ns) in steps {
            world.request(queue, if is_read { Operation::Read } else { Operation::Write }, bytes);
            if ns % 3 == 0 {
                world.run_until(world.now.plus_nanos(ns));
            }
        }
        world.run_until(world.now.plus_nanos(3_600_000_000_000));
        let group_bytes: Vec<_> = world.went.iter().map(|went| (went.at, went.bytes)).collect();
        assert_windows(&group_bytes, 1_000_000, 0);
        let own: Vec<_> = world.went.iter().filter(|went| went.queue == 3).map(|went| (went.at, 1)).collect();
        assert_windows(&own, 20, 0);
    }

    #[test]
    fn leases_add_no_more_than_a_sixteenth_of_the_capacity(
        steps in prop::collection::vec((0..3_usize, any::<bool>(), 0_u64..60_000, 1_u32..40), 1..200),
    ) {
        // Three queues of two devices at up to half a million requests a second, so that leases come and go.
        let mut world = World::as_in_daemon();
        let group = world.group("iops-total=100000");
        let [a, b] = [(); 2].map(|()| world.device(Some(group), ""));
        for member in [a, a, b] {
            world.queue(member);
        }
        for (queue, is_read, ns, count) in steps {
            for _ in 0..count {
                world.arrives(queue, if is_read { Operation::Read } else { Operation::Write }, 512);
                world.now = world.now.plus_nanos(ns / 30);
            }
            world.poll(queue);
            world.run_until(world.now.plus_nanos(ns));
        }
        world.run_until(world.now.plus_nanos(3_600_000_000_000));
        let served: Vec<_> = world.went.iter().map(|went| (went.at, 1)).collect();
        assert_windows(&served, 100_000, 100_000 / 10 / 16);
    }
}

/// For all windows: the units of all but one request fit into rate · T + capacity (a tenth of the rate) + `more`.
///
/// The order of requests that went at one instant is that in which their threads took a turn, not that of the dispatches:
/// the largest may be the one that fills the bucket.
pub(super) fn assert_windows(served: &[(Time, u64)], rate: u64, more: u64) {
    let mut served = served.to_vec();
    served.sort_unstable();
    for first in 0..served.len() {
        let mut units_before = 0_u128;
        for &(at, units) in &served[first..] {
            let window_ns = u128::from(at.nanos_since(served[first].0));
            let allowed = u128::from(rate) * (window_ns + 100_000_000) + u128::from(more) * 1_000_000_000;
            assert!(units_before * 1_000_000_000 <= allowed, "{units_before} units in {window_ns} ns at {rate}/s");
            units_before += u128::from(units);
        }
    }
}
