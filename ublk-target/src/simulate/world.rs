//! Devices, groups and a clock, on one thread.
//!
//! ```text
//!   advance(t):   the earliest deadline ≤ t? ─► the clock jumps there ─► that device's turn ─► then all that were rung
//!   apply(event): at the clock's time; the device's turn ─► then all that were rung
//! ```
//!
//! The part of a queue thread is played exactly: a turn is requests, then a poll. A device takes a
//! turn after its requests, when it was rung or when its deadline has come, and at no further time.
//! Deadlines at the instant of a line come before the line. Every order is the same on each run:
//! deadlines by instant and then by device, bells in the order of their rings.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use throttle_core::cost::Operation;
use throttle_core::gate::Gate;
use throttle_core::group::{Change, MemberOptions, Verdict};
use throttle_core::ids::{GroupId, MemberId};
use throttle_core::limits::Limits;
use throttle_core::request::Tag;
use throttle_core::throttle::{Doorbell, Throttle};
use throttle_core::time::Time;
use ublk_throttle_config::Config;

use super::cast::{Cast, Node};
use super::set::Set;
use super::trace::Event;
use super::waiting::{Request, Waiting};
use crate::groups;

/// The most requests that may wait at a time; each takes some 100 bytes. A trace that exceeds this
/// asks for far more than its limits grant.
const WAITING_MAX: usize = 10_000_000;

/// The end of the clock, which stands for all later times: a deadline there never comes.
const NEVER: Time = Time::from_nanos(u64::MAX);

/// A dispatched request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Went {
    /// When it was dispatched.
    pub at: Time,
    /// The number of its device.
    pub device: usize,
    /// The operation of the request.
    pub operation: Operation,
    /// The length of its range.
    pub bytes: u64,
    /// When it arrived.
    pub arrived: Time,
    /// Whether it was announced by [`Observer::held`].
    pub was_held: bool,
}

/// A receiver of the events of a simulation.
pub trait Observer {
    /// The clock is at this time; later calls are of this time or later.
    fn at(&mut self, _now: Time) {}

    /// A request of a device is held; it may be dispatched at the same instant.
    fn held(&mut self, _at: Time, _device: usize) {}

    /// A request was dispatched.
    fn went(&mut self, went: &Went);

    /// A group or a device now has another parent, or none.
    fn moved(&mut self, _at: Time, _node: Node, _above: Option<usize>) {}

    /// Whether the simulation should go on.
    fn wants_more(&self) -> bool {
        true
    }
}

/// The state of a simulation.
pub struct World<'o, O> {
    now: Time,
    throttle: Arc<Throttle>,
    cast: Cast,
    groups: Vec<Group>,
    devices: Vec<Device>,
    waiting: usize,
    deadlines: BTreeSet<(Time, usize)>,
    rung: Arc<Rung>,
    /// Scratch space, kept so that it is allocated once.
    bells: Vec<usize>,
    tags: Vec<Tag>,
    observer: &'o mut O,
}

struct Group {
    id: GroupId,
    limits: Limits,
}

struct Device {
    name: String,
    /// The options of the configuration.
    options: MemberOptions,
    /// The number of the group in which the configuration puts it.
    group: Option<usize>,
    /// `None` after `del`.
    present: Option<Present>,
}

struct Present {
    member: MemberId,
    limits: Limits,
    gate: Gate,
    waiting: Waiting,
    /// The entry of the device in `deadlines`.
    deadline: Option<Time>,
}

/// Devices that were rung and have not had their turn since.
#[derive(Default)]
struct Rung(Mutex<Vec<usize>>);

struct Bell {
    device: usize,
    rung: Arc<Rung>,
}

impl Doorbell for Bell {
    fn ring(&self) {
        self.rung.lock().push(self.device);
    }
}

impl Rung {
    fn lock(&self) -> MutexGuard<'_, Vec<usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'o, O: Observer> World<'o, O> {
    /// Every group and device of the configuration, at time 0.
    pub fn new(config: &Config, observer: &'o mut O) -> Self {
        let throttle = Throttle::new();
        let now = Time::ZERO;
        let cast = Cast::new(config);
        let ids = groups::make(config, &throttle, now).expect("parents are checked with the configuration");
        let groups = config.groups.iter().map(|group| Group { id: ids[&group.name], limits: group.limits }).collect();
        let devices = config.devices.iter().map(|device| {
            let id = device.group.as_ref().map(|group| ids[group]);
            let options = MemberOptions { limits: device.limits, group: id, weight: device.weight };
            let number = |name: &String| cast.group(name).expect("groups are checked with the configuration");
            let group = device.group.as_ref().map(number);
            Device { name: device.name.clone(), options, group, present: None }
        });
        let mut world = Self {
            now,
            throttle,
            devices: devices.collect(),
            cast,
            groups,
            waiting: 0,
            deadlines: BTreeSet::new(),
            rung: Arc::default(),
            bells: Vec::new(),
            tags: Vec::new(),
            observer,
        };
        for device in 0..world.devices.len() {
            world.add(device);
        }
        world
    }

    /// The names of groups and devices.
    pub fn cast(&self) -> &Cast {
        &self.cast
    }

    /// The receiver of the events.
    pub fn observer(&self) -> &O {
        self.observer
    }

    /// Advances the clock up to and including `to`.
    pub fn advance(&mut self, to: Time) {
        while let Some(&(at, device)) = self.deadlines.first()
            && at <= to
            && at < NEVER
        {
            self.go_to(at);
            self.turn(device, false);
            self.answer_bells();
        }
        self.go_to(to);
    }

    /// Advances the clock until no request waits.
    pub fn finish(&mut self) -> Result<(), String> {
        while let Some(&(at, _)) = self.deadlines.first()
            && at < NEVER
            && self.observer.wants_more()
        {
            self.advance(at);
        }
        if self.waiting == 0 || !self.observer.wants_more() {
            return Ok(());
        }
        Err(format!(
            "{} requests still wait when the clock ends, 584 years after its 0; raise the limits, or begin at a smaller t",
            self.waiting
        ))
    }

    /// Applies an event at the clock's time. A refused event changes nothing; the error names the
    /// value found and the cure.
    pub fn apply(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Request { device, operation, bytes, count } => self.request(device, operation, bytes, count),
            Event::Set(set) => self.set(&set),
            Event::Del(device) => self.del(device),
            Event::Add(device) if self.devices[device].present.is_some() => {
                Err(format!("device {:?} is there already; `del` it first", self.devices[device].name))
            }
            Event::Add(device) => {
                self.add(device);
                Ok(())
            }
        }
    }

    fn go_to(&mut self, at: Time) {
        self.now = self.now.max(at);
        self.observer.at(self.now);
    }

    fn request(&mut self, device: usize, operation: Operation, bytes: u64, count: u32) -> Result<(), String> {
        let now = self.now;
        let Present { gate, waiting, .. } = present(&mut self.devices, device)?;
        for _ in 0..count {
            match gate.request(waiting.next_tag(), operation, bytes, now) {
                Verdict::Go => {
                    self.observer.went(&Went { at: now, device, operation, bytes, arrived: now, was_held: false });
                }
                Verdict::Held => {
                    waiting.put(Request { operation, bytes, arrived: now });
                    self.waiting += 1;
                    self.observer.held(now, device);
                }
            }
            if self.waiting > WAITING_MAX {
                let cure = "the trace asks for far more than the limits grant; raise them, or cut it";
                return Err(format!("more than {WAITING_MAX} requests wait at once; {cure}"));
            }
        }
        self.turn(device, false);
        self.answer_bells();
        Ok(())
    }

    fn set(&mut self, set: &Set) -> Result<(), String> {
        let above = set.above.map(|above| above.map(|group| self.groups[group].id));
        let mut changes = Vec::new();
        let limits = match set.node {
            Node::Group(group) => {
                let Group { id, limits } = &mut self.groups[group];
                let after = set.limits_after(limits)?;
                changes.push(Change::GroupLimits(*id, after));
                changes.extend(above.map(|parent| Change::GroupParent(*id, parent)));
                changes.extend(set.weight.map(|weight| Change::GroupWeight(*id, weight)));
                (limits, after)
            }
            Node::Device(device) => {
                let Present { member, limits, .. } = present(&mut self.devices, device)?;
                let after = set.limits_after(limits)?;
                changes.push(Change::MemberLimits(*member, after));
                changes.extend(above.map(|group| Change::MemberGroup(*member, group)));
                changes.extend(set.weight.map(|weight| Change::MemberWeight(*member, weight)));
                (limits, after)
            }
        };
        self.throttle
            .apply(&changes, self.now)
            .map_err(|bad| format!("{bad}; name another parent, or null for none"))?;
        let (in_force, after) = limits;
        *in_force = after;
        if let Some(above) = set.above {
            self.observer.moved(self.now, set.node, above);
        }
        self.answer_bells();
        Ok(())
    }

    /// Removes a device as the daemon does: its held requests are dispatched at once, charged to
    /// the group as far as a drain charges them, and the member leaves.
    fn del(&mut self, device: usize) -> Result<(), String> {
        let member = present(&mut self.devices, device)?.member;
        self.throttle.drain(member, self.now);
        self.turn(device, true);
        self.answer_bells();
        let Some(mut gone) = self.devices[device].present.take() else { return Ok(()) };
        gone.gate.retire().expect("a drained device holds nothing");
        self.throttle.leave(gone.member, self.now).expect("its only queue has retired");
        if let Some(deadline) = gone.deadline {
            self.deadlines.remove(&(deadline, device));
        }
        Ok(())
    }

    /// Adds a device as configured, regardless of changes before its removal.
    fn add(&mut self, device: usize) {
        let Device { options, group, present, .. } = &mut self.devices[device];
        let member = self.throttle.join(options, self.now);
        self.throttle.go_live(member);
        let bell = Arc::new(Bell { device, rung: self.rung.clone() });
        // The depth only preallocates; any number of requests may wait.
        let gate = Gate::new(self.throttle.clone(), member, 0, bell).without_leases();
        let limits = options.limits;
        *present = Some(Present { member, limits, gate, waiting: Waiting::default(), deadline: None });
        self.observer.moved(self.now, Node::Device(device), *group);
    }

    /// A turn of a device: polls its gate and updates its deadline.
    fn turn(&mut self, device: usize, is_rung: bool) {
        // A device that was rung just before its removal is gone.
        let Some(present) = &mut self.devices[device].present else { return };
        present.gate.poll(self.now, is_rung, &mut self.tags);
        for tag in self.tags.drain(..) {
            let Request { operation, bytes, arrived } = present.waiting.take(tag);
            self.waiting -= 1;
            self.observer.went(&Went { at: self.now, device, operation, bytes, arrived, was_held: true });
        }
        let deadline = present.gate.deadline();
        if deadline != present.deadline {
            if let Some(old) = present.deadline {
                self.deadlines.remove(&(old, device));
            }
            self.deadlines.extend(deadline.map(|deadline| (deadline, device)));
            present.deadline = deadline;
        }
    }

    fn answer_bells(&mut self) {
        let mut bells = std::mem::take(&mut self.bells);
        loop {
            std::mem::swap(&mut bells, &mut self.rung.lock());
            if bells.is_empty() {
                break;
            }
            for device in bells.drain(..) {
                self.turn(device, true);
            }
        }
        self.bells = bells;
    }
}

impl<O> Drop for World<'_, O> {
    /// A gate must not end while it holds requests: those that still wait, after a fault in the
    /// trace, are dispatched as in a removal.
    fn drop(&mut self) {
        for device in &mut self.devices {
            if let Some(present) = &mut device.present {
                self.throttle.drain(present.member, self.now);
                present.gate.poll(self.now, true, &mut self.tags);
                debug_assert!(self.tags.len() >= present.waiting.len());
                self.tags.clear();
            }
        }
    }
}

fn present(devices: &mut [Device], device: usize) -> Result<&mut Present, String> {
    let Device { name, present, .. } = &mut devices[device];
    present.as_mut().ok_or_else(|| format!("device {name:?} has been deleted; `add` it first"))
}
