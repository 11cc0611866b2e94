//! Trees of groups, and the turn: which member's request is dispatched next.
//!
//! ```text
//!                 rack            limits; V = its virtual clock
//!               ╱      ╲
//!        tenant-a      vol3       a node is queued in its parent, once for each lane in which a request waits:
//!        ╱     ╲                    ready   keyed by its position on the parent's clock: the least has the turn
//!     vol1     vol2                 asleep  keyed by the instant at which limits at or below it next let it go
//!    r │ w    r │ w               the two lines of a member: held requests in arrival order
//! ```
//!
//! A request is dispatched when every limit from its member up to the root allows it, and is
//! charged to all of them together. From the root down, each group gives the turn to the first of
//! its ready children. So limits of idle members are not read, and a decision costs one heap step
//! per level.
//!
//! The place of a node in its parent is a function of the requests that wait below it and of limits
//! at or below it. A change anywhere is repaired by *settling* the path from there to the root
//! ([`Tree::settle`]); every public call ends with all paths settled.
//!
//! Reads and writes compete at a node if a limit on the way up counts them together, and the node
//! then has one position in its parent. Otherwise reads and writes are independent, and the node
//! has a position for each.
//!
//! This module knows no queues, no restart work and no timers.

use slotmap::{SecondaryMap, SlotMap, new_key_type};

use crate::charge::ChargeTable;
use crate::cost::{Cost, Direction, Operation};
use crate::heap::Heap;
use crate::held::{Held, Line, Lines};
use crate::lane::{Lane, Lanes};
use crate::lease::{Grant, Prepaid, within};
use crate::limiter::{Credit, Level, Limiter, Takes};
use crate::limits::Limits;
use crate::planted::{Fault, planted};
use crate::share::{LAG_MAX, Virtual, WEIGHT_DEFAULT, advance};
use crate::time::Time;

/// The most levels of groups: bounds the work of one decision.
pub const DEPTH_MAX: usize = 8;

/// The largest timer slack of a request that is not the only one of its device to wait. Up to 1,000
/// requests a second it delays nothing, as the next request is due later than that; above, it is a
/// hundredth of the 100 ms that a limit may run ahead.
const SLACK_NS_MAX: u64 = 1_000_000;

/// The slack is at most 1/2 of the wait so far. With n requests waiting at a rate r, each waits n /
/// r, so half of them are dispatched together, and a client with few requests in flight at a high
/// rate is not delayed by the whole millisecond.
const WAITED_PART: u64 = 2;

/// The slack is at most 1/8 of the patience ([`Limiter::patience_ns`]) of the tree.
const PATIENCE_PART: u64 = 8;

new_key_type! {
    /// The id of a group or a member.
    pub(crate) struct NodeId;
}

#[derive(Clone, Debug)]
struct Node {
    parent: Option<NodeId>,
    weight: u32,
    limiter: Limiter,
    /// Requests held at or below this node.
    held: u32,
    /// Of a root: the least patience of all limits in its tree, or a lower value.
    patience_ns: u64,
    /// Whether reads and writes compete here and share a clock.
    is_joint: bool,
    /// The node's virtual clocks: the largest position that a child (of a member: a line) had when
    /// it was dispatched. Indexed by [`Node::clock`].
    clocks: [Virtual; 2],
    /// The node's positions on the clocks of its parent.
    positions: [Virtual; 2],
    /// The node's place in a heap of its parent, indexed by [`Lane`].
    standing: [Standing; Lane::COUNT],
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Group(Group),
    Member(Lines),
}

#[derive(Clone, Debug, Default)]
struct Group {
    children: u32,
    charges: Option<ChargeTable>,
    /// Children that may go as far as limits at and below them allow. Ties go to the earlier
    /// arrival.
    ready: [Heap<(Virtual, u64), NodeId>; Lane::COUNT],
    /// Children that a limit at or below them holds back, keyed by the instant at which it no
    /// longer does.
    asleep: [Heap<Time, NodeId>; Lane::COUNT],
}

/// The place of a node in its parent, for one lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Out,
    Ready { place: u32 },
    Asleep { place: u32, until: Time },
}

/// The reason why a node cannot have a parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadParent {
    /// The parent is the node itself or below it.
    #[error("a group cannot stand below itself")]
    Cycle,
    /// More than [`DEPTH_MAX`] levels of groups.
    #[error("more than {DEPTH_MAX} groups above each other")]
    TooDeep,
}

impl Node {
    fn new(limits: &Limits, weight: u32, kind: Kind) -> Self {
        let limiter = Limiter::new(limits);
        Self {
            parent: None,
            weight,
            patience_ns: limiter.patience_ns(),
            limiter,
            held: 0,
            is_joint: false,
            clocks: [0; 2],
            positions: [0; 2],
            standing: [Standing::Out; Lane::COUNT],
            kind,
        }
    }

    /// The index of the clock that counts dispatches of children in `direction`.
    fn clock(&self, direction: Direction) -> usize {
        if self.is_joint { 0 } else { direction as usize }
    }

    fn is_group(&self) -> bool {
        matches!(self.kind, Kind::Group(_))
    }

    fn group(&mut self) -> &mut Group {
        match &mut self.kind {
            Kind::Group(group) => group,
            Kind::Member(_) => unreachable!("a member has no children"),
        }
    }

    /// The lanes in which a request waits at or below the node.
    fn waiting(&self) -> Lanes {
        match &self.kind {
            Kind::Member(lines) => lines.iter().filter_map(Line::lane).collect(),
            Kind::Group(Group { ready, asleep, .. }) => {
                Lane::all().filter(|lane| !ready[lane.index()].is_empty() || !asleep[lane.index()].is_empty()).collect()
            }
        }
    }

    /// The lanes in which the node is queued in its parent.
    fn stands(&self) -> Lanes {
        Lane::all().filter(|lane| self.standing[lane.index()] != Standing::Out).collect()
    }

    fn lines(&self) -> &Lines {
        match &self.kind {
            Kind::Member(lines) => lines,
            Kind::Group(_) => unreachable!("a group holds nothing itself"),
        }
    }

    fn lines_mut(&mut self) -> &mut Lines {
        self.kind.lines_mut()
    }
}

impl Kind {
    fn lines_mut(&mut self) -> &mut Lines {
        match self {
            Self::Member(lines) => lines,
            Self::Group(_) => unreachable!("a group holds nothing itself"),
        }
    }
}

/// All groups and members, in any number of trees.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree {
    nodes: SlotMap<NodeId, Node>,
    /// Counts arrivals in the ready heaps, to break ties.
    arrivals: u64,
}

impl Tree {
    /// Adds a group without members, as the root of a new tree.
    pub fn add_group(&mut self, limits: &Limits, weight: u32, charges: Option<ChargeTable>) -> NodeId {
        self.add(Node::new(limits, weight, Kind::Group(Group { charges, ..Group::default() })))
    }

    /// Adds a member, as the root of a new tree.
    pub fn add_member(&mut self, limits: &Limits, weight: u32) -> NodeId {
        self.add(Node::new(limits, weight, Kind::Member(Lines::default())))
    }

    fn add(&mut self, node: Node) -> NodeId {
        let id = self.nodes.insert(node);
        self.tell_joint(id);
        id
    }

    /// Removes a node without children and held requests.
    pub fn remove(&mut self, id: NodeId, now: Time) {
        debug_assert_eq!(self.nodes[id].held, 0);
        debug_assert_eq!(self.children(id), 0);
        self.detach(id, now);
        self.nodes.remove(id);
    }

    /// The number of children of a group; 0 for a member.
    pub fn children(&self, id: NodeId) -> u32 {
        match &self.nodes[id].kind {
            Kind::Group(group) => group.children,
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
        self.restand(now);
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
        self.path(id).all(|id| self.nodes[id].limiter.is_unlimited())
    }

    /// Whether no request waits in the tree of `root`.
    pub fn is_idle(&self, root: NodeId) -> bool {
        self.nodes[root].held == 0
    }

    /// The deadline for a tree in which every request due by `now` has been dispatched and the next
    /// is due at `due`: `now` plus the timer slack, so that more requests go together, or `due` if
    /// that is later. The slack is small enough that no limit of the tree loses rate, and 0 while
    /// the next device has at most one request waiting in each direction: its client may be waiting
    /// for the answer before it sends again.
    pub fn company_at(&self, root: NodeId, due: Time, now: Time) -> Time {
        let Some(lines) = self.next_lines(root) else { return due };
        let is_alone = lines.iter().all(|line| line.len() < 2) && !planted(Fault::LonelyWait);
        let since = lines.iter().filter_map(|line| Some(line.first()?.since)).min();
        let waited_ns = since.map_or(0, |since| now.nanos_since(since));
        let slack_ns = match self.nodes[root].patience_ns / PATIENCE_PART {
            _ if planted(Fault::SlackWithoutEnd) => SLACK_NS_MAX,
            part => SLACK_NS_MAX.min(waited_ns / WAITED_PART).min(part),
        };
        let late = now.plus_nanos(slack_ns);
        if late <= due || is_alone { due } else { late }
    }

    /// The two lines of a member.
    pub fn lines(&self, member: NodeId) -> &Lines {
        self.nodes[member].lines()
    }

    /// Reserves room for `count` held requests of a member in each direction.
    pub fn reserve(&mut self, member: NodeId, count: usize) {
        for line in self.nodes[member].lines_mut() {
            line.reserve(count);
        }
    }

    /// Whether a read and a write of a member are both held if they arrive between `since` and
    /// `now`. Valid if no request of the tree was dispatched in that time.
    pub fn held_newcomers(&mut self, member: NodeId, since: Time, now: Time) -> bool {
        let charges = self.charges(member);
        [Operation::Read, Operation::Write].into_iter().all(|operation| {
            let cost = charges.cost(operation, 1);
            let would_queue = self.nodes[member].lines()[cost.direction as usize].first().is_some();
            !cost.is_free() && (would_queue || self.was_blocked(member, &cost, since, now))
        })
    }

    fn was_blocked(&mut self, node: NodeId, cost: &Cost, since: Time, now: Time) -> bool {
        let mut next = Some(node);
        while let Some(id) = next {
            let node = &mut self.nodes[id];
            if node.limiter.was_blocked(cost, since, now) {
                return true;
            }
            next = node.parent;
        }
        false
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
        let mut root = node;
        while let Some(id) = next {
            let node = &mut self.nodes[id];
            node.limiter.charge(cost, now);
            root = id;
            next = node.parent;
        }
        if !self.is_idle(root) {
            self.settle(node, now);
        }
    }

    /// Charges a member and all nodes above it in advance, for as much of `wanted` as leaves all of
    /// them clearly below their limits; `None` if that is not worth a lease.
    pub fn prepay(&mut self, member: NodeId, direction: Direction, wanted: Prepaid, now: Time) -> Option<Grant> {
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
            node.limiter.prepay(direction, room, now);
            next = node.parent;
        }
        Some(Grant { prepaid: room, size_max, charges: self.charges(member) })
    }

    /// Holds a request. Returns whether that may change the deadline of its tree: the first request
    /// of a line may be due before all others, and the second permits timer slack for the first.
    pub fn hold(&mut self, member: NodeId, held: Held, now: Time) -> bool {
        let direction = held.cost.direction;
        let node = &mut self.nodes[member];
        let clock = node.clock(direction);
        let line = &mut node.kind.lines_mut()[direction as usize];
        let was_empty = line.first().is_none();
        if was_empty {
            line.position = line.position.max(node.clocks[clock].saturating_sub(LAG_MAX));
        }
        line.push(held);
        let may_matter = line.len() <= 2;
        self.count_held(member, 1);
        if was_empty {
            self.settle(member, now);
        }
        may_matter
    }

    /// Holds requests that cannot change the deadline of their tree: from the first of `held` on,
    /// as long as the request is charged and has two before it in its line. Returns their number.
    pub fn join(&mut self, member: NodeId, held: impl Iterator<Item = Held>) -> u32 {
        let lines = self.nodes[member].lines_mut();
        let mut joined = 0;
        for held in held {
            let line = &mut lines[held.cost.direction as usize];
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
        let held = self.nodes[member].lines_mut()[direction as usize].pop()?;
        self.count_held(member, -1);
        if !planted(Fault::PopWithoutSettle) {
            self.settle(member, now);
        }
        Some(held)
    }

    fn count_held(&mut self, from: NodeId, change: i64) {
        let mut next = Some(from);
        while let Some(id) = next {
            let node = &mut self.nodes[id];
            node.held = u32::try_from(i64::from(node.held) + change).expect("held requests are counted once");
            next = node.parent;
        }
    }

    /// The instant at which a request in the tree of `root` is next due: `None` if none waits,
    /// `now` or earlier if one is due.
    pub fn wakes_at(&mut self, root: NodeId, now: Time) -> Option<Time> {
        if self.is_idle(root) {
            return None;
        }
        self.nodes[root].waiting().iter().filter_map(|lane| self.wake(root, lane, now)).min()
    }

    /// Dispatches every due request in turn order, charges each to its member and all above, and
    /// hands it to `post`.
    pub fn let_go_due(&mut self, root: NodeId, now: Time, mut post: impl FnMut(&Held)) {
        let mut lanes = self.open_lanes(root, now);
        while let Some((member, direction)) = self.next(root, lanes, now) {
            let line = &self.nodes[member].lines()[direction as usize];
            // A line that holds all waiting requests of the tree keeps the turn: dispatch it as a
            // run.
            let is_alone = line.len() == self.nodes[root].held || planted(Fault::RunOverOthers);
            let count = if is_alone { u32::MAX } else { 1 };
            if !self.let_go_of(member, direction, count, now, &mut post) {
                lanes = self.open_lanes(root, now);
            }
        }
    }

    /// Dispatches the first request of the line that has the turn, and up to `count` in all while
    /// they are of its lane and every limit allows them. Returns whether a further request of that
    /// lane waits and the limits allow it: the same lanes are then open as before.
    fn let_go_of(
        &mut self,
        member: NodeId,
        direction: Direction,
        count: u32,
        now: Time,
        post: &mut impl FnMut(&Held),
    ) -> bool {
        let mut gone = 0;
        let (keeps_places, goes_on) = loop {
            let node = &mut self.nodes[member];
            let clock = node.clock(direction);
            let line = &mut node.kind.lines_mut()[direction as usize];
            let Some(held) = line.pop() else { break (false, false) };
            let is_like_next = line.first().is_some_and(|next| Lane::of(&next.cost) == Lane::of(&held.cost));
            node.clocks[clock] = node.clocks[clock].max(line.position);
            let takes = self.take(member, &held.cost, now);
            self.nodes[member].lines_mut()[direction as usize].position += advance(takes.ns(), WEIGHT_DEFAULT);
            post(&held);
            gone += 1;
            let goes_on = is_like_next && takes.leave_open;
            if gone == count || !goes_on {
                break (is_like_next && self.keeps_places(member, &held.cost), goes_on);
            }
        };
        self.count_held(member, -i64::from(gone));
        let mut id = member;
        while let Some(parent) = self.nodes[id].parent {
            self.rekey(id, parent, self.nodes[parent].clock(direction));
            id = parent;
        }
        if !keeps_places && !planted(Fault::PlacesKept) {
            self.settle(member, now);
        }
        goes_on
    }

    /// Whether every node from `id` up keeps its place after a request like `cost` was charged: all
    /// limits on the way allow a further one (the root's limits hold back all children alike, so
    /// they do not count), and no node of the way is asleep in another lane.
    fn keeps_places(&self, mut id: NodeId, cost: &Cost) -> bool {
        while let Some(parent) = self.nodes[id].parent {
            let node = &self.nodes[id];
            let sleeps = node.standing.iter().any(|standing| matches!(standing, Standing::Asleep { .. }));
            if sleeps || !node.limiter.is_open(cost) {
                return false;
            }
            id = parent;
        }
        true
    }

    /// Charges a node and all above it for a request that has the turn. Returns the time that the
    /// request takes of those limits: a share counts by the limits at and above the node that
    /// shares.
    #[inline]
    fn take(&mut self, id: NodeId, cost: &Cost, now: Time) -> Takes {
        let node = &mut self.nodes[id];
        let takes = node.limiter.take(cost, now);
        match node.parent {
            None => takes,
            Some(parent) => takes.and(self.take_above(id, parent, cost, now)),
        }
    }

    /// As [`Self::take`] for all nodes above `id`, which moves on the clock of its parent.
    #[inline(never)]
    fn take_above(&mut self, id: NodeId, parent: NodeId, cost: &Cost, now: Time) -> Takes {
        let takes = self.take(parent, cost, now);
        let clock = self.nodes[parent].clock(cost.direction);
        let parent_clock = self.nodes[parent].clocks[clock];
        let node = &mut self.nodes[id];
        let position = node.positions[clock];
        let reached = parent_clock.max(position);
        // A child does not save up turns while a limit of its own lane holds it back.
        node.positions[clock] = (position + advance(takes.ns(), node.weight)).max(reached.saturating_sub(LAG_MAX));
        self.nodes[parent].clocks[clock] = reached;
        takes
    }

    /// The oldest request of a member that is among the next to go: a candidate for the owner of
    /// the deadline.
    pub fn next_waiter(&self, root: NodeId) -> Option<&Held> {
        self.next_lines(root)?.iter().filter_map(|line| line.first()).min_by_key(|held| held.since)
    }

    /// The lines of the member whose request is among the next to go.
    fn next_lines(&self, root: NodeId) -> Option<&Lines> {
        let mut id = root;
        loop {
            match &self.nodes[id].kind {
                Kind::Member(lines) => return Some(lines),
                Kind::Group(group) => {
                    let ready = group.ready.iter().filter_map(Heap::first).min().map(|(_, child)| child);
                    let asleep = || group.asleep.iter().filter_map(Heap::first).min().map(|(_, child)| child);
                    id = ready.or_else(asleep)?;
                }
            }
        }
    }

    /// Changes the limits of a node, keeping the used share of each bucket.
    pub fn set_limits(&mut self, id: NodeId, limits: &Limits, now: Time) {
        self.nodes[id].limiter.reconfigure(limits, now);
        self.restand(now);
    }

    /// Changes the weight of a node among its siblings.
    pub fn set_weight(&mut self, id: NodeId, weight: u32) {
        // The position stands for all dispatches so far; from now on it moves at the new pace.
        self.nodes[id].weight = weight;
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
        self.detach(id, now);
        if let Some(parent) = parent {
            let held = self.nodes[id].held;
            self.count_held(parent, held.into());
            self.nodes[parent].group().children += 1;
            // A new child starts level with the clocks of its parent, without a lag.
            let clocks = self.nodes[parent].clocks;
            let node = &mut self.nodes[id];
            node.parent = Some(parent);
            node.positions = clocks;
        }
        self.restand(now);
    }

    fn detach(&mut self, id: NodeId, now: Time) {
        let Some(parent) = self.nodes[id].parent else { return };
        self.take_out(id);
        let held = self.nodes[id].held;
        self.nodes[id].parent = None;
        self.nodes[parent].group().children -= 1;
        self.count_held(parent, -i64::from(held));
        self.settle(parent, now);
    }

    /// Computes all places anew after limits or parents have changed: rare, so kept simple.
    fn restand(&mut self, now: Time) {
        let ids: Vec<NodeId> = self.nodes.keys().collect();
        for &id in &ids {
            self.take_out(id);
        }
        for &id in &ids {
            self.tell_joint(id);
            self.nodes[id].patience_ns = u64::MAX;
        }
        for &id in &ids {
            let (root, own) = (self.root(id), self.nodes[id].limiter.patience_ns());
            let least = &mut self.nodes[root].patience_ns;
            *least = own.min(*least);
            if matches!(self.nodes[id].kind, Kind::Member(_)) {
                self.settle(id, now);
            }
        }
    }

    /// Updates whether reads and writes compete at a node: whether it or a node above it has a
    /// limit on both together.
    fn tell_joint(&mut self, id: NodeId) {
        let is_joint = self.path(id).any(|above| self.nodes[above].limiter.has_total());
        let node = &mut self.nodes[id];
        if node.is_joint != is_joint {
            node.is_joint = is_joint;
            // On a change between two clocks and one, all children start level, as if all had just
            // arrived.
            node.clocks = [node.clocks[0].max(node.clocks[1]); 2];
            let clocks = node.clocks;
            if let Kind::Member(lines) = &mut node.kind {
                for line in lines {
                    line.position = clocks[0];
                }
            }
            for (_, child) in self.nodes.iter_mut().filter(|(_, child)| child.parent == Some(id)) {
                child.positions = clocks;
            }
        }
    }

    /// Settles the places of `id` and of every node above it.
    fn settle(&mut self, mut id: NodeId, now: Time) {
        while let Some(parent) = self.nodes[id].parent {
            let node = &self.nodes[id];
            for lane in node.waiting().or(node.stands()).iter() {
                let wake = self.wake(id, lane, now);
                self.stand(id, parent, lane, wake, now);
            }
            id = parent;
        }
    }

    /// The instant at which limits at or below `id` allow one of its waiting requests of this lane;
    /// [`Time::ZERO`] if no limit holds it back, `None` if none waits.
    fn wake(&mut self, id: NodeId, lane: Lane, now: Time) -> Option<Time> {
        let node = &mut self.nodes[id];
        let below = match &node.kind {
            Kind::Member(lines) => {
                lines[lane.direction() as usize].lane().filter(|&first| first == lane).map(|_| Time::ZERO)?
            }
            Kind::Group(group) if group.ready[lane.index()].is_empty() => group.asleep[lane.index()].first()?.0,
            Kind::Group(_) => Time::ZERO,
        };
        Some(below.max(node.limiter.ready_at(&lane.probe(), now).unwrap_or(Time::ZERO)))
    }

    fn stand(&mut self, id: NodeId, parent: NodeId, lane: Lane, wake: Option<Time>, now: Time) {
        match (self.nodes[id].standing[lane.index()], wake) {
            (Standing::Out, None) => return,
            (Standing::Ready { .. }, Some(wake)) if wake <= now => return,
            (Standing::Asleep { until, .. }, Some(wake)) if wake == until && wake > now => return,
            _ => {}
        }
        self.take_out_of(id, parent, lane);
        match wake {
            None => {}
            Some(wake) if wake <= now => self.put_ready(id, parent, lane),
            Some(until) => {
                self.with_heap(
                    parent,
                    |group| &mut group.asleep[lane.index()],
                    |heap, nodes| {
                        heap.insert(until, id, &mut |node, place| {
                            let standing = &mut nodes[node].standing[lane.index()];
                            // The remaining entries keep their instants and change places.
                            let until = if node == id { until } else { standing.until() };
                            *standing = Standing::Asleep { place, until };
                        });
                    },
                );
            }
        }
    }

    fn put_ready(&mut self, id: NodeId, parent: NodeId, lane: Lane) {
        let clock = self.nodes[parent].clock(lane.direction());
        let floor = self.nodes[parent].clocks[clock].saturating_sub(LAG_MAX);
        let shares_clock = |other: &Lane| self.nodes[parent].clock(other.direction()) == clock;
        let is_ready = Lane::all()
            .filter(shares_clock)
            .any(|other| matches!(self.nodes[id].standing[other.index()], Standing::Ready { .. }));
        let position = &mut self.nodes[id].positions[clock];
        if !is_ready {
            // Back from a pause: see `share`. A child that is ready in another lane keeps its
            // position.
            *position = (*position).max(floor);
        }
        let position = *position;
        self.arrivals += 1;
        let key = (position, self.arrivals);
        self.with_heap(
            parent,
            |group| &mut group.ready[lane.index()],
            |heap, nodes| {
                heap.insert(key, id, &mut |node, place| nodes[node].standing[lane.index()] = Standing::Ready { place });
            },
        );
    }

    /// Moves `id` to its present position on a clock of its parent, behind children at the same
    /// position.
    fn rekey(&mut self, id: NodeId, parent: NodeId, clock: usize) {
        let position = self.nodes[id].positions[clock];
        for lane in Lane::all() {
            let Standing::Ready { place } = self.nodes[id].standing[lane.index()] else { continue };
            if self.nodes[parent].clock(lane.direction()) != clock {
                continue;
            }
            self.arrivals += 1;
            let key = (position, self.arrivals);
            self.with_heap(
                parent,
                |group| &mut group.ready[lane.index()],
                |heap, nodes| {
                    heap.rekey(place, key, &mut |node, place| {
                        nodes[node].standing[lane.index()] = Standing::Ready { place };
                    });
                },
            );
        }
    }

    /// Removes `id` from all heaps of its parent.
    fn take_out(&mut self, id: NodeId) {
        if let Some(parent) = self.nodes[id].parent {
            for lane in Lane::all() {
                self.take_out_of(id, parent, lane);
            }
        }
    }

    fn take_out_of(&mut self, id: NodeId, parent: NodeId, lane: Lane) {
        match self.nodes[id].standing[lane.index()] {
            Standing::Out => return,
            Standing::Ready { place } => {
                self.with_heap(
                    parent,
                    |group| &mut group.ready[lane.index()],
                    |heap, nodes| {
                        heap.remove(place, &mut |node, place| {
                            nodes[node].standing[lane.index()] = Standing::Ready { place };
                        });
                    },
                );
            }
            Standing::Asleep { place, .. } => {
                self.with_heap(
                    parent,
                    |group| &mut group.asleep[lane.index()],
                    |heap, nodes| {
                        heap.remove(place, &mut |node, place| {
                            let standing = &mut nodes[node].standing[lane.index()];
                            *standing = Standing::Asleep { place, until: standing.until() };
                        });
                    },
                );
            }
        }
        self.nodes[id].standing[lane.index()] = Standing::Out;
    }

    /// Works on a heap of `parent` while the heap reports places to the children.
    fn with_heap<H: Default>(
        &mut self,
        parent: NodeId,
        which: impl Fn(&mut Group) -> &mut H,
        with: impl FnOnce(&mut H, &mut SlotMap<NodeId, Node>),
    ) {
        let mut heap = std::mem::take(which(self.nodes[parent].group()));
        with(&mut heap, &mut self.nodes);
        *which(self.nodes[parent].group()) = heap;
    }

    /// The lanes in which a request waits in the tree of `root` and the limits at and below the
    /// root allow one of them.
    fn open_lanes(&mut self, root: NodeId, now: Time) -> Lanes {
        let mut lanes = Lanes::default();
        for lane in self.nodes[root].waiting().iter() {
            if self.wake(root, lane, now).is_some_and(|wake| wake <= now) {
                lanes.insert(lane);
            }
        }
        lanes
    }

    /// The member and direction that have the turn: from the root down, the first child that is
    /// ready in the open lanes.
    fn next(&mut self, root: NodeId, mut lanes: Lanes, now: Time) -> Option<(NodeId, Direction)> {
        let mut id = root;
        while matches!(self.nodes[id].kind, Kind::Group(_)) {
            for lane in lanes.iter() {
                self.wake_up(id, lane, now);
            }
            let ready = &self.nodes[id].group().ready;
            let (_, child) = lanes.iter().filter_map(|lane| ready[lane.index()].first()).min()?;
            // All limits above allow these lanes, so the child may choose among them.
            let mut ready_lanes = Lanes::default();
            for lane in lanes.iter() {
                if matches!(self.nodes[child].standing[lane.index()], Standing::Ready { .. }) {
                    ready_lanes.insert(lane);
                }
            }
            lanes = ready_lanes;
            id = child;
        }
        let may_go = |direction: &Direction| {
            self.nodes[id].lines()[*direction as usize].lane().is_some_and(|lane| lanes.contains(lane))
        };
        let direction = Direction::ALL
            .into_iter()
            .filter(may_go)
            .min_by_key(|&direction| self.nodes[id].lines()[direction as usize].position)?;
        Some((id, direction))
    }

    /// Moves children whose sleep is over to the ready heap.
    fn wake_up(&mut self, id: NodeId, lane: Lane, now: Time) {
        while let Some((until, child)) = self.nodes[id].group().asleep[lane.index()].first()
            && until <= now
        {
            self.take_out_of(child, id, lane);
            self.put_ready(child, id, lane);
        }
    }
}

impl Standing {
    fn until(self) -> Time {
        match self {
            Self::Asleep { until, .. } => until,
            Self::Out | Self::Ready { .. } => unreachable!("only nodes that sleep are in the heap of sleepers"),
        }
    }
}

#[cfg(test)]
impl Tree {
    /// [`Self::let_go_due`] without its fast paths: each request is decided anew.
    #[cfg(not(any(loom, shuttle)))]
    pub fn let_go_singly(&mut self, root: NodeId, now: Time, mut post: impl FnMut(&Held)) {
        loop {
            let lanes = self.open_lanes(root, now);
            let Some((member, direction)) = self.next(root, lanes, now) else { return };
            self.let_go_of(member, direction, 1, now, &mut post);
            self.settle(member, now);
        }
    }

    /// The clocks, positions, held counts and levels of every node.
    #[cfg(not(any(loom, shuttle)))]
    pub fn shares(&mut self, now: Time) -> Vec<String> {
        let of = |node: &mut Node| {
            let levels = node.limiter.levels(now);
            let lines = match &node.kind {
                Kind::Member(lines) => lines.iter().map(|line| line.position).collect(),
                Kind::Group(_) => Vec::new(),
            };
            let ready = node.standing.map(|standing| matches!(standing, Standing::Ready { .. }));
            format!("{} {lines:?} {:?} {:?} {ready:?} {levels:?}", node.held, node.clocks, node.positions)
        };
        self.nodes.values_mut().map(of).collect()
    }

    /// Panics unless every path is settled and all counts are right.
    pub fn assert_invariants(&self) {
        for (id, node) in &self.nodes {
            let own = match &node.kind {
                Kind::Member(lines) => lines.iter().map(|line| line.len()).sum(),
                Kind::Group(group) => {
                    let children = self.nodes.values().filter(|child| child.parent == Some(id));
                    assert_eq!(children.clone().count(), group.children as usize, "children are counted");
                    children.map(|child| child.held).sum::<u32>()
                }
            };
            assert_eq!(node.held, own, "I5: held requests are counted on every level");
            let Some(parent) = node.parent else {
                assert_eq!(node.standing, [Standing::Out; Lane::COUNT], "a root stands nowhere");
                continue;
            };
            for lane in Lane::all() {
                let waits = match &node.kind {
                    Kind::Member(lines) => lines[lane.direction() as usize].lane() == Some(lane),
                    Kind::Group(group) => {
                        !group.ready[lane.index()].is_empty() || !group.asleep[lane.index()].is_empty()
                    }
                };
                let Kind::Group(above) = &self.nodes[parent].kind else { panic!("a parent is a group") };
                let found = match node.standing[lane.index()] {
                    Standing::Out => None,
                    Standing::Ready { place } => above.ready[lane.index()].at(place).map(|(_, child)| child),
                    Standing::Asleep { place, until } => {
                        let (key, child) = above.asleep[lane.index()].at(place).expect("a sleeper is where it stands");
                        assert_eq!(key, until);
                        Some(child)
                    }
                };
                assert_eq!(found, waits.then_some(id), "I4: stands in its parent exactly where something waits");
            }
        }
    }
}
