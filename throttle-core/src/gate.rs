//! What one queue thread holds back. Owned by that thread alone.
//!
//! ```text
//!   fetched ─► passes ──────────────────────► backend
//!                 └─► request_all ─► tags ──► backend
//!                        └┄┄ held ┄┄► poll ─► tags ─► backend
//!                                      ▲ each turn: when rung, when the deadline has passed, after one was held
//! ```
//!
//! A turn of the thread is: `passes` for each request that came, until one does not, `request_all` for that and those after it, issue
//! what may go, `poll` once, issue what it returns, then wait no longer than [`Gate::deadline`]. A device that no limit is above asks
//! once after each change of limits or places.

use std::sync::Arc;

use crate::cost::Operation;
use crate::group::{Look, MemberId, QueueId, StillBusy, Verdict};
use crate::lease::Lease;
use crate::pass::Pass;
use crate::throttle::{Bells, Doorbell, Request, Tag, Throttle};
use crate::time::Time;

/// The throttle as one queue sees it.
pub struct Gate {
    /// `None` once it has retired: nothing holds back what comes then.
    joined: Option<Joined>,
}

struct Joined {
    throttle: Arc<Throttle>,
    queue: QueueId,
    look: Option<Look>,
    /// A request was held in this turn: its deadline is not known yet, or it may go already.
    owes_poll: bool,
    /// Leave to ask for nothing until something is changed.
    pass: Option<Pass>,
    /// What is prepaid, for reads and for writes; `None` where every decision is to be exact.
    leases: Option<[Lease; 2]>,
    bells: Bells,
}

impl Gate {
    /// The gate of a queue of `member` whose thread is woken by `bell`. Holding up to `depth` requests allocates nothing.
    pub fn new(throttle: Arc<Throttle>, member: MemberId, depth: u16, bell: Arc<dyn Doorbell>) -> Self {
        let queue = throttle.add_queue(member, depth, bell);
        let leases = Some([Lease::none(); 2]);
        let joined = Joined { throttle, queue, look: None, owes_poll: false, pass: None, leases, bells: Vec::new() };
        Self { joined: Some(joined) }
    }

    /// The same gate, asking for each request: exact to the nanosecond at any rate, also far below the limits.
    #[must_use]
    pub fn without_leases(mut self) -> Self {
        if let Some(joined) = &mut self.joined {
            joined.leases = None;
        }
        self
    }

    /// Whether a request that was fetched may go without asking anybody: no limit is above the queue, or it is prepaid. Only while no
    /// request that came before it is yet to be asked for ([`Self::request_all`]).
    pub fn passes(&mut self, operation: Operation, bytes: u64, now: Time) -> bool {
        let Some(joined) = &mut self.joined else { return true };
        if joined.pass.is_some_and(|pass| joined.throttle.is_valid(pass)) {
            return true;
        }
        let leases = joined.leases.as_mut();
        leases.is_some_and(|leases| leases[operation.direction() as usize].spend(operation, bytes, now))
    }

    /// Asks for all others, in the order in which they came. Adds the tags of those that may go to `go`, in that order; the rest is
    /// held, and comes out of a [`Self::poll`], perhaps already of this turn's.
    pub fn request_all(&mut self, requests: &[Request], now: Time, go: &mut Vec<Tag>) {
        self.ask(requests, now, |tag| go.push(tag));
    }

    /// All of that for one that comes alone.
    pub fn request(&mut self, tag: Tag, operation: Operation, bytes: u64, now: Time) -> Verdict {
        if self.passes(operation, bytes, now) {
            return Verdict::Go;
        }
        let mut verdict = Verdict::Held;
        self.ask(&[Request { tag, operation, bytes, since: now }], now, |_| verdict = Verdict::Go);
        verdict
    }

    fn ask(&mut self, requests: &[Request], now: Time, go: impl FnMut(Tag)) {
        match &mut self.joined {
            None => requests.iter().map(|request| request.tag).for_each(go),
            Some(Joined { throttle, queue, owes_poll, pass, leases, bells, .. }) => {
                let asked = throttle.request(bells, *queue, requests, leases.as_mut(), now, go);
                *owes_poll |= asked.is_one_held;
                *pass = asked.pass;
            }
        }
    }

    /// Adds the tags that may be issued now to `let_go`. To be called in every turn; does nothing, without the lock, unless
    /// the thread was `rung`, its deadline has passed or it held something in this turn.
    pub fn poll(&mut self, now: Time, rung: bool, let_go: &mut Vec<Tag>) {
        let Some(joined) = &mut self.joined else { return };
        if rung || joined.owes_poll || joined.look.is_some_and(|look| look.at <= now) {
            joined.look = joined.throttle.poll(&mut joined.bells, joined.queue, now, let_go);
            joined.owes_poll = false;
        }
    }

    /// When the thread must take its next turn at the latest; `None` if the group does not count on it.
    pub fn deadline(&self) -> Option<Time> {
        self.look().map(|look| look.at)
    }

    /// Whether reads and writes that may come before the deadline are to be held until then, in company with those that wait for it. So
    /// the thread can sleep through to it, a millisecond at most, instead of being woken up for each request that joins those that
    /// wait. A flush or discard that comes meanwhile may be late by as much.
    pub fn is_calm(&self) -> bool {
        self.look().is_some_and(|look| look.is_calm)
    }

    fn look(&self) -> Option<Look> {
        self.joined.as_ref().and_then(|joined| joined.look)
    }

    /// The thread is about to end. `Ok` once nothing is held and no restart work is outstanding; from then on nobody
    /// refers to this queue. Until then keep polling: whoever is busy is told so by the bell.
    pub fn retire(&mut self) -> Result<(), StillBusy> {
        if let Some(joined) = &self.joined {
            joined.throttle.retire(joined.queue)?;
            self.joined = None;
        }
        Ok(())
    }
}

impl Drop for Gate {
    /// A gate that ends while something is held would leave requests that nobody lets go: that is a bug of the caller.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let busy = self.retire();
            assert!(busy.is_ok(), "gate dropped: {busy:?}");
        }
    }
}
