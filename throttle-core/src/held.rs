//! Held requests, and the line in which they wait.

use std::collections::VecDeque;

use crate::cost::{Cost, Direction};
use crate::group::QueueId;
use crate::lane::Lane;
use crate::planted::{Fault, planted};
use crate::share::Virtual;
use crate::throttle::Tag;
use crate::time::Time;

/// A request that waits for a limit. Its data stays with the thread of its queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    pub queue: QueueId,
    pub tag: Tag,
    pub cost: Cost,
    pub since: Time,
}

/// The held requests of a member in one direction, in arrival order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Line {
    requests: VecDeque<Held>,
    /// The virtual time of this line, against that of the opposite direction while both wait.
    pub position: Virtual,
}

impl Line {
    /// Reserves room for `count` requests: holding up to so many allocates nothing.
    pub fn reserve(&mut self, count: usize) {
        self.requests.reserve(count.saturating_sub(self.requests.len()));
    }

    pub fn push(&mut self, held: Held) {
        self.requests.push_back(held);
    }

    pub fn pop(&mut self) -> Option<Held> {
        if planted(Fault::NewestFirst) {
            return self.requests.pop_back();
        }
        self.requests.pop_front()
    }

    /// The request that has waited longest.
    pub fn first(&self) -> Option<&Held> {
        self.requests.front()
    }

    pub fn len(&self) -> u32 {
        self.requests.len() as u32
    }

    #[cfg(test)]
    pub fn iter(&self) -> impl Iterator<Item = &Held> {
        self.requests.iter()
    }

    /// The lane of the first request.
    pub fn lane(&self) -> Option<Lane> {
        self.first().map(|held| Lane::of(&held.cost))
    }
}

/// The two lines of a member, indexed by [`Direction`].
pub(crate) type Lines = [Line; Direction::ALL.len()];
