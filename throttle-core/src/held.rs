//! A request that waits, and the line in which it does.

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

/// The requests of a member that wait in one direction, in the order of their arrival.
#[derive(Clone, Debug, Default)]
pub(crate) struct Line {
    requests: VecDeque<Held>,
    /// Where the line stands against that of the other direction, when both wait.
    pub position: Virtual,
}

impl Line {
    /// Room for `count` requests, so that holding so many allocates nothing.
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

    /// The one that has waited longest.
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

    /// The lane of the first.
    pub fn lane(&self) -> Option<Lane> {
        self.first().map(|held| Lane::of(&held.cost))
    }
}

/// The two lines of a member, indexed by [`Direction`].
pub(crate) type Lines = [Line; Direction::ALL.len()];
