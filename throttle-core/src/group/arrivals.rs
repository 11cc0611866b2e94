//! Requests that arrive on one queue at one instant.

use super::outcome::{Asked, Verdict};
use super::{Groups, Mode};
use crate::bucket::Mark;
use crate::charge::ChargeTable;
use crate::cost::{Cost, Direction, Operation};
use crate::held::Held;
use crate::ids::{MemberId, NodeId, QueueId};
use crate::lease::{Grant, Lease, Prepaid, Unspent};
use crate::pass::Pass;
use crate::planted::{Fault, planted};
use crate::request::{Request, Tag};
use crate::time::Time;

/// Requests that one queue submits at one instant. The position of the queue in its tree is looked
/// up once for all of them.
pub(crate) struct Arrivals<'a> {
    groups: &'a mut Groups,
    queue: QueueId,
    member: NodeId,
    root: NodeId,
    is_live: bool,
    charges: ChargeTable,
    now: Time,
}

impl Groups {
    /// Begins the arrivals of `queue` at `now`; the requests then follow one at a time.
    pub fn arrived(&mut self, queue: QueueId, now: Time) -> Arrivals<'_> {
        let now = self.see(now);
        let MemberId(member) = self.queues[queue].member;
        Arrivals {
            queue,
            member,
            root: self.tree.root(member),
            is_live: self.members[member].mode == Mode::Live,
            charges: self.tree.charges(member),
            now,
            groups: self,
        }
    }
}

impl Arrivals<'_> {
    /// Decides on requests in arrival order, and hands the tags of those that pass to `go`. Leases
    /// are spent first. The next request that they do not cover ends its lease and asks for the next
    /// one. `pass` is the present change count.
    pub fn decide(
        &mut self,
        requests: &[Request],
        mut leases: Option<&mut [Lease; 2]>,
        pass: Pass,
        mut go: impl FnMut(Tag),
    ) -> Asked {
        let now = self.now;
        let mut is_one_held = false;
        let mut next = requests;
        while let Some((&Request { tag, operation, bytes, since }, after)) = next.split_first() {
            next = after;
            let direction = operation.direction();
            if let Some(leases) = leases.as_deref_mut() {
                if leases[direction as usize].spend(operation, bytes, pass, now) {
                    go(tag);
                    continue;
                }
                self.end_leases(leases, pass, |lease, of| of == direction || lease.is_over(pass, now));
            }
            let mut lease = leases.as_mut().map(|leases| &mut leases[direction as usize]);
            let wanted = lease.as_mut().and_then(|lease| lease.wants(bytes, now));
            match self.request(tag, operation, bytes, since) {
                Verdict::Go => {
                    go(tag);
                    if let Some((lease, wanted)) = lease.zip(wanted)
                        && let Some(grant) = self.prepay(direction, wanted, lease.marks())
                    {
                        lease.take(grant, pass, now);
                    }
                }
                Verdict::Held => {
                    is_one_held = true;
                    // Later requests may not overtake the held one: leases end.
                    if let Some(leases) = leases.take() {
                        self.end_leases(leases, pass, |_, _| true);
                        leases.iter_mut().for_each(Lease::forget);
                    }
                    next = &after[self.join(after)..];
                }
            }
        }
        Asked { is_one_held, pass: self.are_free().then_some(pass) }
    }

    /// Ends the leases of the queue for which `is_due` holds, and returns their unspent credit. The
    /// credit of a lease before the last change is void: the change may have replaced the buckets
    /// that paid.
    pub fn end_leases(&mut self, leases: &mut [Lease; 2], pass: Pass, is_due: impl Fn(&Lease, Direction) -> bool) {
        for (lease, direction) in leases.iter_mut().zip(Direction::ALL) {
            if is_due(lease, direction)
                && let Some(unspent) = lease.end()
                && (unspent.pass == pass || planted(Fault::RefundAfterChange))
            {
                self.refund(direction, &unspent);
            }
        }
    }

    /// Decides on a request that arrived at `since` or later. After [`Verdict::Held`] the caller
    /// polls in the same turn.
    pub fn request(&mut self, tag: Tag, operation: Operation, bytes: u64, since: Time) -> Verdict {
        if !self.is_live {
            return self.go(tag);
        }
        let cost = self.charges.cost(operation, bytes);
        if cost.is_free() {
            return Verdict::Go;
        }
        let Self { queue, member, root, now, .. } = *self;
        let Groups { tree, queues, armed, .. } = &mut *self.groups;
        if tree.is_uncontended(root, member, &cost) && tree.ready_at(member, &cost, now).is_none() {
            tree.charge(member, &cost, now);
            return self.go(tag);
        }
        let state = &mut queues[queue];
        let owed_poll = std::mem::replace(&mut state.owes_poll, true);
        state.held += 1;
        let may_matter = tree.hold(member, Held { queue, tag, cost, since }, now);
        let is_in_time = || armed.get(root).is_some_and(|armed| armed.deadline > now);
        if !may_matter && is_in_time() || planted(Fault::HoldWithoutRearm) {
            return Verdict::Held;
        }
        self.groups.let_go_due(root, Some(queue), now);

        // The request may have been dispatched at once: answer `Go`, and the caller owes no poll.
        let Groups { queues, armed, .. } = &mut *self.groups;
        let told = armed.get(root).filter(|armed| armed.owner == queue).map(|armed| armed.deadline);
        let state = &mut queues[queue];
        if state.let_go == [tag] && !owed_poll && told == state.told {
            state.let_go.clear();
            state.owes_poll = false;
            return Verdict::Go;
        }
        Verdict::Held
    }

    /// Holds the requests that follow a [`Verdict::Held`] without a decision for each; returns how
    /// many it took from the start of `next`. Stops at a request that could change the deadline
    /// ([`crate::tree::Tree::join`]); takes none if the deadline has come.
    fn join(&mut self, next: &[Request]) -> usize {
        let Groups { tree, queues, armed, .. } = &mut *self.groups;
        if !self.is_live || armed.get(self.root).is_none_or(|armed| armed.deadline <= self.now) {
            return 0;
        }
        let (queue, charges) = (self.queue, self.charges);
        let held = next.iter().map(|&Request { tag, operation, bytes, since }| {
            let cost = charges.cost(operation, bytes);
            Held { queue, tag, cost, since }
        });
        let joined = tree.join(self.member, held);
        queues[queue].held += joined;
        joined as usize
    }

    /// Grants a lease to a queue whose request just passed; appends a mark for each bucket that paid.
    /// Refused while a waiting request is charged to one of these limits, and while the queue has
    /// restart work. A queue without a limit above gets a pass instead, which does not end with time.
    fn prepay(&mut self, direction: Direction, wanted: Prepaid, marks: &mut Vec<Mark>) -> Option<Grant> {
        let has_restart_work = self.has_restart_work();
        let tree = &mut self.groups.tree;
        // The limits of any request in this direction.
        let any = Cost { direction, is_operation: true, bytes: 1 };
        let may = self.is_live && !tree.is_unlimited(self.member) && tree.is_uncontended(self.root, self.member, &any);
        if may && !has_restart_work { tree.prepay(self.member, direction, wanted, marks, self.now) } else { None }
    }

    /// Returns the unspent credit of a lease of this queue. Limits and places must be those of the
    /// grant. Requests that wait in the tree may be due earlier with it.
    fn refund(&mut self, direction: Direction, unspent: &Unspent<'_>) {
        self.groups.tree.refund(self.member, direction, unspent, self.now);
        if !self.groups.tree.is_idle(self.root) {
            self.groups.let_go_due(self.root, Some(self.queue), self.now);
        }
    }

    /// Whether no limit is above the queue and no restart work in it: later requests pass without a
    /// decision until the next change.
    fn are_free(&self) -> bool {
        self.is_live && self.groups.tree.is_unlimited(self.member) && !self.has_restart_work()
    }

    /// Whether dispatched requests of the queue are not yet collected. A later request must be held
    /// behind them. A verdict of `Go` does not prove that there are none: a free request always
    /// goes.
    fn has_restart_work(&self) -> bool {
        !self.groups.queues[self.queue].let_go.is_empty()
    }

    /// Passes a request that need not wait. Restart work of the queue that is not yet collected
    /// goes first, so the request then joins it.
    fn go(&mut self, tag: Tag) -> Verdict {
        if !self.has_restart_work() {
            return Verdict::Go;
        }
        let queue = &mut self.groups.queues[self.queue];
        queue.let_go.push(tag);
        queue.owes_poll = true;
        Verdict::Held
    }
}
