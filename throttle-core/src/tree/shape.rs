//! The shape of the trees: nodes come, go and move, and limits change, while requests wait.
//!
//! A change that only alters rates, levels or weights leaves every line where it waits. A change
//! that alters *which* limits are above a line takes the lines of the subtree out of all orders,
//! gives the limits of the subtree new indexes, and lets the lines enter again. Tags at a limit that
//! is still above stay as they are.

use slotmap::SecondaryMap;

use super::Tree;
use super::depth::{BadParent, DEPTH_MAX};
use super::node::{Flow, Group, Kind, LimitId, LimitState, LineId, Node, Root};
use super::order::{Lead, Order, Scale, Standing};
use crate::charge::ChargeTable;
use crate::cost::Direction;
use crate::ids::NodeId;
use crate::limiter::LimitKinds;
use crate::limits::Limits;
use crate::time::Time;

impl Tree {
    /// Adds a group without members, as the root of a new tree.
    pub fn add_group(&mut self, limits: &Limits, weight: u32, charges: Option<ChargeTable>) -> NodeId {
        self.add(Node::new(limits, weight, Kind::Group(Group { charges, ..Group::default() })))
    }

    /// Adds a member, as the root of a new tree.
    pub fn add_member(&mut self, limits: &Limits, weight: u32) -> NodeId {
        self.add(Node::new(limits, weight, Kind::Member([Flow::default(), Flow::default()])))
    }

    fn add(&mut self, node: Node) -> NodeId {
        let id = self.nodes.insert(node);
        self.roots.insert(id, Root::default());
        self.count_patience(id, id, 1);
        self.number_limits(id);
        id
    }

    /// Removes a node without children and held requests.
    pub fn remove(&mut self, id: NodeId, now: Time) {
        debug_assert_eq!(self.nodes[id].held, 0);
        debug_assert_eq!(self.children(id), 0);
        self.set_parent(id, None, now);
        self.nodes.remove(id);
        self.roots.remove(id);
    }

    /// Changes the limits of a node, keeping the used share of each bucket.
    pub fn set_limits(&mut self, id: NodeId, limits: &Limits, now: Time) {
        let root = self.root(id);
        let has_same_kinds = self.nodes[id].limiter.kinds() == LimitKinds::of(limits);
        let lines = if has_same_kinds { Vec::new() } else { self.take_out_below(id, now) };
        self.count_patience(id, root, -1);
        self.nodes[id].limiter.reconfigure(limits, now);
        self.count_patience(id, root, 1);
        if has_same_kinds {
            self.time_own(id, now);
        } else {
            self.number_limits(id);
            self.put_back(lines, now);
        }
    }

    /// Changes the weight of a node among its siblings.
    pub fn set_weight(&mut self, id: NodeId, weight: u32) {
        // A tag stands for all dispatches so far; from now on it moves at the new pace.
        let node = &mut self.nodes[id];
        let (was, is_waiting) = (u64::from(node.weight), node.held > 0);
        node.weight = weight;
        node.scale = Scale::of(weight);
        if let Some(parent) = node.parent
            && is_waiting
        {
            let weights = &mut self.nodes[parent].weights_waiting;
            *weights = *weights - was + u64::from(weight);
        }
    }

    /// Changes the charge table of a group; held requests keep their cost.
    pub fn set_charges(&mut self, id: NodeId, charges: Option<ChargeTable>) {
        self.nodes[id].group().charges = charges;
    }

    /// Whether all these nodes may have these parents at once.
    pub fn check_parents(&self, planned: &SecondaryMap<NodeId, Option<NodeId>>) -> Result<(), BadParent> {
        if planned.is_empty() {
            return Ok(());
        }
        for (id, node) in &self.nodes {
            let parent = |id: &NodeId| planned.get(*id).copied().unwrap_or(self.nodes[*id].parent);
            // A path without a cycle visits no node twice.
            if std::iter::successors(Some(id), parent).nth(self.nodes.len()).is_some() {
                return Err(BadParent::Cycle);
            }
            let groups = std::iter::successors(Some(id), parent).count() - usize::from(!node.is_group());
            if groups > DEPTH_MAX {
                return Err(BadParent::TooDeep);
            }
        }
        Ok(())
    }

    /// Moves a node, with its subtree and all held requests, below `parent`, or to the root of a
    /// new tree.
    pub fn set_parent(&mut self, id: NodeId, parent: Option<NodeId>, now: Time) {
        let lines = self.take_out_below(id, now);
        let (old_root, held, weight) = (self.root(id), self.nodes[id].held, u64::from(self.nodes[id].weight));
        for node in self.subtree(id) {
            self.count_patience(node, old_root, -1);
        }
        if let Some(old) = self.nodes[id].parent.take() {
            self.nodes[old].group().children.remove(&id);
            self.nodes[old].weights_waiting -= if held > 0 { weight } else { 0 };
            self.count_held(old, -i64::from(held));
        } else {
            self.roots.remove(id);
        }
        if let Some(new) = parent {
            self.nodes[new].group().children.insert(id);
            self.nodes[new].weights_waiting += if held > 0 { weight } else { 0 };
            self.count_held(new, held.into());
            self.nodes[id].parent = Some(new);
        } else {
            self.roots.insert(id, Root::default());
        }
        let root = self.root(id);
        for node in self.subtree(id) {
            self.count_patience(node, root, 1);
        }
        self.number_limits(id);
        self.put_back(lines, now);
    }

    /// A node and all nodes below it, each after its parent.
    fn subtree(&self, id: NodeId) -> Vec<NodeId> {
        let mut nodes = vec![id];
        let mut next = 0;
        while let Some(&id) = nodes.get(next) {
            if let Kind::Group(group) = &self.nodes[id].kind {
                nodes.extend(&group.children);
            }
            next += 1;
        }
        nodes
    }

    /// Takes the lines at and below a node that hold requests out of all orders.
    fn take_out_below(&mut self, id: NodeId, now: Time) -> Vec<LineId> {
        let mut lines = Vec::new();
        if self.nodes[id].held == 0 {
            return lines;
        }
        for member in self.subtree(id) {
            if self.nodes[member].is_group() {
                continue;
            }
            for direction in Direction::ALL {
                let line = LineId { member, direction };
                if self.flow(line).line.first().is_some() {
                    self.exit(line, now);
                    lines.push(line);
                }
            }
        }
        lines
    }

    fn put_back(&mut self, lines: Vec<LineId>, now: Time) {
        for line in lines {
            self.enter(line, Lead::Blocked { cost: 0 }, now);
        }
    }

    /// Gives each limit its index at a node and all nodes below it. No line below waits.
    fn number_limits(&mut self, id: NodeId) {
        for id in self.subtree(id) {
            let above = self.nodes[id].parent.map(|parent| self.nodes[parent].limits.clone()).unwrap_or_default();
            let node = &mut self.nodes[id];
            let own: Vec<LimitId> = node.limiter.kinds().map(|kind| LimitId { node: id, kind }).collect();
            let before = std::mem::take(&mut node.limits);
            let at_before = |limit: &LimitId| before.iter().position(|before| before == limit);
            node.above = above.len();
            let limits: Vec<LimitId> = above.into_iter().chain(own).collect();
            // A limit that was above before keeps its tags; at a new one all are level.
            let mut orders = std::mem::take(&mut node.orders);
            let of_before = |limit: &LimitId| at_before(limit).map(|at| std::mem::take(&mut orders[at]));
            node.orders = limits.iter().map(of_before).map(Option::unwrap_or_default).collect::<Vec<Order>>();
            node.own = limits[node.above..].iter().map(|_| LimitState::default()).collect();
            let places: Vec<Option<usize>> = limits.iter().map(at_before).collect();
            node.limits = limits;
            if let Kind::Member(flows) = &mut node.kind {
                for flow in flows {
                    let before = std::mem::take(&mut flow.standings);
                    let standing = |place: &Option<usize>| place.map(|at| before[at]).unwrap_or_default();
                    flow.standings = places.iter().map(standing).collect();
                }
            }
            self.renumber_standings(id, &places);
        }
    }

    /// The standings of a node at the limits above it.
    fn renumber_standings(&mut self, id: NodeId, places: &[Option<usize>]) {
        let before = std::mem::take(&mut self.nodes[id].standings);
        let above = self.nodes[id].above;
        let standings = places[..above].iter().enumerate().map(|(at, place)| {
            place.and_then(|place| before.get(place).copied()).unwrap_or_else(|| {
                let mut standing = Standing::default();
                if let Some(parent) = self.nodes[id].parent {
                    standing.level(&self.nodes[parent].orders[at]);
                }
                standing
            })
        });
        let standings = standings.collect();
        self.nodes[id].standings = standings;
    }

    /// Counts the patience of a node's limits at the root of its tree.
    fn count_patience(&mut self, id: NodeId, root: NodeId, change: i32) {
        let patience_ns = self.nodes[id].limiter.patience_ns();
        if patience_ns == u64::MAX {
            return;
        }
        let nodes = self.roots[root].patience_ns.entry(patience_ns).or_insert(0);
        *nodes = nodes.checked_add_signed(change).expect("each node is counted once");
        if *nodes == 0 {
            self.roots[root].patience_ns.remove(&patience_ns);
        }
    }
}
