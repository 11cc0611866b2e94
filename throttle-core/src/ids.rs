//! The ids of groups, devices and queues. The id of a removed object names no later object.

use slotmap::new_key_type;

new_key_type! {
    /// A group or a member as a node of a tree.
    pub(crate) struct NodeId;
}

/// A group of members that share limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub(crate) NodeId);

/// A device as a member of a tree of groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(pub(crate) NodeId);

new_key_type! {
    /// One queue of a member, served by one thread.
    pub struct QueueId;
}
