//! Clients on the control socket: a task for each, one request at a time, and no client waits for
//! the requests of another.
//!
//! ```text
//!   accept ─► its right? ─► a seat ─► line ─► parse ─► permitted? ─► execute ─► answer ─┐
//!             (peers)       (seats)   ▲ (lines)                                        │
//!                                     └────────────────────────────────────────────────┘
//! ```
//!
//! Clients are accepted through tokio: the listener of tokio-uring asks for SO_REUSEPORT, which
//! newer kernels refuse on Unix sockets. All further I/O goes through the ring. It uses plain
//! reads, so a descriptor that a client sends along is never received.
//!
//! The server hangs up on a client that sends no whole line for [`IDLE`], sends a line that is too
//! long, or does not read its answer. A command that has begun is carried through, even if its
//! client goes.

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

/// The wait before the next accept when no descriptor is left for a new client.
const NO_ROOM: Duration = Duration::from_millis(100);
/// Bound on the memory of incomplete lines, for all clients together, beyond a few KiB for each.
const LINES_BYTES: usize = 16 * LINE_BYTES_MAX;
/// Bound on the memory of unread answers beyond [`SHORT`] bytes for each client: the list of ten
/// thousand devices a few times.
const ANSWERS_BYTES: usize = 64 << 20;
const SHORT: usize = 32 << 10;
/// Interval at which a full server looks for a seat when all clients are at work. Commands do not
/// take long.
const FULL: Duration = Duration::from_millis(5);
/// After so many accepted clients, the accepting task sleeps for [`TURN`]. tokio-uring submits
/// entries to the kernel only when no task is ready, and the accepting task is ready as long as
/// clients come. Without the pause, a flood of connections would hold up all connected clients.
const AT_ONCE: u64 = 16;
const TURN: Duration = Duration::from_millis(1);
/// Limit for the last line to a client before the server hangs up.
const FAREWELL: Duration = Duration::from_secs(1);

/// The state that the tasks of all clients share.
struct Room {
    daemon: Rc<Daemon>,
    seats: Seats,
    /// The budget for incomplete lines.
    lines: Budget,
    /// The budget for unread answers.
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

/// Seats a client that has a right on the socket. A client without one gets the reason; its input
/// is not read.
fn admit(stream: tokio::net::UnixStream, room: &Rc<Room>) {
    let Some(peer) = Peer::of(&stream) else { return };
    let right = peer.right(nix::unistd::geteuid().as_raw(), room.daemon.readers());
    let Ok(stream) = stream.into_std() else { return };
    // The ring waits only on blocking sockets.
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
                // A client that is reading an answer must not find a second line in the middle of
                // it.
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

/// The answer to a line, and the loan that counts the memory of the answer against the budget.
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

/// Executes a command. Reading commands are answered at once; a changing command is a task of its
/// own, which goes on if its client goes.
async fn carry_out(command: Command, daemon: &Rc<Daemon>) -> Outcome<Rc<str>> {
    match command {
        Command::Ping {} => Ok(daemon.ping()),
        Command::List {} => Ok(daemon.list()),
        Command::Stats { name } => daemon.stats(name.as_deref()),
        command => {
            let daemon = Rc::clone(daemon);
            let work = tokio_uring::spawn(async move {
                let outcome = daemon.change(command).await;
                // The command may have added, removed or changed limits: their levels are to be
                // noted.
                daemon.activity.see();
                outcome
            });
            let outcome = work.await.unwrap_or_else(|cause| Err(Failure::new(Class::Failed, cause)));
            outcome.map(|result| Rc::from(result.to_string()))
        }
    }
}
