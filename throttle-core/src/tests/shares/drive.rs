//! A light driver: a plan run against the throttle in virtual time, and the count of its grants.
//!
//! Each device has one gate. A flow that is on keeps `depth` requests waiting: a grant that leaves
//! fewer than half is followed, at the same instant, by as many new requests as are missing. A flow
//! that is off submits nothing, and its waiting requests go in time. A bell rings into a set of bits,
//! so a turn finds the next rung gate without a scan.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::meter::{Meter, Regime};
use super::plan::{LimitAt, Plan};
use crate::cost::{Direction, Operation};
use crate::gate::Gate;
use crate::group::{Change, GroupOptions, MemberOptions};
use crate::ids::{GroupId, MemberId};
use crate::limiter::Level;
use crate::limits::Limits;
use crate::request::Request;
use crate::throttle::{Doorbell, Throttle};
use crate::time::Time;

/// The gates that have been rung, a bit for each.
type Rung = [AtomicU64; 2];

struct Bell {
    rung: Arc<Rung>,
    gate: usize,
}

impl Doorbell for Bell {
    fn ring(&self) {
        self.rung[self.gate / 64].fetch_or(1 << (self.gate % 64), Ordering::Relaxed);
    }
}

enum Id {
    Group(GroupId),
    Member(MemberId),
}

struct Device {
    member: MemberId,
    gate: Gate,
    /// The flow of each direction.
    flows: [Option<usize>; 2],
}

/// The count of one flow.
#[derive(Clone, Debug, Default)]
pub struct Count {
    pub granted: u64,
    pub waiting: u32,
    pub is_on: bool,
    /// The later of the last grant and the instant at which the flow was switched on.
    since_ns: u64,
    /// The longest pause since `forget_pauses`, and its end.
    pub pause_ns: u64,
    pub paused_until_ns: u64,
    /// The charges of a request: meter and nano-units.
    charges: Vec<(usize, u128)>,
    bytes: u64,
}

pub struct Run {
    pub plan: Plan,
    pub limits: Vec<LimitAt>,
    pub counts: Vec<Count>,
    pub now_ns: u64,
    /// All grants.
    pub granted: u64,
    throttle: Arc<Throttle>,
    ids: Vec<Id>,
    devices: Vec<Device>,
    rung: Arc<Rung>,
    /// For each gate; `u64::MAX` without a deadline.
    deadlines: Vec<u64>,
    meters: Vec<Meter>,
    /// The largest excess of a meter that a change has replaced.
    excess: Option<(LimitAt, f64)>,
    depth: u32,
    tags: Vec<u32>,
    requests: Vec<Request>,
}

impl Run {
    /// All devices joined, all flows off.
    pub fn new(plan: &Plan, depth: u32) -> Self {
        let throttle = Throttle::new();
        let rung = Arc::new(Rung::default());
        let mut ids: Vec<Id> = Vec::new();
        let mut devices = Vec::new();
        for (index, node) in plan.nodes.iter().enumerate() {
            let parent = node.parent.map(|parent| match ids[parent] {
                Id::Group(group) => group,
                Id::Member(_) => panic!("a device has no children"),
            });
            if !node.is_device {
                let options = GroupOptions { limits: node.limits, parent, weight: node.weight, charges: None };
                ids.push(Id::Group(throttle.add_group(&options, Time::ZERO).expect("a parent that fits")));
                continue;
            }
            let options = MemberOptions { limits: node.limits, group: parent, weight: node.weight };
            let member = throttle.join(&options, Time::ZERO);
            throttle.go_live(member);
            ids.push(Id::Member(member));
            let bell = Arc::new(Bell { rung: rung.clone(), gate: devices.len() });
            let gate = Gate::new(throttle.clone(), member, 64, bell).without_leases();
            let of = |direction| plan.flows.iter().position(|flow| flow.device == index && flow.direction == direction);
            devices.push(Device { member, gate, flows: Direction::ALL.map(of) });
        }
        assert!(devices.len() <= 128, "a set of gates has a bit for each");
        let counts = plan.flows.iter().map(|flow| Count { bytes: flow.bytes, ..Count::default() }).collect();
        let mut run = Self {
            plan: plan.clone(),
            limits: plan.limits(),
            counts,
            now_ns: 0,
            granted: 0,
            throttle,
            ids,
            deadlines: vec![u64::MAX; devices.len()],
            devices,
            rung,
            meters: Vec::new(),
            excess: None,
            depth,
            tags: Vec::new(),
            requests: Vec::new(),
        };
        run.replace_meters(None);
        run.fill();
        run
    }

    /// Fills the bucket of each limit without a burst to just above its capacity, as after a full
    /// use. From empty buckets, the flow that is switched on first would take the headroom of all its
    /// limits: 100 ms of a rate, of which its share may be a hundredth, hence 10 s ahead.
    fn fill(&self) {
        for (index, node) in self.plan.nodes.iter().enumerate() {
            let here = self.limits.iter().filter(|at| at.node == index && node.limits.get(at.kind).max == 0);
            let levels: Vec<Level> = here
                .map(|&LimitAt { kind, .. }| {
                    let limit = node.limits.get(kind);
                    Level { kind, limit, level: u128::from(limit.avg) * 100_000_000 + 1, burst_level: 0 }
                })
                .collect();
            match self.ids[index] {
                Id::Group(group) => self.throttle.resume_group(group, &levels, 0, Time::ZERO),
                Id::Member(member) => self.throttle.resume_member(member, &levels, 0, Time::ZERO),
            }
        }
    }

    /// New meters, and the charges of each flow, for the present plan. A limit that is the same as
    /// in `before` keeps its meter; a new or changed one starts with an empty meter, so its windows
    /// begin here.
    fn replace_meters(&mut self, before: Option<&Plan>) {
        if let Some((at, excess)) = self.worst_meter()
            && self.excess.is_none_or(|worst| worst.1 < excess)
        {
            self.excess = Some((at, excess));
        }
        let old = std::mem::take(&mut self.limits).into_iter().zip(std::mem::take(&mut self.meters));
        let old: Vec<(LimitAt, Meter)> = old.collect();
        self.limits = self.plan.limits();
        for &at in &self.limits {
            let takers = self.plan.flows.iter().filter(|flow| super::plan::covers(at.kind, flow.direction));
            // Devices move, so the largest request is that of all flows which may ever count.
            let largest = takers.map(|flow| self.plan.cost(at, flow.bytes)).max().unwrap_or(0);
            let is_same = before.is_some_and(|before| {
                let sizes = [before, &self.plan].map(|plan| plan.nodes[at.node].limits.iops_size);
                before.limit(at) == self.plan.limit(at) && sizes[0] == sizes[1]
            });
            let kept = old.iter().find(|old| is_same && old.0 == at).map(|old| old.1.clone());
            self.meters.push(kept.unwrap_or_else(|| Meter::new(self.plan.limit(at), largest, self.now_ns)));
        }
        for (count, &flow) in self.counts.iter_mut().zip(&self.plan.flows) {
            let charged = self.limits.iter().enumerate().filter(|&(_, &at)| self.plan.counts(at, flow));
            count.charges = charged.map(|(index, &at)| (index, self.plan.cost(at, flow.bytes))).collect();
        }
    }

    /// Switches a flow on or off.
    pub fn switch(&mut self, flow: usize, is_on: bool) {
        let count = &mut self.counts[flow];
        if is_on && !count.is_on {
            count.since_ns = self.now_ns;
        }
        count.is_on = is_on;
        if is_on {
            let device = self.plan.flows[flow].device;
            let member = match self.ids[device] {
                Id::Member(member) => member,
                Id::Group(_) => panic!("a flow belongs to a device"),
            };
            let gate = self.devices.iter().position(|device| device.member == member).expect("a gate");
            self.turn(gate, false);
            self.settle();
        }
    }

    pub fn switch_all_on(&mut self) {
        (0..self.counts.len()).for_each(|flow| self.switch(flow, true));
    }

    /// Makes the throttle follow a plan that differs in limits, weights and parents.
    pub fn change(&mut self, to: &Plan) {
        let before = std::mem::replace(&mut self.plan, to.clone());
        let mut changes = Vec::new();
        for (index, (old, new)) in before.nodes.iter().zip(&to.nodes).enumerate() {
            let parent = || match new.parent.map(|parent| &self.ids[parent]) {
                Some(&Id::Group(group)) => Some(group),
                Some(Id::Member(_)) => panic!("a device has no children"),
                None => None,
            };
            let (limits, weight): (Limits, u32) = (new.limits, new.weight);
            match self.ids[index] {
                Id::Group(group) => {
                    if old.limits != limits {
                        changes.push(Change::GroupLimits(group, limits));
                    }
                    if old.weight != weight {
                        changes.push(Change::GroupWeight(group, weight));
                    }
                    if old.parent != new.parent {
                        changes.push(Change::GroupParent(group, parent()));
                    }
                }
                Id::Member(member) => {
                    if old.limits != limits {
                        changes.push(Change::MemberLimits(member, limits));
                    }
                    if old.weight != weight {
                        changes.push(Change::MemberWeight(member, weight));
                    }
                    if old.parent != new.parent {
                        changes.push(Change::MemberGroup(member, parent()));
                    }
                }
            }
        }
        self.replace_meters(Some(&before));
        self.throttle.apply(&changes, Time::from_nanos(self.now_ns)).expect("the plan stays a tree");
        self.settle();
    }

    /// One turn of a gate: grants are collected, and missing requests submitted, until both are done.
    fn turn(&mut self, gate: usize, rung: bool) {
        let now = Time::from_nanos(self.now_ns);
        let mut rung = rung;
        let mut tags = std::mem::take(&mut self.tags);
        let mut requests = std::mem::take(&mut self.requests);
        loop {
            self.devices[gate].gate.poll(now, rung, &mut tags);
            rung = false;
            self.grant(gate, &mut tags);
            for direction in Direction::ALL {
                let Some(flow) = self.devices[gate].flows[direction as usize] else { continue };
                let count = &mut self.counts[flow];
                if count.is_on && count.waiting * 2 <= self.depth {
                    let operation = if direction == Direction::Read { Operation::Read } else { Operation::Write };
                    let request = Request { tag: direction as u32, operation, bytes: count.bytes, since: now };
                    requests.extend((count.waiting..self.depth).map(|_| request));
                    count.waiting = self.depth;
                }
            }
            if requests.is_empty() {
                break;
            }
            self.devices[gate].gate.request_all(&requests, now, &mut tags);
            requests.clear();
            self.grant(gate, &mut tags);
        }
        self.deadlines[gate] = self.devices[gate].gate.deadline().map_or(u64::MAX, Time::as_nanos);
        (self.tags, self.requests) = (tags, requests);
    }

    /// Counts grants; the tag of a request is its direction.
    fn grant(&mut self, gate: usize, tags: &mut Vec<u32>) {
        for tag in tags.drain(..) {
            let flow = self.devices[gate].flows[tag as usize].expect("a flow with requests");
            let count = &mut self.counts[flow];
            count.granted += 1;
            count.waiting -= 1;
            let pause_ns = self.now_ns - count.since_ns;
            if pause_ns > count.pause_ns {
                (count.pause_ns, count.paused_until_ns) = (pause_ns, self.now_ns);
            }
            count.since_ns = self.now_ns;
            for &(meter, cost) in &count.charges {
                self.meters[meter].add(cost, self.now_ns);
            }
            self.granted += 1;
        }
    }

    /// Gives a turn to each gate that is rung.
    fn settle(&mut self) {
        while let Some(word) = self.rung.iter().position(|word| word.load(Ordering::Relaxed) != 0) {
            let bit = self.rung[word].load(Ordering::Relaxed).trailing_zeros() as usize;
            self.rung[word].fetch_and(!(1 << bit), Ordering::Relaxed);
            self.turn(word * 64 + bit, true);
        }
    }

    /// Runs to the first deadline, or to `end_ns`. Returns whether `end_ns` is reached.
    fn step(&mut self, end_ns: u64) -> bool {
        let (gate, &at_ns) = self.deadlines.iter().enumerate().min_by_key(|(_, at_ns)| **at_ns).expect("a gate");
        if at_ns >= end_ns {
            self.now_ns = end_ns;
            return true;
        }
        self.now_ns = self.now_ns.max(at_ns);
        self.turn(gate, false);
        self.settle();
        false
    }

    /// Runs until `end_ns`.
    pub fn run_until(&mut self, end_ns: u64) {
        while !self.step(end_ns) {}
    }

    /// Runs until `end_ns` or until `grants` more requests have gone; returns whether `end_ns` is
    /// reached.
    pub fn run_at_most(&mut self, end_ns: u64, grants: u64) -> bool {
        let last = self.granted + grants;
        while self.granted < last {
            if self.step(end_ns) {
                return true;
            }
        }
        false
    }

    /// Starts a window: regimes count from here.
    pub fn begin(&mut self) {
        self.meters.iter_mut().for_each(Meter::begin);
    }

    /// Pauses count from here. A pause that has begun counts in full.
    pub fn forget_pauses(&mut self) {
        self.counts.iter_mut().for_each(|count| (count.pause_ns, count.paused_until_ns) = (0, 0));
    }

    /// As [`Self::forget_pauses`], and a pause that has begun counts from here: for the end of a
    /// warm-up, in which the flows are switched on one after another.
    pub fn forget_warm_up(&mut self) {
        self.forget_pauses();
        self.counts.iter_mut().for_each(|count| count.since_ns = self.now_ns);
    }

    /// The longest pause of a flow since `forget_pauses`, the present one included.
    pub fn pause_ns(&self, flow: usize) -> u64 {
        let count = &self.counts[flow];
        let present_ns = if count.is_on { self.now_ns - count.since_ns } else { 0 };
        count.pause_ns.max(present_ns)
    }

    /// Requests granted so far, by flow.
    pub fn grants(&self) -> Vec<u64> {
        self.counts.iter().map(|count| count.granted).collect()
    }

    pub fn is_on(&self) -> Vec<bool> {
        self.counts.iter().map(|count| count.is_on).collect()
    }

    /// Whether no request of a flow that is off still waits.
    pub fn is_drained(&self) -> bool {
        self.counts.iter().all(|count| count.is_on || count.waiting == 0)
    }

    /// The regime of each limit since `begin`.
    pub fn regimes(&self) -> Vec<Regime> {
        self.meters.iter().map(Meter::regime).collect()
    }

    /// The limit that is exceeded most, and by how many units.
    pub fn worst_meter(&self) -> Option<(LimitAt, f64)> {
        let all = self.limits.iter().copied().zip(self.meters.iter().map(Meter::excess)).chain(self.excess);
        all.filter(|worst| worst.1 > 0.0).max_by(|a, b| a.1.total_cmp(&b.1))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // A gate must not be dropped while it holds requests: drain first, as a removal does.
        if std::thread::panicking() {
            return;
        }
        let now = Time::from_nanos(self.now_ns);
        self.counts.iter_mut().for_each(|count| count.is_on = false);
        for device in &self.devices {
            self.throttle.drain(device.member, now);
        }
        for device in &mut self.devices {
            device.gate.poll(now, true, &mut Vec::new());
        }
    }
}
