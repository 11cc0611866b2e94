//! The turn: at which limit a line waits, and which line goes next.
//!
//! # The rule
//!
//! A request needs every limit from its member up to the root. Fair means: the line has its share,
//! by weight on each level, of at least one limit that is used up. So a line waits in the order of
//! one limit only, its *main* limit: the one at which it is least behind its siblings, among those
//! that it does not fit now ([`Tree::choose`]). At the others it is behind, so it would be first
//! there in any case.
//!
//! 1. The first line of an order is due when it *fits*: the level leaves room for the request, up to
//!    half of the capacity, if lines with another main limit count this one as well; otherwise when
//!    the bucket is not above its brim. So the lines that use a limit up keep it just below the
//!    brim, and open for lines that are held up elsewhere.
//! 2. If its other limits are open too, and the line would be first in their orders, it goes.
//! 3. If another limit is closed, the line is *parked* in the order of that limit, and its main
//!    limit is *reserved* until then: other lines pass only if the limit is open again by then. There
//!    is no reservation beyond the instant at which the bucket would be empty, so none loses rate.
//! 4. If another limit is open but has a line before this one, that limit becomes the main limit.
//!
//! # Example
//!
//! ```text
//!   g  iops-read 100         a reads; b reads and writes
//!   ├─ a                     main limit of a's reads: iops-read, 73 a second
//!   └─ b  bps-total 3.5 MB/s main limit of b's reads and writes of 64 KiB: bps-total, 26.7 a second each
//! ```
//!
//! a waits until `iops-read` leaves room for one more, so b's read finds it open when it has its
//! turn at `bps-total`.
//!
//! # What it gives up
//!
//! A request that takes one limit, at the share of its group, longer than the capacity of another
//! limit lasts (100 ms without a burst) can make a sibling lose part of that other limit: nothing is
//! dispatched in the meantime, and the bucket runs empty.

use super::Tree;
use super::depth::{DEPTH_MAX, LIMITS_MAX};
use super::node::{LimitId, LimitState, LineId, Reservation};
use super::order::{Child, Lead, Order, Scale, Share, Standing};
use crate::bits::ones;
use crate::bucket::NanoUnits;
use crate::cost::{Cost, Direction};
use crate::held::Held;
use crate::ids::NodeId;
use crate::share::WEIGHT_DEFAULT;
use crate::time::Time;

const _: () = assert!(LIMITS_MAX <= u64::BITS as usize, "a set of limits fits a word");

/// Looks at one line at one instant after which it no longer gives way to other lines at limits
/// that are open: lines could give way to each other for ever.
const LOOKS_MAX: u8 = 8;

const LINE_SCALE: Scale = Scale::of(WEIGHT_DEFAULT);

/// The nodes between a line and one of its limits, each with its child on the way, from the member
/// up to the node of the limit.
pub(super) struct Climb {
    steps: [(NodeId, Child); DEPTH_MAX + 1],
    count: usize,
}

impl Climb {
    pub fn up(&self) -> impl Iterator<Item = (NodeId, Child)> {
        self.steps[..self.count].iter().copied()
    }

    fn down(&self) -> impl Iterator<Item = (NodeId, Child)> {
        self.steps[..self.count].iter().rev().copied()
    }
}

/// The outcome of a look at the first line of an order.
enum Look {
    /// The line goes.
    Goes(LineId),
    /// The line waits elsewhere, or the limit is timed anew.
    Waits,
}

impl Tree {
    /// Dispatches every due request in turn order, charges each to its member and all above, and
    /// hands it to `post`.
    pub fn let_go_due(&mut self, root: NodeId, now: Time, mut post: impl FnMut(&Held)) {
        loop {
            if let Some(&line) = self.roots[root].unlimited.first() {
                self.dispatch(root, line, now, &mut post);
                continue;
            }
            let Some((due, (node, limit))) = self.roots[root].timers.first() else { return };
            if due > now {
                return;
            }
            if let Look::Goes(line) = self.look(node, limit, now) {
                self.dispatch(root, line, now, &mut post);
            }
        }
    }

    /// Dispatches the first request of a line that has the turn. A line that holds all waiting
    /// requests of its tree keeps the turn as long as every limit allows.
    fn dispatch(&mut self, root: NodeId, line: LineId, now: Time, post: &mut impl FnMut(&Held)) {
        let count = self.flow(line).line.len();
        let is_alone = count > 1 && count == self.nodes[root].held;
        let charged = self.flow(line).charged;
        let mut gone = 0;
        let cost = loop {
            debug_assert_eq!(
                self.flow(line)
                    .line
                    .first()
                    .map(|first| first.cost)
                    .and_then(|cost| { self.ready_at(line.member, &cost, now) }),
                None,
                "exact limits: every limit takes the request"
            );
            let held = self.flow_mut(line).line.pop().expect("a line that is due holds a request");
            let mut next = Some(line.member);
            while let Some(id) = next {
                let node = &mut self.nodes[id];
                node.limiter.charge(&held.cost, now);
                next = node.parent;
            }
            for limit in ones(charged) {
                self.advance(line, limit, &held.cost);
            }
            post(&held);
            gone += 1;
            let is_like_next = self.flow(line).line.first().is_some_and(|next| next.cost.has_limits_of(&held.cost));
            if !is_alone || !is_like_next || self.ready_at(line.member, &held.cost, now).is_some() {
                break held.cost;
            }
        };
        self.count_held(line.member, -gone);
        self.settle(line, &cost, now);
    }

    /// Moves the tags of a line and of the nodes above it at one limit.
    fn advance(&mut self, line: LineId, limit: usize, cost: &Cost) {
        let units = self.units(line, limit, cost);
        for (node, child) in self.climb(line, limit).up() {
            let scale = match child {
                Child::Node(child) => self.nodes[child].scale,
                Child::Line(_) => LINE_SCALE,
            };
            let mut standing = self.standing(node, child, limit);
            standing.advance(&mut self.nodes[node].orders[limit], units, scale);
            *self.standing_mut(node, child, limit) = standing;
            if let Some(place) = standing.place() {
                self.arrivals += 1;
                let arrival = self.arrivals;
                if !self.nodes[node].orders[limit].rekey_only(&standing, arrival) {
                    self.with_order(node, limit, |order, placed| order.rekey(place, &standing, arrival, placed));
                }
            }
        }
    }

    /// A line begins to wait, as its first request or its limits have changed.
    pub(super) fn enter(&mut self, line: LineId, lead: Lead, now: Time) {
        let first = self.flow(line).line.first().expect("a line that enters holds a request");
        let cost = first.cost;
        let limits = &self.nodes[line.member].limits;
        let is_charged = |(_, limit): &(usize, &LimitId)| cost.is_charged_to(limit.kind);
        let charged = limits.iter().enumerate().filter(is_charged).fold(0, |bits, (index, _)| bits | 1 << index);
        self.flow_mut(line).charged = charged;
        if charged == 0 {
            let root = self.root(line.member);
            self.roots[root].unlimited.push(line);
            return;
        }
        ones(charged).for_each(|limit| self.state_mut(line, limit).counted += 1);
        let main = self.choose(line, now);
        self.flow_mut(line).main = main;
        self.state_mut(line, main).mains += 1;
        self.wait_at(line, main, lead);
        self.time_all(line, charged, now);
    }

    /// A line no longer waits: it is empty, or enters again.
    pub(super) fn exit(&mut self, line: LineId, now: Time) {
        let charged = std::mem::take(&mut self.flow_mut(line).charged);
        if charged == 0 {
            let root = self.root(line.member);
            self.roots[root].unlimited.retain(|&due| due != line);
            return;
        }
        self.stop_waiting(line);
        ones(charged).for_each(|limit| self.state_mut(line, limit).counted -= 1);
        let main = self.flow(line).main;
        self.release(line, main);
        self.state_mut(line, main).mains -= 1;
        self.time_all(line, charged, now);
    }

    /// Places a line anew after a request of this cost has left it.
    pub(super) fn settle(&mut self, line: LineId, gone: &Cost, now: Time) {
        let flow = self.flow(line);
        let charged = flow.charged;
        let is_like_next = charged != 0 && flow.line.first().is_some_and(|next| next.cost.has_limits_of(gone));
        if !is_like_next {
            self.exit(line, now);
            if self.flow(line).line.first().is_some() {
                self.enter(line, Lead::Blocked { cost: 0 }, now);
            }
            return;
        }
        let (old, waits_at) = (flow.main, flow.waits_at);
        self.release(line, old);
        let main = self.choose(line, now);
        self.set_main(line, main);
        if waits_at != Some(main) {
            self.move_to(line, main);
        }
        self.time_all(line, charged, now);
    }

    /// The main limit of a line: among the limits that its first request does not fit, or that
    /// others wait for, the one at which the line is least behind on every level. If it fits all,
    /// any.
    fn choose(&mut self, line: LineId, now: Time) -> usize {
        let flow = self.flow(line);
        let (charged, waits_at) = (flow.charged, flow.waits_at);
        let only = charged.trailing_zeros() as usize;
        if charged.count_ones() == 1 {
            return only;
        }
        let mut best: Option<(f64, Time, usize)> = None;
        let mut latest = (Time::ZERO, only);
        for limit in ones(charged) {
            let fits_at = self.fits_at(line, limit, now).unwrap_or(now);
            if fits_at > latest.0 {
                latest = (fits_at, limit);
            }
            let others = self.state(line, limit).waiters - u32::from(waits_at == Some(limit));
            if fits_at <= now && others == 0 {
                continue;
            }
            let ahead_ns = self.ahead_ns(line, limit);
            if best.is_none_or(|(least, at, _)| (ahead_ns, fits_at) > (least, at)) {
                best = Some((ahead_ns, fits_at, limit));
            }
        }
        best.map_or(latest.1, |(_, _, limit)| limit)
    }

    /// How far a line is ahead of its siblings at a limit (< 0: behind), in nanoseconds of the rate
    /// of the level at which it is least ahead. A line without siblings is behind by the time of its
    /// request.
    fn ahead_ns(&self, line: LineId, limit: usize) -> f64 {
        let mut rate = self.rate(line, limit);
        let units = self.first_units(line, limit) as f64;
        let mut least: Option<f64> = None;
        for (node, child) in self.climb(line, limit).down() {
            let weight = f64::from(self.weight(child));
            let weights = self.nodes[node].weights().max(weight);
            if weights > weight {
                let ahead = self.standing(node, child, limit).ahead_ns(&self.nodes[node].orders[limit], rate, weights);
                least = Some(least.map_or(ahead, |least| least.min(ahead)));
            }
            rate *= weight / weights;
        }
        least.unwrap_or(-units / self.rate(line, limit))
    }

    /// Looks at the first line of a limit's order, which is due.
    fn look(&mut self, node: NodeId, limit: usize, now: Time) -> Look {
        let due = self.due_at(node, limit, now).expect("only limits with waiting lines are timed");
        if due > now {
            self.time(node, limit, now);
            return Look::Waits;
        }
        let line = self.first(node, limit).expect("a line waits");
        let looks = self.count_look(line, now);
        let flow = self.flow(line);
        let (main, charged) = (flow.main, flow.charged);
        let mut closed: Option<(Time, usize)> = None;
        for other in ones(charged).filter(|&other| other != limit) {
            let until = match self.ready_at_limit(line, other, now) {
                Some(ready_at) => Some(ready_at),
                None if other == main || looks > LOOKS_MAX => None,
                None if !self.would_be_first(line, other) => {
                    self.change_main(line, other, now);
                    return Look::Waits;
                }
                None => self.kept_until(line, other, now),
            };
            if let Some(until) = until
                && closed.is_none_or(|(latest, _)| until > latest)
            {
                closed = Some((until, other));
            }
        }
        match closed {
            None => Look::Goes(line),
            Some((until, other)) => {
                self.park(line, limit, other, until, now);
                Look::Waits
            }
        }
    }

    /// A line whose limit `closed` opens at `until` waits there, and keeps its main limit.
    fn park(&mut self, line: LineId, from: usize, closed: usize, until: Time, now: Time) {
        let flow = self.flow(line);
        let (main, was_parked) = (flow.main, flow.is_parked());
        let main_node = self.nodes[line.member].limits[main].node;
        let state = self.state(line, main);
        if let Some(reserved) = state.reserved
            && reserved.line != line
            && !was_parked
            && self.flow(reserved.line).is_parked()
            && self.flow(reserved.line).waits_at == Some(closed)
            && closed < self.nodes[main_node].limits.len()
        {
            // The line of the reservation waits for the same limit, at or above this one: all lines
            // of the order do.
            self.state_mut(line, main).blocked_until = until.max(now.plus_nanos(1));
            self.time(main_node, main, now);
            return;
        }
        self.move_to(line, closed);
        let is_reserved = closed != main
            && self.lasts(line, main, until, now)
            && !self.state(line, main).reserved.is_some_and(|other| other.line != line && other.until > now);
        if is_reserved {
            self.state_mut(line, main).reserved = Some(Reservation { line, until });
        } else {
            self.release(line, main);
        }
        let touched = 1 << main | 1 << closed | 1 << from;
        self.time_all(line, touched, now);
    }

    /// A line waits for its turn at another limit, which becomes its main limit.
    fn change_main(&mut self, line: LineId, main: usize, now: Time) {
        let flow = self.flow(line);
        let (old, charged) = (flow.main, flow.charged);
        self.release(line, old);
        self.set_main(line, main);
        self.move_to(line, main);
        self.time_all(line, charged, now);
    }

    fn set_main(&mut self, line: LineId, main: usize) {
        let old = std::mem::replace(&mut self.flow_mut(line).main, main);
        self.state_mut(line, old).mains -= 1;
        self.state_mut(line, main).mains += 1;
    }

    /// A line that waits joins the order of another limit.
    fn move_to(&mut self, line: LineId, limit: usize) {
        self.stop_waiting(line);
        let cost = self.first_units(line, limit);
        self.wait_at(line, limit, Lead::Blocked { cost });
    }

    /// Ends the reservation of a line at its main limit.
    fn release(&mut self, line: LineId, main: usize) {
        let state = self.state_mut(line, main);
        if state.reserved.is_some_and(|reserved| reserved.line == line) {
            state.reserved = None;
            state.blocked_until = Time::ZERO;
        }
    }

    /// Counts a look at a line; returns the looks at this instant.
    fn count_look(&mut self, line: LineId, now: Time) -> u8 {
        let (at, looks) = &mut self.flow_mut(line).looked_at;
        *looks = if *at == now { looks.saturating_add(1) } else { 1 };
        *at = now;
        *looks
    }

    /// Joins the order of a limit.
    fn wait_at(&mut self, line: LineId, limit: usize, lead: Lead) {
        let mut rate = self.rate(line, limit);
        for (node, child) in self.climb(line, limit).down() {
            let share = self.share(node, child, rate);
            rate *= f64::from(share.weight) / share.weights;
            let mut standing = self.standing(node, child, limit);
            if standing.is_waiting() {
                continue;
            }
            self.arrivals += 1;
            let arrival = self.arrivals;
            let order = &mut self.nodes[node].orders[limit];
            order.admit(&mut standing, lead, share);
            let is_only = order.insert_only(child, &mut standing, arrival);
            *self.standing_mut(node, child, limit) = standing;
            if !is_only {
                self.with_order(node, limit, |order, placed| order.insert(child, &standing, arrival, placed));
            }
        }
        self.state_mut(line, limit).waiters += 1;
        self.flow_mut(line).waits_at = Some(limit);
    }

    /// Leaves the order in which the line waits.
    fn stop_waiting(&mut self, line: LineId) {
        let Some(limit) = self.flow_mut(line).waits_at.take() else { return };
        self.state_mut(line, limit).waiters -= 1;
        for (node, child) in self.climb(line, limit).up() {
            if let Child::Node(below) = child
                && self.nodes[below].orders[limit].first().is_some()
            {
                return;
            }
            let mut standing = self.standing(node, child, limit);
            debug_assert!(standing.is_waiting());
            if !self.nodes[node].orders[limit].leave_only(&mut standing) {
                self.with_order(node, limit, |order, placed| order.leave(&mut standing, placed));
            }
            *self.standing_mut(node, child, limit) = standing;
        }
    }

    /// Whether a line would be first if it waited at this limit.
    fn would_be_first(&self, line: LineId, limit: usize) -> bool {
        if self.state(line, limit).waiters == 0 {
            return true;
        }
        let mut rate = self.rate(line, limit);
        let lead = Lead::Blocked { cost: self.first_units(line, limit) };
        for (node, child) in self.climb(line, limit).down() {
            let order = &self.nodes[node].orders[limit];
            match order.first() {
                None => return true,
                Some(first) if first == child => {}
                Some(_) => {
                    let standing = self.standing(node, child, limit);
                    return !standing.is_waiting()
                        && order.would_be_first(&standing, lead, self.share(node, child, rate));
                }
            }
            let share = self.share(node, child, rate);
            rate *= f64::from(share.weight) / share.weights;
        }
        true
    }

    fn share(&self, node: NodeId, child: Child, rate: f64) -> Share {
        let weight = self.weight(child);
        Share { rate, weight, weights: self.nodes[node].weights().max(f64::from(weight)) }
    }

    /// The first line in the order of a limit of `node`.
    pub(super) fn first(&self, node: NodeId, limit: usize) -> Option<LineId> {
        let mut node = node;
        loop {
            match self.nodes[node].orders[limit].first()? {
                Child::Node(child) => node = child,
                Child::Line(line) => {
                    return Some(LineId { member: node, direction: Direction::ALL[line] });
                }
            }
        }
    }

    /// The instant at which the first line of a limit's order is due.
    fn due_at(&mut self, node: NodeId, limit: usize, now: Time) -> Option<Time> {
        let line = self.first(node, limit)?;
        let closed_until = if self.flow(line).is_parked() {
            self.ready_at_limit(line, limit, now)
        } else {
            let blocked_until = self.state(line, limit).blocked_until;
            self.fits_at(line, limit, now).or((blocked_until > now).then_some(blocked_until))
        };
        let until = closed_until.or_else(|| self.kept_until(line, limit, now));
        Some(until.unwrap_or(now))
    }

    /// The end of a reservation by another line that the first request of `line` would delay.
    fn kept_until(&mut self, line: LineId, limit: usize, now: Time) -> Option<Time> {
        let reserved = self.state(line, limit).reserved?;
        if reserved.line == line || reserved.until <= now {
            return None;
        }
        let units = self.first_units(line, limit);
        let id = self.nodes[line.member].limits[limit];
        let bucket = self.nodes[id.node].limiter.bucket(id.kind);
        (!bucket.is_open_after(units, reserved.until, now)).then_some(reserved.until)
    }

    /// Whether a limit that takes no request until then is not empty before.
    fn lasts(&mut self, line: LineId, limit: usize, until: Time, now: Time) -> bool {
        let id = self.nodes[line.member].limits[limit];
        self.nodes[id.node].limiter.bucket(id.kind).lasts(until, now)
    }

    /// The instant at which the first request of a line fits a limit; `None` if that is now.
    fn fits_at(&mut self, line: LineId, limit: usize, now: Time) -> Option<Time> {
        let LimitState { counted, mains, .. } = *self.state(line, limit);
        let units = if counted > mains { self.first_units(line, limit) } else { 0 };
        let id = self.nodes[line.member].limits[limit];
        self.nodes[id.node].limiter.bucket(id.kind).fits_at(units, now)
    }

    /// The instant at which a limit takes a request; `None` if that is now.
    fn ready_at_limit(&mut self, line: LineId, limit: usize, now: Time) -> Option<Time> {
        let id = self.nodes[line.member].limits[limit];
        self.nodes[id.node].limiter.bucket(id.kind).ready_at(now)
    }

    /// The units of a limit that the first request of a line is charged.
    fn first_units(&self, line: LineId, limit: usize) -> NanoUnits {
        let first = self.flow(line).line.first().expect("a line that waits holds a request");
        self.units(line, limit, &first.cost)
    }

    fn units(&self, line: LineId, limit: usize, cost: &Cost) -> NanoUnits {
        let id = self.nodes[line.member].limits[limit];
        self.nodes[id.node].limiter.units(id.kind, cost)
    }

    /// The rate of a limit, in nano-units a nanosecond.
    fn rate(&self, line: LineId, limit: usize) -> f64 {
        let id = self.nodes[line.member].limits[limit];
        self.nodes[id.node].limiter.rate(id.kind) as f64
    }

    fn weight(&self, child: Child) -> u32 {
        match child {
            Child::Node(child) => self.nodes[child].weight,
            Child::Line(_) => WEIGHT_DEFAULT,
        }
    }

    /// The way from a line up to one of its limits.
    pub(super) fn climb(&self, line: LineId, limit: usize) -> Climb {
        let first = (line.member, Child::Line(line.direction as usize));
        let mut climb = Climb { steps: [first; DEPTH_MAX + 1], count: 1 };
        let mut id = line.member;
        while limit < self.nodes[id].above
            && let Some(parent) = self.nodes[id].parent
        {
            climb.steps[climb.count] = (parent, Child::Node(id));
            climb.count += 1;
            id = parent;
        }
        climb
    }

    /// The standing of a child of `node` at a limit.
    pub(super) fn standing(&self, node: NodeId, child: Child, limit: usize) -> Standing {
        match child {
            Child::Node(child) => self.nodes[child].standings[limit],
            Child::Line(line) => self.nodes[node].flow(Direction::ALL[line]).standings[limit],
        }
    }

    /// [`Self::standing`], to change it.
    fn standing_mut(&mut self, node: NodeId, child: Child, limit: usize) -> &mut Standing {
        match child {
            Child::Node(child) => &mut self.nodes[child].standings[limit],
            Child::Line(line) => self.nodes[node].line_standing(line, limit),
        }
    }

    /// Works on an order of `node` while its heap reports places to the children.
    fn with_order(&mut self, node: NodeId, limit: usize, with: impl FnOnce(&mut Order, &mut dyn FnMut(Child, u32))) {
        let mut order = std::mem::take(&mut self.nodes[node].orders[limit]);
        with(&mut order, &mut |child, place| self.standing_mut(node, child, limit).set_place(Some(place)));
        self.nodes[node].orders[limit] = order;
    }

    fn state(&self, line: LineId, limit: usize) -> &LimitState {
        let node = &self.nodes[self.nodes[line.member].limits[limit].node];
        &node.own[limit - node.above]
    }

    fn state_mut(&mut self, line: LineId, limit: usize) -> &mut LimitState {
        let node = self.nodes[line.member].limits[limit].node;
        let node = &mut self.nodes[node];
        &mut node.own[limit - node.above]
    }

    /// Times some limits of a line anew.
    fn time_all(&mut self, line: LineId, limits: u64, now: Time) {
        for limit in ones(limits) {
            let node = self.nodes[line.member].limits[limit].node;
            self.time(node, limit, now);
        }
    }

    /// Times the limits of a node anew, whose levels or rates have changed.
    pub(super) fn time_own(&mut self, node: NodeId, now: Time) {
        for limit in self.nodes[node].above..self.nodes[node].limits.len() {
            self.time(node, limit, now);
        }
    }

    /// Sets the timer of a limit to the instant at which the first line of its order is due.
    fn time(&mut self, node: NodeId, limit: usize, now: Time) {
        let own = limit - self.nodes[node].above;
        let due = self.due_at(node, limit, now);
        let timer = self.nodes[node].own[own].timer;
        if due.is_none() && timer.is_none() {
            return;
        }
        let root = self.root(node);
        let Self { nodes, roots, .. } = self;
        let mut placed = |(node, limit): (NodeId, usize), place: u32| {
            let node = &mut nodes[node];
            node.own[limit - node.above].timer = Some(place);
        };
        let timers = &mut roots[root].timers;
        match (due, timer) {
            (Some(due), Some(_)) if timers.rekey_only(due) => {}
            (Some(due), Some(place)) => timers.rekey(place, due, &mut placed),
            (Some(due), None) => timers.insert(due, (node, limit), &mut placed),
            (None, Some(place)) => {
                timers.remove(place, &mut placed);
                self.nodes[node].own[own].timer = None;
            }
            (None, None) => {}
        }
    }
}
