//! A tree of groups, devices and flows as plain data.
//!
//! A *flow* is one direction of one device, with requests of one size. Nodes are numbered; node 0 is
//! the root. A limit is named by its node and its kind.

use std::fmt;

use crate::cost::Direction;
use crate::limits::{Limit, LimitKind, Limits, SECOND_NS};
use crate::tests::world::limits;

/// A set of nodes, a bit for each.
pub type Nodes = u128;

/// 10⁻⁹ in units of a limit.
pub const NANO: u128 = 1_000_000_000;

#[derive(Clone, Debug)]
pub struct Node {
    pub parent: Option<usize>,
    pub weight: u32,
    pub limits: Limits,
    pub is_device: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct Flow {
    pub device: usize,
    pub direction: Direction,
    pub bytes: u64,
}

/// The name of one limit of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitAt {
    pub node: usize,
    pub kind: LimitKind,
}

#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub nodes: Vec<Node>,
    pub flows: Vec<Flow>,
}

impl Plan {
    /// A plan with a root group.
    pub fn root(text: &str) -> Self {
        let mut plan = Self::default();
        plan.add(None, text, 100, false);
        plan
    }

    fn add(&mut self, parent: Option<usize>, text: &str, weight: u32, is_device: bool) -> usize {
        self.nodes.push(Node { parent, weight, limits: limits(text), is_device });
        assert!(self.nodes.len() <= Nodes::BITS as usize, "a set of nodes has a bit for each");
        self.nodes.len() - 1
    }

    pub fn group(&mut self, parent: usize, text: &str, weight: u32) -> usize {
        self.add(Some(parent), text, weight, false)
    }

    pub fn device(&mut self, parent: usize, text: &str, weight: u32) -> usize {
        self.add(Some(parent), text, weight, true)
    }

    pub fn reads(&mut self, device: usize, bytes: u64) -> usize {
        self.flow(device, Direction::Read, bytes)
    }

    pub fn writes(&mut self, device: usize, bytes: u64) -> usize {
        self.flow(device, Direction::Write, bytes)
    }

    pub fn flow(&mut self, device: usize, direction: Direction, bytes: u64) -> usize {
        debug_assert!(self.nodes[device].is_device);
        self.flows.push(Flow { device, direction, bytes });
        self.flows.len() - 1
    }

    /// The node and all above it, from the node to the root.
    pub fn path(&self, node: usize) -> impl Iterator<Item = usize> {
        std::iter::successors(Some(node), |&node| self.nodes[node].parent)
    }

    pub fn path_set(&self, node: usize) -> Nodes {
        self.path(node).fold(0, |set, node| set | 1 << node)
    }

    /// All limits, in the order of nodes and kinds.
    pub fn limits(&self) -> Vec<LimitAt> {
        let of = |node: usize| LimitKind::ALL.map(|kind| LimitAt { node, kind });
        (0..self.nodes.len()).flat_map(of).filter(|&at| !self.limit(at).is_unlimited()).collect()
    }

    pub fn limit(&self, at: LimitAt) -> Limit {
        self.nodes[at.node].limits.get(at.kind)
    }

    /// Whether requests of the flow are charged to the limit.
    pub fn counts(&self, at: LimitAt, flow: Flow) -> bool {
        covers(at.kind, flow.direction) && self.path(flow.device).any(|node| node == at.node)
    }

    /// The charge of one request on a limit that it counts for, in nano-units: bytes on a bps limit;
    /// on an iops limit one operation, or `bytes / iops-size` operations if that is more.
    pub fn cost(&self, at: LimitAt, bytes: u64) -> u128 {
        let size = u128::from(self.nodes[at.node].limits.iops_size);
        let bytes = u128::from(bytes);
        match (at.kind.is_iops(), size) {
            (false, _) => bytes * NANO,
            (true, 0) => NANO,
            (true, size) => NANO.max((bytes * NANO).div_ceil(size)),
        }
    }

    /// Whether every flow has a limit on its path: a flow without one would never wait.
    pub fn limits_all(&self) -> bool {
        let limits = self.limits();
        self.flows.iter().all(|&flow| limits.iter().any(|&at| self.counts(at, flow)))
    }

    /// The flow in words: `7 reads 4096`.
    pub fn name(&self, flow: usize) -> String {
        let Flow { device, direction, bytes } = self.flows[flow];
        let verb = if direction == Direction::Read { "reads" } else { "writes" };
        format!("{device} {verb} {bytes}")
    }

    fn describe(&self, f: &mut fmt::Formatter<'_>, node: usize, depth: usize) -> fmt::Result {
        let Node { weight, limits, is_device, .. } = &self.nodes[node];
        let kind = if *is_device { "device" } else { "group" };
        write!(f, "{:indent$}{node} {kind} weight {weight}", "", indent = 2 + 2 * depth)?;
        for kind in LimitKind::ALL {
            let Limit { avg, max, burst_length_ns } = limits.get(kind);
            if avg > 0 {
                write!(f, ", {} {avg}", kind.name())?;
            }
            if max > 0 {
                write!(f, " max {max} for {} s", burst_length_ns as f64 / SECOND_NS as f64)?;
            }
        }
        if limits.iops_size > 0 {
            write!(f, ", iops-size {}", limits.iops_size)?;
        }
        for flow in self.flows.iter().filter(|flow| flow.device == node) {
            let verb = if flow.direction == Direction::Read { "reads" } else { "writes" };
            write!(f, "; {verb} {}", flow.bytes)?;
        }
        writeln!(f)?;
        let children = (0..self.nodes.len()).filter(|&child| self.nodes[child].parent == Some(node));
        children.into_iter().try_for_each(|child| self.describe(f, child, depth + 1))
    }
}

/// Whether a limit of this kind counts requests of this direction.
pub fn covers(kind: LimitKind, direction: Direction) -> bool {
    match kind {
        LimitKind::BpsTotal | LimitKind::IopsTotal => true,
        LimitKind::BpsRead | LimitKind::IopsRead => direction == Direction::Read,
        LimitKind::BpsWrite | LimitKind::IopsWrite => direction == Direction::Write,
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.describe(f, 0, 0)
    }
}
