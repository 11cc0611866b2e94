//! Cuts the input of a client into lines, within bounds that hold for all clients together.
//!
//! ```text
//!   socket ──chunk──► pending ──► line, line, …
//!             4 KiB      │ beyond a chunk: a loan from the budget of all clients, until the line is cut off
//!                        └ beyond LINE_BYTES_MAX: E-TOOBIG
//! ```
//!
//! A line must be complete [`IDLE`] after the server began to wait for it. This limit ends a silent
//! client as well as one that sends a byte now and then.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tokio_uring::net::UnixStream;

use super::budget::{Budget, Loan};
use super::peers::Right;
use crate::error::{Class, Failure, Outcome};
use crate::protocol::LINE_BYTES_MAX;

/// Limit for one line of a client.
pub const IDLE: Duration = Duration::from_secs(30);
/// Bytes of one read, and bytes that each client may have pending without a loan.
const CHUNK: usize = 4096;
/// The input of one client.
pub struct Lines<'a> {
    stream: &'a UnixStream,
    pending: Vec<u8>,
    /// The number of leading bytes of `pending` that hold no line feed.
    searched: usize,
    /// The loan for pending bytes beyond a chunk.
    loan: Loan<'a>,
    chunk: Vec<u8>,
}

impl<'a> Lines<'a> {
    pub fn new(stream: &'a UnixStream, budget: &'a Budget, right: Right) -> Self {
        Self { stream, pending: Vec::new(), searched: 0, loan: budget.loan(right), chunk: vec![0; CHUNK] }
    }

    /// The next line without its line feed; `None` when the client has gone or has been silent too
    /// long.
    pub async fn next(&mut self) -> Outcome<Option<Vec<u8>>> {
        let deadline = Instant::now() + IDLE;
        loop {
            if let Some(line) = self.cut() {
                return Ok(Some(line));
            }
            if self.pending.len() > LINE_BYTES_MAX {
                return Err(Failure::new(Class::TooBig, format!("a request may have {LINE_BYTES_MAX} bytes")));
            }
            let chunk = std::mem::take(&mut self.chunk);
            match timeout_at(deadline, self.stream.read(chunk)).await {
                Ok((Ok(count), chunk)) if count > 0 => {
                    self.pending.extend_from_slice(&chunk[..count]);
                    self.chunk = chunk;
                }
                _ => return Ok(None),
            }
            self.account()?;
        }
    }

    fn cut(&mut self) -> Option<Vec<u8>> {
        let Some(end) = self.pending[self.searched..].iter().position(|byte| *byte == b'\n') else {
            self.searched = self.pending.len();
            return None;
        };
        let rest = self.pending.split_off(self.searched + end + 1);
        let mut line = std::mem::replace(&mut self.pending, rest);
        line.pop();
        self.searched = 0;
        // The loan shrinks, which is never refused.
        self.loan.set(self.pending.len().saturating_sub(CHUNK));
        Some(line)
    }

    fn account(&mut self) -> Outcome<()> {
        if self.loan.set(self.pending.len().saturating_sub(CHUNK)) {
            return Ok(());
        }
        Err(Failure::new(Class::TooBig, "too many long requests at once; send it again later"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream as StdStream;

    const ROOM: usize = 4 * LINE_BYTES_MAX;

    /// The lines of a client that sends `text` and hangs up. The budget of all clients is `budget`
    /// bytes.
    fn lines(text: &[u8], budget: usize) -> Vec<Outcome<Option<Vec<u8>>>> {
        let (mut client, server) = StdStream::pair().unwrap();
        let text = text.to_vec();
        let sender = std::thread::spawn(move || drop(client.write_all(&text)));
        let got = tokio_uring::start(async move {
            let stream = UnixStream::from_std(server);
            let budget = Budget::new(budget);
            let mut got = Vec::new();
            {
                let mut lines = Lines::new(&stream, &budget, Right::Change);
                loop {
                    got.push(lines.next().await);
                    if !matches!(got.last(), Some(Ok(Some(_)))) {
                        break;
                    }
                }
            }
            assert!(budget.is_whole(), "all of it is given back");
            let _ = stream.shutdown(std::net::Shutdown::Both);
            got
        });
        sender.join().unwrap();
        got
    }

    #[test]
    fn lines_are_cut_wherever_the_chunks_end() {
        let long = vec![b'x'; 3 * CHUNK + 7];
        let text = [b"one\n\ntwo\n".as_slice(), &long, b"\nhalf"].concat();
        let got = lines(&text, ROOM);
        let wanted = [Some(b"one".to_vec()), Some(Vec::new()), Some(b"two".to_vec()), Some(long), None];
        assert_eq!(got.into_iter().map(Result::unwrap).collect::<Vec<_>>(), wanted);
    }

    #[test]
    fn f32_a_line_without_an_end_is_refused_before_it_is_all_there() {
        let got = lines(&vec![b'x'; 3 * LINE_BYTES_MAX], ROOM);
        assert_eq!(got[0].as_ref().unwrap_err().class, Class::TooBig);
        // The pending bytes of all clients together may not exceed the budget.
        let got = lines(&vec![b'x'; LINE_BYTES_MAX / 2], 2 * CHUNK);
        assert_eq!(got[0].as_ref().unwrap_err().class, Class::TooBig);
    }
}
