//! Whose request goes next when several members of a group are waiting.
//!
//! ```text
//!   reads    C ─ A ─ D      each member stands once in a line, however much it holds;
//!   writes   A ─ B          the first of a line has the turn (QEMU's token)
//!   first: writes           the line that is looked at first
//! ```
//!
//! A member that was served goes to the end of its line, or out of it when it holds nothing more, and the other line is
//! looked at first. One that cannot go (its own limit) is passed over and keeps its place. Members that wait for nothing
//! stand in no line, so an idle member costs nothing. This module knows no limits and no time.

use std::collections::VecDeque;

use crate::cost::Direction;
use crate::group::MemberId;

/// The two lines of a group.
#[derive(Debug)]
pub(crate) struct Turn {
    lines: [VecDeque<MemberId>; 2],
    first: Direction,
}

impl Turn {
    /// Nobody waits.
    pub fn new() -> Self {
        Self { lines: [VecDeque::new(), VecDeque::new()], first: Direction::Read }
    }

    /// Room for `members` in each line, so that waiting allocates nothing.
    pub fn reserve(&mut self, members: usize) {
        for line in &mut self.lines {
            line.reserve(members.saturating_sub(line.len()));
        }
    }

    /// Whether both lines are empty.
    pub fn is_idle(&self) -> bool {
        self.lines.iter().all(VecDeque::is_empty)
    }

    /// A member begins to wait: it stands at the end of the line.
    pub fn join(&mut self, direction: Direction, member: MemberId) {
        debug_assert!(!self.lines[direction as usize].contains(&member));
        self.lines[direction as usize].push_back(member);
    }

    /// Everyone who waits, in the order in which they may go.
    pub fn in_order(&self) -> impl Iterator<Item = (Direction, MemberId)> {
        [self.first, self.first.other()]
            .into_iter()
            .flat_map(|direction| self.lines[direction as usize].iter().map(move |&member| (direction, member)))
    }

    /// A request of `member` was let go: the turn passes on.
    pub fn pass(&mut self, direction: Direction, member: MemberId, waits_on: bool) {
        self.leave(direction, member);
        if waits_on {
            self.join(direction, member);
        }
        self.first = direction.other();
    }

    /// A member waits no more; whoever stood behind it moves up.
    pub fn leave(&mut self, direction: Direction, member: MemberId) {
        let line = &mut self.lines[direction as usize];
        // Nearly always the first: only members held back by a limit of their own are passed over.
        if let Some(place) = line.iter().position(|&other| other == member) {
            line.remove(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slotmap::SlotMap;

    #[test]
    fn turn_goes_round_and_alternates_directions() {
        let mut ids: SlotMap<MemberId, ()> = SlotMap::with_key();
        let [a, b] = [ids.insert(()), ids.insert(())];
        let mut turn = Turn::new();
        turn.join(Direction::Read, a);
        turn.join(Direction::Read, b);
        turn.join(Direction::Write, b);
        let mut served = Vec::new();
        for _ in 0..6 {
            let (direction, member) = turn.in_order().next().unwrap();
            served.push((direction, member));
            turn.pass(direction, member, true);
        }
        let (r, w) = (Direction::Read, Direction::Write);
        assert_eq!(served, [(r, a), (w, b), (r, b), (w, b), (r, a), (w, b)]);
    }

    #[test]
    fn member_that_was_passed_over_keeps_its_place() {
        let mut ids: SlotMap<MemberId, ()> = SlotMap::with_key();
        let [a, b, c] = [ids.insert(()), ids.insert(()), ids.insert(())];
        let mut turn = Turn::new();
        for member in [a, b, c] {
            turn.join(Direction::Read, member);
        }
        turn.pass(Direction::Read, b, true);
        let order: Vec<_> = turn.in_order().map(|(_, member)| member).collect();
        assert_eq!(order, [a, c, b]);
    }
}
