//! The outcomes of calls: verdicts, refusals, and what a member holds.

use thiserror::Error;

use crate::pass::Pass;
use crate::time::Time;

/// The decision on a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The request is charged; issue it now.
    Go,
    /// The request waits. Its tag comes out of a later poll of its queue, possibly the very next.
    Held,
}

/// The queue or member is still referred to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("still busy: {held} held, {restart_work} let go and not run, {queues} queues")]
pub struct StillBusy {
    /// Requests that wait for a limit.
    pub held: u32,
    /// Dispatched requests that their queue thread has not collected.
    pub restart_work: u32,
    /// Queues of the member that have not retired.
    pub queues: u32,
}

/// The group has members, or groups below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the group is in use by {children} devices and groups")]
pub struct GroupInUse {
    /// The number of members and groups directly in the group.
    pub children: u32,
}

/// The requests that a member holds at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldSummary {
    /// Requests that wait for a limit.
    pub count: u32,
    /// The arrival of the oldest held request.
    pub oldest: Option<Time>,
}

/// The next poll that is due from the thread of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    pub at: Time,
    /// The thread may sleep until `at` regardless of new requests: a read or write that arrives
    /// before `at` is held until then anyway.
    pub is_calm: bool,
}

/// The outcome of [`super::arrivals::Arrivals::decide`].
pub(crate) struct Asked {
    /// At least one request was held.
    pub is_one_held: bool,
    /// The pass of a queue without a limit above it.
    pub pass: Option<Pass>,
}
