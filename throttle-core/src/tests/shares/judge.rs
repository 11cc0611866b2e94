//! The definition of a fair window, and the judge of it.
//!
//! A request waits for a limit, and all flows that wait for a limit share it: at each level of the
//! tree by weight, and between the two directions of a device equally. A flow can complain of a
//! window if it had requests waiting throughout and no limit justifies its rate. A limit L of the
//! node g on the path of the flow justifies the rate if L is *used up*, and if each node n on the
//! path below g has at least its due of L: `take(n) ≥ due(n)`. Here `take(n)` is the part of L that
//! all flows at or below n were granted. The due of a child n of p is `weight(n) · level`, at the
//! level at which n and its siblings together use `take(p)` and no sibling counts for more than it
//! took: `due(n) + Σ min(take(s), weight(s) · level) = take(p)`. A limit with rate to spare
//! justifies nothing. This is the tree form of "no justified complaints" (Dolev et al., 2012).
//!
//! ```text
//!   root: bps-total 100, bps-read 1      device A reads and writes, device B writes
//!   granted   A reads 0.66   A writes 33.1   B writes 66.2
//!   A writes  bps-total is used up; A took 33.8, B 66.2 of 100 → level 50, due(A) = 50 > 33.8: a complaint
//!   A reads   bps-read is not used up (0.66 of 1), bps-total gives A less than 50: a complaint
//!   fair      A reads 1.0, A writes 49.0, B writes 50.0
//! ```
//!
//! Tolerances, all for the granularity of requests and of timers, none for a wrong ratio:
//! * used up: granted ≥ rate · T − one largest request − 1 %. The window may end while the bucket
//!   drains the debt of a request, and a plain rate may start the window up to 100 ms ahead: 1 % of
//!   10 s, and less than the 5 % below of any window of 4 s. A request that this limit would let go
//!   may wait, at each further limit on its path, for one request of each competitor. This limit
//!   loses its rate for as much of that wait as exceeds its headroom (100 ms): a device of 2.8 kB/s
//!   beside requests of 512 KiB at 175 kB/s waits 3 s for each of its requests, at any scheduler.
//! * due: 5 %, and two requests, the largest of the competitors at that level. Start-time fair
//!   queueing keeps two children within one largest request of each, once at each end of a window.

use std::fmt;

use super::plan::{LimitAt, NANO, Nodes, Plan};
use crate::limits::Limit;

/// A set of flows, a bit for each.
type Flows = u128;

/// The grants of a window, and the rates of its limits.
pub struct Window<'a> {
    pub plan: &'a Plan,
    pub ns: u64,
    /// Requests granted to each flow.
    pub granted: &'a [u64],
    /// Whether the flow had requests waiting throughout.
    pub backlogged: &'a [bool],
    /// The rate of each limit, in the order of [`Plan::limits`]; `None` while a burst lets any rate
    /// pass.
    pub rates: &'a [Option<u64>],
}

/// One level of a limit, from the parent `p` to its child on the path of a flow.
#[derive(Clone, Debug)]
pub struct Level {
    pub node: usize,
    pub take: f64,
    pub due: f64,
    /// The take of the parent.
    pub all: f64,
    /// The due of the parent if that is more than its take: within the tolerance, or the take of a
    /// flow that is due less than a request in the window. Pauses are explained by this.
    entitled: f64,
    /// The part of the child in what the parent is entitled to, if it takes no more than the
    /// siblings of its weight. A sibling with less than half of its part by weight is at a limit of
    /// its own. Unlike `due`, this is not raised by what the child itself took too much.
    lasting: f64,
    /// The largest request of the competitors.
    pub largest: f64,
    /// One largest request of each competitor, together.
    round: f64,
    /// The flows of each competitor.
    siblings: Vec<Flows>,
}

impl Level {
    fn is_fair(&self) -> bool {
        self.take >= self.due * 0.95 - 2.0 * self.largest
    }
}

/// The position of one flow at one limit on its path.
#[derive(Clone, Debug)]
pub struct Position {
    /// The number of the limit in [`Plan::limits`].
    limit: usize,
    pub at: LimitAt,
    pub granted: f64,
    /// `rate · T`.
    pub allowed: f64,
    pub is_used_up: bool,
    /// One request of the flow.
    pub cost: f64,
    /// The largest request of all flows that count for the limit.
    largest: f64,
    /// From the node of the limit down to the flow.
    pub levels: Vec<Level>,
}

impl Position {
    pub fn justifies(&self) -> bool {
        self.is_used_up && self.levels.iter().all(Level::is_fair)
    }

    /// The longest pause that this limit explains to a flow, in nanoseconds: twice the interval
    /// between two requests at the due rate, and one largest request of each competitor on each
    /// level, at the rate of that level. A fair level may have 5 % less than its due.
    fn pause_ns(&self, ns: u64) -> f64 {
        let due = self.levels.last().map_or(0.0, |level| level.lasting);
        ns as f64 * (2.0 * self.cost / due + rounds(&self.levels)) / 0.95
    }
}

/// One request of each competitor on each level, as a part of the window.
fn rounds(levels: &[Level]) -> f64 {
    levels.iter().filter(|level| level.round > 0.0).map(|level| level.round / level.entitled).sum()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No limit on the path is used up: rate is lost.
    Idle,
    /// A limit is used up, and it does not justify the rate.
    Unfair,
}

/// A flow whose rate no limit justifies.
#[derive(Clone, Debug)]
pub struct Complaint {
    pub flow: usize,
    pub name: String,
    pub reason: Reason,
    pub positions: Vec<Position>,
}

/// The judge of one window.
pub struct Judge<'a> {
    window: &'a Window<'a>,
    limits: Vec<LimitAt>,
    /// The nodes on the path of each flow.
    paths: Vec<Nodes>,
    /// The children of each node.
    children: Vec<Nodes>,
    /// For each limit, the flows that count for it, and the cost of a request of each flow.
    members: Vec<Flows>,
    costs: Vec<Vec<f64>>,
    /// The positions of each flow, at each limit that it counts for.
    positions: Vec<Vec<Position>>,
}

impl<'a> Judge<'a> {
    pub fn new(window: &'a Window<'a>) -> Self {
        let plan = window.plan;
        let paths = plan.flows.iter().map(|flow| plan.path_set(flow.device)).collect();
        let mut children = vec![0; plan.nodes.len()];
        for (child, node) in plan.nodes.iter().enumerate() {
            node.parent.into_iter().for_each(|parent| children[parent] |= 1 << child);
        }
        let limits = plan.limits();
        let of_flows = |at: LimitAt| {
            let counted = plan.flows.iter().enumerate().filter(move |(_, flow)| plan.counts(at, **flow));
            counted.fold(0, |set: Flows, (index, _)| set | 1 << index)
        };
        let members = limits.iter().map(|&at| of_flows(at)).collect();
        let costs_of = |at| plan.flows.iter().map(|flow| plan.cost(at, flow.bytes) as f64 / NANO as f64).collect();
        let costs = limits.iter().map(|&at| costs_of(at)).collect();
        let mut judge = Self { window, limits, paths, children, members, costs, positions: Vec::new() };
        let mut positions: Vec<_> = (0..plan.flows.len()).map(|flow| judge.positions(flow)).collect();
        judge.see_what_is_used_up(&mut positions);
        judge.positions = positions;
        judge
    }

    /// Marks the limits that are used up.
    fn see_what_is_used_up(&self, positions: &mut [Vec<Position>]) {
        for (limit, &rate) in self.window.rates.iter().enumerate() {
            let Some(rate) = rate else { continue };
            let lost = self.idle_s(limit, positions) * rate as f64;
            for position in positions.iter_mut().flatten().filter(|position| position.limit == limit) {
                position.is_used_up = position.granted >= position.allowed * 0.99 - position.largest - lost;
            }
        }
    }

    /// The time for which a limit may be empty although its flows have requests, in seconds.
    ///
    /// Each time, each of its flows waits for another limit: at most a round of those competitors
    /// that are not charged to this limit, as the rest would use it. The shortest such wait of a flow
    /// counts, less the headroom of the limit. A request of this limit ends the wait, and a further
    /// wait begins with a further round, which bounds their number.
    fn idle_s(&self, limit: usize, positions: &[Vec<Position>]) -> f64 {
        let window_s = self.window.ns as f64 / 1e9;
        let own = || (0..positions.len()).filter(|&flow| self.counts(limit, flow));
        let round_s = |flow: usize| {
            let elsewhere = positions[flow].iter().filter(|position| position.limit != limit);
            elsewhere.map(|position| self.round_beside(limit, position)).sum::<f64>() * window_s
        };
        let round_s = own().filter(|&flow| self.window.backlogged[flow]).map(round_s).fold(f64::INFINITY, f64::min);
        let excess_s = round_s - headroom_s(self.window.plan.limit(self.limits[limit]));
        if !round_s.is_finite() || excess_s <= 0.0 {
            return 0.0;
        }
        let granted: u64 = own().map(|flow| self.window.granted[flow]).sum();
        excess_s * (granted as f64 + 1.0).min(window_s / round_s)
    }

    /// One request of each competitor at `position` that is not charged to `limit`, as a part of the
    /// window.
    fn round_beside(&self, limit: usize, position: &Position) -> f64 {
        let of_level = |level: &Level| {
            let largest = |&flows: &Flows| {
                let beside = (0..self.paths.len()).filter(|&flow| (flows & !self.members[limit]) >> flow & 1 == 1);
                beside.map(|flow| self.costs[position.limit][flow]).fold(0.0, f64::max)
            };
            let round: f64 = level.siblings.iter().map(largest).sum();
            if round > 0.0 { round / level.entitled } else { 0.0 }
        };
        position.levels.iter().map(of_level).sum()
    }

    /// The complaints of all flows that were backlogged.
    pub fn complaints(&self) -> Vec<Complaint> {
        let backlogged = (0..self.paths.len()).filter(|&flow| self.window.backlogged[flow]);
        backlogged.filter_map(|flow| self.complaint(flow)).collect()
    }

    fn complaint(&self, flow: usize) -> Option<Complaint> {
        let positions = &self.positions[flow];
        if positions.iter().any(Position::justifies) {
            return None;
        }
        let is_idle = !positions.iter().any(|position| position.is_used_up);
        let reason = if is_idle { Reason::Idle } else { Reason::Unfair };
        Some(Complaint { flow, name: self.window.plan.name(flow), reason, positions: positions.clone() })
    }

    /// The longest pause of a backlogged flow that its used-up limits explain. The request waits for
    /// the due interval of its slowest limit, and at each limit for a round of the competitors.
    pub fn pause_ns(&self, flow: usize) -> f64 {
        let positions = &self.positions[flow];
        positions.iter().filter(|position| position.is_used_up).map(|position| position.pause_ns(self.window.ns)).sum()
    }

    /// The position of a flow at each limit that it counts for.
    fn positions(&self, flow: usize) -> Vec<Position> {
        let own = (0..self.limits.len()).filter(|&limit| self.counts(limit, flow));
        own.map(|limit| self.position(limit, flow)).collect()
    }

    fn counts(&self, limit: usize, flow: usize) -> bool {
        self.members[limit] >> flow & 1 == 1
    }

    fn position(&self, limit: usize, flow: usize) -> Position {
        let plan = self.window.plan;
        let (at, rate) = (self.limits[limit], self.window.rates[limit]);
        // Each flow that counts for the limit: its number, its cost, its take.
        let costs = &self.costs[limit];
        let takers: Vec<(usize, f64, f64)> = (0..plan.flows.len())
            .filter(|&other| self.counts(limit, other))
            .map(|other| (other, costs[other], costs[other] * self.window.granted[other] as f64))
            .collect();
        let granted = takers.iter().map(|taker| taker.2).sum();
        let largest = takers.iter().map(|taker| taker.1).fold(0.0, f64::max);
        let allowed = rate.map_or(f64::INFINITY, |rate| rate as f64 * self.window.ns as f64 / 1e9);
        let mut levels = Vec::new();
        let mut path: Vec<usize> = plan.path(plan.flows[flow].device).take_while(|&node| node != at.node).collect();
        path.push(at.node);
        // From the node of the limit down to the device.
        path.reverse();
        for (place, &parent) in path.iter().enumerate() {
            // Competitors below `parent`: the children, or at a device its directions.
            let child = path.get(place + 1).copied();
            let mut competitors: Vec<Competitor> = Vec::new();
            for &(taker, cost, take) in takers.iter().filter(|taker| self.paths[taker.0] >> parent & 1 == 1) {
                let key = match child {
                    Some(_) => (self.paths[taker] & self.children[parent]).trailing_zeros() as usize,
                    None => taker,
                };
                let index = competitors.iter().position(|competitor| competitor.key == key).unwrap_or_else(|| {
                    let weight = if child.is_some() { plan.nodes[key].weight.into() } else { 1.0 };
                    competitors.push(Competitor { key, weight, take: 0.0, largest: 0.0, flows: 0 });
                    competitors.len() - 1
                });
                competitors[index].take += take;
                competitors[index].flows |= 1 << taker;
                competitors[index].largest = competitors[index].largest.max(cost);
            }
            let entitled = levels.last().map_or(0.0, |above: &Level| above.lasting);
            let node = child.unwrap_or(plan.flows[flow].device);
            levels.push(level(child.unwrap_or(flow), node, &competitors, entitled));
        }
        Position { limit, at, granted, allowed, is_used_up: false, cost: costs[flow], largest, levels }
    }
}

/// The time for which a limit loses no rate while no request goes: that in which a full bucket
/// drains, 100 ms without a burst and in a burst longer than 1 s.
fn headroom_s(limit: Limit) -> f64 {
    let Limit { avg, max, burst_length_ns } = limit;
    let pool_s = max as f64 * burst_length_ns as f64 / 1e9 / avg as f64;
    if max > 0 { pool_s.min(0.1) } else { 0.1 }
}

/// A child of a node, or a direction of a device, at one limit.
#[derive(Clone, Copy, Debug)]
struct Competitor {
    key: usize,
    weight: f64,
    take: f64,
    largest: f64,
    flows: Flows,
}

fn level(key: usize, node: usize, competitors: &[Competitor], entitled: f64) -> Level {
    let own = competitors.iter().find(|competitor| competitor.key == key).expect("the flow counts for the limit");
    let siblings = || competitors.iter().filter(|competitor| competitor.key != key);
    let all: f64 = competitors.iter().map(|competitor| competitor.take).sum();
    let entitled = entitled.max(all);
    let due = own.weight * water_level(own.weight, siblings().map(|other| (other.weight, other.take)), all);
    let weights: f64 = competitors.iter().map(|competitor| competitor.weight).sum();
    let (mut rest, mut shared_by) = (entitled, weights);
    for sibling in siblings().filter(|sibling| sibling.take < entitled * sibling.weight / weights / 2.0) {
        rest -= sibling.take;
        shared_by -= sibling.weight;
    }
    let lasting = own.weight * rest / shared_by;
    let largest = competitors.iter().map(|competitor| competitor.largest).fold(0.0, f64::max);
    let (round, siblings) =
        (siblings().map(|sibling| sibling.largest).sum(), siblings().map(|sibling| sibling.flows).collect());
    Level { node, take: own.take, due, all, entitled, lasting, largest, round, siblings }
}

/// The level at which `weight · level + Σ min(take, weight · level)` over the siblings is `all`.
fn water_level(weight: f64, siblings: impl Iterator<Item = (f64, f64)>, all: f64) -> f64 {
    let mut siblings: Vec<(f64, f64)> = siblings.collect();
    // The sibling that took least by weight is the first to be satisfied.
    siblings.sort_by(|a, b| (a.1 / a.0).total_cmp(&(b.1 / b.0)));
    let mut rest = all;
    let mut weights = weight + siblings.iter().map(|sibling| sibling.0).sum::<f64>();
    for (own, take) in siblings {
        if take / own >= rest / weights {
            break;
        }
        rest -= take;
        weights -= own;
    }
    rest / weights
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}: flow {} ({})", self.reason, self.flow, self.name)?;
        for Position { at, granted, allowed, is_used_up, levels, .. } in &self.positions {
            let state = if *is_used_up { "used up" } else { "not used up" };
            writeln!(f, "    {} of {}: granted {granted:.1} of {allowed:.1}, {state}", at.kind.name(), at.node)?;
            for Level { node, take, due, all, largest, .. } in levels {
                writeln!(
                    f,
                    "        at {node}: took {take:.1} of {all:.1}, due {due:.1}, largest request {largest:.1}"
                )?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The complaints of a window of 10 s in which all flows were backlogged, as flow and reason.
    fn complaints(plan: &Plan, granted: &[u64]) -> Vec<(usize, Reason)> {
        let rates: Vec<_> = plan.limits().iter().map(|&at| Some(plan.limit(at).avg)).collect();
        let backlogged = vec![true; granted.len()];
        let window = Window { plan, ns: 10_000_000_000, granted, backlogged: &backlogged, rates: &rates };
        Judge::new(&window).complaints().iter().map(|complaint| (complaint.flow, complaint.reason)).collect()
    }

    #[test]
    fn equal_parts_of_one_limit_are_fair_and_unequal_ones_are_not() {
        let mut plan = Plan::root("iops-total=100");
        for _ in 0..2 {
            let device = plan.device(0, "", 100);
            plan.reads(device, 4096);
        }
        assert_eq!(complaints(&plan, &[500, 500]), []);
        // 5 % of 500, and two requests: 473 is the least that passes.
        assert_eq!(complaints(&plan, &[473, 527]), []);
        assert_eq!(complaints(&plan, &[472, 528]), [(0, Reason::Unfair)]);
    }

    #[test]
    fn limit_with_rate_to_spare_justifies_nothing() {
        let mut plan = Plan::root("iops-total=100");
        let device = plan.device(0, "", 100);
        plan.reads(device, 4096);
        // 1 % of 1000, and one request: 989 is the least that counts as used up.
        assert_eq!(complaints(&plan, &[989]), []);
        assert_eq!(complaints(&plan, &[988]), [(0, Reason::Idle)]);
    }

    #[test]
    fn weights_count_on_each_level() {
        // h (weight 200) and c (100) share 900: 600 and 300; a (100) and b (300) share the 600.
        let mut plan = Plan::root("iops-total=90");
        let h = plan.group(0, "", 200);
        for (parent, weight) in [(h, 100), (h, 300), (0, 100)] {
            let device = plan.device(parent, "", weight);
            plan.writes(device, 4096);
        }
        assert_eq!(complaints(&plan, &[150, 450, 300]), []);
        assert_eq!(complaints(&plan, &[225, 375, 300]), [(1, Reason::Unfair)]);
        assert_eq!(complaints(&plan, &[100, 300, 500]), [(0, Reason::Unfair), (1, Reason::Unfair)]);
    }

    #[test]
    fn flow_at_its_own_limit_lends_the_rest_to_its_siblings() {
        let mut plan = Plan::root("iops-total=90");
        for own in ["iops-read=10", "", ""] {
            let device = plan.device(0, own, 100);
            plan.reads(device, 4096);
        }
        assert_eq!(complaints(&plan, &[100, 400, 400]), []);
        assert_eq!(complaints(&plan, &[100, 500, 300]), [(2, Reason::Unfair)]);
        // 300 each would be fair without the limit of the first, which is exceeded here: the meter
        // sees that, the judge only that no flow has less than its due.
        assert_eq!(complaints(&plan, &[300, 300, 300]), []);
    }

    #[test]
    fn write_held_by_a_read_is_complained_of() {
        // Group bps-write 4 MB/s; A has bps-read 4 MB/s of its own and takes every write.
        let mut plan = Plan::root("bps-write=4000000");
        let a = plan.device(0, "bps-read=4000000", 100);
        plan.reads(a, 65_536);
        plan.writes(a, 65_536);
        for _ in 0..2 {
            let device = plan.device(0, "", 100);
            plan.writes(device, 65_536);
        }
        assert_eq!(complaints(&plan, &[610, 610, 0, 0]), [(2, Reason::Unfair), (3, Reason::Unfair)]);
        assert_eq!(complaints(&plan, &[610, 204, 203, 203]), []);
    }

    #[test]
    fn directions_of_a_device_share_a_total_equally() {
        let mut plan = Plan::root("");
        let device = plan.device(0, "bps-total=1000000", 100);
        plan.reads(device, 10_000);
        plan.writes(device, 1_000);
        assert_eq!(complaints(&plan, &[500, 5000]), []);
        assert_eq!(complaints(&plan, &[900, 1000]), [(1, Reason::Unfair)]);
    }

    #[test]
    fn example_of_the_head_is_judged_as_it_says() {
        // In units of 10 kB requests, for 10 s: bps-read 1 MB/s, bps-total 100 MB/s.
        let mut plan = Plan::root("bps-total=100000000 bps-read=1000000");
        let a = plan.device(0, "", 100);
        plan.reads(a, 10_000);
        plan.writes(a, 10_000);
        let b = plan.device(0, "", 100);
        plan.writes(b, 10_000);
        assert_eq!(complaints(&plan, &[660, 33_140, 66_200]), [(0, Reason::Unfair), (1, Reason::Unfair)]);
        assert_eq!(complaints(&plan, &[1000, 49_000, 50_000]), []);
    }

    #[test]
    fn larger_request_counts_as_several_operations_of_a_limit_with_a_size() {
        // iops-size 4096: a request of 16 KiB is 4 operations, so 2000 of 500 and 500 of 2000 are half each.
        let mut plan = Plan::root("iops-total=400 iops-size=4096");
        for bytes in [4096, 16_384] {
            let device = plan.device(0, "", 100);
            plan.reads(device, bytes);
        }
        assert_eq!(complaints(&plan, &[2000, 500]), []);
        assert_eq!(complaints(&plan, &[800, 800]), [(0, Reason::Unfair)]);
    }

    #[test]
    fn flow_that_paused_has_no_complaint_and_counts_for_what_it_took() {
        let mut plan = Plan::root("iops-total=90");
        for _ in 0..3 {
            let device = plan.device(0, "", 100);
            plan.reads(device, 4096);
        }
        let rates = [Some(90)];
        let backlogged = [false, true, true];
        let judged = |granted: &[u64]| {
            let window = Window { plan: &plan, ns: 10_000_000_000, granted, backlogged: &backlogged, rates: &rates };
            Judge::new(&window).complaints().len()
        };
        assert_eq!(judged(&[100, 400, 400]), 0);
        assert_eq!(judged(&[100, 500, 300]), 1);
    }

    #[test]
    fn limit_that_loses_rate_to_a_long_round_at_another_limit_counts_as_used_up() {
        // b may send 1 KiB a second; a request of a keeps the root for 1 s. b waits for it each time,
        // 0.9 s longer than its headroom, so b sends each 1.9 s.
        let mut plan = Plan::root("bps-total=1048576");
        let a = plan.device(0, "", 100);
        plan.reads(a, 1 << 20);
        let b = plan.device(0, "bps-total=1024", 100);
        plan.reads(b, 1024);
        assert_eq!(complaints(&plan, &[10, 5]), []);
        assert_eq!(complaints(&plan, &[10, 3]), [(1, Reason::Unfair)]);
    }

    #[test]
    fn explained_pause_is_two_intervals_and_a_round_of_the_competitors() {
        // Half of 100/s: an interval of 20 ms; one request of the sibling at 100/s: 10 ms. 50 ms / 0.95.
        let mut plan = Plan::root("iops-total=100");
        for _ in 0..2 {
            let device = plan.device(0, "", 100);
            plan.reads(device, 4096);
        }
        let window = Window {
            plan: &plan,
            ns: 10_000_000_000,
            granted: &[500, 500],
            backlogged: &[true, true],
            rates: &[Some(100)],
        };
        assert_eq!(Judge::new(&window).pause_ns(0).round(), 52_631_579.0);
    }
}
