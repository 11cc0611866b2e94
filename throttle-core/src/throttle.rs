//! The only lock. Everything that threads share about throttling is behind it.
//!
//! ```text
//!   queue thread A ── Gate ─┐            ┌─ Groups   held requests, turns, restart work, deadlines
//!   queue thread B ── Gate ─┼─ Throttle ─┤
//!   device thread ──────────┘   (lock)   └─ bells    how to wake the thread of a queue
//! ```
//!
//! Access rules:
//! 1. `state` is locked for one call of [`Groups`] and for looking up the bells that it wants rung; nothing blocks, waits
//!    or enters the kernel meanwhile (I8). There is no second lock, so there is no order of locks.
//! 2. Bells are rung after unlocking. That may be late, or after the queue has retired; a bell is an `Arc` of its own and
//!    ringing it then is harmless. It is never left out: whoever set `owes_poll` rings before it returns, unless the instant has come
//!    at which that thread was told to look in.
//! 3. Whether a queue is there, how much restart work it has, and posting to it are one critical section. So a queue that
//!    has retired gets nothing more, and one that has work cannot retire: this is the wait without which restart work
//!    runs on a member that is gone.
//! 4. `changes` is written with `state` locked, and read without: it tells a queue that no limit is above that this is still so
//!    ([`crate::pass`]). So whoever has no limit takes the lock once after each change, whatever others
//!    do.

use std::sync::Arc;

use slotmap::SecondaryMap;

use crate::cost::Operation;
use crate::group::{
    Change, GroupId, GroupInUse, GroupOptions, Groups, HeldSummary, Look, MemberId, MemberOptions, QueueId, StillBusy,
    Verdict,
};
use crate::lease::Lease;
use crate::limiter::{Credit, Level};
use crate::pass::{Changes, Pass};
use crate::planted::{Fault, planted};
use crate::sync::{Mutex, MutexGuard};
use crate::time::Time;
use crate::tree::BadParent;

/// How to wake the thread that serves a queue.
///
/// May be called from any thread, late, twice, and after the queue has gone; never not at all.
pub trait Doorbell: Send + Sync {
    /// Makes the thread of the queue take a turn soon. Must not block.
    fn ring(&self);
}

/// What the owner of a queue calls a request until it is let go; the throttle only hands it back.
///
/// ublk numbers them from 0 to the queue's depth, in 16 bits; a simulation may have millions waiting.
pub type Tag = u32;

/// A request as it came.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Its name in its queue.
    pub tag: Tag,
    /// What it does.
    pub operation: Operation,
    /// The length of its range; what it costs is up to the charge table of its group ([`crate::charge`]).
    pub bytes: u64,
    /// It was not there before. The longer it has been there, the longer it may wait for company.
    pub since: Time,
}

/// All groups, devices and queues of a daemon, shared by its threads.
#[derive(Default)]
pub struct Throttle {
    /// Protects every group, member and queue, and the bells.
    state: Mutex<State>,
    /// Written under that lock only, read by any thread.
    changes: Changes,
}

#[derive(Default)]
struct State {
    groups: Groups,
    bells: SecondaryMap<QueueId, Arc<dyn Doorbell>>,
}

impl Throttle {
    /// No groups, no members. Every request goes at its own instant.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// The same for threads that sleep in between: what waits behind others of its device may go late by half of what it has waited, a millisecond at most, so that
    /// at high rates several go for one timer and one wake-up. No limit loses rate by it.
    pub fn in_company() -> Arc<Self> {
        let throttle = Self::default();
        throttle.lock().groups.let_go_in_company();
        Arc::new(throttle)
    }

    /// A new group. The limits must be sound ([`crate::limits::Limits::violations`]).
    pub fn add_group(&self, options: &GroupOptions, now: Time) -> Result<GroupId, BadParent> {
        self.lock().groups.add_group(options, now)
    }

    /// Ends a group that nothing is in.
    pub fn remove_group(&self, group: GroupId, now: Time) -> Result<(), GroupInUse> {
        self.lock().groups.remove_group(group, now)
    }

    /// A device joins a group, or stands alone with its own limits. It is neither limited nor charged until
    /// [`Self::go_live`]: what the kernel reads while the device starts is nobody's load.
    pub fn join(&self, options: &MemberOptions, now: Time) -> MemberId {
        self.lock().groups.join(options, now)
    }

    /// From now on the device is limited and charged.
    pub fn go_live(&self, member: MemberId) {
        self.lock().groups.go_live(member);
    }

    /// The device is about to be removed: what it holds is let go at once, each request by the thread of its queue, and charged
    /// as far as it makes nobody else wait more than 50 ms longer; what it still sends is neither limited nor charged, until
    /// [`Self::end_drain`]. Asking twice is harmless.
    pub fn drain(&self, member: MemberId, now: Time) {
        self.call(&mut Vec::new(), |groups| groups.drain(member, now));
    }

    /// The removal has failed: the device is limited and charged again. Nothing that was let go is taken back. A device that does not
    /// drain stays as it is.
    pub fn end_drain(&self, member: MemberId) {
        self.lock().groups.end_drain(member);
    }

    /// What the device holds back at the moment.
    pub fn held(&self, member: MemberId) -> HeldSummary {
        self.lock().groups.held(member)
    }

    /// The device is gone. Refused while a gate of it has not retired; afterwards nothing refers to it.
    pub fn leave(&self, member: MemberId, now: Time) -> Result<(), StillBusy> {
        self.lock().groups.leave(member, now)
    }

    /// Makes changes under load, all in one step: nothing goes in between that may go neither before nor after, and who waits is
    /// timed anew at once, so that a change strands nobody. Either all of them, or none where a group would get a parent that
    /// it cannot have. Every group and member named must be there.
    pub fn apply(&self, changes: &[Change], now: Time) -> Result<(), BadParent> {
        self.call(&mut Vec::new(), |groups| {
            if !planted(Fault::PassForEver) {
                self.changes.count();
            }
            groups.apply(changes, now)
        })
    }

    /// What each limit of a group has left at the moment, in the order of [`crate::limits::LimitKind`].
    pub fn group_credit(&self, group: GroupId, now: Time) -> Vec<Credit> {
        self.lock().groups.group_credit(group, now)
    }

    /// What each limit of a device has left at the moment.
    pub fn member_credit(&self, member: MemberId, now: Time) -> Vec<Credit> {
        self.lock().groups.member_credit(member, now)
    }

    /// How full each limit of a group is at the moment: what the next program goes on with.
    pub fn group_levels(&self, group: GroupId, now: Time) -> Vec<Level> {
        self.lock().groups.group_levels(group, now)
    }

    /// How full each limit of a device is at the moment.
    pub fn member_levels(&self, member: MemberId, now: Time) -> Vec<Level> {
        self.lock().groups.member_levels(member, now)
    }

    /// Goes on with a group where an earlier program left it, `elapsed_ns` nanoseconds ago (0 where nobody knows): what was
    /// earned meanwhile is there, and nothing that was given away is given again. Under other limits than then each bucket
    /// keeps its used share; a limit that there was not begins as a new one does, and a level that is higher already stays.
    pub fn resume_group(&self, group: GroupId, levels: &[Level], elapsed_ns: u64, now: Time) {
        self.call(&mut Vec::new(), |groups| groups.resume_group(group, levels, elapsed_ns, now));
    }

    /// The same for a device.
    pub fn resume_member(&self, member: MemberId, levels: &[Level], elapsed_ns: u64, now: Time) {
        self.call(&mut Vec::new(), |groups| groups.resume_member(member, levels, elapsed_ns, now));
    }

    pub(crate) fn add_queue(&self, member: MemberId, depth: u16, bell: Arc<dyn Doorbell>) -> QueueId {
        let mut state = self.lock();
        let queue = state.groups.add_queue(member, depth);
        state.bells.insert(queue, bell);
        queue
    }

    /// Whether nothing was changed since the pass was given.
    pub(crate) fn is_valid(&self, pass: Pass) -> bool {
        self.changes.has_none_since(pass)
    }

    /// Asks for requests in the order in which they came, under one lock, and hands the tags of those that go to `go`. What is prepaid
    /// for them is spent, and asked for anew.
    pub(crate) fn request(
        &self,
        bells: &mut Bells,
        queue: QueueId,
        requests: &[Request],
        mut leases: Option<&mut [Lease; 2]>,
        now: Time,
        mut go: impl FnMut(Tag),
    ) -> Asked {
        self.call(bells, |groups| {
            let mut is_one_held = false;
            let mut arrived = groups.arrived(queue, now);
            let mut next = requests;
            while let Some((&Request { tag, operation, bytes, since }, after)) = next.split_first() {
                next = after;
                let direction = operation.direction();
                let mut lease = leases.as_mut().map(|leases| &mut leases[direction as usize]);
                if lease.as_mut().is_some_and(|lease| lease.spend(operation, bytes, now)) {
                    go(tag);
                    continue;
                }
                let wanted = lease.as_mut().and_then(|lease| lease.wants(bytes, now));
                match arrived.request(tag, operation, bytes, since) {
                    Verdict::Go => {
                        go(tag);
                        if let Some(lease) = lease {
                            lease.take(wanted.and_then(|wanted| arrived.prepay(direction, wanted)), now);
                        }
                    }
                    Verdict::Held => {
                        is_one_held = true;
                        // What comes after it may not overtake it.
                        leases.take().into_iter().flatten().for_each(Lease::end);
                        next = &after[arrived.join(after)..];
                    }
                }
            }
            // Behind restart work that is yet to be collected requests are held without a limit, too: no pass to overtake them.
            let is_free = !is_one_held && arrived.are_free();
            Asked { is_one_held, pass: is_free.then(|| self.changes.pass()) }
        })
    }

    pub(crate) fn poll(&self, bells: &mut Bells, queue: QueueId, now: Time, collected: &mut Vec<Tag>) -> Option<Look> {
        let told = self.call(bells, |groups| groups.poll(queue, now, collected));
        #[cfg(test)]
        if planted(Fault::LookThenSay) {
            self.lock().groups.say_nothing_owed(queue);
        }
        told
    }

    pub(crate) fn retire(&self, queue: QueueId) -> Result<(), StillBusy> {
        let mut state = self.lock();
        state.groups.retire(queue)?;
        state.bells.remove(queue);
        Ok(())
    }

    /// One call under the lock, then, without it, the bells that it wants rung. `bells` is scratch space that the caller
    /// keeps, so that nothing is allocated.
    fn call<R>(&self, bells: &mut Bells, with: impl FnOnce(&mut Groups) -> R) -> R {
        let mut state = self.lock();
        let State { groups, bells: known } = &mut *state;
        let result = with(groups);
        bells.extend(groups.take_rings().filter_map(|queue| known.get(queue).cloned()));
        if planted(Fault::RingUnderLock) {
            bells.drain(..).for_each(|bell| bell.ring());
        }
        #[cfg(test)]
        let late = state.groups.take_late();
        drop(state);
        #[cfg(test)]
        if !late.is_empty() {
            let State { groups, bells: known } = &mut *self.lock();
            late.into_iter().for_each(|(queue, tag)| groups.post_late(queue, tag));
            bells.extend(groups.take_rings().filter_map(|queue| known.get(queue).cloned()));
        }
        for bell in bells.drain(..) {
            bell.ring();
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A poisoned lock means that an invariant broke on another thread: the state behind it cannot be trusted.
        self.state.lock().expect("no thread panics while it holds the throttle's lock")
    }

    #[cfg(test)]
    pub(crate) fn assert_invariants(&self) {
        self.lock().groups.assert_invariants();
    }
}

/// What came of asking.
pub(crate) struct Asked {
    /// A request was held.
    pub is_one_held: bool,
    /// Leave to ask no more.
    pub pass: Option<Pass>,
}

/// Scratch space for the bells of one call.
pub(crate) type Bells = Vec<Arc<dyn Doorbell>>;
