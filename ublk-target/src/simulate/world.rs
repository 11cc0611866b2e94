//! Devices, groups and a clock, on one thread.
//!
//! ```text
//!   advance(t):   the earliest deadline ≤ t? ─► the clock jumps there ─► that device takes its turn ─► and all it rang
//!   apply(event): at the clock's time; the device takes its turn ─► and all that were rung take theirs
//! ```
//!
//! The part of a queue thread is played to the letter: a turn is requests, then a poll; a device is polled when it was
//! rung or its deadline has come, and at no other time. Deadlines that fall on the instant of a line come before the line.
//! Everything that has an order has the same order every time: deadlines by instant and then by device, bells as they ring.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use throttle_core::cost::Operation;
use throttle_core::gate::Gate;
use throttle_core::group::{Change, GroupId, MemberId, MemberOptions, Verdict};
use throttle_core::limits::Limits;
use throttle_core::throttle::{Doorbell, Tag, Throttle};
use throttle_core::time::Time;
use ublk_throttle_config::Config;

use super::cast::{Cast, Node};
use super::set::Set;
use super::trace::Event;
use super::waiting::{Request, Waiting};
use crate::groups;

/// How many requests may wait at a time: some 100 bytes each. A trace that asks for more for good is far beyond its limits.
const WAITING_MAX: usize = 10_000_000;

/// The end of the clock, which stands for everything beyond it: a deadline there never comes.
const NEVER: Time = Time::from_nanos(u64::MAX);

/// A request that was let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Went {
    /// When.
    pub at: Time,
    /// Of which device, by number.
    pub device: usize,
    /// What it does.
    pub operation: Operation,
    /// The length of its range.
    pub bytes: u64,
    /// When it came.
    pub arrived: Time,
    /// Whether it was announced by [`Observer::held`].
    pub was_held: bool,
}

/// Who wants to know what happens.
pub trait Observer {
    /// Something happens at this time; later calls are of this time or later.
    fn at(&mut self, _now: Time) {}

    /// A request of a device begins to wait; it may go at the same instant.
    fn held(&mut self, _at: Time, _device: usize) {}

    /// A request went.
    fn went(&mut self, went: &Went);

    /// A group or a device is now below another group, or at the top.
    fn moved(&mut self, _at: Time, _node: Node, _above: Option<usize>) {}

    /// Whether it is worth going on.
    fn wants_more(&self) -> bool {
        true
    }
}

/// Everything that a trace acts upon.
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
    /// As the configuration has it.
    options: MemberOptions,
    /// The number of the group that the configuration puts it in.
    group: Option<usize>,
    /// `None` after a `del`.
    present: Option<Present>,
}

struct Present {
    member: MemberId,
    limits: Limits,
    gate: Gate,
    waiting: Waiting,
    /// What stands in `deadlines` for it.
    deadline: Option<Time>,
}

/// Devices that were rung and have not had their turn yet.
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

    /// Who is who.
    pub fn cast(&self) -> &Cast {
        &self.cast
    }

    /// Who watches.
    pub fn observer(&self) -> &O {
        self.observer
    }

    /// Lets time pass up to and including `to`.
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

    /// Lets time pass until nothing waits any more.
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

    /// Something happens now. What is refused changes nothing; the answer says what was found and what would work.
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

    /// A removal as the daemon does it: what is held goes at once, charged to the group as far as a drain does, and the member
    /// leaves.
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

    /// A device comes as the configuration has it, whatever was set before it went.
    fn add(&mut self, device: usize) {
        let Device { options, group, present, .. } = &mut self.devices[device];
        let member = self.throttle.join(options, self.now);
        self.throttle.go_live(member);
        let bell = Arc::new(Bell { device, rung: self.rung.clone() });
        // The depth is only what room is made for beforehand; there may be millions waiting or none.
        let gate = Gate::new(self.throttle.clone(), member, 0, bell).without_leases();
        let limits = options.limits;
        *present = Some(Present { member, limits, gate, waiting: Waiting::default(), deadline: None });
        self.observer.moved(self.now, Node::Device(device), *group);
    }

    /// A device looks whether something of it may go, and says when it wants to look again.
    fn turn(&mut self, device: usize, is_rung: bool) {
        // Rung just before it went: harmless.
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
    /// A gate must not end while it holds something: what still waits, after a fault in the trace, goes as in a removal.
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
