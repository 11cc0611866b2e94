//! The state of each tag of a queue, which guarantees that a request is committed exactly once.
//!
//! ```text
//!              deliver             hold
//!   Parked ─────────────► Owned ─────────► Held
//!     │ ▲                 │   ▲             │
//!     │ └──── commit ─────┤   └── let_go ───┘
//!     │ abort             │ run
//!     ▼                   ▼
//!   Dead                Running ── done, give_up ──► Owned
//! ```
//!
//! *Parked*: with the kernel, which may deliver a request under it. *Owned*: with the queue thread,
//! and about to move on in the same turn. *Held*: waits for a limit. *Running*: the backend has an
//! entry of it. *Dead*: the kernel took it back, as the device ends.
//!
//! A tag that was given up goes on without its entry, which is *stuck*: still with the backend, and
//! counted until it completes.

/// The state of a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Parked,
    Owned,
    Held,
    Running,
    Dead,
}

/// The states of all tags of a queue, with counts.
#[derive(Debug)]
pub struct Tags {
    states: Vec<State>,
    held: u16,
    running: u16,
    dead: u16,
    stuck: usize,
}

impl Tags {
    /// All parked: for a queue whose FETCHes have been submitted.
    pub fn parked(depth: u16) -> Self {
        Self { states: vec![State::Parked; depth.into()], held: 0, running: 0, dead: 0, stuck: 0 }
    }

    /// The kernel delivered a request.
    pub fn deliver(&mut self, tag: u16) {
        self.step(tag, State::Parked, State::Owned);
    }

    /// The gate holds the request.
    pub fn hold(&mut self, tag: u16) {
        self.step(tag, State::Owned, State::Held);
        self.held += 1;
    }

    /// The gate dispatches the request.
    pub fn let_go(&mut self, tag: u16) {
        self.step(tag, State::Held, State::Owned);
        self.held -= 1;
    }

    /// The backend gets an entry for the request.
    pub fn run(&mut self, tag: u16) {
        self.step(tag, State::Owned, State::Running);
        self.running += 1;
    }

    /// The entry has completed.
    pub fn done(&mut self, tag: u16) {
        self.step(tag, State::Running, State::Owned);
        self.running -= 1;
    }

    /// The entry is not waited for any longer.
    pub fn give_up(&mut self, tag: u16) {
        self.done(tag);
        self.stuck += 1;
    }

    /// An entry that was given up has completed.
    pub fn late(&mut self) {
        assert!(self.stuck > 0, "an entry came back that nobody gave up");
        self.stuck -= 1;
    }

    /// The request is answered; the kernel has the tag again.
    pub fn commit(&mut self, tag: u16) {
        self.step(tag, State::Owned, State::Parked);
    }

    /// The kernel takes the tag back for good.
    pub fn abort(&mut self, tag: u16) {
        self.step(tag, State::Parked, State::Dead);
        self.dead += 1;
    }

    /// Whether the kernel has this tag, and may deliver a request under it.
    pub fn is_parked(&self, tag: u16) -> bool {
        self.states[usize::from(tag)] == State::Parked
    }

    /// Whether the kernel has taken a tag back.
    pub fn is_ending(&self) -> bool {
        self.dead > 0
    }

    /// Whether the queue has no work left: every tag is dead, so none is held and none is with the
    /// backend.
    pub fn all_dead(&self) -> bool {
        usize::from(self.dead) == self.states.len()
    }

    /// Whether the backend has no entry that is waited for.
    pub fn is_backend_idle(&self) -> bool {
        self.running == 0
    }

    /// Whether the backend has an entry of this tag.
    pub fn is_running(&self, tag: u16) -> bool {
        self.states[usize::from(tag)] == State::Running
    }

    /// Whether the queue keeps a request over the end of a turn.
    pub fn is_busy(&self) -> bool {
        self.held > 0 || self.running > 0
    }

    /// Entries that were given up and have not completed.
    pub fn stuck(&self) -> usize {
        self.stuck
    }

    fn step(&mut self, tag: u16, from: State, to: State) {
        let state = &mut self.states[usize::from(tag)];
        // Also in release builds: a request answered twice loses the data of another client.
        assert!(*state == from, "tag {tag} goes to {to:?} from {state:?}, not from {from:?}");
        *state = to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_may_be_held_run_and_committed_and_comes_again() {
        // The usual way round, twice, with the counts in step.
        let mut tags = Tags::parked(2);
        for _ in 0..2 {
            tags.deliver(1);
            tags.hold(1);
            assert!(tags.is_busy() && tags.is_backend_idle());
            tags.let_go(1);
            tags.run(1);
            assert!(!tags.is_backend_idle() && tags.is_running(1));
            tags.done(1);
            tags.commit(1);
        }
        assert!(!tags.is_busy() && !tags.is_ending());
    }

    #[test]
    fn the_queue_ends_when_the_last_tag_is_dead() {
        // A tag that is still with the queue keeps it alive until it was committed and aborted.
        let mut tags = Tags::parked(2);
        tags.deliver(0);
        tags.abort(1);
        assert!(tags.is_ending() && !tags.all_dead());
        tags.commit(0);
        tags.abort(0);
        assert!(tags.all_dead());
    }

    #[test]
    fn a_tag_goes_on_without_an_entry_that_was_given_up() {
        // The device can be removed; the entry completes when the backend pleases.
        let mut tags = Tags::parked(1);
        tags.deliver(0);
        tags.run(0);
        tags.give_up(0);
        tags.commit(0);
        tags.abort(0);
        assert!(tags.all_dead() && tags.is_backend_idle());
        assert_eq!(tags.stuck(), 1);
        tags.late();
        assert_eq!(tags.stuck(), 0);
    }

    #[test]
    #[should_panic(expected = "not from Owned")]
    fn a_request_is_not_committed_twice() {
        // The second commit would answer the next request under the same tag.
        let mut tags = Tags::parked(1);
        tags.deliver(0);
        tags.commit(0);
        tags.commit(0);
    }
}
