//! A world of devices and queues on one thread, in virtual time.
//!
//! The world plays the queue threads: each turn is `request`s, a `poll`, and a wait until the
//! deadline or the bell. A bell may be late: a queue is polled only when the world gets to it.
//! Invariants are checked after every step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::cost::Operation;
use crate::gate::Gate;
use crate::group::{Change, GroupOptions, MemberOptions, StillBusy, Verdict};
use crate::ids::{GroupId, MemberId};
use crate::limits::{LimitKind, Limits, SECOND_NS};
use crate::throttle::{Doorbell, Throttle};
use crate::time::Time;
use crate::tree::BadParent;

/// Limits from text such as `iops-total=10 iops-total-max=70 iops-total-max-length=4`.
pub fn limits(text: &str) -> Limits {
    let mut limits = Limits::UNLIMITED;
    for setting in text.split_whitespace() {
        let (key, value) = setting.split_once('=').expect("key=value");
        let value: u64 = value.parse().expect("a number");
        if key == "iops-size" {
            limits.iops_size = value;
            continue;
        }
        let kind = LimitKind::ALL.into_iter().find(|kind| key.starts_with(kind.name())).expect("a limit");
        let mut limit = limits.get(kind);
        match &key[kind.name().len()..] {
            "" => limit.avg = value,
            "-max" => limit.max = value,
            "-max-length" => limit.burst_length_ns = value * SECOND_NS,
            other => panic!("unknown limit {other}"),
        }
        limits.set(kind, limit);
    }
    assert_eq!(limits.violations(), []);
    limits
}

/// A single change, with a short call for each kind.
pub trait OneChange {
    fn change(&self, change: Change, now: Time) -> Result<(), BadParent>;

    fn set_group_limits(&self, group: GroupId, limits: &Limits, now: Time) {
        self.change(Change::GroupLimits(group, *limits), now).expect("no place changes");
    }

    fn set_member_limits(&self, member: MemberId, limits: &Limits, now: Time) {
        self.change(Change::MemberLimits(member, *limits), now).expect("no place changes");
    }

    fn set_member_weight(&self, member: MemberId, weight: u32, now: Time) {
        self.change(Change::MemberWeight(member, weight), now).expect("no place changes");
    }

    fn set_parent(&self, group: GroupId, parent: Option<GroupId>, now: Time) -> Result<(), BadParent> {
        self.change(Change::GroupParent(group, parent), now)
    }

    fn set_group(&self, member: MemberId, group: Option<GroupId>, now: Time) {
        self.change(Change::MemberGroup(member, group), now).expect("a member has nothing below it");
    }
}

impl OneChange for Throttle {
    fn change(&self, change: Change, now: Time) -> Result<(), BadParent> {
        self.apply(&[change], now)
    }
}

#[derive(Default)]
struct Bell(AtomicBool);

impl Doorbell for Bell {
    fn ring(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A dispatched request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Went {
    pub at: Time,
    pub queue: usize,
    /// The number of the request in its queue, from 0, in arrival order.
    pub number: u32,
    pub operation: Operation,
    pub bytes: u64,
}

struct Queue {
    member: MemberId,
    gate: Gate,
    bell: Arc<Bell>,
    /// Indexed by tag; tags are not reused.
    requests: Vec<(Operation, u64)>,
    retired: bool,
}

pub struct World {
    pub throttle: Arc<Throttle>,
    pub now: Time,
    pub went: Vec<Went>,
    queues: Vec<Queue>,
    is_checked: bool,
    is_exact: bool,
}

impl World {
    /// An empty world. Every step checks the invariants, and every decision is exact.
    pub fn new() -> Self {
        Self {
            throttle: Throttle::new(),
            now: Time::ZERO,
            went: Vec::new(),
            queues: Vec::new(),
            is_checked: true,
            is_exact: true,
        }
    }

    /// An empty world with leases and timer slack, as in the daemon.
    pub fn as_in_daemon() -> Self {
        let mut world = Self::new();
        world.throttle = Throttle::in_company();
        world.is_exact = false;
        world
    }

    /// An empty world with leases, for long runs without checks of the invariants.
    pub fn with_leases() -> Self {
        let mut world = Self::unchecked();
        world.is_exact = false;
        world
    }

    /// The device of a queue.
    pub fn member(&self, queue: usize) -> MemberId {
        self.queues[queue].member
    }

    /// An empty world for long runs, without checks of the invariants.
    pub fn unchecked() -> Self {
        let mut world = Self::new();
        world.is_checked = false;
        world
    }

    fn check(&self) {
        if self.is_checked {
            self.throttle.assert_invariants();
        }
    }

    pub fn group(&self, text: &str) -> GroupId {
        self.group_below(None, text, 100)
    }

    pub fn group_below(&self, parent: Option<GroupId>, text: &str, weight: u32) -> GroupId {
        let options = GroupOptions { limits: limits(text), parent, weight, charges: None };
        self.throttle.add_group(&options, self.now).expect("a parent that fits")
    }

    /// A live device.
    pub fn device(&self, group: Option<GroupId>, text: &str) -> MemberId {
        self.weighted_device(group, text, 100)
    }

    pub fn weighted_device(&self, group: Option<GroupId>, text: &str, weight: u32) -> MemberId {
        let member = self.throttle.join(&MemberOptions { limits: limits(text), group, weight }, self.now);
        self.throttle.go_live(member);
        member
    }

    /// A queue of a device; returns its index.
    pub fn queue(&mut self, member: MemberId) -> usize {
        let bell = Arc::new(Bell::default());
        let gate = Gate::new(self.throttle.clone(), member, 64, bell.clone());
        let gate = if self.is_exact { gate.without_leases() } else { gate };
        self.queues.push(Queue { member, gate, bell, requests: Vec::new(), retired: false });
        self.queues.len() - 1
    }

    /// The number of queues so far, those that have retired included.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// The number of requests that have arrived on a queue.
    pub fn arrived(&self, queue: usize) -> u32 {
        self.queues[queue].requests.len() as u32
    }

    /// A device of one queue, in a group; returns the index of the queue.
    pub fn simple(&mut self, group: GroupId) -> (MemberId, usize) {
        let member = self.device(Some(group), "");
        (member, self.queue(member))
    }

    /// A request arrives now; the turn of its queue is not over yet.
    pub fn arrives(&mut self, queue: usize, operation: Operation, bytes: u64) {
        let state = &mut self.queues[queue];
        let number = u32::try_from(state.requests.len()).unwrap();
        state.requests.push((operation, bytes));
        if state.gate.request(number, operation, bytes, self.now) == Verdict::Go {
            self.went.push(Went { at: self.now, queue, number, operation, bytes });
        }
        self.check();
    }

    /// A poll of the queue now, with or without a reason.
    pub fn poll(&mut self, queue: usize) {
        let state = &mut self.queues[queue];
        if state.retired {
            return;
        }
        let rung = state.bell.0.swap(false, Ordering::Relaxed);
        let mut tags = Vec::new();
        state.gate.poll(self.now, rung, &mut tags);
        for number in tags {
            let (operation, bytes) = state.requests[number as usize];
            self.went.push(Went { at: self.now, queue, number, operation, bytes });
        }
        self.check();
    }

    /// A request arrives and the turn of its queue ends.
    pub fn request(&mut self, queue: usize, operation: Operation, bytes: u64) {
        self.arrives(queue, operation, bytes);
        self.poll(queue);
    }

    pub fn reads(&mut self, queue: usize, count: u32, bytes: u64) {
        for _ in 0..count {
            self.arrives(queue, Operation::Read, bytes);
        }
        self.poll(queue);
    }

    /// Advances the time to `end`; each queue takes a turn when it is rung or its deadline has
    /// come.
    pub fn run_until(&mut self, end: Time) {
        loop {
            while let Some(queue) = self.rung() {
                self.poll(queue);
            }
            let due =
                (0..self.queues.len()).filter_map(|queue| Some((self.queues[queue].gate.deadline()?, queue))).min();
            match due {
                Some((at, queue)) if at <= end => {
                    self.now = self.now.max(at);
                    self.poll(queue);
                }
                _ => break,
            }
        }
        self.now = self.now.max(end);
    }

    pub fn run_until_ms(&mut self, ms: u64) {
        self.run_until(Time::from_nanos(ms * 1_000_000));
    }

    fn rung(&self) -> Option<usize> {
        self.queues.iter().position(|queue| !queue.retired && queue.bell.0.load(Ordering::Relaxed))
    }

    /// Whether the thread of a queue may sleep until its deadline regardless of new requests.
    pub fn is_calm(&self, queue: usize) -> bool {
        self.queues[queue].gate.is_calm()
    }

    /// Whether a queue has been rung and has not polled yet.
    pub fn is_rung(&self, queue: usize) -> bool {
        self.queues[queue].bell.0.load(Ordering::Relaxed)
    }

    pub fn deadline(&self, queue: usize) -> Option<Time> {
        self.queues[queue].gate.deadline()
    }

    /// The next instant at which the world has a turn to play: now if a bell rings, otherwise the
    /// first deadline of any queue.
    pub fn next_deadline(&self) -> Option<Time> {
        if self.rung().is_some() {
            return Some(self.now);
        }
        self.queues.iter().filter_map(|queue| queue.gate.deadline()).min()
    }

    pub fn retire(&mut self, queue: usize) -> Result<(), StillBusy> {
        let result = self.queues[queue].gate.retire();
        self.queues[queue].retired |= result.is_ok();
        self.check();
        result
    }

    /// The instants at which the requests of a queue went, in milliseconds, in that order.
    pub fn times_ms(&self, queue: usize) -> Vec<f64> {
        self.went.iter().filter(|went| went.queue == queue).map(|went| went.at.as_nanos() as f64 / 1e6).collect()
    }

    /// The number of requests that went up to and including `ms`.
    pub fn count_by_ms(&self, ms: u64) -> usize {
        self.went.iter().filter(|went| went.at.as_nanos() <= ms * 1_000_000).count()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A gate must not be dropped while it holds a request: drain first, as a removal does.
        if std::thread::panicking() {
            return;
        }
        for queue in self.queues.iter_mut().filter(|queue| !queue.retired) {
            self.throttle.drain(queue.member, self.now);
        }
        for queue in &mut self.queues {
            queue.gate.poll(self.now, true, &mut Vec::new());
        }
    }
}
