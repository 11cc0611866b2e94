//! The queues, as the groups see them: what each holds, what was let go of it, and which are to be rung.

use std::ops::{Index, IndexMut};

use slotmap::SlotMap;

use super::{MemberId, QueueId};
use crate::held::Held;
use crate::planted::{Fault, planted};
use crate::throttle::Tag;
use crate::time::Time;

/// One of them.
#[derive(Clone, Debug)]
pub(crate) struct Queue {
    pub member: MemberId,
    pub depth: u16,
    /// Requests of this queue in the member's lines.
    pub held: u32,
    /// Restart work: tags let go that the thread has not collected.
    pub let_go: Vec<Tag>,
    /// When the thread was last told to look in: it does, whatever happens until then.
    pub told: Option<Time>,
    /// The thread has been rung, is looking in by itself, or is in the middle of a turn that ends in a poll: it needs no other ring.
    pub owes_poll: bool,
}

/// All of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Queues {
    all: SlotMap<QueueId, Queue>,
    /// Effect of the last calls: the queues to be rung.
    rings: Vec<QueueId>,
    /// What [`Fault::PostAfterUnlock`] posts too late.
    #[cfg(test)]
    late: Vec<(QueueId, Tag)>,
}

impl Queues {
    /// A queue of `member` that has room for `depth` requests.
    pub fn add(&mut self, member: MemberId, depth: u16) -> QueueId {
        let let_go = Vec::with_capacity(depth.into());
        self.all.insert(Queue { member, depth, held: 0, let_go, told: None, owes_poll: false })
    }

    /// Forgets a queue.
    pub fn remove(&mut self, queue: QueueId) {
        self.all.remove(queue);
    }

    /// The queues of a member.
    pub fn of(&self, member: MemberId) -> impl Iterator<Item = &Queue> {
        self.all.values().filter(move |queue| queue.member == member)
    }

    /// Posts a request that was let go and charged to its queue. Let go, charged, counted and posted under one lock.
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

    /// Has the thread of a queue take a turn, if it does not by itself.
    pub fn ring(&mut self, queue: QueueId, caller: Option<QueueId>, now: Time) {
        let state = &mut self.all[queue];
        if !state.owes_poll {
            debug_assert_ne!(Some(queue), caller, "a caller polls in its turn");
            state.owes_poll = true;
            // One whose instant has come looks in by itself.
            if state.told.is_none_or(|told| told > now && !planted(Fault::ToldIsEnough)) {
                self.rings.push(queue);
            }
        }
    }

    /// The queues to be rung because of the calls since the last time, each once.
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
    /// Each with its name.
    pub fn iter(&self) -> impl Iterator<Item = (QueueId, &Queue)> {
        self.all.iter()
    }

    /// One that may have retired.
    pub fn get(&self, queue: QueueId) -> Option<&Queue> {
        self.all.get(queue)
    }

    /// See [`Fault::PostAfterUnlock`].
    pub fn take_late(&mut self) -> Vec<(QueueId, Tag)> {
        std::mem::take(&mut self.late)
    }
}
