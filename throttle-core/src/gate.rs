//! The throttle from the side of one queue thread, which alone owns its gate.
//!
//! ```text
//!   fetched ─► passes ──────────────────────► backend
//!   fetched ─► passes ──────────────────────► backend
//!                 └─► request_all ─► tags ──► backend
//!                        └┄┄ held ┄┄► poll ─► tags ─► backend
//! ```
//!
//! A turn of the thread: `passes` for each new request until the first refusal, `request_all` for
//! that request and all after it, issue the tags that may go, `poll` once, issue the tags that it
//! returns, then wait until [`Gate::deadline`] at most. A device without a limit above it calls
//! `request_all` once after each change of limits or places.

use std::sync::Arc;

use crate::cost::Operation;
use crate::group::{Look, StillBusy, Verdict};
use crate::ids::{MemberId, QueueId};
use crate::lease::Lease;
use crate::pass::Pass;
use crate::request::{Request, Tag};
use crate::throttle::{Bells, Doorbell, Throttle};
use crate::time::Time;

/// The access of one queue to the throttle.
pub struct Gate {
    /// `None` after retirement: later requests all pass.
    joined: Option<Joined>,
}

struct Joined {
    throttle: Arc<Throttle>,
    queue: QueueId,
    look: Option<Look>,
    /// A request was held in this turn: its deadline is not known yet, or it has been dispatched
    /// already.
    owes_poll: bool,
    /// The pass of a queue without a limit above it, valid until the next change.
    pass: Option<Pass>,
    /// The leases for reads and for writes; `None` where every decision is to be exact.
    leases: Option<[Lease; 2]>,
    bells: Bells,
}

impl Gate {
    /// The gate of a queue of `member` whose thread is woken by `bell`. Holding up to `depth`
    /// requests allocates nothing.
    pub fn new(throttle: Arc<Throttle>, member: MemberId, depth: u16, bell: Arc<dyn Doorbell>) -> Self {
        let queue = throttle.add_queue(member, depth, bell);
        let leases = Some([const { Lease::none() }; 2]);
        let joined = Joined { throttle, queue, look: None, owes_poll: false, pass: None, leases, bells: Vec::new() };
        Self { joined: Some(joined) }
    }

    /// The same gate without leases: each decision is exact to the nanosecond at any rate, also far
    /// below the limits.
    #[must_use]
    pub fn without_leases(mut self) -> Self {
        if let Some(joined) = &mut self.joined {
            joined.leases = None;
        }
        self
    }

    /// Whether a fetched request may go without the lock: its queue has a valid pass, or the
    /// request is prepaid by a lease. Not to be called while an earlier request awaits
    /// [`Self::request_all`].
    pub fn passes(&mut self, operation: Operation, bytes: u64, now: Time) -> bool {
        let Some(joined) = &mut self.joined else { return true };
        let pass = joined.throttle.pass();
        let leases = joined.leases.as_mut();
        leases.is_some_and(|leases| leases[operation.direction() as usize].spend(operation, bytes, pass, now))
            || joined.pass == Some(pass)
    }

    /// Decides on requests in arrival order. Appends the tags that may go to `go`, in that order;
    /// the rest is held and comes out of a [`Self::poll`], possibly in this turn.
    pub fn request_all(&mut self, requests: &[Request], now: Time, go: &mut Vec<Tag>) {
        self.ask(requests, now, |tag| go.push(tag));
    }

    /// [`Self::passes`] and [`Self::request_all`] for a single request.
    pub fn request(&mut self, tag: Tag, operation: Operation, bytes: u64, now: Time) -> Verdict {
        if self.passes(operation, bytes, now) {
            return Verdict::Go;
        }
        self.ask_one(tag, operation, bytes, now)
    }

    /// Asks for a request at its arrival. Not inlined: a request that passes by a lease would spend
    /// as long on the saved registers of this path as on its decision.
    #[inline(never)]
    fn ask_one(&mut self, tag: Tag, operation: Operation, bytes: u64, now: Time) -> Verdict {
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

    /// Appends the tags that may be issued now to `let_go`. Call it in every turn: it does nothing,
    /// and takes no lock, unless the thread was `rung`, its deadline has passed, or a request was
    /// held in this turn.
    pub fn poll(&mut self, now: Time, rung: bool, let_go: &mut Vec<Tag>) {
        let Some(joined) = &mut self.joined else { return };
        if rung || joined.owes_poll || joined.look.is_some_and(|look| look.at <= now) {
            joined.look = joined.throttle.poll(&mut joined.bells, joined.queue, now, let_go);
            joined.owes_poll = false;
        }
    }

    /// The latest instant of the thread's next turn; `None` if the group does not count on this
    /// thread.
    pub fn deadline(&self) -> Option<Time> {
        self.look().map(|look| look.at)
    }

    /// Whether reads and writes that arrive before the deadline are held until then anyway. The
    /// thread may then sleep until the deadline, at most 1 ms, instead of waking up for each
    /// request that joins the waiting ones. A flush or discard that arrives during the sleep may be
    /// delayed by as much.
    pub fn is_calm(&self) -> bool {
        self.look().is_some_and(|look| look.is_calm)
    }

    fn look(&self) -> Option<Look> {
        self.joined.as_ref().and_then(|joined| joined.look)
    }

    /// Ends the gate before its thread ends; unspent credit of its leases returns. `Ok` once no
    /// request is held and no restart work is outstanding; after that no state refers to this queue.
    /// Keep polling until then: the bell announces remaining work.
    pub fn retire(&mut self) -> Result<(), StillBusy> {
        if let Some(joined) = &mut self.joined {
            joined.throttle.retire(&mut joined.bells, joined.queue, joined.leases.as_mut())?;
            self.joined = None;
        }
        Ok(())
    }
}

impl Drop for Gate {
    /// A gate dropped with held requests would strand them: that is a bug of the caller.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let busy = self.retire();
            assert!(busy.is_ok(), "gate dropped: {busy:?}");
        }
    }
}
