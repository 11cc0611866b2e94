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

use super::control::Daemon;
use super::lines::{Budget, IDLE, Lines};
use super::peers::{Peer, Right};
use super::seats::{Doing, SEATS, Seat, Seats};
use crate::error::{Class, Failure, Outcome};
use crate::protocol::{Answer, Command, Request};

/// How long to wait when no descriptor is left for a new client.
const NO_ROOM: Duration = Duration::from_millis(100);
/// For the one line to a client that is hung up on.
const FAREWELL: Duration = Duration::from_secs(1);

/// What the tasks of all clients share.
struct Room {
    daemon: Rc<Daemon>,
    seats: Seats,
    budget: Budget,
}

/// Accepts clients for ever.
pub async fn serve(listener: UnixListener, daemon: Rc<Daemon>) {
    let room = Rc::new(Room { daemon, seats: Seats::default(), budget: Budget::default() });
    loop {
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
    let mut lines = Lines::new(&seat.stream, &room.budget);
    loop {
        seat.set(Doing::Idle);
        let answer = match lines.next().await {
            Ok(Some(line)) => {
                seat.set(Doing::Waiting);
                answer(&line, seat.right, room).await
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

async fn answer(line: &[u8], right: Right, room: &Rc<Room>) -> Vec<u8> {
    match Request::parse(line) {
        Ok(Request { id, command }) if right == Right::Change || command.is_reading() => {
            Answer::line(&id, &carry_out(command, &room.daemon).await)
        }
        Ok(Request { id, .. }) => {
            let what = "you may look (ping, list, stats) but not change anything; run as root";
            Answer::line(&id, &Err::<&str, _>(Failure::new(Class::Perm, what)))
        }
        Err((id, failure)) => Answer::line(&id, &Err::<&str, _>(failure)),
    }
}

/// Reading is done at once. What changes something is a task of its own, so that it goes on when the client has gone.
async fn carry_out(command: Command, daemon: &Rc<Daemon>) -> Outcome<Rc<str>> {
    match command {
        Command::Ping {} => Ok(daemon.ping()),
        Command::List {} => Ok(daemon.list()),
        Command::Stats { name } => daemon.stats(name.as_deref()),
        command => {
            let daemon = Rc::clone(daemon);
            let work = tokio_uring::spawn(async move { daemon.change(command).await });
            let outcome = work.await.unwrap_or_else(|cause| Err(Failure::new(Class::Failed, cause)));
            outcome.map(|result| Rc::from(result.to_string()))
        }
    }
}
