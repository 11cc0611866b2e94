//! Faults that tests plant, to show that the checks would find them.
//!
//! Each is a protection taken out: a wait, a test, a hand-over. A test plants one for its thread and expects a check to
//! fail. In any other build [`planted`] is `false`, and the compiler leaves nothing of it.

/// A protection that can be taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
pub(crate) enum Fault {
    /// Race (a), R1: a queue retires while restart work is outstanding.
    RetireWithRestartWork,
    /// Race (b): a queue collects its work, and only then, in a second critical section, says that it has looked.
    LookThenSay,
    /// Race (c): who lets a request go posts it after unlocking, when its queue may have gone.
    PostAfterUnlock,
    /// Race (d), R4, R5: the member that watched the clock leaves, and nobody else does.
    DrainWithoutRearm,
    /// I1: a request begins to wait, and nothing is armed.
    HoldWithoutRearm,
    /// I2: the owner of the deadline may be a queue that holds nothing.
    OwnerHoldsNothing,
    /// I3, U1: a deadline that has come nearer is not told to its owner.
    EarlierUntold,
    /// I4, R12: a member that holds nothing more keeps its place.
    PopWithoutSettle,
    /// I5: a request that was let go still counts as held.
    HeldNotCounted,
    /// I6: the newest goes first.
    NewestFirst,
    /// A request that comes behind another one waits without a look at what that changes.
    JoinUnseen,
    /// Who has let a request go keeps its place among those that may, whatever its limits say.
    PlacesKept,
    /// A line goes on as long as the limits let it, whoever else waits.
    RunOverOthers,
    /// I7: a member leaves while it has a queue.
    LeaveWithQueue,
    /// I8: bells are rung with the lock held.
    RingUnderLock,
    /// I9, R13: a change of group ends a drain.
    MoveEndsDrain,
    /// R6: what a draining member still holds waits for its turn.
    DrainHoldsOn,
    /// U4: a drain exempts the whole group.
    DrainExemptsGroup,
    /// A drain charges whatever it lets go, and its neighbours pay.
    DrainChargesAll,
    /// A removal that failed leaves its device without limits.
    DrainForEver,
    /// The changes of one step are made one after the other, and what is due goes in between.
    ApplyInSteps,
    /// A queue that no limit was above goes on without asking after it got one.
    PassForEver,
    /// What an earlier program gave away is forgotten.
    ResumeEmpty,
    /// Requests that wait for company do so however little their limit forgives.
    SlackWithoutEnd,
    /// The only request of its device waits for the company of others.
    LonelyWait,
    /// I3: a thread is counted on at an instant that it was not told.
    ToldInSecret,
    /// Who was told an instant is not rung for what happens before it.
    ToldIsEnough,
    /// A thread sleeps although what may come need not wait.
    CalmForAll,
}

#[cfg(test)]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Fault>> = const { std::cell::Cell::new(None) };
}

/// Whether this fault is planted. Never, outside of tests.
#[cfg(test)]
pub(crate) fn planted(fault: Fault) -> bool {
    PLANTED.get() == Some(fault)
}

/// Whether this fault is planted. Never, outside of tests.
#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn planted(_: Fault) -> bool {
    false
}

/// Plants a fault for this thread while `with` runs, and tells whether a check found it by panicking.
#[cfg(test)]
pub(crate) fn is_found(fault: Fault, with: impl FnOnce() + std::panic::UnwindSafe) -> bool {
    PLANTED.set(Some(fault));
    let found = std::panic::catch_unwind(with).is_err();
    PLANTED.set(None);
    found
}
