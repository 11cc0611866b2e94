//! Faults that tests plant to show that the checks find them.
//!
//! Each fault removes one protection: a wait, a test, a hand-over. A test plants a fault for its
//! thread and expects a check to fail. In a build without tests [`planted`] is `false`, and the
//! compiler removes the branches.

/// A protection that a test can remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
pub(crate) enum Fault {
    /// Race (a), R1: a queue retires while restart work is outstanding.
    RetireWithRestartWork,
    /// Race (b): a queue collects its restart work, and clears `owes_poll` only later, in a second
    /// critical section.
    LookThenSay,
    /// Race (c): a dispatched request is posted after unlocking, when its queue may have retired.
    PostAfterUnlock,
    /// Race (d), R4, R5: the owner of the deadline drains, and no new owner is chosen.
    DrainWithoutRearm,
    /// I1: a request begins to wait, and no deadline is armed.
    HoldWithoutRearm,
    /// I2: the owner of the deadline may be a queue that holds nothing.
    OwnerHoldsNothing,
    /// I3, U1: the owner does not learn of an earlier deadline.
    EarlierUntold,
    /// I4, R12: a member without held requests stays queued in its group.
    PopWithoutSettle,
    /// I5: a dispatched request still counts as held.
    HeldNotCounted,
    /// I6: the newest request of a line is dispatched first.
    NewestFirst,
    /// A request joins a line without a check whether it changes the deadline.
    JoinUnseen,
    /// I7: a member leaves while it has a queue.
    LeaveWithQueue,
    /// I8: bells are rung with the lock held.
    RingUnderLock,
    /// I9, R13: a change of group ends a drain.
    MoveEndsDrain,
    /// R6: the held requests of a draining member wait for their turn.
    DrainHoldsOn,
    /// U4: a drain exempts the whole group.
    DrainExemptsGroup,
    /// A drain charges every dispatched request, and the neighbours pay.
    DrainChargesAll,
    /// A removal that failed leaves its device without limits.
    DrainForEver,
    /// The changes of one step are made one at a time, with dispatches in between.
    ApplyInSteps,
    /// A queue keeps its pass after it gets a limit.
    PassForEver,
    /// A lease is spent after a change, which may have replaced the buckets that paid it.
    LeaseOutlivesChange,
    /// A refund returns credit that has drained since the payment.
    RefundDrained,
    /// A refund returns credit that a change of limits has made void.
    RefundAfterChange,
    /// A resumed process forgets the levels of the earlier one.
    ResumeEmpty,
    /// The timer slack ignores the patience of the limits.
    SlackWithoutEnd,
    /// The only request of its device waits for the timer slack.
    LonelyWait,
    /// I3: a queue is recorded to know a deadline that its thread did not get.
    ToldInSecret,
    /// A thread that knows a deadline is not rung for work that is due earlier.
    ToldIsEnough,
    /// A thread sleeps until the deadline although a new request could pass at once.
    CalmForAll,
}

#[cfg(test)]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Fault>> = const { std::cell::Cell::new(None) };
}

/// Whether this fault is planted; always `false` in builds without tests.
#[cfg(test)]
pub(crate) fn planted(fault: Fault) -> bool {
    PLANTED.get() == Some(fault)
}

/// Whether this fault is planted; always `false` in builds without tests.
#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn planted(_: Fault) -> bool {
    false
}

/// Plants a fault for this thread while `with` runs; returns whether a check found it by panicking.
#[cfg(test)]
pub(crate) fn is_found(fault: Fault, with: impl FnOnce() + std::panic::UnwindSafe) -> bool {
    PLANTED.set(Some(fault));
    let found = std::panic::catch_unwind(with).is_err();
    PLANTED.set(None);
    found
}
