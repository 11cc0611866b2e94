//! Random trees: one seed, one plan.
//!
//! Each flow has a nominal rate. Each limit has 0.3 to 1.6 times the need of the flows below it at
//! their nominal rates, so several levels, in bytes and in operations, may be the short one. All
//! rates are then scaled so that the tree passes at most 400 to 3000 requests a second: ratios make a
//! tree, and grants make the cost of a test.

use super::plan::{LimitAt, NANO, Plan, covers};
use super::random::Random;
use crate::cost::Direction;
use crate::limits::{Limit, LimitKind, SECOND_NS};

/// The properties of a plan that differ between the classes.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Each device reads and writes.
    pub both: bool,
    /// Limits have bursts.
    pub bursts: bool,
    /// All limits are of this kind, a total.
    pub only: Option<LimitKind>,
    /// The root alone has a limit.
    pub root_only: bool,
}

impl Shape {
    fn has(self, kind: LimitKind) -> bool {
        self.only.is_none_or(|only| only == kind)
    }
}

/// A weight: mostly 50 to 400, 1 to 10,000 in a tenth.
pub fn weight(random: &mut Random) -> u32 {
    let weight = if random.chance(10) { random.log_between(1.0, 10_000.0) } else { random.log_between(50.0, 400.0) };
    weight.round() as u32
}

/// A random plan with 1 to 4 levels of groups and 2 to 12 devices, of which each flow has a limit.
pub fn plan(random: &mut Random, shape: Shape) -> Plan {
    let mut plan = Plan::root("");
    grow(random, &mut plan, shape);
    let nominal: Vec<f64> = plan.flows.iter().map(|_| random.log_between(1.0, 10.0)).collect();
    limit(random, &mut plan, &nominal, shape);
    if random.chance(50) {
        add_twin(random, &mut plan);
    }
    scale(random, &mut plan);
    if shape.bursts {
        add_bursts(random, &mut plan);
    }
    assert!(plan.limits_all());
    plan
}

fn grow(random: &mut Random, plan: &mut Plan, shape: Shape) {
    let depth_max = random.between(1, 4) as usize;
    let groups = if depth_max == 1 { 0 } else { random.between(depth_max as u64 - 1, 6) };
    let mut groups_so_far = vec![0];
    for _ in 0..groups {
        let fits: Vec<usize> =
            groups_so_far.iter().copied().filter(|&group| plan.path(group).count() < depth_max).collect();
        let parent = fits[random.below(fits.len())];
        let weight = weight(random);
        groups_so_far.push(plan.group(parent, "", weight));
    }
    // Sizes within a factor of 16 in most trees, 512 B to 1 MiB in one of six.
    let is_wide = random.chance(16);
    let base = random.between(9, 20);
    for _ in 0..random.between(2, 12) {
        let parent = groups_so_far[random.below(groups_so_far.len())];
        let weight = weight(random);
        let device = plan.device(parent, "", weight);
        let size = |random: &mut Random| {
            let power =
                if is_wide { random.between(9, 20) } else { random.between(base.max(11) - 2, base.min(18) + 2) };
            1 << power.clamp(9, 20)
        };
        let directions = if shape.both { 2 } else { random.below(3) };
        if directions != 1 {
            let bytes = size(random);
            plan.reads(device, bytes);
        }
        if directions != 0 {
            let bytes = size(random);
            plan.writes(device, bytes);
        }
    }
}

/// The units that the flows below a node need of a limit at their nominal rates.
fn need(plan: &Plan, at: LimitAt, nominal: &[f64]) -> f64 {
    let takers = plan.flows.iter().zip(nominal).filter(|(flow, _)| plan.counts(at, **flow));
    takers.map(|(flow, rate)| plan.cost(at, flow.bytes) as f64 / NANO as f64 * rate).sum()
}

/// Rates are multiples of this until they are scaled, so that rounding changes no ratio.
const FINE: f64 = 1e6;

fn limit(random: &mut Random, plan: &mut Plan, nominal: &[f64], shape: Shape) {
    let (of_group, of_device) = if shape.root_only { (0, 0) } else { (random.between(5, 40), random.between(0, 15)) };
    for node in 0..plan.nodes.len() {
        if shape.only.is_none() && random.chance(15) {
            plan.nodes[node].limits.iops_size = 512 << random.between(0, 8);
        }
        let percent = if plan.nodes[node].is_device { of_device } else { of_group };
        for kind in LimitKind::ALL.into_iter().filter(|&kind| shape.has(kind)) {
            if random.chance(percent) {
                set(random, plan, LimitAt { node, kind }, nominal);
            }
        }
    }
    // A flow without a limit gets one: at the root for half of them, or at its device.
    for flow in plan.flows.clone() {
        let is_limited = plan.limits().iter().any(|&at| plan.counts(at, flow));
        if !is_limited {
            let node = if shape.root_only || random.chance(50) { 0 } else { flow.device };
            let kinds: Vec<LimitKind> =
                LimitKind::ALL.into_iter().filter(|&kind| covers(kind, flow.direction) && shape.has(kind)).collect();
            let kind = kinds[random.below(kinds.len())];
            set(random, plan, LimitAt { node, kind }, nominal);
        }
    }
    for node in &mut plan.nodes {
        if LimitKind::ALL.iter().all(|&kind| !kind.is_iops() || node.limits.get(kind).is_unlimited()) {
            node.limits.iops_size = 0;
        }
    }
}

fn set(random: &mut Random, plan: &mut Plan, at: LimitAt, nominal: &[f64]) {
    let need = need(plan, at, nominal);
    if need > 0.0 {
        let avg = (need * random.log_between(0.3, 1.6) * FINE).round().max(1.0) as u64;
        plan.nodes[at.node].limits.set(at.kind, Limit::average(avg));
    }
}

/// Adds a device that is the same as one without limits of its own.
fn add_twin(random: &mut Random, plan: &mut Plan) {
    let devices: Vec<usize> = (0..plan.nodes.len())
        .filter(|&node| plan.nodes[node].is_device && plan.nodes[node].limits.is_unlimited())
        .collect();
    if devices.is_empty() {
        return;
    }
    let device = devices[random.below(devices.len())];
    let twin = plan.device(plan.nodes[device].parent.expect("a device has a group"), "", plan.nodes[device].weight);
    for flow in plan.flows.clone().into_iter().filter(|flow| flow.device == device) {
        plan.flow(twin, flow.direction, flow.bytes);
    }
}

/// The most requests a second that can go at or below a node, in one direction.
fn most(plan: &Plan, node: usize, direction: Direction) -> f64 {
    let flows = || plan.flows.iter().filter(move |flow| flow.direction == direction);
    let own = flows().any(|flow| flow.device == node);
    let children = (0..plan.nodes.len()).filter(|&child| plan.nodes[child].parent == Some(node));
    let below: f64 = if own { f64::INFINITY } else { children.map(|child| most(plan, child, direction)).sum() };
    let limits = LimitKind::ALL.into_iter().map(|kind| LimitAt { node, kind });
    limits
        .filter(|&at| covers(at.kind, direction) && !plan.limit(at).is_unlimited())
        .map(|at| {
            let costs = flows().filter(|flow| plan.counts(at, **flow)).map(|flow| plan.cost(at, flow.bytes));
            costs.min().map_or(0.0, |least| plan.limit(at).avg as f64 / (least as f64 / NANO as f64))
        })
        .fold(below, f64::min)
}

fn scale(random: &mut Random, plan: &mut Plan) {
    let most: f64 = Direction::ALL.map(|direction| most(plan, 0, direction)).iter().sum();
    assert!(most.is_finite(), "every flow has a limit");
    let factor = random.log_between(400.0, 3000.0) / most;
    for at in plan.limits() {
        let avg = (plan.limit(at).avg as f64 * factor).round().max(1.0) as u64;
        plan.nodes[at.node].limits.set(at.kind, Limit::average(avg));
    }
}

/// Gives half of the limits a burst: a pool of 0.05 to 1 s, or a rate for 1 to 6 s.
fn add_bursts(random: &mut Random, plan: &mut Plan) {
    for at in plan.limits() {
        if random.chance(50) {
            let avg = plan.limit(at).avg;
            let max = (avg as f64 * random.log_between(1.2, 5.0)).ceil() as u64;
            let seconds = if random.chance(40) { random.log_between(0.05, 1.0) } else { random.log_between(1.1, 6.0) };
            let burst_length_ns = (seconds * SECOND_NS as f64) as u64;
            plan.nodes[at.node].limits.set(at.kind, Limit { avg, max, burst_length_ns });
        }
    }
}

/// Makes one to four changes of limits, weights and places. A plan in which a flow would have no
/// limit is not taken.
pub fn changed(random: &mut Random, plan: &Plan) -> Plan {
    loop {
        let mut to = plan.clone();
        for _ in 0..random.between(1, 4) {
            change(random, &mut to);
        }
        if to.limits_all() {
            return to;
        }
    }
}

fn change(random: &mut Random, plan: &mut Plan) {
    let node = random.below(plan.nodes.len());
    let limits = plan.limits();
    if limits.is_empty() {
        return;
    }
    match random.below(4) {
        0 => plan.nodes[node].weight = weight(random),
        1 if node > 0 => {
            let parents: Vec<usize> = (0..plan.nodes.len())
                .filter(|&parent| !plan.nodes[parent].is_device && plan.path(parent).all(|above| above != node))
                .collect();
            plan.nodes[node].parent = Some(parents[random.below(parents.len())]);
        }
        2 => {
            let at = limits[random.below(limits.len())];
            plan.nodes[at.node].limits.set(at.kind, Limit::UNLIMITED);
            let limits = &mut plan.nodes[at.node].limits;
            if LimitKind::ALL.iter().all(|&kind| !kind.is_iops() || limits.get(kind).is_unlimited()) {
                limits.iops_size = 0;
            }
        }
        _ => {
            let at = limits[random.below(limits.len())];
            let avg = (plan.limit(at).avg as f64 * random.log_between(0.4, 2.0)).round().max(1.0) as u64;
            plan.nodes[at.node].limits.set(at.kind, Limit::average(avg));
        }
    }
}
