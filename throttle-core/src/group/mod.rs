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

mod apply;
pub(crate) mod arrivals;
mod deadline;
mod options;
mod outcome;
mod queues;
mod removal;

use slotmap::SecondaryMap;

use crate::ids::{GroupId, MemberId, NodeId, QueueId};
use crate::limiter::{Credit, Level};
#[cfg(test)]
use crate::request::Tag;
use crate::time::Time;
use crate::tree::{BadParent, Tree};

pub use options::{Change, GroupOptions, MemberOptions};
pub(crate) use outcome::{Asked, Look};
pub use outcome::{GroupInUse, HeldSummary, StillBusy, Verdict};
use queues::Queues;

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

    /// The requests that the member holds.
    pub fn held(&self, member: MemberId) -> HeldSummary {
        let lines = self.tree.lines(member.0);
        HeldSummary {
            count: lines.iter().map(|line| line.len()).sum(),
            oldest: lines.iter().filter_map(|line| Some(line.first()?.since)).min(),
        }
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

    /// The queues to ring because of the calls since the last `take_rings`, each once.
    pub fn take_rings(&mut self) -> impl Iterator<Item = QueueId> {
        self.queues.take_rings()
    }

    fn see(&mut self, now: Time) -> Time {
        self.now = self.now.max(now);
        self.now
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
