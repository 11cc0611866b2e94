//! Sends one command to the daemon and waits for its answer; on a terminal, a line shows the time.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::client::Client;
use crate::error::{Class, Failure, Outcome};
use crate::flags::Place;
use crate::protocol::Command;

/// Shorter work gets no such line.
const SOON: Duration = Duration::from_millis(500);

/// Sends a command. Returns its result, or the daemon's failure as if it were local.
pub fn ask(place: &Place, command: &Command) -> Outcome<Value> {
    Client::connect(&place.socket())?.call(command)
}

/// [`ask`] for work that may take a while. Shows a line such as `removing vol1 … 2 s`.
pub fn ask_patiently(place: &Place, command: &Command, doing: &str) -> Outcome<Value> {
    let mut client = Client::connect(&place.socket())?;
    let is_shown = io::stderr().is_terminal();
    let mut is_begun = false;
    let outcome = client.call_watched(command, &mut |so_far| {
        if is_shown && so_far > SOON {
            is_begun = true;
            let _ = write!(io::stderr(), "\r{doing} … {} s", so_far.as_secs());
        }
    });
    if is_begun {
        // Carriage return, then erase the line.
        let _ = write!(io::stderr(), "\r\x1b[K");
    }
    outcome
}

/// The result as a value of its type.
pub fn understood<T: DeserializeOwned>(result: Value) -> Outcome<T> {
    serde_json::from_value(result)
        .map_err(|cause| Failure::new(Class::Protocol, format!("the daemon's answer makes no sense: {cause}")))
}
