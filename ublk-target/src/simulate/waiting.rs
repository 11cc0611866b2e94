//! The waiting requests of a device, by tag. The throttle holds tags and costs only; in the daemon,
//! the queue keeps the requests.

use throttle_core::cost::Operation;
use throttle_core::request::Tag;
use throttle_core::time::Time;

/// A request as it arrived.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub operation: Operation,
    pub bytes: u64,
    pub arrived: Time,
}

/// Tags are reused, so the size depends on the requests that wait at a time, not on the trace.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    requests: Vec<Request>,
    free: Vec<Tag>,
}

impl Waiting {
    /// The tag under which the next [`Self::put`] will store.
    pub fn next_tag(&self) -> Tag {
        self.free.last().copied().unwrap_or(self.requests.len() as Tag)
    }

    /// Stores a request under [`Self::next_tag`].
    pub fn put(&mut self, request: Request) {
        match self.free.pop() {
            Some(tag) => self.requests[tag as usize] = request,
            None => self.requests.push(request),
        }
    }

    /// Removes and returns the request of a tag.
    pub fn take(&mut self, tag: Tag) -> Request {
        self.free.push(tag);
        self.requests[tag as usize]
    }

    /// The number of waiting requests.
    pub fn len(&self) -> usize {
        self.requests.len() - self.free.len()
    }
}
