//! A request at its arrival, and the caller's name for it.

use crate::cost::Operation;
use crate::time::Time;

/// The caller's name for a request while it is held; the throttle only hands it back.
///
/// ublk numbers tags from 0 to the queue's depth, in 16 bits; a simulation may hold millions of
/// requests.
pub type Tag = u32;

/// A request at its arrival.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Its tag in its queue.
    pub tag: Tag,
    /// The operation.
    pub operation: Operation,
    /// The length of its range. The charge table of its group decides on the cost
    /// ([`crate::charge`]).
    pub bytes: u64,
    /// The earliest instant at which the request may have arrived. A longer wait allows more timer
    /// slack.
    pub since: Time,
}
