//! The number of clients at a time, and which client a new one displaces.
//!
//! A silent client may stay for [`super::lines::IDLE`], but not at the cost of a client with a
//! request. When every seat is taken, a new client displaces the client that has been idle longest,
//! readers before clients that may change things. A client whose command is under way is never
//! displaced, and a reader never displaces a client that may change things.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::Shutdown;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_uring::net::UnixStream;

use super::peers::Right;

/// Clients at a time. Each takes a descriptor and a few KiB.
pub const SEATS: usize = 512;

/// A client that has been idle for this long is not in the middle of a dialogue. With a shorter
/// time, a flood of short connections, each closed before it is accepted, would displace every
/// client that asks a question now and then.
const SETTLED: Duration = Duration::from_secs(1);

/// The state of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// No command of it is known.
    Idle,
    /// Its command is under way.
    Waiting,
    /// An answer is being written to it.
    Answered,
}

/// A connected client.
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

/// All connected clients.
#[derive(Default)]
pub struct Seats {
    taken: RefCell<BTreeMap<u64, Rc<Seat>>>,
    next: Cell<u64>,
}

impl Seats {
    /// Seats a new client. Returns its id, its seat and the client that it displaces; `None` if it
    /// may displace no client, and so has to go itself.
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

    /// Whether a new client can be seated without harm to a busy one: a seat is free, or there is a
    /// client without a command under way that may only read or has been idle for [`SETTLED`].
    /// Without room, new clients wait in the backlog of the socket.
    pub fn has_room(&self) -> bool {
        let taken = self.taken.borrow();
        let seats = || taken.values().map(|seat| (seat.right, seat.doing.get(), seat.since.get().elapsed()));
        taken.len() < SEATS || seats().any(|(right, doing, idle)| may_go(right, doing, idle))
    }

    /// Frees the seat of a client that has gone.
    pub fn leave(&self, id: u64) {
        if let Some(seat) = self.taken.borrow_mut().remove(&id) {
            // Also ends the reads and writes of the client that are in flight.
            let _ = seat.stream.shutdown(Shutdown::Both);
        }
    }
}

/// Whether a client may be displaced at all.
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
        // A client that may change things is safe for a second after each question. A reader can be
        // displaced at any time.
        use Doing::{Answered, Idle, Waiting};
        let (just_now, long_ago) = (Duration::from_millis(20), SETTLED);
        assert!(!may_go(Right::Change, Idle, just_now) && may_go(Right::Change, Idle, long_ago));
        assert!(!may_go(Right::Change, Answered, just_now) && may_go(Right::Read, Idle, just_now));
        assert!(!may_go(Right::Read, Waiting, long_ago));
    }
}
