//! When the tree is due, and how much later a timer may be.

use super::Tree;
use super::node::LineId;
use crate::cost::{Cost, Direction, Operation};
use crate::held::{Held, Line};
use crate::ids::NodeId;
use crate::planted::{Fault, planted};
use crate::time::Time;

/// The largest timer slack of a request that is not the only one of its device to wait. Up to 1,000
/// requests a second it delays nothing, as the next request is due later than that; above, it is a
/// hundredth of the 100 ms that a limit may run ahead.
const SLACK_NS_MAX: u64 = 1_000_000;

/// The slack is at most 1/2 of the wait so far. With n requests waiting at a rate r, each waits n /
/// r, so half of them are dispatched together, and a client with few requests in flight at a high
/// rate is not delayed by the whole millisecond.
const WAITED_PART: u64 = 2;

/// The slack is at most 1/8 of the patience ([`crate::limiter::Limiter::patience_ns`]) of the tree.
const PATIENCE_PART: u64 = 8;

impl Tree {
    /// The instant at which a request in the tree of `root` is next due: `None` if none waits,
    /// `now` or earlier if one is due.
    pub fn wakes_at(&self, root: NodeId, now: Time) -> Option<Time> {
        let root = &self.roots[root];
        if !root.unlimited.is_empty() {
            return Some(now);
        }
        root.timers.first().map(|(due, _)| due)
    }

    /// The deadline for a tree in which every request due by `now` has been dispatched and the next
    /// is due at `due`: `now` plus the timer slack, so that more requests go together, or `due` if
    /// that is later. The slack is small enough that no limit of the tree loses rate, and 0 while
    /// the next device has at most one request waiting in each direction: its client may be waiting
    /// for the answer before it sends again.
    pub fn company_at(&self, root: NodeId, due: Time, now: Time) -> Time {
        let Some(lines) = self.next_lines(root) else { return due };
        let is_alone = lines.iter().all(|line| line.len() < 2) && !planted(Fault::LonelyWait);
        let since = lines.iter().filter_map(|line| Some(line.first()?.since)).min();
        let waited_ns = since.map_or(0, |since| now.nanos_since(since));
        let patience_ns = self.roots[root].patience_ns.first_key_value().map_or(u64::MAX, |(&ns, _)| ns);
        let slack_ns = match patience_ns / PATIENCE_PART {
            _ if planted(Fault::SlackWithoutEnd) => SLACK_NS_MAX,
            part => SLACK_NS_MAX.min(waited_ns / WAITED_PART).min(part),
        };
        let late = now.plus_nanos(slack_ns);
        if late <= due || is_alone { due } else { late }
    }

    /// The oldest request of the member that is next to go: a candidate for the owner of the
    /// deadline.
    pub fn next_waiter(&self, root: NodeId) -> Option<&Held> {
        self.next_lines(root)?.into_iter().filter_map(|line| line.first()).min_by_key(|held| held.since)
    }

    /// The lines of the member whose request is next to go.
    fn next_lines(&self, root: NodeId) -> Option<[&Line; Direction::ALL.len()]> {
        let root = &self.roots[root];
        let due = root.unlimited.first().copied();
        let LineId { member, .. } = due.or_else(|| {
            let (_, (node, limit)) = root.timers.first()?;
            self.first(node, limit)
        })?;
        Some(self.lines(member))
    }

    /// Whether a read and a write of a member are both held if they arrive between `since` and
    /// `now`. Valid if no request of the tree was dispatched in that time.
    pub fn held_newcomers(&mut self, member: NodeId, since: Time, now: Time) -> bool {
        let charges = self.charges(member);
        [Operation::Read, Operation::Write].into_iter().all(|operation| {
            let cost = charges.cost(operation, 1);
            let would_queue = self.nodes[member].flow(cost.direction).line.first().is_some();
            !cost.is_free() && (would_queue || self.was_blocked(member, &cost, since, now))
        })
    }

    fn was_blocked(&mut self, node: NodeId, cost: &Cost, since: Time, now: Time) -> bool {
        let mut next = Some(node);
        while let Some(id) = next {
            let node = &mut self.nodes[id];
            if node.limiter.was_blocked(cost, since, now) {
                return true;
            }
            next = node.parent;
        }
        false
    }
}
