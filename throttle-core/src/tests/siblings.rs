//! Bounds of start-time fair queueing, on random groups at a limit that is used up: between any two
//! siblings whose requests wait all the time, in every interval; and for a newcomer.

use proptest::prelude::*;

use super::world::World;
use crate::cost::{Direction, Operation};
use crate::time::Time;

/// A sibling in the tree of a test: the lines below it, and its weight.
struct Sibling {
    lines: Vec<(usize, Direction)>,
    weight: u32,
}

/// A group with a limit; below it devices with a reading and a writing client each, and a group of
/// further devices. Every client sends the sizes of its device in turn.
struct Tree {
    world: World,
    /// The sizes that a queue sends.
    sizes: Vec<Vec<u64>>,
    /// The children of each node.
    families: Vec<Vec<Sibling>>,
}

fn operation(direction: Direction) -> Operation {
    match direction {
        Direction::Read => Operation::Read,
        Direction::Write => Operation::Write,
    }
}

impl Tree {
    /// `outer` and `inner` are the devices of the limited group and of the group in it: weight and
    /// sizes.
    fn new(limit: &str, outer: &[(u32, Vec<u64>)], inner_weight: u32, inner: &[(u32, Vec<u64>)]) -> Self {
        let mut tree = Self { world: World::unchecked(), sizes: Vec::new(), families: Vec::new() };
        let top = tree.world.group(limit);
        let below = tree.world.group_below(Some(top), "", inner_weight);
        let mut children = Vec::new();
        for (group, devices) in [(top, outer), (below, inner)] {
            let mut family = Vec::new();
            for (weight, sizes) in devices {
                let member = tree.world.weighted_device(Some(group), "", *weight);
                let queue = tree.world.queue(member);
                tree.sizes.push(sizes.clone());
                let lines = Direction::ALL.map(|direction| (queue, direction));
                // A member divides its share equally between reads and writes.
                tree.families.push(lines.map(|line| Sibling { lines: vec![line], weight: 1 }).into());
                family.push(Sibling { lines: lines.into(), weight: *weight });
            }
            children.push(family);
        }
        let (inner, mut outer) = (children.pop().expect("two"), children.pop().expect("two"));
        let lines = inner.iter().flat_map(|sibling| sibling.lines.clone()).collect();
        outer.push(Sibling { lines, weight: inner_weight });
        tree.families.extend([inner, outer]);
        tree
    }

    /// Runs up to `to` with a request waiting in each line all the time, and returns the largest distance of
    /// two siblings in any interval after `from`, as a part of the bound.
    fn run(&mut self, from: Time, to: Time, is_operations: bool) -> f64 {
        let lines = self.sizes.len() * 2;
        let (mut sent, mut went) = (vec![0_usize; lines], vec![0_usize; lines]);
        let mut served = vec![0_u64; lines];
        let cost = |bytes: u64| if is_operations { 1 } else { bytes };
        // For each pair of siblings the least and the largest distance so far; empty before `from`.
        let mut ranges: Vec<(i128, i128)> = Vec::new();
        let mut seen = 0;
        let mut count = |world: &World, went: &mut [usize], served: &mut [u64]| {
            for done in &world.went[seen..] {
                let line = done.queue * 2 + done.operation.direction() as usize;
                went[line] += 1;
                served[line] += cost(done.bytes);
            }
            seen = world.went.len();
        };
        loop {
            for line in 0..lines {
                let (queue, direction) = (line / 2, Direction::ALL[line % 2]);
                while sent[line] < went[line] + 4 {
                    let sizes = &self.sizes[queue];
                    self.world.request(queue, operation(direction), sizes[sent[line] % sizes.len()]);
                    sent[line] += 1;
                    count(&self.world, &mut went, &mut served);
                }
            }
            if self.world.now >= from {
                self.note(&served, &mut ranges);
            }
            let next = self.world.next_deadline().expect("requests wait");
            if next > to {
                break;
            }
            self.world.run_until(next);
            count(&self.world, &mut went, &mut served);
            assert!((0..lines).all(|line| sent[line] > went[line]), "a line was empty");
        }
        self.worst(&ranges, cost)
    }

    /// All pairs of siblings, as (family, first, second).
    fn pairs(&self) -> impl Iterator<Item = (&Sibling, &Sibling)> {
        self.families.iter().flat_map(|family| {
            (0..family.len()).flat_map(move |one| (0..one).map(move |other| (&family[one], &family[other])))
        })
    }

    /// The distance of two siblings is W₁/w₁ − W₂/w₂, here times w₁·w₂.
    fn note(&self, served: &[u64], ranges: &mut Vec<(i128, i128)>) {
        let of = |sibling: &Sibling| -> i128 {
            sibling.lines.iter().map(|&(queue, direction)| i128::from(served[queue * 2 + direction as usize])).sum()
        };
        let distances: Vec<i128> = (self.pairs())
            .map(|(one, other)| of(one) * i128::from(other.weight) - of(other) * i128::from(one.weight))
            .collect();
        if ranges.is_empty() {
            ranges.extend(distances.iter().map(|&distance| (distance, distance)));
        }
        for (range, distance) in ranges.iter_mut().zip(distances) {
            *range = (range.0.min(distance), range.1.max(distance));
        }
    }

    /// The largest range over its bound l₁/w₁ + l₂/w₂, where l is the largest request of a sibling.
    fn worst(&self, ranges: &[(i128, i128)], cost: impl Fn(u64) -> u64) -> f64 {
        let largest = |sibling: &Sibling| -> i128 {
            let sizes = sibling.lines.iter().flat_map(|&(queue, _)| &self.sizes[queue]);
            sizes.map(|&bytes| i128::from(cost(bytes))).max().expect("a size")
        };
        let parts = self.pairs().zip(ranges).map(|((one, other), (least, most))| {
            let bound = largest(one) * i128::from(other.weight) + largest(other) * i128::from(one.weight);
            (most - least) as f64 / bound as f64
        });
        parts.fold(0.0, f64::max)
    }
}

fn devices() -> impl Strategy<Value = Vec<(u32, Vec<u64>)>> {
    let weight = prop_oneof![1_u32..=10_000, 50_u32..=200];
    let size = prop_oneof![512_u64..=1_048_576, Just(4096_u64)];
    prop::collection::vec((weight, prop::collection::vec(size, 1..6)), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The bound of Goyal, Vin and Cheng ("Start-time Fair Queueing", 1996, theorem 1): for any two
    /// siblings and any interval in which requests of both wait all the time, |W₁/w₁ − W₂/w₂| ≤
    /// l₁/w₁ + l₂/w₂, in the unit of the limit, at each level.
    ///
    /// The intervals begin at 2 s. Requests before that start with full buckets and, as newcomers,
    /// with leads of 100 ms of the rate at most in each order.
    #[test]
    fn siblings_whose_requests_wait_are_at_most_a_request_of_each_apart(
        is_operations in any::<bool>(),
        outer in devices(),
        inner_weight in 1_u32..=10_000,
        inner in devices(),
        rate in 200_u64..2_000,
    ) {
        let limit = if is_operations { format!("iops-total={rate}") } else { format!("bps-total={}", rate * 200_000) };
        let mut tree = Tree::new(&limit, &outer, inner_weight, &inner);
        let part = tree.run(Time::from_nanos(2_000_000_000), Time::from_nanos(6_000_000_000), is_operations);
        prop_assert!(part <= 1.0, "{part:.3} of the bound");
    }

    /// A client with one request in flight, which comes back after each pause, waits for at most one
    /// request of each of the 32 devices: 32 requests of one size at the rate of the limit.
    #[test]
    fn newcomer_beside_31_devices_waits_for_32_requests_at_most(
        is_operations in any::<bool>(),
        rate in 100_u64..2_000,
        pauses_ns in prop::collection::vec(0_u64..500_000_000, 1..6),
    ) {
        const BYTES: u64 = 65_536;
        let limit = if is_operations { format!("iops-total={rate}") } else { format!("bps-total={}", rate * BYTES) };
        let mut world = World::unchecked();
        let group = world.group(&limit);
        let newcomer = world.simple(group).1;
        let others: Vec<usize> = (0..31).map(|_| world.simple(group).1).collect();
        others.iter().for_each(|&queue| world.reads(queue, 40, BYTES));
        let (mut seen, mut answered) = (0, 0);
        for pause_ns in pauses_ns {
            let comes_at = world.now.plus_nanos(pause_ns);
            let asked = answered + 1;
            while answered < asked {
                let next = world.next_deadline().expect("requests wait");
                if world.arrived(newcomer) < asked && comes_at <= next {
                    world.run_until(comes_at);
                    world.request(newcomer, Operation::Read, BYTES);
                } else {
                    world.run_until(next);
                }
                while let Some(went) = world.went.get(seen).copied() {
                    seen += 1;
                    if went.queue == newcomer {
                        answered += 1;
                    } else {
                        world.request(went.queue, Operation::Read, BYTES);
                    }
                }
            }
            let waited_ns = world.now.nanos_since(comes_at);
            // The bucket rounds each request up to a nanosecond.
            let bound_ns = 32 * 1_000_000_000_u64.div_ceil(rate) + 32;
            prop_assert!(waited_ns <= bound_ns, "{waited_ns} ns, at most {bound_ns}");
        }
    }
}
