//! The fast path for many requests that arrive at one instant has no observable effect: with two
//! requests waiting in a line, later ones join it without a look at the tree.

use proptest::prelude::*;

use super::world::limits;
use crate::charge::ChargeTable;
use crate::cost::Operation;
use crate::held::Held;
use crate::ids::NodeId;
use crate::ids::QueueId;
use crate::limits::Limits;
use crate::planted::{Fault, is_found};
use crate::request::Tag;
use crate::time::Time;
use crate::tree::Tree;

const MEMBERS: usize = 4;

#[derive(Clone, Debug)]
struct Step {
    member: usize,
    /// The operations of the requests with even and with odd index.
    operations: [Operation; 2],
    bytes: u64,
    count: u32,
    then_ns: u64,
}

fn some_limits() -> impl Strategy<Value = Limits> {
    prop::sample::select(vec![
        "",
        "iops-total=2000",
        "bps-read=4000000",
        "iops-write=500 bps-total=30000000",
        "iops-total=300 iops-total-max=3000 iops-total-max-length=2",
        "bps-total=8000000 iops-read=1000 iops-size=4096",
    ])
    .prop_map(limits)
}

fn some_step() -> impl Strategy<Value = Step> {
    let operation =
        || prop::sample::select(vec![Operation::Read, Operation::Write, Operation::Discard, Operation::Flush]);
    let operations = prop_oneof![operation().prop_map(|one| [one; 2]), [operation(), operation()]];
    let then_ns = prop_oneof![Just(0), 1_u64..2_000_000, 1_u64..300_000_000];
    (0..MEMBERS, operations, 1_u64..100_000, 1_u32..40, then_ns)
        .prop_map(|(member, operations, bytes, count, then_ns)| Step { member, operations, bytes, count, then_ns })
}

/// Two members in a group, one in a group below it, and one alone.
fn tree(of: &[Limits; 6], weights: [u32; 5]) -> (Tree, [NodeId; MEMBERS]) {
    let mut tree = Tree::default();
    let above = tree.add_group(&of[0], weights[0], None);
    let below = tree.add_group(&of[1], weights[1], None);
    let members = [2, 3, 4, 5].map(|index| tree.add_member(&of[index], weights[index.min(4)]));
    for (node, parent) in [(below, above), (members[0], above), (members[1], above), (members[2], below)] {
        tree.set_parent(node, Some(parent), Time::ZERO);
    }
    for member in members {
        tree.reserve(member, 4096);
    }
    (tree, members)
}

type Went = Vec<(NodeId, Tag)>;

fn expect_short_cuts_to_be_as_one_by_one(of: &[Limits; 6], weights: [u32; 5], steps: &[Step]) {
    let (mut many, members) = tree(of, weights);
    let mut single = many.clone();
    let (mut went, mut went_singly): (Went, Went) = (Vec::new(), Vec::new());
    let (mut now, mut tag) = (Time::ZERO, 0);
    for step in steps {
        let member = members[step.member];
        let mut came: Vec<Held> = Vec::new();
        for operation in step.operations.into_iter().cycle().take(step.count as usize) {
            let cost = ChargeTable::DEFAULT.cost(operation, step.bytes);
            came.push(Held { queue: QueueId::default(), tag, cost, since: now });
            tag += 1;
        }
        let is_charged = |held: &&Held| !held.cost.is_free();
        came.iter().filter(is_charged).for_each(|&held| _ = single.hold(member, held, now));
        let mut next = came.as_slice();
        while let Some((&held, after)) = next.split_first() {
            if is_charged(&&held) {
                many.hold(member, held, now);
            }
            let joined = many.join(member, after.iter().copied());
            next = &after[joined as usize..];
        }
        now = now.plus_nanos(step.then_ns);
        let root = many.root(member);
        many.let_go_due(root, now, |held| went.push((root, held.tag)));
        single.let_go_due(root, now, |held| went_singly.push((root, held.tag)));
        assert_eq!(went, went_singly);
        assert_eq!(many.wakes_at(root, now), single.wakes_at(root, now));
        assert_eq!(format!("{many:?}"), format!("{single:?}"), "orders, counts and levels are the same");
        many.assert_invariants();
    }
}

proptest! {
    #[test]
    fn many_leave_everything_as_they_would_one_by_one(
        of in [some_limits(), some_limits(), some_limits(), some_limits(), some_limits(), some_limits()],
        weights in [1_u32..1000, 1_u32..1000, 1_u32..1000, 1_u32..1000, 1_u32..1000],
        steps in prop::collection::vec(some_step(), 1..60),
    ) {
        expect_short_cuts_to_be_as_one_by_one(&of, weights, &steps);
    }
}

/// The comparison holds, and fails once the fault removes a condition of the fast path.
fn expect_condition_to_be_needed(fault: Fault, of: [&str; 6], steps: &[Step]) {
    let of = of.map(limits);
    let compare = || expect_short_cuts_to_be_as_one_by_one(&of, [100; 5], steps);
    compare();
    assert!(is_found(fault, compare), "{fault:?} was not found");
}

fn step(member: usize, operations: [Operation; 2], count: u32) -> Step {
    Step { member, operations, bytes: 4096, count, then_ns: 50_000_000 }
}

#[test]
fn the_first_of_a_line_does_not_join_unseen() {
    // A read among writes is the first of its own line, and may be due before them: it needs a
    // place in the tree.
    let of = ["bps-write=4000000", "", "", "", "", ""];
    expect_condition_to_be_needed(Fault::JoinUnseen, of, &[step(0, [Operation::Write, Operation::Read], 400)]);
}
