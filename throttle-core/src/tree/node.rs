//! The nodes of a tree, the lines of its members, and what each limit counts.

use std::collections::{BTreeMap, BTreeSet};

use super::order::{Order, Scale, Standing};
use crate::charge::ChargeTable;
use crate::cost::Direction;
use crate::heap::Heap;
use crate::held::Line;
use crate::ids::NodeId;
use crate::limiter::Limiter;
use crate::limits::{LimitKind, Limits};
use crate::share::WEIGHT_DEFAULT;
use crate::time::Time;

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub parent: Option<NodeId>,
    pub weight: u32,
    pub scale: Scale,
    pub limiter: Limiter,
    /// Requests held at or below this node.
    pub held: u32,
    /// The weights of the children that hold requests.
    pub weights_waiting: u64,
    /// The limits at the node and above it, from the root down. The index of a limit is the same at
    /// all nodes below the limit.
    pub limits: Vec<LimitId>,
    /// The number of `limits` that belong to nodes above; the rest belongs to the node.
    pub above: usize,
    pub own: Vec<LimitState>,
    /// The order of the node's children at each of `limits`.
    pub orders: Vec<Order>,
    /// The node's standing in the orders of its parent.
    pub standings: Vec<Standing>,
    pub kind: Kind,
}

/// A limit of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LimitId {
    pub node: NodeId,
    pub kind: LimitKind,
}

/// The lines that a limit counts.
#[derive(Clone, Debug, Default)]
pub(super) struct LimitState {
    /// Lines with a held request that is charged to the limit.
    pub counted: u32,
    /// Lines with a held request whose main limit is this one. Such a line is also in `counted`.
    pub mains: u32,
    /// The lines that wait in the order of the limit.
    pub waiters: u32,
    pub reserved: Option<Reservation>,
    /// Until this instant the order dispatches nothing: its first lines wait for the closed limit
    /// that the line of the reservation waits for.
    pub blocked_until: Time,
    /// The place among the timers of the tree, if lines wait.
    pub timer: Option<u32>,
}

/// A limit that is kept for the first line of its order while this line waits for a second, closed
/// limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reservation {
    pub line: LineId,
    pub until: Time,
}

/// A line of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LineId {
    pub member: NodeId,
    pub direction: Direction,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    Group(Group),
    Member([Flow; Direction::ALL.len()]),
}

#[derive(Clone, Debug, Default)]
pub(super) struct Group {
    pub children: BTreeSet<NodeId>,
    pub charges: Option<ChargeTable>,
}

/// A line and its part in the orders.
#[derive(Clone, Debug, Default)]
pub(super) struct Flow {
    pub line: Line,
    /// The line's standing in the orders of its member.
    pub standings: Vec<Standing>,
    /// The limits that the first request is charged to, a bit for each index; 0 if none waits.
    pub charged: u64,
    /// The index of the main limit, while a request waits that is charged to a limit.
    pub main: usize,
    /// The index of the limit in whose order the line waits: the main limit, or a closed one at
    /// which the line is parked.
    pub waits_at: Option<usize>,
    /// The instant of the last look at the line, and the looks at that instant.
    pub looked_at: (Time, u8),
}

/// What only a whole tree has.
#[derive(Clone, Debug, Default)]
pub(super) struct Root {
    /// The limits in whose orders lines wait, each with the instant at which its first line is due.
    pub timers: Heap<Time, (NodeId, usize)>,
    /// Lines whose first request is charged to no limit: due at once.
    pub unlimited: Vec<LineId>,
    /// The patience of each limited node of the tree ([`Limiter::patience_ns`]), with the number of
    /// such nodes.
    pub patience_ns: BTreeMap<u64, u32>,
}

impl Flow {
    pub fn is_parked(&self) -> bool {
        self.waits_at.is_some_and(|at| at != self.main)
    }
}

impl Node {
    pub fn new(limits: &Limits, weight: u32, kind: Kind) -> Self {
        Self {
            parent: None,
            weight,
            scale: Scale::of(weight),
            limiter: Limiter::new(limits),
            held: 0,
            weights_waiting: 0,
            limits: Vec::new(),
            above: 0,
            own: Vec::new(),
            orders: Vec::new(),
            standings: Vec::new(),
            kind,
        }
    }

    pub fn is_group(&self) -> bool {
        matches!(self.kind, Kind::Group(_))
    }

    pub fn group(&mut self) -> &mut Group {
        match &mut self.kind {
            Kind::Group(group) => group,
            Kind::Member(_) => unreachable!("a member has no children"),
        }
    }

    pub fn flow(&self, direction: Direction) -> &Flow {
        match &self.kind {
            Kind::Member(flows) => &flows[direction as usize],
            Kind::Group(_) => unreachable!("a group holds nothing itself"),
        }
    }

    pub fn flow_mut(&mut self, direction: Direction) -> &mut Flow {
        match &mut self.kind {
            Kind::Member(flows) => &mut flows[direction as usize],
            Kind::Group(_) => unreachable!("a group holds nothing itself"),
        }
    }

    /// The standing of a child that is a line of this member.
    pub fn line_standing(&mut self, line: usize, limit: usize) -> &mut Standing {
        &mut self.flow_mut(Direction::ALL[line]).standings[limit]
    }

    /// The weights of the children that wait.
    pub fn weights(&self) -> f64 {
        match &self.kind {
            Kind::Member(flows) => {
                let waiting = flows.iter().filter(|flow| flow.line.first().is_some()).count();
                waiting as f64 * f64::from(WEIGHT_DEFAULT)
            }
            Kind::Group(_) => self.weights_waiting as f64,
        }
    }
}
