//! The order of siblings at one limit: start-time fair queueing.
//!
//! ```text
//!   limit: 1000 operations/s of a group      A (weight 100)   B (weight 200)
//!   dispatched so far                        30               62
//!   tag = dispatched / weight                0.30             0.31      → A is first
//! ```
//!
//! A child's *tag* grows with each dispatch at or below the child, by the cost in the unit of the
//! limit over the weight of the child. Among the children with a request that waits for the limit,
//! the child with the least tag is first. The *virtual time* of the order is the largest tag that a
//! dispatched child had. Two children that wait all the time differ by at most one request of each.
//!
//! Tags of different limits are never compared: a tag is private to this file, and [`Order::first`]
//! answers for the one limit of the order.
//!
//! # After a pause
//!
//! A child that comes back with an old tag would be first until its tag has caught up. Two bounds
//! limit this, both in the time that the limit is kept from the siblings:
//! * [`NEWCOMER_NS`] for a child that had no request waiting, and [`NEWCOMERS_NS`] for all such
//!   children of the order together. A client that waits for each answer keeps its share, and a
//!   hundred clients that return in the same second delay the others by 100 ms only.
//! * [`BLOCKED_NS`] of its share and two requests for a child whose requests waited for another
//!   limit meanwhile: it could not take its turns, and may make up for them.

use crate::heap::Heap;
use crate::ids::NodeId;
use crate::time::Time;

/// A position in an order: nano-units of the limit over the weight of the child, in 1/65,536.
///
/// At most 10^15 units/s · 10^9 · 65,536 = 6.6 · 10^28 a second for a child of weight 1: a `u128`
/// lasts for 160 years.
type Tag = u128;

const TICKS: f64 = 65_536.0;

/// The largest lead of a child that comes back, in nanoseconds of the limit's whole rate.
const NEWCOMER_NS: u64 = 50_000_000;

/// The largest sum of such leads; it is earned again at half the speed of time.
const NEWCOMERS_NS: u64 = 100_000_000;

/// The largest lead of a child that waited for another limit, in nanoseconds of its own share.
const BLOCKED_NS: u64 = 200_000_000;

/// The requests that such a child may make up for besides.
const BLOCKED_REQUESTS: f64 = 2.0;

/// A child in an order: a node below the node of the order, or one of the two lines of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Child {
    Node(NodeId),
    /// The index of the [`crate::cost::Direction`].
    Line(usize),
}

/// A child's part in one order.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Standing {
    tag: Tag,
    /// The place in the heap of the order, while a request at or below the child waits for the
    /// limit.
    place: Option<u32>,
    /// The virtual time when the child last left the order.
    left_at: Tag,
}

impl Standing {
    /// Whether a request at or below the child waits for the limit.
    pub fn is_waiting(&self) -> bool {
        self.place.is_some()
    }

    /// Adds a dispatch of `cost` nano-units to the tag of a child of this weight.
    pub fn advance(&mut self, order: &mut Order, cost: u128, scale: Scale) {
        order.virtual_time = order.virtual_time.max(self.tag);
        self.tag += scale.ticks(cost);
    }

    /// The nanoseconds of the order's rate by which the child is behind (< 0) or ahead of the
    /// virtual time, if the children that wait weigh `weights` in all.
    pub fn ahead_ns(&self, order: &Order, rate: f64, weights: f64) -> f64 {
        let ticks = if self.tag >= order.virtual_time {
            ticks_to_float(self.tag - order.virtual_time)
        } else {
            -ticks_to_float(order.virtual_time - self.tag)
        };
        ticks / TICKS * weights / rate
    }

    /// Makes the child equal to its siblings.
    pub fn level(&mut self, order: &Order) {
        (self.tag, self.left_at) = (order.virtual_time, order.virtual_time);
    }
}

/// The siblings below one node at one limit of this node or a node above.
#[derive(Clone, Debug, Default)]
pub(super) struct Order {
    virtual_time: Tag,
    waiting: Heap<(Tag, u64), Child>,
    /// The leads granted to newcomers, in nanoseconds, and the instant up to which they are earned
    /// again.
    granted_ns: u64,
    granted_at: Time,
}

/// The bounds of a lead that count for a child that joins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lead {
    /// The child had no request waiting.
    Newcomer(Time),
    /// A request of the child, of `cost` nano-units, waited for another limit.
    Blocked { cost: u128 },
}

/// The rate at a node and the weights that share it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    /// Nano-units a nanosecond that the node has of the limit.
    pub rate: f64,
    /// The weight of the child.
    pub weight: u32,
    /// The weights of all children with a waiting request, the child included.
    pub weights: f64,
}

impl Share {
    /// The nanoseconds of the node's rate for which a child with a lead of so many ticks keeps the
    /// limit from its siblings.
    fn lead_ns(self, ticks: Tag) -> u64 {
        (ticks_to_float(ticks) / TICKS * f64::from(self.weight) / self.rate) as u64
    }
}

impl Order {
    /// The child that is first.
    pub fn first(&self) -> Option<Child> {
        self.waiting.first().map(|(_, child)| child)
    }

    /// Whether `child`, which does not wait, would be first if it joined with this tag bound.
    pub fn would_be_first(&self, standing: &Standing, lead: Lead, share: Share) -> bool {
        self.waiting.first().is_none_or(|((tag, _), _)| self.joining_tag(standing, lead, share) < tag)
    }

    fn joining_tag(&self, standing: &Standing, lead: Lead, share: Share) -> Tag {
        if standing.tag >= self.virtual_time {
            return standing.tag;
        }
        let lead_ticks = match lead {
            Lead::Newcomer(now) => {
                let before_ns = share.lead_ns(standing.left_at.saturating_sub(standing.tag));
                let lead_ns = before_ns.saturating_add(self.newly_granted(standing, now, share)).min(NEWCOMER_NS);
                lead_ns as f64 * share.rate / f64::from(share.weight) * TICKS
            }
            Lead::Blocked { cost } => {
                let requests = BLOCKED_REQUESTS * cost as f64 / f64::from(share.weight);
                (BLOCKED_NS as f64 * share.rate / share.weights + requests) * TICKS
            }
        };
        standing.tag.max(self.virtual_time.saturating_sub(lead_ticks as Tag))
    }

    /// The part of a newcomer's lead that comes from its pause, as far as the order grants it.
    fn newly_granted(&self, standing: &Standing, now: Time, share: Share) -> u64 {
        let paused = self.virtual_time.saturating_sub(standing.tag.max(standing.left_at));
        share.lead_ns(paused).min(NEWCOMERS_NS - self.granted_by(now))
    }

    /// The leads granted and not earned again by `now`.
    fn granted_by(&self, now: Time) -> u64 {
        self.granted_ns.saturating_sub(now.nanos_since(self.granted_at) / 2)
    }

    /// Sets the tag with which a child joins; [`Self::insert`] follows.
    pub fn admit(&mut self, standing: &mut Standing, lead: Lead, share: Share) {
        let tag = self.joining_tag(standing, lead, share);
        if let Lead::Newcomer(now) = lead
            && tag < self.virtual_time
        {
            self.granted_ns = self.granted_by(now) + self.newly_granted(standing, now, share);
            self.granted_at = now;
        }
        standing.tag = tag;
    }

    /// A child leaves the order.
    pub fn leave(&mut self, standing: &mut Standing, place: &mut dyn FnMut(Child, u32)) {
        if let Some(at) = standing.place.take() {
            self.waiting.remove(at, place);
        }
        standing.left_at = self.virtual_time;
    }

    /// Inserts an admitted child; `place` hears of each child that moves in the heap.
    pub fn insert(&mut self, child: Child, standing: &Standing, arrival: u64, place: &mut dyn FnMut(Child, u32)) {
        self.waiting.insert((standing.tag, arrival), child, place);
    }

    /// Inserts an admitted child into an order in which none waits; `false` if a child waits.
    pub fn insert_only(&mut self, child: Child, standing: &mut Standing, arrival: u64) -> bool {
        let is_only = self.waiting.insert_only((standing.tag, arrival), child);
        if is_only {
            standing.place = Some(0);
        }
        is_only
    }

    /// The only waiting child leaves; `false` if more children wait.
    pub fn leave_only(&mut self, standing: &mut Standing) -> bool {
        let is_only = self.waiting.remove_only();
        if is_only {
            standing.place = None;
            standing.left_at = self.virtual_time;
        }
        is_only
    }

    /// Gives the only waiting child its new tag; `false` if more children wait.
    pub fn rekey_only(&mut self, standing: &Standing, arrival: u64) -> bool {
        self.waiting.rekey_only((standing.tag, arrival))
    }

    /// Moves the child at a place behind children of equal tags.
    pub fn rekey(&mut self, at: u32, standing: &Standing, arrival: u64, place: &mut dyn FnMut(Child, u32)) {
        self.waiting.rekey(at, (standing.tag, arrival), place);
    }

    /// The child at a place.
    #[cfg(test)]
    pub fn at(&self, place: u32) -> Option<Child> {
        self.waiting.at(place).map(|(_, child)| child)
    }
}

impl Standing {
    pub(super) fn place(&self) -> Option<u32> {
        self.place
    }

    pub(super) fn set_place(&mut self, place: Option<u32>) {
        self.place = place;
    }
}

/// The factor from nano-units to ticks for a weight: a multiplication where a division of 128 bits
/// would take ten times as long. Shares err by less than 3 · 10^-6.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale(u64);

impl Scale {
    pub const fn of(weight: u32) -> Self {
        // 2^48 / weight, of which 2^32 are shifted out again.
        Self((1 << 48) / if weight == 0 { 1 } else { weight as u64 })
    }

    fn ticks(self, cost: u128) -> Tag {
        match u64::try_from(cost) {
            Ok(cost) => (u128::from(cost) * u128::from(self.0)) >> 32,
            // Above 1.8 · 10^10 units: 2^90 · 2^48 would not fit.
            Err(_) => (cost >> 32) * u128::from(self.0),
        }
    }
}

fn ticks_to_float(ticks: Tag) -> f64 {
    // A conversion of 128 bits takes a routine; most differences are below 2^63.
    i64::try_from(ticks).map_or_else(|_| ticks as f64, |ticks| ticks as f64)
}
