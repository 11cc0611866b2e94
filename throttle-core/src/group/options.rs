//! The settings of groups and members, and changes to them.

use crate::charge::ChargeTable;
use crate::ids::{GroupId, MemberId, NodeId};
use crate::limits::Limits;
use crate::share::WEIGHT_DEFAULT;

/// The settings of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupOptions {
    /// The limits its members share; must be sound ([`Limits::violations`]).
    pub limits: Limits,
    /// The parent group, whose limits hold as well.
    pub parent: Option<GroupId>,
    /// The share of the group among the children of `parent`; 1 to [`crate::share::WEIGHT_MAX`].
    pub weight: u32,
    /// The charge of each operation. `None`: as in `parent`, or the default table without a parent.
    pub charges: Option<ChargeTable>,
}

impl Default for GroupOptions {
    fn default() -> Self {
        Self { limits: Limits::UNLIMITED, parent: None, weight: WEIGHT_DEFAULT, charges: None }
    }
}

/// The settings of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberOptions {
    /// Limits of the member, besides those of its group; must be sound ([`Limits::violations`]).
    pub limits: Limits,
    /// The group of the member.
    pub group: Option<GroupId>,
    /// The share of the member among the members and groups in its group; 1 to
    /// [`crate::share::WEIGHT_MAX`].
    pub weight: u32,
}

impl Default for MemberOptions {
    fn default() -> Self {
        Self { limits: Limits::UNLIMITED, group: None, weight: WEIGHT_DEFAULT }
    }
}

/// A change to a group or a member while requests wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The limits of a group. Each bucket keeps its used share, and the same limits again change nothing.
    GroupLimits(GroupId, Limits),
    /// The share of a group among its siblings; 1 to [`crate::share::WEIGHT_MAX`].
    GroupWeight(GroupId, u32),
    /// The charge of each operation in a group, for requests that arrive from now on. `None`: as in
    /// the parent.
    GroupCharges(GroupId, Option<ChargeTable>),
    /// The parent of a group. The group moves below it (`None`: to the top) with all its members
    /// and their held requests.
    GroupParent(GroupId, Option<GroupId>),
    /// The limits of a member; bucket levels behave as for [`Self::GroupLimits`].
    MemberLimits(MemberId, Limits),
    /// The share of a member in its group; 1 to [`crate::share::WEIGHT_MAX`].
    MemberWeight(MemberId, u32),
    /// The group of a member (`None`: no group). The member takes all its held requests along, so
    /// each request waits in exactly one tree.
    MemberGroup(MemberId, Option<GroupId>),
}

impl Change {
    pub(super) fn node(&self) -> NodeId {
        match *self {
            Self::GroupLimits(GroupId(node), _)
            | Self::GroupWeight(GroupId(node), _)
            | Self::GroupCharges(GroupId(node), _)
            | Self::GroupParent(GroupId(node), _)
            | Self::MemberLimits(MemberId(node), _)
            | Self::MemberWeight(MemberId(node), _)
            | Self::MemberGroup(MemberId(node), _) => node,
        }
    }

    /// The new parent, if this change sets one.
    pub(super) fn parent(&self) -> Option<Option<NodeId>> {
        match *self {
            Self::GroupParent(_, parent) | Self::MemberGroup(_, parent) => Some(parent.map(|GroupId(parent)| parent)),
            _ => None,
        }
    }
}
