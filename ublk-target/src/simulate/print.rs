//! A line for each dispatched request.

use std::io::{self, Write};

use serde::Serialize;
use throttle_core::cost::Operation;
use ublk_throttle_config::Config;

use super::trace::OPERATIONS;
use super::world::{Observer, Went};
use crate::error::{Class, OrFail, Outcome};

/// Prints JSON lines. Keeps the first write error and prints nothing after it.
pub struct Printer<W> {
    devices: Vec<String>,
    output: W,
    outcome: io::Result<()>,
}

#[derive(Serialize)]
struct Line<'a> {
    t: u64,
    device: &'a str,
    op: &'a str,
    bytes: u64,
    arrived: u64,
    wait: u64,
}

impl<W: Write> Printer<W> {
    /// Prints to `output`, which should have a buffer.
    pub fn new(config: &Config, output: W) -> Self {
        Self { devices: config.devices.iter().map(|device| device.name.clone()).collect(), output, outcome: Ok(()) }
    }

    /// Empties the buffer. A reader that has gone is no failure.
    pub fn finish(mut self) -> Outcome<()> {
        match self.outcome.and_then(|()| self.output.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            outcome => outcome.or_fail(Class::Failed, "cannot write the result"),
        }
    }

    fn print(&mut self, went: &Went) -> io::Result<()> {
        let line = Line {
            t: went.at.as_nanos(),
            device: &self.devices[went.device],
            op: name(went.operation),
            bytes: went.bytes,
            arrived: went.arrived.as_nanos(),
            wait: went.at.nanos_since(went.arrived),
        };
        serde_json::to_writer(&mut self.output, &line)?;
        self.output.write_all(b"\n")
    }
}

impl<W: Write> Observer for Printer<W> {
    fn went(&mut self, went: &Went) {
        if self.outcome.is_ok() {
            self.outcome = self.print(went);
        }
    }

    fn wants_more(&self) -> bool {
        self.outcome.is_ok()
    }
}

fn name(operation: Operation) -> &'static str {
    let known = OPERATIONS.iter().find(|(_, known)| *known == operation);
    known.map_or("write-zeroes", |(name, _)| name)
}
