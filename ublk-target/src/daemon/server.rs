//! Clients on the control socket: a task for each, one request at a time, nobody waits for anybody else.
//!
//! ```text
//!   accept ─► who is it? ─► a seat ─► line ─► parse ─► may it? ─► carry out ─► answer ─┐
//!             (peers)       (seats)   ▲ (lines)                                        │
//!                                     └────────────────────────────────────────────────┘
//! ```
//!
//! Clients are accepted through tokio, because tokio-uring's own listener asks for SO_REUSEPORT, which newer kernels refuse on
//! Unix sockets; everything after that goes through the ring. Plain reads, so that a descriptor which a client passes along is
//! never received.
//!
//! A client that sends no whole line for [`IDLE`], or more than a line may hold, or does not read its answer, is let go. A
//! command that has begun is carried through, whatever becomes of the client.

use std::rc::Rc;
use std::time::Duration;

use serde_json::Value;
use tokio::net::UnixListener;
use tokio::time::timeout;
use tokio_uring::net::UnixStream;

use super::budget::{Budget, Loan};
use super::control::Daemon;
use super::lines::{IDLE, Lines};
use super::peers::{Peer, Right};
use super::seats::{Doing, SEATS, Seat, Seats};
use crate::error::{Class, Failure, Outcome};
use crate::protocol::{Answer, Command, LINE_BYTES_MAX, Request};

/// How long to wait when no descriptor is left for a new client.
const NO_ROOM: Duration = Duration::from_millis(100);
/// What lines without an end may take, of all clients together, beyond a few KiB of each.
const LINES_BYTES: usize = 16 * LINE_BYTES_MAX;
/// What answers may take that are not read yet, beyond [`SHORT`] of each: the list of ten thousand devices a few times.
const ANSWERS_BYTES: usize = 64 << 20;
const SHORT: usize = 32 << 10;
/// How long to wait when every seat is taken by somebody at work. They do not take long.
const FULL: Duration = Duration::from_millis(5);
/// So many clients are accepted, then those who are there have their turn. The ring hands what they have asked of it to the kernel
/// only when no task is ready, which the accepting one is for as long as clients come: a flood of them would hold up everybody.
const AT_ONCE: u64 = 16;
const TURN: Duration = Duration::from_millis(1);
/// For the one line to a client that is hung up on.
const FAREWELL: Duration = Duration::from_secs(1);

/// What the tasks of all clients share.
struct Room {
    daemon: Rc<Daemon>,
    seats: Seats,
    /// For lines that have no end yet.
    lines: Budget,
    /// For answers that are not read yet.
    answers: Budget,
}

/// Accepts clients for ever.
pub async fn serve(listener: UnixListener, daemon: Rc<Daemon>) {
    let (lines, answers) = (Budget::new(LINES_BYTES), Budget::new(ANSWERS_BYTES));
    let room = Rc::new(Room { daemon, seats: Seats::default(), lines, answers });
    for number in 1_u64.. {
        if number.is_multiple_of(AT_ONCE) {
            tokio::time::sleep(TURN).await;
        }
        while !room.seats.has_room() {
            tokio::time::sleep(FULL).await;
        }
        match listener.accept().await {
            Ok((stream, _)) => admit(stream, &room),
            Err(_) => tokio::time::sleep(NO_ROOM).await,
        }
    }
}

/// Seats a client that may talk to us; others hear why not, and nothing that they say is read.
fn admit(stream: tokio::net::UnixStream, room: &Rc<Room>) {
    let Some(peer) = Peer::of(&stream) else { return };
    let right = peer.right(nix::unistd::geteuid().as_raw(), room.daemon.readers());
    let Ok(stream) = stream.into_std() else { return };
    // The ring waits by itself only for what may block.
    if stream.set_nonblocking(false).is_err() {
        return;
    }
    let stream = Rc::new(UnixStream::from_std(stream));
    let Some(right) = right else {
        let what = format!("user {} may not use this socket; run as root", peer.uid);
        return hang_up(stream, Failure::new(Class::Perm, what));
    };
    let full = || Failure::new(Class::Resource, format!("{SEATS} clients are connected already; come again later"));
    match room.seats.take(&stream, right) {
        None => hang_up(stream, full()),
        Some((id, seat, displaced)) => {
            if let Some(displaced) = displaced {
                // One that reads an answer must not find another in the middle of it.
                if displaced.is_idle() {
                    hang_up(Rc::clone(&displaced.stream), full());
                } else {
                    let _ = displaced.stream.shutdown(std::net::Shutdown::Both);
                }
            }
            let room = Rc::clone(room);
            tokio_uring::spawn(async move {
                client(&seat, &room).await;
                room.seats.leave(id);
            });
        }
    }
}

fn hang_up(stream: Rc<UnixStream>, failure: Failure) {
    tokio_uring::spawn(async move {
        let line = Answer::line(&Value::Null, &Err::<&str, _>(failure));
        let _ = timeout(FAREWELL, stream.write_all(line)).await;
        let _ = stream.shutdown(std::net::Shutdown::Both);
    });
}

async fn client(seat: &Seat, room: &Rc<Room>) {
    let mut lines = Lines::new(&seat.stream, &room.lines, seat.right);
    loop {
        seat.set(Doing::Idle);
        let (answer, _loan) = match lines.next().await {
            Ok(Some(line)) => {
                seat.set(Doing::Waiting);
                answer(line, seat.right, room).await
            }
            Ok(None) => return,
            Err(failure) => {
                let line = Answer::line(&Value::Null, &Err::<&str, _>(failure));
                let _ = timeout(FAREWELL, seat.stream.write_all(line)).await;
                return;
            }
        };
        seat.set(Doing::Answered);
        if !matches!(timeout(IDLE, seat.stream.write_all(answer)).await, Ok((Ok(()), _))) {
            return;
        }
    }
}

/// The answer to a line, and what it takes of everybody's memory.
async fn answer(line: Vec<u8>, right: Right, room: &Room) -> (Vec<u8>, Loan<'_>) {
    let request = Request::parse(&line);
    drop(line);
    let (id, outcome) = match request {
        Ok(Request { id, command }) if right == Right::Change || command.is_reading() => {
            (id, carry_out(command, &room.daemon).await)
        }
        Ok(Request { id, .. }) => {
            let what = "you may look (ping, list, stats) but not change anything; run as root";
            (id, Err(Failure::new(Class::Perm, what)))
        }
        Err((id, failure)) => (id, Err(failure)),
    };
    let mut loan = room.answers.loan(right);
    let mut answer = Answer::line(&id, &outcome);
    if !loan.set(answer.len().saturating_sub(SHORT)) {
        let what = "too many long answers have not been read; ask again later";
        answer = Answer::line(&Value::Null, &Err::<&str, _>(Failure::new(Class::Resource, what)));
    }
    (answer, loan)
}

/// Reading is done at once. What changes something is a task of its own, so that it goes on when the client has gone.
async fn carry_out(command: Command, daemon: &Rc<Daemon>) -> Outcome<Rc<str>> {
    match command {
        Command::Ping {} => Ok(daemon.ping()),
        Command::List {} => Ok(daemon.list()),
        Command::Stats { name } => daemon.stats(name.as_deref()),
        command => {
            let daemon = Rc::clone(daemon);
            let work = tokio_uring::spawn(async move {
                let outcome = daemon.change(command).await;
                // Limits may have come or gone, or be others.
                daemon.activity.see();
                outcome
            });
            let outcome = work.await.unwrap_or_else(|cause| Err(Failure::new(Class::Failed, cause)));
            outcome.map(|result| Rc::from(result.to_string()))
        }
    }
}
