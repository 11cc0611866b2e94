//! The group protocol: who is held, who is let go, who watches the clock. Pure state; events in, effects out.
//!
//! ```text
//!   request ─► fits, nobody waits ──────────────────────────► goes at once
//!      └─────► held ─► due and its turn ─► let go: charged, ─► collected by the thread of its queue (poll)
//!                                          restart work of
//!                                          its queue
//! ```
//!
//! Whoever looks at a tree of groups at an instant lets go of everything that is due, for all its members, in the order
//! of [`crate::tree`], charging each request as it goes; what belongs to another queue is posted to it as *restart work*
//! and that queue is rung. Only the thread of a queue collects what was let go of it, so only decisions cross threads.
//!
//! Where requests may go in company, that deadline is later than the first of them is due, by as little as nobody loses rate for
//! ([`Tree::company_at`]); whoever calls meanwhile lets go of what is due all the same.
//!
//! One queue with a held request is the *owner* of its tree's one deadline: its thread wakes up then. Every call that can
//! change the deadline ends in [`Groups::rearm`], so none is ever left armed for nothing, and none forgotten.
//!
//! A thread that was told an instant looks in then, owner or not, so nobody rings for what happens from then on. Where company is
//! sought a queue that has just got restart work and holds more is told too, if the deadline is near: its client is about to send
//! again, and what it sends can wait for the same look ([`Look::is_calm`]). One wake-up then serves what comes and what goes.
//!
//! Limits, weights and places change by [`Groups::apply`], any number of them as one step: nothing goes in between that may
//! go neither before nor after.
//!
//! What holds between any two calls (numbers as in `ARCHITECTURE.md`, checked by `assert_invariants` in tests):
//! * I1  something waits in a tree ⇔ it is armed, with exactly one owner, who knows the deadline or owes a poll
//! * I2  the owner holds a request of a member that is not draining
//! * I4  a node stands in its parent exactly where something of it waits
//! * I5  what a queue counts as held is what its member holds of it
//! * I7  nothing refers to a queue that has retired or a member that has left: both are refused while anything does

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

use queues::Queues;

/// A group of members that share limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(NodeId);

/// A device, as the groups see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(NodeId);

new_key_type! {
    /// One queue of a member, served by one thread.
    pub struct QueueId;
}

/// What a group is made of, besides its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupOptions {
    /// The limits its members share; must be sound ([`Limits::violations`]).
    pub limits: Limits,
    /// The group above, whose limits hold as well.
    pub parent: Option<GroupId>,
    /// Its share among the children of `parent`, against theirs; 1 to [`crate::share::WEIGHT_MAX`].
    pub weight: u32,
    /// What operations count as; `None`: as in `parent`, or by default.
    pub charges: Option<ChargeTable>,
}

impl Default for GroupOptions {
    fn default() -> Self {
        Self { limits: Limits::UNLIMITED, parent: None, weight: WEIGHT_DEFAULT, charges: None }
    }
}

/// What a member is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberOptions {
    /// Limits of its own, besides those of its group; must be sound ([`Limits::violations`]).
    pub limits: Limits,
    /// The group it shares.
    pub group: Option<GroupId>,
    /// Its share of what the group grants, against other members and groups in it; 1 to [`crate::share::WEIGHT_MAX`].
    pub weight: u32,
}

impl Default for MemberOptions {
    fn default() -> Self {
        Self { limits: Limits::UNLIMITED, group: None, weight: WEIGHT_DEFAULT }
    }
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It has been charged; issue it now.
    Go,
    /// It waits; its tag comes out of a later poll of its queue, perhaps of the very next.
    Held,
}

/// Something still refers to what was to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("still busy: {held} held, {restart_work} let go and not run, {queues} queues")]
pub struct StillBusy {
    /// Requests waiting for a limit.
    pub held: u32,
    /// Requests let go that their queue thread has not collected.
    pub restart_work: u32,
    /// Queues of the member that have not retired.
    pub queues: u32,
}

/// The group has members, or groups below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the group is in use by {children} devices and groups")]
pub struct GroupInUse {
    /// How many.
    pub children: u32,
}

/// Something about a group or a member that changes while requests wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The limits of a group. Each bucket keeps its used share, and the same limits again change nothing.
    GroupLimits(GroupId, Limits),
    /// The share of a group among its siblings; 1 to [`crate::share::WEIGHT_MAX`].
    GroupWeight(GroupId, u32),
    /// What operations count as in a group, for requests that come from now on; `None`: as in its parent.
    GroupCharges(GroupId, Option<ChargeTable>),
    /// A group, with everything in it and all it holds, goes below another, or to the top.
    GroupParent(GroupId, Option<GroupId>),
    /// The limits of a member, as those of a group.
    MemberLimits(MemberId, Limits),
    /// The share of a member of what its group grants; 1 to [`crate::share::WEIGHT_MAX`].
    MemberWeight(MemberId, u32),
    /// A member, with all it holds, goes to another group, or out of any: each request waits in exactly one.
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

    /// Where the node goes, if this is about its place.
    fn parent(&self) -> Option<Option<NodeId>> {
        match *self {
            Self::GroupParent(_, parent) | Self::MemberGroup(_, parent) => Some(parent.map(|GroupId(parent)| parent)),
            _ => None,
        }
    }
}

/// What a member holds back at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldSummary {
    /// Requests waiting for a limit.
    pub count: u32,
    /// Since when the oldest of them waits.
    pub oldest: Option<Time>,
}

/// When the thread of a queue is to look in again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    pub at: Time,
    /// Reads and writes wait in company: those that come before that are to wait until then, too.
    pub is_calm: bool,
}

/// No deadline further away is slept through: what is neither read nor write, and what somebody changes meanwhile, waits as long.
const CALM_NS_MAX: u64 = 1_000_000;

/// How a member stands to its limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Neither limited nor charged: the device is starting, and the kernel reads its partition table.
    Exempt,
    /// Limited and charged.
    Live,
    /// Neither limited nor charged: the device is being removed, and what the kernel still sends while it takes the disk
    /// down is nobody's load. Only [`Groups::end_drain`] leads back.
    Draining,
}

/// How much longer others may have to wait because of what a drain lets go. What is held is charged to the groups until that
/// is reached, and one request at least; the rest goes uncharged, so that a removal is no pause for the neighbours.
const DRAIN_DEBT_NS: u64 = 50_000_000;

/// The one deadline of a tree and the queue whose thread wakes up for it.
#[derive(Clone, Copy, Debug)]
struct Armed {
    owner: QueueId,
    deadline: Time,
    /// When that was settled: all that was due by then had gone.
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
    /// The armed deadline of each tree in which something waits, by its root.
    armed: SecondaryMap<NodeId, Armed>,
    /// The latest instant seen: threads read their clocks before they take the lock, so theirs may be a little earlier.
    now: Time,
    /// Whether requests may go a little late, together ([`Tree::company_at`]).
    is_company_sought: bool,
}

impl Groups {
    /// From now on requests may go a little late, together.
    pub fn let_go_in_company(&mut self) {
        self.is_company_sought = true;
    }

    /// A new group that nobody is in.
    pub fn add_group(&mut self, options: &GroupOptions, now: Time) -> Result<GroupId, BadParent> {
        let now = self.see(now);
        let group = GroupId(self.tree.add_group(&options.limits, options.weight, options.charges));
        let placed = self.apply(&[Change::GroupParent(group, options.parent)], now);
        if placed.is_err() {
            self.tree.remove(group.0, now);
        }
        placed.map(|()| group)
    }

    /// Ends a group; refused while it has members or groups below it.
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

    /// A device becomes a member, exempt from the limits until it goes live.
    pub fn join(&mut self, options: &MemberOptions, now: Time) -> MemberId {
        let now = self.see(now);
        let member = self.tree.add_member(&options.limits, options.weight);
        self.members.insert(member, Member { mode: Mode::Exempt, queues: 0 });
        if let Some(group) = options.group {
            self.tree.set_parent(member, Some(group.0), now);
        }
        MemberId(member)
    }

    /// A queue of `member` that has room for `depth` requests.
    pub fn add_queue(&mut self, member: MemberId, depth: u16) -> QueueId {
        self.members[member.0].queues += 1;
        let queue = self.queues.add(member, depth);
        // All that the member can ever hold, so that holding allocates nothing.
        self.tree.reserve(member.0, self.queues.of(member).map(|queue| usize::from(queue.depth)).sum());
        queue
    }

    /// The start is over: from now the member is limited and charged.
    pub fn go_live(&mut self, member: MemberId) {
        let member = &mut self.members[member.0];
        if member.mode == Mode::Exempt {
            member.mode = Mode::Live;
        }
    }

    /// The thread of `queue` looks in: because it was rung, because its deadline has passed, or for no reason.
    ///
    /// Its restart work is added to `collected`, to be issued by the caller at once. Returns when the thread is to look in again,
    /// if anybody counts on it.
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

    /// Whether the thread of `queue` may sleep until the deadline, whatever comes.
    fn is_calm(&mut self, queue: QueueId, armed: Armed, now: Time) -> bool {
        let (MemberId(member), held) = (self.queues[queue].member, self.queues[queue].held);
        // The client of one that holds a single request waits for that, and sends nothing meanwhile.
        self.is_company_sought
            && held > 1
            && armed.deadline <= now.plus_nanos(CALM_NS_MAX)
            && (self.tree.held_newcomers(member, armed.since, now) || planted(Fault::CalmForAll))
    }

    /// The member is about to go: everything it holds is let go now, and nothing is held any more. What is let go is charged
    /// as far as [`DRAIN_DEBT_NS`] says; what comes later is not.
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
        // The deadline may have been watched by a queue of this member: hand it on.
        self.rearm(self.tree.root(member.0), None, now);
    }

    /// The member does not go after all: what comes from now on is limited and charged. What the drain let go stays let go, and
    /// goes before it.
    pub fn end_drain(&mut self, member: MemberId) {
        let member = &mut self.members[member.0];
        if member.mode == Mode::Draining && !planted(Fault::DrainForEver) {
            member.mode = Mode::Live;
        }
    }

    /// What the member holds back.
    pub fn held(&self, member: MemberId) -> HeldSummary {
        let lines = self.tree.lines(member.0);
        HeldSummary {
            count: lines.iter().map(|line| line.len()).sum(),
            oldest: lines.iter().filter_map(|line| Some(line.first()?.since)).min(),
        }
    }

    /// The thread of `queue` is about to end. Refused while the queue holds a request or has restart work outstanding:
    /// membership, count and posting are one piece of state, so once this returns `Ok` nothing can be posted to it.
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

    /// The device is gone. Refused while one of its queues has not retired.
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

    /// Makes all of these changes in one step, under load: who waits is timed anew at the end, and nothing goes in between.
    /// Either all of them or, where a group would get a parent that it cannot have, none. Where two are about the same thing,
    /// the later one counts; groups may take each other's places.
    pub fn apply(&mut self, changes: &[Change], now: Time) -> Result<(), BadParent> {
        let now = self.see(now);
        let mut places: SecondaryMap<NodeId, Option<NodeId>> = SecondaryMap::new();
        places.extend(changes.iter().filter_map(|change| Some((change.node(), change.parent()?))));
        self.tree.check_parents(&places)?;
        places.retain(|node, parent| self.tree.parent(node) != *parent);
        let roots_before: Vec<NodeId> = changes.iter().map(|change| self.tree.root(change.node())).collect();
        // Those who move stand alone for a moment, so that groups can take each other's places.
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
                // It was a root, and is none any more: its deadline is now that of the tree it has joined.
                self.armed.remove(root);
            }
        }
        Ok(())
    }

    /// What each limit of a group has left.
    pub fn group_credit(&mut self, group: GroupId, now: Time) -> Vec<Credit> {
        let now = self.see(now);
        self.tree.credit(group.0, now)
    }

    /// What each limit of a member has left.
    pub fn member_credit(&mut self, member: MemberId, now: Time) -> Vec<Credit> {
        let now = self.see(now);
        self.tree.credit(member.0, now)
    }

    /// How full each limit of a group is.
    pub fn group_levels(&mut self, group: GroupId, now: Time) -> Vec<Level> {
        let now = self.see(now);
        self.tree.levels(group.0, now)
    }

    /// How full each limit of a member is.
    pub fn member_levels(&mut self, member: MemberId, now: Time) -> Vec<Level> {
        let now = self.see(now);
        self.tree.levels(member.0, now)
    }

    /// Goes on with a group where another program left it.
    pub fn resume_group(&mut self, group: GroupId, levels: &[Level], elapsed_ns: u64, now: Time) {
        self.resume(group.0, levels, elapsed_ns, now);
    }

    /// Goes on with a member where another program left it.
    pub fn resume_member(&mut self, member: MemberId, levels: &[Level], elapsed_ns: u64, now: Time) {
        self.resume(member.0, levels, elapsed_ns, now);
    }

    fn resume(&mut self, node: NodeId, levels: &[Level], elapsed_ns: u64, now: Time) {
        let now = self.see(now);
        self.tree.resume(node, levels, elapsed_ns, now);
        let root = self.tree.root(node);
        // Who waits already is timed anew.
        self.let_go_due(root, None, now);
    }

    /// The queues to be rung because of the calls since the last time, each once.
    pub fn take_rings(&mut self) -> impl Iterator<Item = QueueId> {
        self.queues.take_rings()
    }

    fn see(&mut self, now: Time) -> Time {
        self.now = self.now.max(now);
        self.now
    }

    /// Lets go of everything that is due, in the order of the turn, and arms for what is not.
    fn let_go_due(&mut self, root: NodeId, caller: Option<QueueId>, now: Time) {
        let Self { tree, queues, .. } = self;
        tree.let_go_due(root, now, |held| queues.post(held, caller, now));
        self.rearm(root, caller, now);
    }

    /// Arms a tree for the earliest instant at which something in it is due, on a queue that holds something of it.
    fn rearm(&mut self, root: NodeId, caller: Option<QueueId>, now: Time) {
        let Some((due, heir)) = self.tree.wakes_at(root, now).zip(self.tree.next_waiter(root)) else {
            self.armed.remove(root);
            return;
        };
        // All that is due by now has gone.
        let deadline = if self.is_company_sought { self.tree.company_at(root, due, now) } else { due };
        // Who watches the clock, cheapest first: who does already, who is awake anyhow, one of those who are due first.
        let may_keep = |queue: &QueueId| {
            let queue = &self.queues[*queue];
            let holds = queue.held > 0 || planted(Fault::OwnerHoldsNothing);
            holds && self.tree.root(queue.member.0) == root
        };
        let is_told = |queue: &QueueId| self.queues[*queue].told.is_some_and(|told| told <= deadline);
        let keeper = self.armed.get(root).map(|armed| armed.owner).filter(may_keep);
        let awake = caller.filter(may_keep);
        // Who watches it, but sleeps longer, need not be woken up if somebody else is awake.
        let owner = keeper.filter(is_told).or(awake).or(keeper).unwrap_or(heir.queue);
        self.armed.insert(root, Armed { owner, deadline, since: now });
        // Told of an earlier instant, the thread looks in for nothing and is told anew: no need to wake it for that.
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
            let mut held = self.tree.lines(id).iter().flat_map(|line| line.iter()).peekable();
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
            let held = lines.iter().flat_map(|line| line.iter()).filter(|held| held.queue == id).count();
            assert_eq!(queue.held as usize, held, "I5: the count is what the member holds");
            assert!(queue.owes_poll || queue.let_go.is_empty(), "restart work is never left without a ring");
        }
    }
}
