//! Every reachable state of a small group, under any order of events.
//!
//! Two devices share a group; each has a few requests to send. From each state, every possible next
//! event is applied: a request, a turn of a queue (rung or not), time passing, a removal, a change
//! of limits, a move. In each state the invariants hold, and each state can be brought to an end:
//! every request goes, once and in order, and all members and groups can be removed (no lost
//! wake-up, no deadline left armed).

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::world::limits;
use crate::cost::Operation;
use crate::group::{Change, GroupOptions, Groups, MemberOptions, Verdict};
use crate::ids::{GroupId, MemberId, QueueId};
use crate::planted::{Fault, is_found};
use crate::time::Time;

/// A device with one queue.
#[derive(Clone, Debug)]
struct Side {
    member: MemberId,
    queue: QueueId,
    is_rung: bool,
    deadline: Option<Time>,
    /// A request was held and the turn is not over.
    is_in_turn: bool,
    sent: u32,
    went: Vec<u32>,
    is_draining: bool,
    /// A removal of the device has failed; each device has at most one such event.
    has_come_back: bool,
    has_moved: bool,
    is_retired: bool,
}

#[derive(Clone, Debug)]
struct State {
    pace: Pace,
    groups: Groups,
    now: Time,
    group: GroupId,
    other: GroupId,
    is_raised: bool,
    sides: Vec<Side>,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Request(usize),
    Turn(usize),
    Tick,
    Drain(usize),
    /// The removal fails.
    EndDrain(usize),
    Retire(usize),
    /// An attempt to remove the member while its queue exists.
    Leave(usize),
    Move(usize),
    Raise,
}

/// Requests of each side: enough for one to go and two to wait.
const REQUESTS: u32 = 3;
const TICKS: u64 = 3;

/// The rate of a group. At one request a second no deadline is near enough to be slept through; at
/// a thousand every deadline is.
#[derive(Clone, Copy, Debug)]
enum Pace {
    /// Each request goes at its instant.
    One,
    /// Requests go with timer slack.
    Thousand,
}

impl Pace {
    const fn rate(self) -> u64 {
        match self {
            Self::One => 1,
            Self::Thousand => 1000,
        }
    }

    /// Half of the period of the rate.
    const fn tick_ns(self) -> u64 {
        500_000_000 / self.rate()
    }
}

impl State {
    fn new(pace: Pace) -> Self {
        let mut groups = Groups::default();
        if matches!(pace, Pace::Thousand) {
            groups.let_go_in_company();
        }
        let group = Self::full_group(&mut groups, pace.rate());
        let other = Self::full_group(&mut groups, 2 * pace.rate());
        let sides = (0..2)
            .map(|_| {
                let options = MemberOptions { group: Some(group), ..MemberOptions::default() };
                let member = groups.join(&options, Time::ZERO);
                groups.go_live(member);
                let queue = groups.add_queue(member, REQUESTS as u16);
                Side {
                    member,
                    queue,
                    is_rung: false,
                    deadline: None,
                    is_in_turn: false,
                    sent: 0,
                    went: Vec::new(),
                    is_draining: false,
                    has_come_back: false,
                    has_moved: false,
                    is_retired: false,
                }
            })
            .collect();
        Self { pace, groups, now: Time::ZERO, group, other, is_raised: false, sides }
    }

    /// A group that passes one more request at once: its capacity, a tenth of a second of the rate,
    /// is used up here.
    fn full_group(groups: &mut Groups, rate: u64) -> GroupId {
        let options = GroupOptions { limits: limits(&format!("iops-total={rate}")), ..GroupOptions::default() };
        let group = groups.add_group(&options, Time::ZERO).unwrap();
        let member = groups.join(&MemberOptions { group: Some(group), ..MemberOptions::default() }, Time::ZERO);
        groups.go_live(member);
        let queue = groups.add_queue(member, 1);
        for tag in 0..rate as u32 / 10 {
            assert_eq!(groups.arrived(queue, Time::ZERO).request(tag, Operation::Read, 512, Time::ZERO), Verdict::Go);
        }
        groups.retire(queue).unwrap();
        groups.leave(member, Time::ZERO).unwrap();
        group
    }

    fn events(&self) -> Vec<Event> {
        let mut events = Vec::new();
        for (index, side) in self.sides.iter().enumerate() {
            if side.is_retired {
                continue;
            }
            if side.sent < REQUESTS {
                events.push(Event::Request(index));
            }
            events.push(Event::Turn(index));
            if !side.is_draining {
                events.push(Event::Drain(index));
            } else if !side.has_come_back {
                events.push(Event::EndDrain(index));
            }
            events.push(Event::Leave(index));
            // A thread may try to end as soon as its device drains; `retire` refuses until its
            // restart work has run.
            if side.is_draining && !side.is_in_turn {
                events.push(Event::Retire(index));
            }
            if index == 0 && !side.has_moved {
                events.push(Event::Move(index));
            }
        }
        if self.now < Time::from_nanos(TICKS * self.pace.tick_ns()) {
            events.push(Event::Tick);
        }
        if !self.is_raised {
            events.push(Event::Raise);
        }
        events
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Request(index) => {
                let side = &mut self.sides[index];
                let number = side.sent;
                side.sent += 1;
                match self.groups.arrived(side.queue, self.now).request(number, Operation::Read, 512, self.now) {
                    Verdict::Go => side.went.push(number),
                    Verdict::Held => side.is_in_turn = true,
                }
            }
            Event::Turn(index) => {
                let side = &mut self.sides[index];
                side.is_rung = false;
                side.is_in_turn = false;
                side.deadline = self.groups.poll(side.queue, self.now, &mut side.went).map(|look| look.at);
            }
            Event::Tick => self.now = self.now.plus_nanos(self.pace.tick_ns()),
            Event::Drain(index) => {
                self.sides[index].is_draining = true;
                self.groups.drain(self.sides[index].member, self.now);
                assert_eq!(self.groups.held(self.sides[index].member).count, 0, "a drain lets everything go");
            }
            Event::EndDrain(index) => {
                (self.sides[index].is_draining, self.sides[index].has_come_back) = (false, true);
                self.groups.end_drain(self.sides[index].member);
            }
            Event::Retire(index) => {
                let side = &mut self.sides[index];
                if self.groups.retire(side.queue).is_ok() {
                    side.is_retired = true;
                    self.groups.leave(side.member, self.now).expect("its queue has retired");
                }
            }
            Event::Leave(index) => {
                let left = self.groups.leave(self.sides[index].member, self.now);
                assert!(left.is_err(), "I7: a member does not leave while it has a queue");
            }
            Event::Move(index) => {
                self.sides[index].has_moved = true;
                let to = Change::MemberGroup(self.sides[index].member, Some(self.other));
                self.groups.apply(&[to], self.now).expect("a member has nothing below it");
            }
            Event::Raise => {
                self.is_raised = true;
                let raise = Change::GroupLimits(self.group, limits(&format!("iops-total={}", 4 * self.pace.rate())));
                self.groups.apply(&[raise], self.now).expect("no place changes");
            }
        }
        for queue in self.groups.take_rings() {
            let side = self.sides.iter_mut().find(|side| side.queue == queue).expect("only queues that are there");
            assert!(!side.is_retired, "I7: a queue that has retired is rung no more");
            side.is_rung = true;
        }
        self.check();
    }

    fn check(&self) {
        self.groups.assert_invariants();
        for side in &self.sides {
            assert!(side.went.iter().is_sorted(), "I6: arrival order");
            let mut once = side.went.clone();
            once.dedup();
            assert_eq!(once.len(), side.went.len(), "each request goes once");
            let held = if side.is_retired { 0 } else { self.groups.held(side.member).count };
            assert!(!side.is_draining || held == 0, "I9: a member that drains holds nothing");
            assert!(!side.is_retired || side.sent as usize == side.went.len(), "nothing is lost with a queue");
        }
        // U4: at the first instant the group's capacity passes one request, besides those of a
        // draining member.
        let limited = self.sides.iter().filter(|side| !side.is_draining && !side.has_come_back && !side.has_moved);
        if self.now == Time::ZERO && !self.is_raised {
            assert!(limited.map(|side| side.went.len()).sum::<usize>() <= 1, "U4: no one passes unchecked");
        }
    }

    /// Gives all queues their turns until no event is left, then removes all members and groups.
    fn finish(mut self) {
        for _ in 0..200 {
            for index in 0..self.sides.len() {
                let side = &self.sides[index];
                let is_due = side.deadline.is_some_and(|deadline| deadline <= self.now);
                if !side.is_retired && (side.is_rung || side.is_in_turn || is_due) {
                    self.apply(Event::Turn(index));
                }
            }
            let pending = self.sides.iter().filter(|side| !side.is_retired);
            if pending.clone().any(|side| side.is_rung) {
                continue;
            }
            match pending.filter_map(|side| side.deadline).min() {
                Some(deadline) => self.now = self.now.max(deadline),
                None => break,
            }
        }
        for index in 0..self.sides.len() {
            let side = &self.sides[index];
            assert_eq!(side.sent as usize, side.went.len(), "I3: whatever waits goes in the end");
            if !side.is_retired {
                self.groups.retire(self.sides[index].queue).expect("nothing held, no restart work");
                self.groups.leave(self.sides[index].member, self.now).expect("no queues");
            }
        }
        for group in [self.group, self.other] {
            self.groups.remove_group(group, self.now).expect("no members");
        }
    }

    fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        format!("{self:?}").hash(&mut hasher);
        hasher.finish()
    }
}

/// Visits every state reachable within `steps` events; returns the number of states.
fn explore(pace: Pace, steps: usize) -> usize {
    let mut seen = HashSet::new();
    let mut frontier = vec![State::new(pace)];
    for _ in 0..steps {
        let mut next = Vec::new();
        for state in frontier {
            for event in state.events() {
                let mut after = state.clone();
                after.apply(event);
                if seen.insert(after.digest()) {
                    after.clone().finish();
                    next.push(after);
                }
            }
        }
        frontier = next;
    }
    seen.len()
}

/// Events from the start to each state that is visited.
const STEPS: usize = 7;

/// Events within which each planted fault shows.
const STEPS_TO_A_FAULT: usize = 6;

#[test]
fn every_reachable_state_keeps_the_invariants_and_can_be_ended() {
    for pace in [Pace::One, Pace::Thousand] {
        let states = explore(pace, STEPS);
        assert!(states > 40_000, "{pace:?}: only {states} states: the exploration no longer explores");
    }
}

#[test]
fn exploration_finds_each_planted_fault() {
    // A check that cannot fail checks nothing. Faults that need two threads in one call are in
    // `models`.
    for fault in [
        Fault::RetireWithRestartWork,
        Fault::DrainWithoutRearm,
        Fault::HoldWithoutRearm,
        Fault::OwnerHoldsNothing,
        Fault::EarlierUntold,
        Fault::PopWithoutSettle,
        Fault::HeldNotCounted,
        Fault::NewestFirst,
        Fault::LeaveWithQueue,
        Fault::MoveEndsDrain,
        Fault::DrainHoldsOn,
        Fault::DrainExemptsGroup,
    ] {
        assert!(is_found(fault, || _ = explore(Pace::One, STEPS_TO_A_FAULT)), "{fault:?} was not found");
    }
    // At this pace the tree counts on threads that poll by themselves.
    for fault in [Fault::RetireWithRestartWork, Fault::DrainWithoutRearm, Fault::ToldInSecret] {
        let found = is_found(fault, || _ = explore(Pace::Thousand, STEPS_TO_A_FAULT));
        assert!(found, "{fault:?} was not found at a thousand a second");
    }
}
