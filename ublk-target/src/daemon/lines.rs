//! Cuts what a client sends into lines, within bounds that hold for all clients together.
//!
//! ```text
//!   socket ──chunk──► pending ──► line, line, …
//!             4 KiB      │ beyond a chunk: taken from the budget of all clients, given back when the line is cut off
//!                        └ beyond LINE_BYTES_MAX: E-TOOBIG
//! ```
//!
//! A line has to be complete [`IDLE`] after it was first waited for, so a client that sends nothing and one that sends a byte
//! now and then both end.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tokio_uring::net::UnixStream;

use super::budget::{Budget, Loan};
use super::peers::Right;
use crate::error::{Class, Failure, Outcome};
use crate::protocol::LINE_BYTES_MAX;

/// How long a client may take for a line.
pub const IDLE: Duration = Duration::from_secs(30);
/// What is read at once, and what each client may have pending in any case.
const CHUNK: usize = 4096;
/// What one client has sent.
pub struct Lines<'a> {
    stream: &'a UnixStream,
    pending: Vec<u8>,
    /// How much of it is known to hold no end of a line.
    searched: usize,
    /// For what is beyond a chunk.
    loan: Loan<'a>,
    chunk: Vec<u8>,
}

impl<'a> Lines<'a> {
    pub fn new(stream: &'a UnixStream, budget: &'a Budget, right: Right) -> Self {
        Self { stream, pending: Vec::new(), searched: 0, loan: budget.loan(right), chunk: vec![0; CHUNK] }
    }

    /// The next line without its end; nothing when the client has gone or is silent.
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
        // Less than before, so it cannot be refused.
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

    /// The lines of a client that sends `text` and hangs up, with so much room for all clients.
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
        // All clients together may not keep more than the budget.
        let got = lines(&vec![b'x'; LINE_BYTES_MAX / 2], 2 * CHUNK);
        assert_eq!(got[0].as_ref().unwrap_err().class, Class::TooBig);
    }
}
