//! Held requests, and the line in which they wait.

use std::collections::VecDeque;

use crate::cost::Cost;
use crate::ids::QueueId;
use crate::planted::{Fault, planted};
use crate::request::Tag;
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
}
