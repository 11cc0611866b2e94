//! The deadline of each tree and its owner; polls.

use super::outcome::Look;
use super::{Armed, Groups};
use crate::ids::{MemberId, NodeId, QueueId};
use crate::planted::{Fault, planted};
use crate::request::Tag;
use crate::time::Time;

/// The longest deadline that a thread sleeps through. A flush, a discard or a change that arrives
/// during the sleep is delayed by as much.
const CALM_NS_MAX: u64 = 1_000_000;

impl Groups {
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

    /// Dispatches every due request of the tree, in turn order, and arms the deadline for the rest.
    pub(super) fn let_go_due(&mut self, root: NodeId, caller: Option<QueueId>, now: Time) {
        let Self { tree, queues, .. } = self;
        tree.let_go_due(root, now, |held| queues.post(held, caller, now));
        self.rearm(root, caller, now);
    }

    /// Arms a tree for the earliest instant at which one of its requests is due. The owner is a
    /// queue that holds a request of the tree.
    pub(super) fn rearm(&mut self, root: NodeId, caller: Option<QueueId>, now: Time) {
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
