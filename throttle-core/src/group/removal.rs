//! The removal of a member: drain, retirement of its queues, end of its membership.

use super::outcome::StillBusy;
use super::{Groups, Mode};
use crate::cost::Direction;
use crate::ids::{MemberId, QueueId};
use crate::planted::{Fault, planted};
use crate::time::Time;

/// The wait that a drain may add for the neighbours. Held requests of the draining member are
/// charged to the groups above until that wait is reached, at least one in each direction; the
/// remaining requests are not charged, so a removal does not pause the neighbours.
const DRAIN_DEBT_NS: u64 = 50_000_000;

impl Groups {
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
}
