//! How many clients there may be, and who makes room for a new one.
//!
//! A client that does nothing may stay for a while ([`super::lines::IDLE`]), but not at the cost of one that wants something:
//! when every seat is taken, the one that has been idle longest goes, those who may only read first. Nobody goes whose
//! command is under way, and a reader never displaces a client that may change things.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::Shutdown;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_uring::net::UnixStream;

use super::peers::Right;

/// Clients at the same time. Each takes a descriptor and a few KiB.
pub const SEATS: usize = 512;

/// A client that was silent for so long is not in the middle of something. With less, a flood of new clients, each gone before
/// it was looked at, would hang up on all who ask a question now and then.
const SETTLED: Duration = Duration::from_secs(1);

/// What a client is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// Nothing that we know of.
    Idle,
    /// A command of it is carried out.
    Waiting,
    /// It is to read an answer.
    Answered,
}

/// A client.
pub struct Seat {
    pub stream: Rc<UnixStream>,
    pub right: Right,
    doing: Cell<Doing>,
    since: Cell<Instant>,
}

impl Seat {
    pub fn set(&self, doing: Doing) {
        self.doing.set(doing);
        self.since.set(Instant::now());
    }

    pub fn is_idle(&self) -> bool {
        self.doing.get() == Doing::Idle
    }
}

/// All clients.
#[derive(Default)]
pub struct Seats {
    taken: RefCell<BTreeMap<u64, Rc<Seat>>>,
    next: Cell<u64>,
}

impl Seats {
    /// A seat for a new client, and the one that has to go for it; nothing if it is the new one that has to go.
    pub fn take(&self, stream: &Rc<UnixStream>, right: Right) -> Option<(u64, Rc<Seat>, Option<Rc<Seat>>)> {
        let mut taken = self.taken.borrow_mut();
        let displaced = if taken.len() < SEATS {
            None
        } else {
            let seats = taken.iter().map(|(id, seat)| (*id, seat.right, seat.doing.get(), seat.since.get()));
            Some(displaced(seats, right)?)
        };
        let displaced = displaced.and_then(|id| taken.remove(&id));
        let id = self.next.replace(self.next.get() + 1);
        let seat = Rc::new(Seat {
            stream: Rc::clone(stream),
            right,
            doing: Cell::new(Doing::Idle),
            since: Cell::new(Instant::now()),
        });
        taken.insert(id, Rc::clone(&seat));
        Some((id, seat, displaced))
    }

    /// Whether a new client would hurt nobody who is at work: there is a seat, or one of somebody who may only read, or who has
    /// been idle for [`SETTLED`]. Otherwise new ones wait to be accepted.
    pub fn has_room(&self) -> bool {
        let taken = self.taken.borrow();
        let seats = || taken.values().map(|seat| (seat.right, seat.doing.get(), seat.since.get().elapsed()));
        taken.len() < SEATS || seats().any(|(right, doing, idle)| may_go(right, doing, idle))
    }

    /// The client has gone.
    pub fn leave(&self, id: u64) {
        if let Some(seat) = self.taken.borrow_mut().remove(&id) {
            // Ends reads and writes that are still under way as well.
            let _ = seat.stream.shutdown(Shutdown::Both);
        }
    }
}

/// Whether a client may be hung up on for another one.
fn may_go(right: Right, doing: Doing, idle: Duration) -> bool {
    doing != Doing::Waiting && (right == Right::Read || idle >= SETTLED)
}

fn displaced<T: Ord>(seats: impl Iterator<Item = (u64, Right, Doing, T)>, newcomer: Right) -> Option<u64> {
    seats
        .filter(|(_, right, doing, _)| *doing != Doing::Waiting && *right <= newcomer)
        .min_by(|one, other| (one.1, &one.3).cmp(&(other.1, &other.3)))
        .map(|(id, ..)| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_idlest_goes_readers_first_and_nobody_whose_command_is_under_way() {
        use Doing::{Answered, Idle, Waiting};
        let (reads, changes) = (Right::Read, Right::Change);
        let seats = [(1, changes, Idle, 10), (2, reads, Idle, 30), (3, reads, Answered, 20), (4, reads, Waiting, 1)];
        assert_eq!(displaced(seats.into_iter(), changes), Some(3));
        assert_eq!(displaced(seats.into_iter(), reads), Some(3));
        let busy = [(1, changes, Idle, 10), (4, reads, Waiting, 1)];
        assert_eq!(displaced(busy.into_iter(), reads), None);
        assert_eq!(displaced(busy.into_iter(), changes), Some(1));
    }

    #[test]
    fn a_flood_hangs_up_on_no_client_that_has_just_asked() {
        // Those who may change things are safe for a second after each question; readers give way to them at any time.
        use Doing::{Answered, Idle, Waiting};
        let (just_now, long_ago) = (Duration::from_millis(20), SETTLED);
        assert!(!may_go(Right::Change, Idle, just_now) && may_go(Right::Change, Idle, long_ago));
        assert!(!may_go(Right::Change, Answered, just_now) && may_go(Right::Read, Idle, just_now));
        assert!(!may_go(Right::Read, Waiting, long_ago));
    }
}
