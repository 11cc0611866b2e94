//! A bare client of the control socket: free to break the protocol, and without code of the
//! product's client.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::Value;

use crate::wait;

/// A connection.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    pending: Vec<u8>,
}

impl Client {
    /// Connects to the socket.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        Ok(Self { stream, pending: Vec::new() })
    }

    /// Sends arbitrary bytes for at most `limit`; returns the number of bytes that the daemon
    /// accepted.
    pub fn send(&mut self, bytes: &[u8], limit: Duration) -> Result<usize> {
        let end = Instant::now() + limit;
        let mut sent = 0;
        while sent < bytes.len() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            self.stream.set_write_timeout(Some(left))?;
            match self.stream.write(&bytes[sent..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // The daemon closed the connection: the count so far is the result.
                Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(sent)
    }

    /// The next line without its newline, within `limit` (see [`wait::patience`]); `None` at the
    /// end of the stream.
    pub fn line(&mut self, limit: Duration) -> Result<Option<String>> {
        let limit = wait::patience(limit);
        let end = Instant::now() + limit;
        loop {
            if let Some(at) = self.pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=at).collect();
                return Ok(Some(String::from_utf8_lossy(&line[..at]).into_owned()));
            }
            let left = end.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "no answer within {limit:?}");
            self.stream.set_read_timeout(Some(left))?;
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(count) => self.pending.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("no answer within {limit:?}"),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends a question and returns the complete answer, including its field `ok`.
    pub fn ask(&mut self, question: &Value, limit: Duration) -> Result<Value> {
        self.send(format!("{question}\n").as_bytes(), wait::patience(limit))?;
        let line = self.line(limit).with_context(|| format!("{question}"))?;
        let line = line.with_context(|| format!("{question}: the daemon hung up"))?;
        serde_json::from_str(&line).with_context(|| line)
    }

    /// Sends a question that must succeed, and returns the result.
    pub fn must(&mut self, question: &Value, limit: Duration) -> Result<Value> {
        let answer = self.ask(question, limit)?;
        ensure!(answer["ok"] == true, "{question}: {answer}");
        Ok(answer["result"].clone())
    }

    /// Sends bytes together with a descriptor (SCM_RIGHTS).
    pub fn send_with_descriptor(&mut self, bytes: &[u8], descriptor: impl AsFd) -> Result<()> {
        let descriptors = [descriptor.as_fd().as_raw_fd()];
        let passed = [ControlMessage::ScmRights(&descriptors)];
        let socket = self.stream.as_raw_fd();
        let sent = sendmsg::<()>(socket, &[IoSlice::new(bytes)], &passed, MsgFlags::empty(), None)?;
        ensure!(sent == bytes.len(), "{sent} of {} bytes sent", bytes.len());
        Ok(())
    }

    /// Closes the sending half of the connection.
    pub fn finish_sending(&self) -> Result<()> {
        self.stream.shutdown(std::net::Shutdown::Write).context("shutdown")
    }
}
