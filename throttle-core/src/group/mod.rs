//! The group protocol: which requests are held, which are dispatched, and which queue thread owns
//! the deadline. Pure state: calls go in, verdicts, tags and rings come out.
//!
//! ```text
//!   request ─► fits, no request waits in the tree ────────────► goes at once
//!      └─────► held ─► due, and its turn ─► dispatched: charged,─► collected by the thread of its
//!                                           restart work of        queue (poll)
//!                                           its queue
//! ```
//!
//! A poll at the deadline, a request that may move the deadline, and a change each dispatch every
//! due request of their tree of groups, for all members, in the order of [`crate::tree`], and
//! charge each request as it goes. A dispatched request is posted to its queue as *restart work*,
//! and a queue that is not the caller's is rung. Only the thread of a queue collects its restart
//! work, so only decisions cross threads.
//!
//! With timer slack enabled, the deadline lies later than the instant at which the first request is
//! due, by an amount that costs no limit any rate ([`Tree::company_at`]). A call before the
//! deadline dispatches due requests all the same.
//!
//! Each tree has one deadline, and one queue with a held request *owns* it: the thread of the owner
//! wakes up at the deadline. Every call that can change the deadline ends in [`Groups::rearm`], so
//! no deadline stays armed without a held request and no held request is left without a deadline.
//!
//! A thread that knows a deadline polls at that instant, owner or not, so it is not rung for events
//! from that instant on. With timer slack, a queue that collects restart work and still holds
//! requests also learns the deadline, if that is at most 1 ms away: its client is about to send
//! again, and the new requests can wait for the same poll ([`Look::is_calm`]). A single wake-up
//! then serves the new requests and the due ones.
//!
//! Limits, weights and places change by [`Groups::apply`], any number of changes as one step: the
//! step dispatches no request that could be dispatched neither before nor after it.
//!
//! Invariants between any two calls (numbers as in `ARCHITECTURE.md`, checked by
//! `assert_invariants` in tests):
//! * I1  a request waits in a tree ⇔ the tree is armed, with exactly one owner, which knows the
//!   deadline or owes a poll
//! * I2  the owner holds a request of a member that is not draining
//! * I4  a node is queued in its parent exactly where a request waits at or below the node
//! * I5  the held count of a queue is the number of its requests in the member's lines
//! * I7  no state refers to a retired queue or to a member that has left: `retire` and `leave`
//!   refuse while any does

mod arrivals;
mod queues;

use slotmap::{SecondaryMap, new_key_type};
use thiserror::Error;

use crate::charge::ChargeTable;
use crate::cost::Direction;
use crate::limiter::{Credit, Level};
use crate::limits::Limits;
use crate::planted::{Fault, planted};
use crate::share::WEIGHT_DEFAULT;
use crate::throttle::Tag;
use crate::time::Time;
use crate::tree::{BadParent, NodeId, Tree};

pub(crate) use arrivals::Arrivals;
use queues::Queues;

/// A group of members that share limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(NodeId);

/// A device as a member of a tree of groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(NodeId);

new_key_type! {
    /// One queue of a member, served by one thread.
    pub struct QueueId;
}

/// The settings of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupOptions {
    /// The limits its members share; must be sound ([`Limits::violations`]).
    pub limits: Limits,
    /// The parent group, whose limits hold as well.
    pub parent: Option<GroupId>,
    /// The share of the group among the children of `parent`; 1 to [`crate::share::WEIGHT_MAX`].
    pub weight: u32,
    /// The charge of each operation. `None`: as in `parent`, or the default table without a parent.
    pub charges: Option<ChargeTable>,
}

impl Default for GroupOptions {
    fn default() -> Self {
        Self { limits: Limits::UNLIMITED, parent: None, weight: WEIGHT_DEFAULT, charges: None }
    }
}

/// The settings of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberOptions {
    /// Limits of the member, besides those of its group; must be sound ([`Limits::violations`]).
    pub limits: Limits,
    /// The group of the member.
    pub group: Option<GroupId>,
    /// The share of the member among the members and groups in its group; 1 to
    /// [`crate::share::WEIGHT_MAX`].
    pub weight: u32,
}

impl Default for MemberOptions {
    fn default() -> Self {
        Self { limits: Limits::UNLIMITED, group: None, weight: WEIGHT_DEFAULT }
    }
}

/// The decision on a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The request is charged; issue it now.
    Go,
    /// The request waits. Its tag comes out of a later poll of its queue, possibly the very next.
    Held,
}

/// The queue or member is still referred to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("still busy: {held} held, {restart_work} let go and not run, {queues} queues")]
pub struct StillBusy {
    /// Requests that wait for a limit.
    pub held: u32,
    /// Dispatched requests that their queue thread has not collected.
    pub restart_work: u32,
    /// Queues of the member that have not retired.
    pub queues: u32,
}

/// The group has members, or groups below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the group is in use by {children} devices and groups")]
pub struct GroupInUse {
    /// The number of members and groups directly in the group.
    pub children: u32,
}

/// A change to a group or a member while requests wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The limits of a group. Each bucket keeps its used share, and the same limits again change nothing.
    GroupLimits(GroupId, Limits),
    /// The share of a group among its siblings; 1 to [`crate::share::WEIGHT_MAX`].
    GroupWeight(GroupId, u32),
    /// The charge of each operation in a group, for requests that arrive from now on. `None`: as in
    /// the parent.
    GroupCharges(GroupId, Option<ChargeTable>),
    /// The parent of a group. The group moves below it (`None`: to the top) with all its members
    /// and their held requests.
    GroupParent(GroupId, Option<GroupId>),
    /// The limits of a member; bucket levels behave as for [`Self::GroupLimits`].
    MemberLimits(MemberId, Limits),
    /// The share of a member in its group; 1 to [`crate::share::WEIGHT_MAX`].
    MemberWeight(MemberId, u32),
    /// The group of a member (`None`: no group). The member takes all its held requests along, so
    /// each request waits in exactly one tree.
    MemberGroup(MemberId, Option<GroupId>),
}

impl Change {
    fn node(&self) -> NodeId {
        match *self {
            Self::GroupLimits(GroupId(node), _)
            | Self::GroupWeight(GroupId(node), _)
            | Self::GroupCharges(GroupId(node), _)
            | Self::GroupParent(GroupId(node), _)
            | Self::MemberLimits(MemberId(node), _)
            | Self::MemberWeight(MemberId(node), _)
            | Self::MemberGroup(MemberId(node), _) => node,
        }
    }

    /// The new parent, if this change sets one.
    fn parent(&self) -> Option<Option<NodeId>> {
        match *self {
            Self::GroupParent(_, parent) | Self::MemberGroup(_, parent) => Some(parent.map(|GroupId(parent)| parent)),
            _ => None,
        }
    }
}

/// The requests that a member holds at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldSummary {
    /// Requests that wait for a limit.
    pub count: u32,
    /// The arrival of the oldest held request.
    pub oldest: Option<Time>,
}

/// The next poll that is due from the thread of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    pub at: Time,
    /// The thread may sleep until `at` regardless of new requests: a read or write that arrives
    /// before `at` is held until then anyway.
    pub is_calm: bool,
}

/// The longest deadline that a thread sleeps through. A flush, a discard or a change that arrives
/// during the sleep is delayed by as much.
const CALM_NS_MAX: u64 = 1_000_000;

/// The relation of a member to its limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Neither limited nor charged: the device is starting, and the kernel reads its partition table.
    Exempt,
    /// Limited and charged.
    Live,
    /// Neither limited nor charged: the device is being removed, and requests that the kernel still
    /// sends until the disk is gone count for no group. Only [`Groups::end_drain`] ends this mode.
    Draining,
}

/// The wait that a drain may add for the neighbours. Held requests of the draining member are
/// charged to the groups above until that wait is reached, at least one in each direction; the
/// remaining requests are not charged, so a removal does not pause the neighbours.
const DRAIN_DEBT_NS: u64 = 50_000_000;

/// The one deadline of a tree and the queue whose thread wakes up for it.
#[derive(Clone, Copy, Debug)]
struct Armed {
    owner: QueueId,
    deadline: Time,
    /// The instant of arming: every request that was due by then has been dispatched.
    since: Time,
}

#[derive(Clone, Debug)]
struct Member {
    mode: Mode,
    queues: u32,
}

/// Every group, member and queue of a daemon.
#[derive(Clone, Debug, Default)]
pub(crate) struct Groups {
    tree: Tree,
    members: SecondaryMap<NodeId, Member>,
    queues: Queues,
    /// The armed deadline of each tree in which a request waits, keyed by the root of the tree.
    armed: SecondaryMap<NodeId, Armed>,
    /// The latest instant seen. Threads read their clocks before they take the lock, so an argument
    /// may be slightly earlier.
    now: Time,
    /// Whether requests may be dispatched late by the timer slack, several per timer
    /// ([`Tree::company_at`]).
    is_company_sought: bool,
}

impl Groups {
    /// Enables timer slack for this throttle.
    pub fn let_go_in_company(&mut self) {
        self.is_company_sought = true;
    }

    /// Adds a group without members.
    pub fn add_group(&mut self, options: &GroupOptions, now: Time) -> Result<GroupId, BadParent> {
        let now = self.see(now);
        let group = GroupId(self.tree.add_group(&options.limits, options.weight, options.charges));
        let placed = self.apply(&[Change::GroupParent(group, options.parent)], now);
        if placed.is_err() {
            self.tree.remove(group.0, now);
        }
        placed.map(|()| group)
    }

    /// Removes a group. Refused while the group has members or groups below it.
    pub fn remove_group(&mut self, group: GroupId, now: Time) -> Result<(), GroupInUse> {
        let now = self.see(now);
        match self.tree.children(group.0) {
            0 => {
                self.tree.remove(group.0, now);
                Ok(())
            }
            children => Err(GroupInUse { children }),
        }
    }

    /// Adds a device as a member, exempt from the limits until [`Self::go_live`].
    pub fn join(&mut self, options: &MemberOptions, now: Time) -> MemberId {
        let now = self.see(now);
        let member = self.tree.add_member(&options.limits, options.weight);
        self.members.insert(member, Member { mode: Mode::Exempt, queues: 0 });
        if let Some(group) = options.group {
            self.tree.set_parent(member, Some(group.0), now);
        }
        MemberId(member)
    }

    /// Adds a queue of `member` with room for `depth` requests.
    pub fn add_queue(&mut self, member: MemberId, depth: u16) -> QueueId {
        self.members[member.0].queues += 1;
        let queue = self.queues.add(member, depth);
        // Reserve for the sum of the depths, the most that the member can hold: holding allocates
        // nothing.
        self.tree.reserve(member.0, self.queues.of(member).map(|queue| usize::from(queue.depth)).sum());
        queue
    }

    /// Ends the start phase: from now on the member is limited and charged.
    pub fn go_live(&mut self, member: MemberId) {
        let member = &mut self.members[member.0];
        if member.mode == Mode::Exempt {
            member.mode = Mode::Live;
        }
    }

    /// A poll by the thread of `queue`: rung, at its deadline, or spurious.
    ///
    /// Appends the restart work of the queue to `collected`; the caller issues it at once. Returns
    /// the next poll that the tree counts on: for the owner of the deadline always, for a queue
    /// that does not own it only if the queue collected restart work now and may sleep until the
    /// deadline.
    pub fn poll(&mut self, queue: QueueId, now: Time, collected: &mut Vec<Tag>) -> Option<Look> {
        let now = self.see(now);
        let MemberId(member) = self.queues[queue].member;
        let root = self.tree.root(member);
        self.queues[queue].owes_poll = true;
        if self.armed.get(root).is_some_and(|armed| armed.deadline <= now) {
            self.let_go_due(root, Some(queue), now);
        }
        let armed = self.armed.get(root).copied();
        let is_calm = armed.is_some_and(|armed| self.is_calm(queue, armed, now));
        let state = &mut self.queues[queue];
        let is_counted_on = |owner| owner == queue || is_calm && !state.let_go.is_empty();
        let told = armed.filter(|armed| is_counted_on(armed.owner));
        collected.append(&mut state.let_go);
        state.owes_poll = planted(Fault::LookThenSay);
        state.told = told.map(|armed| armed.deadline);
        told.filter(|armed| armed.owner == queue || !planted(Fault::ToldInSecret))
            .map(|Armed { deadline, .. }| Look { at: deadline, is_calm })
    }

    /// Whether the thread of `queue` may sleep until the deadline regardless of new requests.
    fn is_calm(&mut self, queue: QueueId, armed: Armed, now: Time) -> bool {
        let (MemberId(member), held) = (self.queues[queue].member, self.queues[queue].held);
        // The client of a queue that holds one request waits for its answer and sends nothing until
        // then.
        self.is_company_sought
            && held > 1
            && armed.deadline <= now.plus_nanos(CALM_NS_MAX)
            && (self.tree.held_newcomers(member, armed.since, now) || planted(Fault::CalmForAll))
    }

    /// Starts the drain of a member before its removal: dispatches all its held requests now, and
    /// holds no later one. Dispatched requests are charged to the groups above within
    /// [`DRAIN_DEBT_NS`]; later requests are not charged.
    pub fn drain(&mut self, member: MemberId, now: Time) {
        let now = self.see(now);
        self.members[member.0].mode = Mode::Draining;
        if planted(Fault::DrainHoldsOn) {
            return;
        }
        if planted(Fault::DrainExemptsGroup) {
            self.members.iter_mut().for_each(|(_, member)| member.mode = Mode::Draining);
        }
        let above = self.tree.parent(member.0);
        for direction in Direction::ALL {
            let mut enough = None;
            while let Some(held) = self.tree.pop(member.0, direction, now) {
                if let Some(above) = above {
                    let wait = self.tree.ready_at(above, &held.cost, now).unwrap_or(now);
                    if planted(Fault::DrainChargesAll) || wait < *enough.get_or_insert(wait.plus_nanos(DRAIN_DEBT_NS)) {
                        self.tree.charge(above, &held.cost, now);
                    }
                }
                self.queues.post(&held, None, now);
            }
        }
        if planted(Fault::DrainWithoutRearm) {
            return;
        }
        // A queue of this member may have owned the deadline: choose a new owner.
        self.rearm(self.tree.root(member.0), None, now);
    }

    /// Ends the drain of a member whose removal failed: requests from now on are limited and
    /// charged. Requests that the drain dispatched stay dispatched, and are collected before later
    /// ones.
    pub fn end_drain(&mut self, member: MemberId) {
        let member = &mut self.members[member.0];
        if member.mode == Mode::Draining && !planted(Fault::DrainForEver) {
            member.mode = Mode::Live;
        }
    }

    /// The requests that the member holds.
    pub fn held(&self, member: MemberId) -> HeldSummary {
        let lines = self.tree.lines(member.0);
        HeldSummary {
            count: lines.iter().map(|line| line.len()).sum(),
            oldest: lines.iter().filter_map(|line| Some(line.first()?.since)).min(),
        }
    }

    /// Removes a queue whose thread is about to end. Refused while the queue holds a request or has
    /// restart work outstanding: membership, count and posting are one piece of state, so nothing
    /// can be posted to the queue after `Ok`.
    pub fn retire(&mut self, queue: QueueId) -> Result<(), StillBusy> {
        let state = &self.queues[queue];
        let busy = StillBusy { held: state.held, restart_work: state.let_go.len() as u32, queues: 0 };
        if busy.held > 0 || busy.restart_work > 0 && !planted(Fault::RetireWithRestartWork) {
            return Err(busy);
        }
        let MemberId(member) = state.member;
        debug_assert!(self.armed.values().all(|armed| armed.owner != queue));
        self.members[member].queues -= 1;
        self.queues.remove(queue);
        Ok(())
    }

    /// Removes a member whose device is gone. Refused while one of its queues has not retired.
    pub fn leave(&mut self, member: MemberId, now: Time) -> Result<(), StillBusy> {
        let now = self.see(now);
        let queues = self.members[member.0].queues;
        if queues > 0 && !planted(Fault::LeaveWithQueue) {
            return Err(StillBusy { held: self.held(member).count, restart_work: 0, queues });
        }
        self.tree.remove(member.0, now);
        self.members.remove(member.0);
        Ok(())
    }

    /// Makes all changes in one step, under load. Deadlines of waiting requests are computed anew
    /// at the end, and no request is dispatched between two changes. Returns `Err`, and changes
    /// nothing, if a group would get a parent that it cannot have. The last of two changes to the
    /// same setting counts; groups may swap places.
    pub fn apply(&mut self, changes: &[Change], now: Time) -> Result<(), BadParent> {
        let now = self.see(now);
        let mut places: SecondaryMap<NodeId, Option<NodeId>> = SecondaryMap::new();
        places.extend(changes.iter().filter_map(|change| Some((change.node(), change.parent()?))));
        self.tree.check_parents(&places)?;
        places.retain(|node, parent| self.tree.parent(node) != *parent);
        let roots_before: Vec<NodeId> = changes.iter().map(|change| self.tree.root(change.node())).collect();
        // Detach every node that moves before attaching any, so that groups can swap places.
        for node in places.keys() {
            self.tree.set_parent(node, None, now);
        }
        for (node, parent) in &places {
            self.tree.set_parent(node, *parent, now);
            if planted(Fault::ApplyInSteps) {
                self.let_go_due(self.tree.root(node), None, now);
            }
        }
        for change in changes {
            match *change {
                Change::GroupLimits(GroupId(node), ref limits) | Change::MemberLimits(MemberId(node), ref limits) => {
                    self.tree.set_limits(node, limits, now);
                }
                Change::GroupWeight(GroupId(node), weight) | Change::MemberWeight(MemberId(node), weight) => {
                    self.tree.set_weight(node, weight);
                }
                Change::GroupCharges(GroupId(node), charges) => self.tree.set_charges(node, charges),
                Change::GroupParent(..) => {}
                Change::MemberGroup(MemberId(node), _) => {
                    if planted(Fault::MoveEndsDrain) {
                        self.members[node].mode = Mode::Live;
                    }
                }
            }
        }
        let roots_after = changes.iter().map(|change| self.tree.root(change.node()));
        let mut roots: Vec<NodeId> = roots_before.into_iter().chain(roots_after).collect();
        roots.sort_unstable();
        roots.dedup();
        for root in roots {
            if self.tree.root(root) == root {
                self.let_go_due(root, None, now);
            } else {
                // A former root that is now below a parent: its waiting requests are armed in the
                // tree it joined.
                self.armed.remove(root);
            }
        }
        Ok(())
    }

    /// The credit of each limit of a group.
    pub fn group_credit(&mut self, group: GroupId, now: Time) -> Vec<Credit> {
        let now = self.see(now);
        self.tree.credit(group.0, now)
    }

    /// The credit of each limit of a member.
    pub fn member_credit(&mut self, member: MemberId, now: Time) -> Vec<Credit> {
        let now = self.see(now);
        self.tree.credit(member.0, now)
    }

    /// The level of each limit of a group.
    pub fn group_levels(&mut self, group: GroupId, now: Time) -> Vec<Level> {
        let now = self.see(now);
        self.tree.levels(group.0, now)
    }

    /// The level of each limit of a member.
    pub fn member_levels(&mut self, member: MemberId, now: Time) -> Vec<Level> {
        let now = self.see(now);
        self.tree.levels(member.0, now)
    }

    /// Resumes a group at the levels that an earlier process noted.
    pub fn resume_group(&mut self, group: GroupId, levels: &[Level], elapsed_ns: u64, now: Time) {
        self.resume(group.0, levels, elapsed_ns, now);
    }

    /// Resumes a member at the levels that an earlier process noted.
    pub fn resume_member(&mut self, member: MemberId, levels: &[Level], elapsed_ns: u64, now: Time) {
        self.resume(member.0, levels, elapsed_ns, now);
    }

    fn resume(&mut self, node: NodeId, levels: &[Level], elapsed_ns: u64, now: Time) {
        let now = self.see(now);
        self.tree.resume(node, levels, elapsed_ns, now);
        let root = self.tree.root(node);
        // Requests that already wait get new deadlines.
        self.let_go_due(root, None, now);
    }

    /// The queues to ring because of the calls since the last `take_rings`, each once.
    pub fn take_rings(&mut self) -> impl Iterator<Item = QueueId> {
        self.queues.take_rings()
    }

    fn see(&mut self, now: Time) -> Time {
        self.now = self.now.max(now);
        self.now
    }

    /// Dispatches every due request of the tree, in turn order, and arms the deadline for the rest.
    fn let_go_due(&mut self, root: NodeId, caller: Option<QueueId>, now: Time) {
        let Self { tree, queues, .. } = self;
        tree.let_go_due(root, now, |held| queues.post(held, caller, now));
        self.rearm(root, caller, now);
    }

    /// Arms a tree for the earliest instant at which one of its requests is due. The owner is a
    /// queue that holds a request of the tree.
    fn rearm(&mut self, root: NodeId, caller: Option<QueueId>, now: Time) {
        let Some((due, heir)) = self.tree.wakes_at(root, now).zip(self.tree.next_waiter(root)) else {
            self.armed.remove(root);
            return;
        };
        // Every request that is due by `now` has been dispatched.
        let deadline = if self.is_company_sought { self.tree.company_at(root, due, now) } else { due };
        // Choose the owner, cheapest first: the present owner if it wakes up by the deadline
        // anyway, the caller, which is awake, the present owner, and last the queue of a request
        // that is among the next to go.
        let may_keep = |queue: &QueueId| {
            let queue = &self.queues[*queue];
            let holds = queue.held > 0 || planted(Fault::OwnerHoldsNothing);
            holds && self.tree.root(queue.member.0) == root
        };
        let is_told = |queue: &QueueId| self.queues[*queue].told.is_some_and(|told| told <= deadline);
        let keeper = self.armed.get(root).map(|armed| armed.owner).filter(may_keep);
        let awake = caller.filter(may_keep);
        // The present owner needs a ring if it wakes up later; the caller, awake, needs none.
        let owner = keeper.filter(is_told).or(awake).or(keeper).unwrap_or(heir.queue);
        self.armed.insert(root, Armed { owner, deadline, since: now });
        // A thread with an earlier wake-up than the deadline needs no ring: it polls in vain and
        // gets the new deadline.
        if self.queues[owner].told.is_none_or(|told| told > deadline && !planted(Fault::EarlierUntold)) {
            self.queues.ring(owner, caller, now);
        }
    }
}

#[cfg(test)]
impl Groups {
    /// See [`Fault::PostAfterUnlock`].
    pub fn take_late(&mut self) -> Vec<(QueueId, Tag)> {
        self.queues.take_late()
    }

    /// See [`Fault::PostAfterUnlock`].
    pub fn post_late(&mut self, queue: QueueId, tag: Tag) {
        self.queues[queue].let_go.push(tag);
        self.queues.ring(queue, None, self.now);
    }

    /// See [`Fault::LookThenSay`].
    pub fn say_nothing_owed(&mut self, queue: QueueId) {
        self.queues[queue].owes_poll = false;
    }

    /// Panics unless the invariants of the module's head hold.
    pub fn assert_invariants(&self) {
        self.tree.assert_invariants();
        for (id, member) in &self.members {
            assert_eq!(self.queues.of(MemberId(id)).count(), member.queues as usize);
            let mut held = self.tree.lines(id).into_iter().flat_map(|line| line.iter()).peekable();
            assert!(held.peek().is_none() || member.mode == Mode::Live, "a member that is not limited holds nothing");
            for held in held {
                let queue = self.queues.get(held.queue).expect("I7: what is held has a queue");
                assert_eq!(queue.member.0, id, "what a member holds came through its queues");
            }
            let root = self.tree.root(id);
            assert_eq!(
                self.armed.contains_key(root),
                !self.tree.is_idle(root),
                "I1, I3: armed if and only if something waits"
            );
        }
        for (root, &Armed { owner, deadline, .. }) in &self.armed {
            assert_eq!(self.tree.root(root), root, "only trees are armed");
            let queue = self.queues.get(owner).expect("I7: the owner exists");
            assert_eq!(self.tree.root(queue.member.0), root);
            assert!(queue.held > 0, "I2: the owner holds a request");
            assert_eq!(self.members[queue.member.0].mode, Mode::Live, "I2: of a member that is not draining");
            assert!(
                queue.owes_poll || queue.told.is_some_and(|told| told <= deadline),
                "I1: the owner knows the deadline"
            );
        }
        for (id, queue) in self.queues.iter() {
            assert!(self.members.contains_key(queue.member.0), "I7: a queue has a member");
            let lines = self.tree.lines(queue.member.0);
            let held = lines.into_iter().flat_map(|line| line.iter()).filter(|held| held.queue == id).count();
            assert_eq!(queue.held as usize, held, "I5: the count is what the member holds");
            assert!(queue.owes_poll || queue.let_go.is_empty(), "restart work is never left without a ring");
        }
    }
}
