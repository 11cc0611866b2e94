//! The group protocol: who is held, who is let go, who watches the clock. Pure state; events in, effects out.
//!
//! ```text
//!   group ── limiter, turn, at most one armed deadline
//!     └─ member (a device) ── limiter of its own, requests held in arrival order for each direction
//!          └─ queue ── requests let go that its thread has not collected yet: its restart work
//!
//!   request ─► fits, nobody waits ──────────────────────────► goes at once
//!      └─────► held ─► due and its turn ─► let go: charged, ─► collected by the thread of its queue (poll)
//!                                          restart work of
//!                                          its queue
//! ```
//!
//! Whoever looks at a group at an instant lets go of everything that is due, for all its members, charging each request as
//! it goes; what belongs to another queue is posted to it as *restart work* and that queue is rung. Only the thread of a
//! queue collects what was let go of it, so only decisions cross threads.
//!
//! One queue with a held request is the *owner* of the group's one deadline: its thread wakes up then. Every call that can
//! change the deadline ends in [`Groups::rearm`], so none is ever left armed for nothing, and none forgotten.
//!
//! What holds between any two calls (numbers as in `ARCHITECTURE.md`, checked by `assert_invariants` in tests):
//! * I1  a member waits ⇔ its group is armed, with exactly one owner, who knows the deadline or owes a poll
//! * I2  the owner holds a request of a member that is not draining
//! * I4  the lines of the turn hold exactly the members that hold something, each once
//! * I5  what a queue counts as held is what the members hold of it
//! * I7  nothing refers to a queue that has retired or a member that has left: both are refused while anything does

use std::collections::VecDeque;

use slotmap::{SlotMap, new_key_type};
use thiserror::Error;

use crate::cost::{Cost, Direction};
use crate::limiter::Limiter;
use crate::limits::Limits;
use crate::time::Time;
use crate::turn::Turn;

new_key_type! {
    /// A group of members that share limits.
    pub struct GroupId;
    /// A device, as the groups see it.
    pub struct MemberId;
    /// One queue of a member, served by one thread.
    pub struct QueueId;
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

/// The group has members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the group is in use by {members} devices")]
pub struct GroupInUse {
    /// How many.
    pub members: u32,
}

/// What a member holds back at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldSummary {
    /// Requests waiting for a limit.
    pub count: u32,
    /// Since when the oldest of them waits.
    pub oldest: Option<Time>,
}

/// How a member stands to its limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Neither limited nor charged: the device is starting, and the kernel reads its partition table.
    Exempt,
    /// Limited and charged.
    Live,
    /// No longer limited, still charged: the device is being removed. There is no way back.
    Draining,
}

#[derive(Debug)]
struct Group {
    limiter: Limiter,
    turn: Turn,
    armed: Option<Armed>,
    members: u32,
    /// Made for one member that has no group, and gone with it.
    is_private: bool,
}

/// The one deadline of a group and the queue whose thread wakes up for it.
#[derive(Clone, Copy, Debug)]
struct Armed {
    owner: QueueId,
    deadline: Time,
}

#[derive(Debug)]
struct Member {
    group: GroupId,
    limiter: Limiter,
    mode: Mode,
    /// Indexed by [`Direction`].
    held: [VecDeque<Held>; 2],
    queues: u32,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    queue: QueueId,
    tag: u16,
    cost: Cost,
    since: Time,
}

#[derive(Debug)]
struct Queue {
    member: MemberId,
    /// Requests of this queue in the member's FIFOs.
    held: u32,
    /// Restart work: tags let go that the thread has not collected.
    let_go: Vec<u16>,
    /// The deadline that the thread was last told to wake up for.
    told: Option<Time>,
    /// The thread has been rung, or is in the middle of a turn that ends in a poll: it needs no other ring.
    owes_poll: bool,
}

/// Every group, member and queue of a daemon.
#[derive(Debug, Default)]
pub(crate) struct Groups {
    groups: SlotMap<GroupId, Group>,
    members: SlotMap<MemberId, Member>,
    queues: SlotMap<QueueId, Queue>,
    /// Effect of the last calls: the queues to be rung.
    rings: Vec<QueueId>,
}

impl Groups {
    /// A new group that nobody is in.
    pub fn add_group(&mut self, limits: &Limits) -> GroupId {
        self.new_group(Limiter::new(limits), false)
    }

    fn new_group(&mut self, limiter: Limiter, is_private: bool) -> GroupId {
        self.groups.insert(Group { limiter, turn: Turn::new(), armed: None, members: 0, is_private })
    }

    /// Ends a group; refused while it has members.
    pub fn remove_group(&mut self, group: GroupId) -> Result<(), GroupInUse> {
        match self.groups[group].members {
            0 => {
                self.groups.remove(group);
                Ok(())
            }
            members => Err(GroupInUse { members }),
        }
    }

    /// A device becomes a member, exempt from the limits until it goes live.
    pub fn join(&mut self, limits: &Limits, group: Option<GroupId>) -> MemberId {
        let group = group.unwrap_or_else(|| self.new_group(Limiter::new(&Limits::UNLIMITED), true));
        self.groups[group].members += 1;
        let members = self.groups[group].members as usize;
        self.groups[group].turn.reserve(members);
        self.members.insert(Member {
            group,
            limiter: Limiter::new(limits),
            mode: Mode::Exempt,
            held: [VecDeque::new(), VecDeque::new()],
            queues: 0,
        })
    }

    /// A queue of `member` with tags below `depth`.
    pub fn add_queue(&mut self, member: MemberId, depth: u16) -> QueueId {
        let depth = usize::from(depth);
        let state = &mut self.members[member];
        state.queues += 1;
        // All that the queue can ever hold, so that holding allocates nothing.
        for held in &mut state.held {
            held.reserve(depth * state.queues as usize);
        }
        let queue = Queue { member, held: 0, let_go: Vec::with_capacity(depth), told: None, owes_poll: false };
        self.queues.insert(queue)
    }

    /// The start is over: from now the member is limited and charged.
    pub fn go_live(&mut self, member: MemberId) {
        let member = &mut self.members[member];
        if member.mode == Mode::Exempt {
            member.mode = Mode::Live;
        }
    }

    /// A request has arrived on `queue`. After [`Verdict::Held`] the caller polls in the same turn.
    pub fn request(&mut self, queue: QueueId, tag: u16, cost: Cost, now: Time) -> Verdict {
        let id = self.queues[queue].member;
        let member = &mut self.members[id];
        match member.mode {
            Mode::Exempt => return Verdict::Go,
            Mode::Draining => return self.go(queue, tag, &cost, now),
            Mode::Live if cost.is_free() => return Verdict::Go,
            Mode::Live => {}
        }
        let group = member.group;
        if self.groups[group].turn.is_idle() && self.ready_at(id, &cost, now).is_none() {
            return self.go(queue, tag, &cost, now);
        }
        let line = &mut self.members[id].held[cost.direction as usize];
        line.push_back(Held { queue, tag, cost, since: now });
        let is_first = line.len() == 1;
        self.queues[queue].held += 1;
        self.queues[queue].owes_poll = true;
        if is_first {
            self.groups[group].turn.join(cost.direction, id);
        }
        // Behind others of its member it changes nothing about what is due, unless something has fallen due meanwhile.
        if is_first || self.groups[group].armed.is_none_or(|armed| armed.deadline <= now) {
            self.let_go_due(group, Some(queue), now);
        }
        Verdict::Held
    }

    /// The thread of `queue` looks in: because it was rung, because its deadline has passed, or for no reason.
    ///
    /// Its restart work is added to `collected`, to be issued by the caller at once. Returns the deadline at which the
    /// thread is to look in again, if the group counts on it.
    pub fn poll(&mut self, queue: QueueId, now: Time, collected: &mut Vec<u16>) -> Option<Time> {
        let group = self.members[self.queues[queue].member].group;
        self.queues[queue].owes_poll = true;
        if let Some(armed) = self.groups[group].armed
            && armed.owner == queue
            && armed.deadline <= now
        {
            self.let_go_due(group, Some(queue), now);
        }
        let told = self.groups[group].armed.filter(|armed| armed.owner == queue).map(|armed| armed.deadline);
        let queue = &mut self.queues[queue];
        collected.append(&mut queue.let_go);
        queue.owes_poll = false;
        queue.told = told;
        told
    }

    /// The member is about to go: everything it holds is let go now, and nothing is held any more. Still charged.
    pub fn drain(&mut self, member: MemberId, now: Time) {
        let group = self.members[member].group;
        self.members[member].mode = Mode::Draining;
        for direction in Direction::ALL {
            self.groups[group].turn.leave(direction, member);
            while let Some(held) = self.members[member].held[direction as usize].pop_front() {
                self.post(member, held, None, now);
            }
        }
        // The deadline may have been watched by a queue of this member: hand it on.
        self.rearm(group, None, now);
    }

    /// What the member holds back.
    pub fn held(&self, member: MemberId) -> HeldSummary {
        let held = &self.members[member].held;
        HeldSummary {
            count: held.iter().map(|line| line.len() as u32).sum(),
            oldest: held.iter().filter_map(|line| line.front().map(|held| held.since)).min(),
        }
    }

    /// The thread of `queue` is about to end. Refused while the queue holds a request or has restart work outstanding:
    /// membership, count and posting are one piece of state, so once this returns `Ok` nothing can be posted to it.
    pub fn retire(&mut self, queue: QueueId) -> Result<(), StillBusy> {
        let state = &self.queues[queue];
        let busy = StillBusy { held: state.held, restart_work: state.let_go.len() as u32, queues: 0 };
        if busy.held > 0 || busy.restart_work > 0 {
            return Err(busy);
        }
        let member = state.member;
        debug_assert!(self.groups[self.members[member].group].armed.is_none_or(|armed| armed.owner != queue));
        self.members[member].queues -= 1;
        self.queues.remove(queue);
        Ok(())
    }

    /// The device is gone. Refused while one of its queues has not retired.
    pub fn leave(&mut self, member: MemberId) -> Result<(), StillBusy> {
        let state = &self.members[member];
        if state.queues > 0 {
            return Err(StillBusy { held: self.held(member).count, restart_work: 0, queues: state.queues });
        }
        let group = state.group;
        self.members.remove(member);
        let state = &mut self.groups[group];
        state.members -= 1;
        if state.is_private {
            self.groups.remove(group);
        }
        Ok(())
    }

    /// Charges a request that need not wait. It may not overtake restart work of its queue that is yet to be collected.
    fn go(&mut self, queue: QueueId, tag: u16, cost: &Cost, now: Time) -> Verdict {
        self.charge(self.queues[queue].member, cost, now);
        let queue = &mut self.queues[queue];
        if queue.let_go.is_empty() {
            return Verdict::Go;
        }
        queue.let_go.push(tag);
        queue.owes_poll = true;
        Verdict::Held
    }

    /// The queues to be rung because of the calls since the last time, each once.
    pub fn take_rings(&mut self) -> impl Iterator<Item = QueueId> {
        self.rings.drain(..)
    }

    /// When everything on the member's path takes a request of this cost, `None` if it goes now.
    fn ready_at(&mut self, member: MemberId, cost: &Cost, now: Time) -> Option<Time> {
        let member = &mut self.members[member];
        let own = member.limiter.ready_at(cost, now);
        own.max(self.groups[member.group].limiter.ready_at(cost, now))
    }

    fn charge(&mut self, member: MemberId, cost: &Cost, now: Time) {
        let member = &mut self.members[member];
        member.limiter.charge(cost, now);
        self.groups[member.group].limiter.charge(cost, now);
    }

    /// Lets go of everything that is due, in the order of the turn, and arms for what is not.
    fn let_go_due(&mut self, group: GroupId, caller: Option<QueueId>, now: Time) {
        while let Some((direction, member)) = self.next_due(group, now) {
            let line = &mut self.members[member].held[direction as usize];
            if let Some(held) = line.pop_front() {
                let waits_on = !line.is_empty();
                self.groups[group].turn.pass(direction, member, waits_on);
                self.post(member, held, caller, now);
            }
        }
        self.rearm(group, caller, now);
    }

    fn next_due(&mut self, group: GroupId, now: Time) -> Option<(Direction, MemberId)> {
        self.waiting(group, now)
            .find(|(_, _, ready_at)| ready_at.is_none())
            .map(|(direction, member, _)| (direction, member))
    }

    /// Everyone who waits in the group, in the order of the turn, with when its oldest request may go (`None`: now).
    fn waiting(&mut self, group: GroupId, now: Time) -> impl Iterator<Item = (Direction, MemberId, Option<Time>)> {
        let Group { limiter, turn, .. } = &mut self.groups[group];
        let members = &mut self.members;
        turn.in_order().filter_map(move |(direction, id)| {
            let member = &mut members[id];
            let cost = member.held[direction as usize].front()?.cost;
            Some((direction, id, member.limiter.ready_at(&cost, now).max(limiter.ready_at(&cost, now))))
        })
    }

    /// Charges a request that goes and posts it to its queue. Charge, count and post are one step under one lock.
    fn post(&mut self, member: MemberId, held: Held, caller: Option<QueueId>, now: Time) {
        self.charge(member, &held.cost, now);
        let queue = &mut self.queues[held.queue];
        queue.held -= 1;
        queue.let_go.push(held.tag);
        self.ring(held.queue, caller);
    }

    fn ring(&mut self, queue: QueueId, caller: Option<QueueId>) {
        let state = &mut self.queues[queue];
        if !state.owes_poll {
            debug_assert_ne!(Some(queue), caller, "a caller polls in its turn");
            state.owes_poll = true;
            self.rings.push(queue);
        }
    }

    /// Arms the group for the earliest instant at which something is due, on a queue that holds something.
    fn rearm(&mut self, group: GroupId, caller: Option<QueueId>, now: Time) {
        let Some((heir, deadline)) = self
            .waiting(group, now)
            .map(|(direction, member, ready_at)| (direction, member, ready_at.unwrap_or(now)))
            .min_by_key(|&(_, _, ready_at)| ready_at)
            .and_then(|(direction, member, deadline)| {
                Some((self.members[member].held[direction as usize].front()?.queue, deadline))
            })
        else {
            self.groups[group].armed = None;
            return;
        };
        // Who watches the clock, cheapest first: who does already, who is awake anyhow, the one who is due first.
        let keeps = |queue: &QueueId| {
            let queue = &self.queues[*queue];
            queue.held > 0 && self.members[queue.member].mode == Mode::Live
        };
        let owner =
            self.groups[group].armed.map(|armed| armed.owner).filter(keeps).or(caller.filter(keeps)).unwrap_or(heir);
        self.groups[group].armed = Some(Armed { owner, deadline });
        // Told of an earlier instant, the thread looks in for nothing and is told anew: no need to wake it for that.
        if self.queues[owner].told.is_none_or(|told| told > deadline) {
            self.ring(owner, caller);
        }
    }
}

#[cfg(test)]
impl Groups {
    /// Panics unless the invariants of the module's head hold.
    pub fn assert_invariants(&self) {
        for (id, group) in &self.groups {
            let mut waiting = 0;
            for (member_id, member) in self.members.iter().filter(|(_, member)| member.group == id) {
                for direction in Direction::ALL {
                    let holds = !member.held[direction as usize].is_empty();
                    let places = group.turn.in_order().filter(|&place| place == (direction, member_id)).count();
                    assert_eq!(places, usize::from(holds), "I4: one place in line for a member that holds");
                    assert!(!holds || member.mode == Mode::Live, "a member that is not limited holds nothing");
                    waiting += places;
                }
            }
            assert_eq!(waiting, group.turn.in_order().count(), "I4: only members of the group stand in line");
            assert_eq!(group.armed.is_some(), waiting > 0, "I1, I3: armed if and only if somebody waits");
            let members = self.members.values().filter(|member| member.group == id).count();
            assert_eq!(members, group.members as usize);
            if let Some(Armed { owner, deadline }) = group.armed {
                let queue = self.queues.get(owner).expect("I7: the owner exists");
                assert_eq!(self.members[queue.member].group, id);
                assert!(queue.held > 0, "I2: the owner holds a request");
                assert_eq!(self.members[queue.member].mode, Mode::Live, "I2: of a member that is not draining");
                assert!(
                    queue.owes_poll || queue.told.is_some_and(|told| told <= deadline),
                    "I1: the owner knows the deadline"
                );
            }
        }
        for (id, queue) in &self.queues {
            let member = self.members.get(queue.member).expect("I7: a queue has a member");
            let held = member.held.iter().flatten().filter(|held| held.queue == id).count();
            assert_eq!(queue.held as usize, held, "I5: the count is what the member holds");
            assert!(queue.owes_poll || queue.let_go.is_empty(), "restart work is never left without a ring");
        }
        for (id, member) in &self.members {
            assert_eq!(self.queues.values().filter(|queue| queue.member == id).count(), member.queues as usize);
            for held in member.held.iter().flatten() {
                assert!(self.queues.contains_key(held.queue), "I7: what is held has a queue");
            }
        }
    }
}
