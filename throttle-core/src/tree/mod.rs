//! Trees of groups, and the turn: which member's request is dispatched next.
//!
//! ```text
//!                 rack            limit R
//!               ╱      ╲
//!        tenant-a      vol3       limit T of tenant-a
//!        ╱     ╲        r │ w
//!     vol1     vol2
//!    r │ w    r │ w               a line: the held requests of a member in one direction, in arrival order
//!
//!   order of R:  rack { tenant-a { vol1 { r w } vol2 { r w } } vol3 { r w } }
//!   order of T:         tenant-a { vol1 { r w } vol2 { r w } }
//! ```
//!
//! Each limit has its own order over the children of its node, their children, and so on down to
//! the lines ([`order`]), in the unit of the limit. A dispatched request is charged to every limit
//! from its member up to the root together, and moves the tags of its line, member and groups in
//! the order of each of these limits.
//!
//! A line waits in the order of one limit, its *main* limit ([`turn`] says which); for each limit
//! with a waiting line the tree has the instant at which the first of them is due. So limits of
//! idle members are not read, and a decision costs one heap step for each limit and level on the
//! way up.
//!
//! A limit has the same index at its node and at every node below: the limits at and above a node
//! are those above its parent, those of its parent, and its own.
//!
//! This module knows no queues, no restart work and no timers.

mod depth;
mod node;
mod order;
mod shape;
mod timing;
mod turn;

use slotmap::{SecondaryMap, SlotMap};

use crate::bucket::Mark;
use crate::charge::ChargeTable;
use crate::cost::{Cost, Direction};
use crate::held::{Held, Line};
use crate::ids::NodeId;
use crate::lease::{Grant, Prepaid, Unspent, within};
use crate::limiter::{Credit, Level};
use crate::planted::{Fault, planted};
use crate::time::Time;
use node::{Flow, Kind, LineId, Node, Root};

pub use depth::{BadParent, DEPTH_MAX};

/// All groups and members, in any number of trees.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree {
    nodes: SlotMap<NodeId, Node>,
    roots: SecondaryMap<NodeId, Root>,
    /// Counts arrivals in the orders, to break ties.
    arrivals: u64,
}

impl Tree {
    /// The number of children of a group; 0 for a member.
    pub fn children(&self, id: NodeId) -> u32 {
        match &self.nodes[id].kind {
            Kind::Group(group) => group.children.len() as u32,
            Kind::Member(_) => 0,
        }
    }

    /// The topmost node above `id`, or `id` itself.
    pub fn root(&self, id: NodeId) -> NodeId {
        self.path(id).last().unwrap_or(id)
    }

    /// The group above a node.
    pub fn parent(&self, id: NodeId) -> Option<NodeId> {
        self.nodes[id].parent
    }

    /// The credit of each limit of a node.
    pub fn credit(&mut self, id: NodeId, now: Time) -> Vec<Credit> {
        self.nodes[id].limiter.credit(now)
    }

    /// The level of each limit of a node.
    pub fn levels(&mut self, id: NodeId, now: Time) -> Vec<Level> {
        self.nodes[id].limiter.levels(now)
    }

    /// Resumes a node from levels noted `elapsed_ns` ago.
    pub fn resume(&mut self, id: NodeId, levels: &[Level], elapsed_ns: u64, now: Time) {
        self.nodes[id].limiter.resume(levels, elapsed_ns, now);
        self.time_own(id, now);
    }

    /// The node and every node above it.
    fn path(&self, id: NodeId) -> impl Iterator<Item = NodeId> {
        std::iter::successors(Some(id), |&id| self.nodes[id].parent)
    }

    /// The charge table of a member: that of the nearest group above with a table of its own, or
    /// the default.
    pub fn charges(&self, id: NodeId) -> ChargeTable {
        let table = |id| match &self.nodes[id].kind {
            Kind::Group(group) => group.charges,
            Kind::Member(_) => None,
        };
        self.path(id).find_map(table).unwrap_or_default()
    }

    /// Whether a node and all nodes above it are without limits.
    pub fn is_unlimited(&self, id: NodeId) -> bool {
        self.nodes[id].limits.is_empty()
    }

    /// Whether no request waits in the tree of `root`.
    pub fn is_idle(&self, root: NodeId) -> bool {
        self.nodes[root].held == 0
    }

    /// The two lines of a member.
    pub fn lines(&self, member: NodeId) -> [&Line; Direction::ALL.len()] {
        Direction::ALL.map(|direction| &self.nodes[member].flow(direction).line)
    }

    /// Reserves room for `count` held requests of a member in each direction.
    pub fn reserve(&mut self, member: NodeId, count: usize) {
        for direction in Direction::ALL {
            self.nodes[member].flow_mut(direction).line.reserve(count);
        }
    }

    /// Whether a new request of this cost competes with no held request: none waits in its line,
    /// and none that waits is charged to a limit that the new one is charged to.
    pub fn is_uncontended(&self, root: NodeId, member: NodeId, cost: &Cost) -> bool {
        if self.is_idle(root) {
            return true;
        }
        if self.nodes[member].flow(cost.direction).line.first().is_some() {
            return false;
        }
        self.path(member).all(|id| {
            let node = &self.nodes[id];
            let mut own = node.limits[node.above..].iter().zip(&node.own);
            own.all(|(limit, state)| state.counted == 0 || !cost.is_charged_to(limit.kind))
        })
    }

    /// The instant at which every limit of a node and above it allows a request of this cost;
    /// `None` if that is now.
    pub fn ready_at(&mut self, node: NodeId, cost: &Cost, now: Time) -> Option<Time> {
        let mut latest = None;
        let mut next = Some(node);
        while let Some(id) = next {
            let node = &mut self.nodes[id];
            latest = latest.max(node.limiter.ready_at(cost, now));
            next = node.parent;
        }
        latest
    }

    /// Charges a node and all above it for a request that is dispatched outside its turn.
    pub fn charge(&mut self, node: NodeId, cost: &Cost, now: Time) {
        let mut next = Some(node);
        while let Some(id) = next {
            let node = &mut self.nodes[id];
            node.limiter.charge(cost, now);
            next = node.parent;
            if self.nodes[id].held > 0 {
                self.time_own(id, now);
            }
        }
    }

    /// Charges a member and all nodes above it in advance, for as much of `wanted` as leaves all of
    /// them clearly below their limits; `None` if that is not worth a lease. Appends a mark for each
    /// charged bucket, from the member up.
    pub fn prepay(
        &mut self,
        member: NodeId,
        direction: Direction,
        wanted: Prepaid,
        marks: &mut Vec<Mark>,
        now: Time,
    ) -> Option<Grant> {
        let mut room = wanted;
        let mut size_max = u64::MAX;
        let mut next = Some(member);
        while let Some(id) = next {
            let node = &mut self.nodes[id];
            room = within(room, node.limiter.room(direction, now))?;
            size_max = size_max.min(node.limiter.size_max());
            next = node.parent;
        }
        let mut next = Some(member);
        while let Some(id) = next {
            let node = &mut self.nodes[id];
            node.limiter.prepay(direction, room, marks, now);
            next = node.parent;
        }
        Some(Grant { prepaid: room, paid_at: now, size_max, charges: self.charges(member) })
    }

    /// Returns unspent credit to the buckets that [`Self::prepay`] charged. No limit and no place on
    /// the way up may have changed since.
    pub fn refund(&mut self, member: NodeId, direction: Direction, unspent: &Unspent<'_>, now: Time) {
        let mut marks = unspent.marks.iter().copied();
        let mut next = Some(member);
        while let Some(id) = next {
            let node = &mut self.nodes[id];
            node.limiter.refund(direction, unspent, &mut marks, now);
            next = node.parent;
            if self.nodes[id].held > 0 {
                self.time_own(id, now);
            }
        }
        debug_assert!(marks.next().is_none(), "each charged bucket gets its part back");
    }

    /// Holds a request. Returns whether that may change the deadline of its tree: the first request
    /// of a line may be due before all others, and the second permits timer slack for the first.
    pub fn hold(&mut self, member: NodeId, held: Held, now: Time) -> bool {
        let line_id = LineId { member, direction: held.cost.direction };
        let line = &mut self.flow_mut(line_id).line;
        let was_empty = line.first().is_none();
        line.push(held);
        let may_matter = line.len() <= 2;
        self.count_held(member, 1);
        if was_empty {
            self.enter(line_id, order::Lead::Newcomer(now), now);
        }
        may_matter
    }

    /// Holds requests that cannot change the deadline of their tree: from the first of `held` on,
    /// as long as the request is charged and has two before it in its line. Returns their number.
    pub fn join(&mut self, member: NodeId, held: impl Iterator<Item = Held>) -> u32 {
        let node = &mut self.nodes[member];
        let mut joined = 0;
        for held in held {
            let line = &mut node.flow_mut(held.cost.direction).line;
            if held.cost.is_free() || line.len() < 2 && !planted(Fault::JoinUnseen) {
                break;
            }
            line.push(held);
            joined += 1;
        }
        self.count_held(member, i64::from(joined));
        joined
    }

    /// Removes the oldest held request of a member in a direction, without a charge.
    pub fn pop(&mut self, member: NodeId, direction: Direction, now: Time) -> Option<Held> {
        let line = LineId { member, direction };
        let held = self.flow_mut(line).line.pop()?;
        self.count_held(member, -1);
        if !planted(Fault::PopWithoutSettle) {
            self.settle(line, &held.cost, now);
        }
        Some(held)
    }

    /// Counts held requests at a node and all above it.
    fn count_held(&mut self, from: NodeId, change: i64) {
        let mut next = Some(from);
        while let Some(id) = next {
            let node = &mut self.nodes[id];
            let was_waiting = node.held > 0;
            node.held = u32::try_from(i64::from(node.held) + change).expect("held requests are counted once");
            let (is_waiting, weight) = (node.held > 0, u64::from(node.weight));
            next = node.parent;
            if let Some(parent) = next
                && was_waiting != is_waiting
            {
                let weights = &mut self.nodes[parent].weights_waiting;
                *weights = if is_waiting { *weights + weight } else { *weights - weight };
            }
        }
    }

    fn flow(&self, line: LineId) -> &Flow {
        self.nodes[line.member].flow(line.direction)
    }

    fn flow_mut(&mut self, line: LineId) -> &mut Flow {
        self.nodes[line.member].flow_mut(line.direction)
    }
}

#[cfg(test)]
impl Tree {
    /// Panics unless all counts are right and every line waits in exactly one order.
    pub fn assert_invariants(&self) {
        for (id, node) in &self.nodes {
            self.assert_node(id, node);
            if let Kind::Member(flows) = &node.kind {
                for (line, flow) in flows.iter().enumerate() {
                    self.assert_flow(LineId { member: id, direction: Direction::ALL[line] }, flow);
                }
            }
        }
    }

    fn assert_node(&self, id: NodeId, node: &Node) {
        assert_eq!(node.parent.is_none(), self.roots.contains_key(id), "a node without a parent is a root");
        let (held, weights) = match &node.kind {
            Kind::Member(flows) => (flows.iter().map(|flow| flow.line.len()).sum(), 0),
            Kind::Group(group) => {
                let children = self.nodes.iter().filter(|(_, child)| child.parent == Some(id));
                assert!(children.map(|(id, _)| id).eq(group.children.iter().copied()), "a group knows its children");
                let children = group.children.iter().map(|&child| &self.nodes[child]);
                let waiting = children.clone().filter(|child| child.held > 0);
                (children.map(|child| child.held).sum(), waiting.map(|child| u64::from(child.weight)).sum())
            }
        };
        assert_eq!((node.held, node.weights_waiting), (held, weights), "I5: counted on every level");
        let inherited = node.parent.map_or(&[][..], |parent| &self.nodes[parent].limits);
        assert_eq!(&node.limits[..node.above], inherited, "a limit has one index at all nodes below it");
        assert_eq!(node.limits.len(), node.orders.len());
        assert_eq!(node.standings.len(), node.above);
        for (own, state) in node.own.iter().enumerate() {
            let index = node.above + own;
            let of_member = |(member, node): (NodeId, &Node)| {
                let flows = match &node.kind {
                    Kind::Member(flows) => flows.clone().to_vec(),
                    Kind::Group(_) => Vec::new(),
                };
                self.path(member).any(|above| above == id).then_some(flows).into_iter().flatten()
            };
            let flows: Vec<Flow> = self.nodes.iter().flat_map(of_member).filter(|flow| flow.charged != 0).collect();
            let counted = flows.iter().filter(|flow| flow.charged & 1 << index != 0);
            assert_eq!(state.counted as usize, counted.clone().count(), "charged lines are counted");
            assert_eq!(state.mains as usize, counted.filter(|flow| flow.main == index).count());
            let waiters = flows.iter().filter(|flow| flow.waits_at == Some(index)).count();
            assert_eq!(state.waiters as usize, waiters, "waiting lines are counted");
            assert_eq!(state.timer.is_some(), waiters > 0, "a limit is timed exactly while lines wait");
        }
    }

    fn assert_flow(&self, line: LineId, flow: &Flow) {
        let first = flow.line.first();
        assert_eq!(flow.waits_at.is_some(), flow.charged != 0, "I4: a line waits in one order");
        let unlimited = &self.roots[self.root(line.member)].unlimited;
        let is_due = first.is_some() && flow.charged == 0;
        assert_eq!(unlimited.iter().filter(|&&due| due == line).count(), usize::from(is_due));
        let Some(first) = first else {
            assert_eq!(flow.charged, 0, "a line without requests waits nowhere");
            return;
        };
        let limits = &self.nodes[line.member].limits;
        for (index, limit) in limits.iter().enumerate() {
            assert_eq!(flow.charged & 1 << index != 0, first.cost.is_charged_to(limit.kind));
        }
        let Some(at) = flow.waits_at else { return };
        assert_ne!(flow.charged & 1 << at, 0);
        for (node, child) in self.climb(line, at).up() {
            let standing = self.standing(node, child, at);
            assert_eq!(self.nodes[node].orders[at].at(standing.place().expect("it waits")), Some(child));
        }
    }
}
