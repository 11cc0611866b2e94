//! One question to the daemon, and its answer.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use serde_json::Value;

use crate::error::{Class, Failure, OrFail, Outcome};
use crate::flags::Place;
use crate::protocol::{Answer, Command, LINE_BYTES_MAX, Request};

/// Asks the daemon; its result, or its failure as if it were ours.
pub fn ask(place: &Place, command: Command) -> Outcome<Value> {
    let socket = place.socket();
    let mut stream = UnixStream::connect(&socket).map_err(|cause| match cause.kind() {
        io::ErrorKind::PermissionDenied => {
            Failure::new(Class::Perm, format!("{} may not be used by you; run as root", socket.display()))
        }
        _ => Failure::new(
            Class::NoDaemon,
            format!(
                "no daemon answers on {} ({}); start it with `ublk-throttle run CONFIG`",
                socket.display(),
                crate::error::plain(&cause)
            ),
        ),
    })?;
    let lost = || format!("the daemon on {} went away", socket.display());
    let request = Request { id: Value::from(1), command };
    stream.write_all(&request.line()).or_fail(Class::NoDaemon, lost())?;
    let mut line = Vec::new();
    // The answer of a daemon with thousands of devices is longer than a request may be.
    let limit = 64 * LINE_BYTES_MAX as u64;
    BufReader::new(stream.take(limit)).read_until(b'\n', &mut line).or_fail(Class::NoDaemon, lost())?;
    if line.is_empty() {
        return Err(Failure::new(Class::NoDaemon, lost()));
    }
    let answer: Answer = serde_json::from_slice(&line)
        .map_err(|cause| Failure::new(Class::Protocol, format!("the daemon's answer makes no sense: {cause}")))?;
    answer.outcome()
}
