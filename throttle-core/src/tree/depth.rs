//! The bound of the depth of a tree of groups.

/// The most levels of groups: bounds the work of one decision.
pub const DEPTH_MAX: usize = 8;

/// The most limits above a request: six for its member and for each level of groups.
pub(super) const LIMITS_MAX: usize = 6 * (DEPTH_MAX + 1);

/// The reason why a node cannot have a parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadParent {
    /// The parent is the node itself or below it.
    #[error("a group cannot stand below itself")]
    Cycle,
    /// More than [`DEPTH_MAX`] levels of groups.
    #[error("more than {DEPTH_MAX} groups above each other")]
    TooDeep,
}
