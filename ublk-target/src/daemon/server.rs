//! Clients on the control socket: a task for each, one request at a time, nobody waits for anybody else.
//!
//! Only root and the user of the daemon are heard. Clients are accepted through tokio, because tokio-uring's own listener asks
//! for SO_REUSEPORT, which newer kernels refuse on Unix sockets; everything after that goes through the ring.
//!
//! A client that sends nothing for [`IDLE`], or more than a line may hold, is let go. A command that has begun is carried
//! through, whatever becomes of the client.

use std::cell::RefCell;
use std::net::Shutdown;
use std::rc::Rc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::time::timeout;
use tokio_uring::net::UnixStream;

use super::control::Table;
use crate::error::{Class, Failure, Outcome};
use crate::protocol::{Answer, Command, LINE_BYTES_MAX, Request};

/// How long a client may be silent, or not read its answer.
const IDLE: Duration = Duration::from_secs(30);
/// How long to wait when no descriptor is left for a new client.
const NO_ROOM: Duration = Duration::from_millis(100);
const CHUNK: usize = 4096;

/// Accepts clients for ever.
pub async fn serve(listener: UnixListener, table: Rc<RefCell<Table>>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if let Some(stream) = admit(stream) {
                    tokio_uring::spawn(client(stream, Rc::clone(&table)));
                }
            }
            Err(_) => tokio::time::sleep(NO_ROOM).await,
        }
    }
}

/// A client that may talk to us, on the ring; others are hung up on before they have said a word.
fn admit(stream: tokio::net::UnixStream) -> Option<UnixStream> {
    let user = stream.peer_cred().ok()?.uid();
    if user != 0 && user != nix::unistd::geteuid().as_raw() {
        return None;
    }
    let stream = stream.into_std().ok()?;
    // The ring waits by itself only for what may block.
    stream.set_nonblocking(false).ok()?;
    Some(UnixStream::from_std(stream))
}

async fn client(stream: UnixStream, table: Rc<RefCell<Table>>) {
    let mut lines = Lines { stream: &stream, pending: Vec::new() };
    loop {
        let answer = match lines.next().await {
            Ok(Some(line)) => match Request::parse(&line) {
                Ok(Request { id, command }) => Answer::new(id, carry_out(command, &table).await),
                Err((id, failure)) => Answer::new(id, Err(failure)),
            },
            Ok(None) => break,
            Err(failure) => {
                write(&stream, &Answer::new(Value::Null, Err(failure))).await;
                break;
            }
        };
        if !write(&stream, &answer).await {
            break;
        }
    }
    // Ends reads and writes that are still under way as well.
    let _ = stream.shutdown(Shutdown::Both);
}

async fn write(stream: &UnixStream, answer: &Answer) -> bool {
    matches!(timeout(IDLE, stream.write_all(answer.line())).await, Ok((Ok(()), _)))
}

/// Cuts what a client sends into lines.
struct Lines<'a> {
    stream: &'a UnixStream,
    pending: Vec<u8>,
}

impl Lines<'_> {
    /// The next line without its end; nothing when the client has gone or is silent.
    async fn next(&mut self) -> Outcome<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.pending.drain(..=end).collect();
                line.pop();
                return Ok(Some(line));
            }
            if self.pending.len() > LINE_BYTES_MAX {
                let what = format!("a request may have {LINE_BYTES_MAX} bytes");
                return Err(Failure::new(Class::TooBig, what));
            }
            match timeout(IDLE, self.stream.read(vec![0; CHUNK])).await {
                Ok((Ok(count), chunk)) if count > 0 => self.pending.extend_from_slice(&chunk[..count]),
                _ => return Ok(None),
            }
        }
    }
}

async fn carry_out(command: Command, table: &Rc<RefCell<Table>>) -> Outcome<Value> {
    match command {
        Command::Ping {} => Ok(json!({ "pid": std::process::id(), "version": env!("CARGO_PKG_VERSION") })),
        Command::List {} => Ok(json!(table.borrow().listing())),
        Command::Del { device, force, timeout_ms } => {
            let outcome = table.borrow().remove(&device, force)?;
            match timeout(Duration::from_millis(timeout_ms), outcome).await {
                Ok(Ok(outcome)) => outcome.map(|removed| json!({ "device": device, "note": removed.note })),
                // The device's thread dropped the answer: it ended otherwise, and is gone.
                Ok(Err(_)) => Ok(json!({ "device": device })),
                Err(_) => Err(Failure::new(
                    Class::Timeout,
                    format!("device {device:?} is not gone after {timeout_ms} ms; the removal goes on, `list` tells"),
                )),
            }
        }
    }
}
