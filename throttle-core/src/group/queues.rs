//! The queues of all members: held count, restart work, and which queues are to be rung.

use std::ops::{Index, IndexMut};

use slotmap::SlotMap;

use crate::held::Held;
use crate::ids::{MemberId, QueueId};
use crate::planted::{Fault, planted};
use crate::request::Tag;
use crate::time::Time;

/// One hardware queue of a device and its thread.
#[derive(Clone, Debug)]
pub(crate) struct Queue {
    pub member: MemberId,
    pub depth: u16,
    /// Requests of this queue in the member's lines.
    pub held: u32,
    /// Restart work: tags of dispatched requests that the thread has not collected.
    pub let_go: Vec<Tag>,
    /// The deadline that the thread last learned. The thread polls then, regardless of events
    /// before then.
    pub told: Option<Time>,
    /// The thread has been rung, polls by itself, or is in a turn that ends in a poll: no further
    /// ring is needed.
    pub owes_poll: bool,
}

/// Every queue of a daemon.
#[derive(Clone, Debug, Default)]
pub(crate) struct Queues {
    all: SlotMap<QueueId, Queue>,
    /// Queues to ring because of the calls since the last [`Queues::take_rings`].
    rings: Vec<QueueId>,
    /// Tags that [`Fault::PostAfterUnlock`] posts too late.
    #[cfg(test)]
    late: Vec<(QueueId, Tag)>,
}

impl Queues {
    /// A queue of `member` that has room for `depth` requests.
    pub fn add(&mut self, member: MemberId, depth: u16) -> QueueId {
        let let_go = Vec::with_capacity(depth.into());
        self.all.insert(Queue { member, depth, held: 0, let_go, told: None, owes_poll: false })
    }

    /// Removes a queue.
    pub fn remove(&mut self, queue: QueueId) {
        self.all.remove(queue);
    }

    /// The queues of a member.
    pub fn of(&self, member: MemberId) -> impl Iterator<Item = &Queue> {
        self.all.values().filter(move |queue| queue.member == member)
    }

    /// Posts a dispatched and charged request to its queue. Dispatch, charge, count and post are
    /// one critical section.
    #[inline]
    pub fn post(&mut self, held: &Held, caller: Option<QueueId>, now: Time) {
        #[cfg(test)]
        if planted(Fault::PostAfterUnlock) && Some(held.queue) != caller {
            self.all[held.queue].held -= 1;
            self.late.push((held.queue, held.tag));
            return;
        }
        let queue = &mut self.all[held.queue];
        queue.held -= u32::from(!planted(Fault::HeldNotCounted));
        queue.let_go.push(held.tag);
        if !queue.owes_poll {
            self.ring(held.queue, caller, now);
        }
    }

    /// Makes the thread of a queue take a turn, unless it takes one by itself.
    pub fn ring(&mut self, queue: QueueId, caller: Option<QueueId>, now: Time) {
        let state = &mut self.all[queue];
        if !state.owes_poll {
            debug_assert_ne!(Some(queue), caller, "a caller polls in its turn");
            state.owes_poll = true;
            // A thread whose deadline has come polls by itself.
            if state.told.is_none_or(|told| told > now && !planted(Fault::ToldIsEnough)) {
                self.rings.push(queue);
            }
        }
    }

    /// The queues to ring because of the calls since the last `take_rings`, each once.
    pub fn take_rings(&mut self) -> impl Iterator<Item = QueueId> {
        self.rings.drain(..)
    }
}

impl Index<QueueId> for Queues {
    type Output = Queue;

    fn index(&self, queue: QueueId) -> &Queue {
        &self.all[queue]
    }
}

impl IndexMut<QueueId> for Queues {
    fn index_mut(&mut self, queue: QueueId) -> &mut Queue {
        &mut self.all[queue]
    }
}

#[cfg(test)]
impl Queues {
    /// Every queue with its id.
    pub fn iter(&self) -> impl Iterator<Item = (QueueId, &Queue)> {
        self.all.iter()
    }

    /// A queue, or `None` if it has retired.
    pub fn get(&self, queue: QueueId) -> Option<&Queue> {
        self.all.get(queue)
    }

    /// See [`Fault::PostAfterUnlock`].
    pub fn take_late(&mut self) -> Vec<(QueueId, Tag)> {
        std::mem::take(&mut self.late)
    }
}
