//! A client of the daemon, for programs and for the command line.
//!
//! ```text
//!   connect ─► ping (is it alive?) ─► call ─► answer
//!     ≤ 1.5 s      ≤ 3 s               │ every 2 s: is it still?
//!                                      └─► the command's own timeout and a little more
//! ```
//!
//! No call waits for ever: a daemon that is stopped, hung or overloaded with clients is reported
//! within 5 s as [`Class::Timeout`], for every command. Blocking, no threads, no dependencies on
//! the rest of the daemon.
//!
//! ```no_run
//! use ublk_target::client::Client;
//! use ublk_target::protocol::Command;
//!
//! let mut client = Client::connect("/run/ublk-throttle/control.sock".as_ref())?;
//! let listing = client.call(&Command::List {})?;
//! # Ok::<(), ublk_target::error::Failure>(())
//! ```

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde_json::Value;

use crate::error::{Class, Failure, OrFail, Outcome, plain};
use crate::protocol::{Answer, Command, LINE_BYTES_MAX, Request};

/// Limit for a place in the daemon's queue of new clients.
const CONNECT_LIMIT: Duration = Duration::from_millis(1500);
/// Limit for the answer to a ping. Together with the connect and the start of a process it stays
/// below 5 s.
const ALIVE_LIMIT: Duration = Duration::from_secs(3);
/// Limit for the answer of a command that does not wait; added to a timeout that the daemon keeps
/// itself.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// Interval at which a daemon that works on a command is asked whether it is alive.
const LOOK: Duration = Duration::from_secs(2);
/// Interval at which `call_watched` reports that the command still takes.
const TICK: Duration = Duration::from_millis(200);
/// The answer of a daemon with thousands of devices is longer than a request may be.
const ANSWER_BYTES_MAX: usize = 64 * LINE_BYTES_MAX;

/// A connection to a daemon that has been found alive.
pub struct Client {
    stream: UnixStream,
    socket: PathBuf,
    /// Bytes read behind the last answer.
    pending: Vec<u8>,
    id: u64,
}

impl Client {
    /// Connects to the daemon on `socket` and makes sure that it answers.
    pub fn connect(socket: &Path) -> Outcome<Self> {
        let mut client = Self::reach(socket, CONNECT_LIMIT)?;
        client.is_alive(ALIVE_LIMIT)?;
        Ok(client)
    }

    /// Sends a command. Returns its result, or the daemon's failure as if it were local.
    pub fn call(&mut self, command: &Command) -> Outcome<Value> {
        self.call_watched(command, &mut |_| {})
    }

    /// [`Self::call`]; every 200 ms or so `watch` gets the time taken so far.
    pub fn call_watched(&mut self, command: &Command, watch: &mut dyn FnMut(Duration)) -> Outcome<Value> {
        let began = Instant::now();
        let timeout = Duration::from_millis(command.timeout_ms());
        let deadline = began.checked_add(timeout + ANSWER_LIMIT);
        let id = self.send(command)?;
        let mut look = began + LOOK;
        loop {
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                return Err(self.silent(began.elapsed(), "; `list` tells what it does"));
            }
            if now >= look {
                // On a connection of its own: on this one it would wait for the command.
                Self::reach(&self.socket, CONNECT_LIMIT)?.is_alive(LOOK)?;
                look = Instant::now() + LOOK;
            }
            let until = deadline.map_or(now + TICK, |deadline| deadline.min(now + TICK));
            if let Some(answer) = self.receive(&id, until)? {
                return answer.outcome();
            }
            watch(began.elapsed());
        }
    }

    /// Connects without a ping.
    fn reach(at: &Path, limit: Duration) -> Outcome<Self> {
        let unreached = |cause: Errno| match cause {
            Errno::EACCES | Errno::EPERM => {
                Failure::new(Class::Perm, format!("{} may not be used by you; run as root", at.display()))
            }
            _ => Failure::new(
                Class::NoDaemon,
                format!(
                    "no daemon answers on {} ({}); start it with `ublk-throttle run CONFIG`",
                    at.display(),
                    plain(&cause.into())
                ),
            ),
        };
        let address = UnixAddr::new(at).map_err(unreached)?;
        let descriptor: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .or_fail(Class::Resource, "cannot make a socket")?;
        let stream = UnixStream::from(descriptor);
        // While the daemon's queue of new clients is full, connect(2) waits for at most this
        // timeout; the kernel admits the client that has waited longest.
        stream.set_write_timeout(Some(limit)).or_fail(Class::Failed, "cannot set up a socket")?;
        loop {
            match connect(stream.as_raw_fd(), &address) {
                Ok(()) => break,
                Err(Errno::EAGAIN) => {
                    let what = format!("the daemon on {} takes no new client within {limit:?}", at.display());
                    return Err(Failure::new(Class::Timeout, what));
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(unreached(errno)),
            }
        }
        stream.set_write_timeout(Some(ALIVE_LIMIT)).or_fail(Class::Failed, "cannot set up a socket")?;
        Ok(Self { stream, socket: at.to_owned(), pending: Vec::new(), id: 0 })
    }

    fn is_alive(&mut self, limit: Duration) -> Outcome<()> {
        let until = Instant::now() + limit;
        let id = self.send(&Command::Ping {})?;
        match self.receive(&id, until)? {
            Some(answer) => answer.outcome().map(drop),
            None => Err(self.silent(limit, "; is it stopped?")),
        }
    }

    fn send(&mut self, command: &Command) -> Outcome<Value> {
        self.id += 1;
        let request = Request { id: Value::from(self.id), command: command.clone() };
        match self.stream.write_all(&request.line()?) {
            Ok(()) => {}
            // The daemon may have sent a reason before it hung up.
            Err(cause) if cause.kind() == io::ErrorKind::BrokenPipe => {}
            Err(cause) if is_timeout(&cause) => return Err(self.silent(ALIVE_LIMIT, "; is it stopped?")),
            Err(cause) => return Err(cause).or_fail(Class::NoDaemon, self.lost()),
        }
        Ok(request.id)
    }

    /// The answer to request `id`; `None` if it has not come by `until`.
    fn receive(&mut self, id: &Value, until: Instant) -> Outcome<Option<Answer>> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.pending[searched..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=searched + end).collect();
                let answer: Answer = serde_json::from_slice(&line).map_err(|cause| {
                    Failure::new(Class::Protocol, format!("the daemon's answer makes no sense: {cause}"))
                })?;
                // Null: an answer about the connection, not about a request.
                if answer.id == *id || answer.id.is_null() {
                    return Ok(Some(answer));
                }
                searched = 0;
                continue;
            }
            searched = self.pending.len();
            if searched > ANSWER_BYTES_MAX {
                let what = format!("the daemon's answer has more than {ANSWER_BYTES_MAX} bytes");
                return Err(Failure::new(Class::Protocol, what));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left)).or_fail(Class::Failed, "cannot set up a socket")?;
            let mut chunk = [0; 1 << 16];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(Failure::new(Class::NoDaemon, self.lost())),
                Ok(count) => self.pending.extend_from_slice(&chunk[..count]),
                Err(cause) if is_timeout(&cause) => return Ok(None),
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(cause).or_fail(Class::NoDaemon, self.lost()),
            }
        }
    }

    fn lost(&self) -> String {
        format!("the daemon on {} went away", self.socket.display())
    }

    fn silent(&self, after: Duration, cure: &str) -> Failure {
        let what = format!(
            "the daemon on {} has not answered within {:.1} s{cure}",
            self.socket.display(),
            after.as_secs_f64()
        );
        Failure::new(Class::Timeout, what)
    }
}

fn is_timeout(cause: &io::Error) -> bool {
    matches!(cause.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    fn place(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("ublk-throttle-client-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    #[test]
    fn answers_are_told_apart_by_their_ids() {
        // The answer to a request that was given up must not be taken for that of the next request.
        let path = place("ids");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            lines.next().unwrap().unwrap();
            stream.write_all(b"{\"id\":1,\"ok\":true,\"result\":{}}\n").unwrap();
            lines.next().unwrap().unwrap();
            stream.write_all(b"{\"id\":1,\"ok\":true}\n{\"id\":2,\"ok\":true,\"result\":[7]}\n").unwrap();
        });
        let mut client = Client::connect(&path).unwrap();
        assert_eq!(client.call(&Command::List {}).unwrap(), serde_json::json!([7]));
        server.join().unwrap();
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn nobody_there_and_nobody_awake_are_two_things() {
        let path = place("silent");
        assert_eq!(Client::connect(&path).err().unwrap().class, Class::NoDaemon);
        // Bound and never accepted, as by a daemon that is stopped.
        let _listener = UnixListener::bind(&path).unwrap();
        let mut client = Client::reach(&path, Duration::from_millis(10)).unwrap();
        assert_eq!(client.is_alive(Duration::from_millis(10)).unwrap_err().class, Class::Timeout);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_hang_up_is_told_with_its_reason() {
        let path = place("reason");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream
                .write_all(&Answer::line(&Value::Null, &Err::<&str, _>(Failure::new(Class::Perm, "not you"))))
                .unwrap();
        });
        let refused = Client::connect(&path).err().unwrap();
        assert_eq!((refused.class, refused.message.as_str()), (Class::Perm, "not you"));
        server.join().unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
