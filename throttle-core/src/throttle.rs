//! The throttle's only lock, with all state that threads share behind it.
//!
//! ```text
//!   queue thread A ── Gate ─┐            ┌─ Groups   held requests, turns, restart work, deadlines
//!   queue thread B ── Gate ─┼─ Throttle ─┤
//!   device thread ──────────┘   (lock)   └─ bells    how to wake the thread of a queue
//! ```
//!
//! Access rules:
//! 1. `state` is locked for one call of [`Groups`] and for the look-up of the bells to ring. No
//!    thread blocks, waits or enters the kernel with the lock held (I8). With a single lock there
//!    is no lock order.
//! 2. Bells are rung after unlocking, so a ring may be late, or come after the queue has retired; a
//!    bell is an `Arc` of its own, and a late ring is harmless. A ring is never omitted: the call
//!    that sets `owes_poll` rings before it returns, unless the deadline that the thread knows has
//!    come.
//! 3. Membership of a queue, its restart work and posting to it are one critical section. So a
//!    retired queue gets no more restart work, and a queue with restart work cannot retire: without
//!    this wait, restart work would run on a member that is gone.
//! 4. `changes` is written with `state` locked and read without it: an unchanged count proves to a
//!    queue without limits above it that this is still so ([`crate::pass`]), and to a queue with a
//!    lease that its buckets are those that paid ([`crate::lease`]). Such a queue takes the lock
//!    once after each change.

use std::sync::Arc;

use slotmap::SecondaryMap;

use crate::group::{Asked, Change, GroupInUse, GroupOptions, Groups, HeldSummary, Look, MemberOptions, StillBusy};
use crate::ids::{GroupId, MemberId, QueueId};
use crate::lease::Lease;
use crate::limiter::{Credit, Level};
use crate::pass::{Changes, Pass};
use crate::planted::{Fault, planted};
use crate::request::{Request, Tag};
use crate::sync::{Mutex, MutexGuard};
use crate::time::Time;
use crate::tree::BadParent;

/// Wakes the thread that serves a queue.
///
/// Called from any thread, possibly late, twice, or after the queue has gone; a required call is
/// never omitted.
pub trait Doorbell: Send + Sync {
    /// Makes the thread of the queue take a turn soon. Must not block.
    fn ring(&self);
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
    /// A throttle without groups and members. It dispatches each request at its own instant.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// As [`Self::new`], with timer slack, for threads that sleep between polls: a request that
    /// waits behind others of its device may be dispatched late by half of its wait, at most 1 ms.
    /// At high rates several requests then share a timer and a wake-up. No limit loses rate by it.
    pub fn in_company() -> Arc<Self> {
        let throttle = Self::default();
        throttle.lock().groups.let_go_in_company();
        Arc::new(throttle)
    }

    /// Adds a group. The limits must be sound ([`crate::limits::Limits::violations`]).
    pub fn add_group(&self, options: &GroupOptions, now: Time) -> Result<GroupId, BadParent> {
        self.lock().groups.add_group(options, now)
    }

    /// Removes a group without members and groups below it.
    pub fn remove_group(&self, group: GroupId, now: Time) -> Result<(), GroupInUse> {
        self.lock().groups.remove_group(group, now)
    }

    /// Adds a device to a group, or alone with its own limits. The device is neither limited nor
    /// charged until [`Self::go_live`]: reads of the kernel during the start count for no group.
    pub fn join(&self, options: &MemberOptions, now: Time) -> MemberId {
        self.lock().groups.join(options, now)
    }

    /// Ends the start phase: from now on the device is limited and charged.
    pub fn go_live(&self, member: MemberId) {
        self.lock().groups.go_live(member);
    }

    /// Starts the drain before a removal: all held requests of the device are dispatched at once,
    /// each by the thread of its queue, and charged as far as that makes the neighbours wait at
    /// most 50 ms longer. Later requests of the device are neither limited nor charged, until
    /// [`Self::end_drain`]. A second call is harmless.
    pub fn drain(&self, member: MemberId, now: Time) {
        self.call(&mut Vec::new(), |groups| groups.drain(member, now));
    }

    /// Ends a drain after a failed removal: the device is limited and charged again. Requests that
    /// the drain dispatched stay dispatched. No effect on a device that does not drain.
    pub fn end_drain(&self, member: MemberId) {
        self.lock().groups.end_drain(member);
    }

    /// The requests that the device holds at the moment.
    pub fn held(&self, member: MemberId) -> HeldSummary {
        self.lock().groups.held(member)
    }

    /// Removes a device. Refused while one of its gates has not retired; after `Ok` no state refers
    /// to the device.
    pub fn leave(&self, member: MemberId, now: Time) -> Result<(), StillBusy> {
        self.lock().groups.leave(member, now)
    }

    /// Makes changes under load, all in one step: no request is dispatched between two changes, and
    /// the deadlines of waiting requests are computed anew at once, so no change strands a request.
    /// Returns `Err`, and changes nothing, if a group would get a parent that it cannot have. Every
    /// group and member named must exist.
    pub fn apply(&self, changes: &[Change], now: Time) -> Result<(), BadParent> {
        self.call(&mut Vec::new(), |groups| {
            if !planted(Fault::PassForEver) {
                self.changes.count();
            }
            groups.apply(changes, now)
        })
    }

    /// The credit of each limit of a group at the moment, in the order of
    /// [`crate::limits::LimitKind`].
    pub fn group_credit(&self, group: GroupId, now: Time) -> Vec<Credit> {
        self.lock().groups.group_credit(group, now)
    }

    /// The credit of each limit of a device at the moment.
    pub fn member_credit(&self, member: MemberId, now: Time) -> Vec<Credit> {
        self.lock().groups.member_credit(member, now)
    }

    /// The level of each limit of a group at the moment, from which a later process resumes.
    pub fn group_levels(&self, group: GroupId, now: Time) -> Vec<Level> {
        self.lock().groups.group_levels(group, now)
    }

    /// The level of each limit of a device at the moment.
    pub fn member_levels(&self, member: MemberId, now: Time) -> Vec<Level> {
        self.lock().groups.member_levels(member, now)
    }

    /// Resumes a group from the levels that an earlier process noted `elapsed_ns` nanoseconds ago
    /// (0 if that is unknown). Levels drain for that time, and no credit is granted twice. Under
    /// changed limits each bucket keeps its used share; a limit without a noted level starts as a
    /// new one, and a higher present level stays.
    pub fn resume_group(&self, group: GroupId, levels: &[Level], elapsed_ns: u64, now: Time) {
        self.call(&mut Vec::new(), |groups| {
            // Ends all leases: a refund would lower the levels that rise here.
            self.changes.count();
            groups.resume_group(group, levels, elapsed_ns, now);
        });
    }

    /// Resumes a device, as [`Self::resume_group`] a group.
    pub fn resume_member(&self, member: MemberId, levels: &[Level], elapsed_ns: u64, now: Time) {
        self.call(&mut Vec::new(), |groups| {
            self.changes.count();
            groups.resume_member(member, levels, elapsed_ns, now);
        });
    }

    pub(crate) fn add_queue(&self, member: MemberId, depth: u16, bell: Arc<dyn Doorbell>) -> QueueId {
        let mut state = self.lock();
        let queue = state.groups.add_queue(member, depth);
        state.bells.insert(queue, bell);
        queue
    }

    /// The present change count: a pass or a lease of that count is valid.
    pub(crate) fn pass(&self) -> Pass {
        self.changes.pass()
    }

    /// Decides on requests in arrival order, under one lock ([`Arrivals::decide`]).
    ///
    /// [`Arrivals::decide`]: crate::group::arrivals::Arrivals::decide
    pub(crate) fn request(
        &self,
        bells: &mut Bells,
        queue: QueueId,
        requests: &[Request],
        leases: Option<&mut [Lease; 2]>,
        now: Time,
        go: impl FnMut(Tag),
    ) -> Asked {
        self.call(bells, |groups| groups.arrived(queue, now).decide(requests, leases, self.changes.pass(), go))
    }

    pub(crate) fn poll(&self, bells: &mut Bells, queue: QueueId, now: Time, collected: &mut Vec<Tag>) -> Option<Look> {
        let told = self.call(bells, |groups| groups.poll(queue, now, collected));
        #[cfg(test)]
        if planted(Fault::LookThenSay) {
            self.lock().groups.say_nothing_owed(queue);
        }
        told
    }

    /// Removes a queue, whose leases end. Refused while the queue has work; the leases end all the
    /// same.
    pub(crate) fn retire(
        &self,
        bells: &mut Bells,
        queue: QueueId,
        leases: Option<&mut [Lease; 2]>,
    ) -> Result<(), StillBusy> {
        if let Some(leases) = leases {
            self.call(bells, |groups| {
                // The caller has no clock here: the latest instant that any thread has seen counts.
                groups.arrived(queue, Time::ZERO).end_leases(leases, self.changes.pass(), |_, _| true);
            });
        }
        let mut state = self.lock();
        state.groups.retire(queue)?;
        state.bells.remove(queue);
        Ok(())
    }

    /// Runs one call under the lock, then, without the lock, rings the bells that it asked for.
    /// `bells` is scratch space that the caller keeps, so a call allocates nothing.
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
        // A poisoned lock means that an invariant broke on another thread: the state behind it
        // cannot be trusted.
        self.state.lock().expect("no thread panics while it holds the throttle's lock")
    }

    #[cfg(test)]
    pub(crate) fn assert_invariants(&self) {
        self.lock().groups.assert_invariants();
    }
}

/// Scratch space for the bells of one call.
pub(crate) type Bells = Vec<Arc<dyn Doorbell>>;
