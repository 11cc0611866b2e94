//! One question to the daemon, and its answer; with a line that shows how long it takes, on a terminal.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::client::Client;
use crate::error::{Class, Failure, Outcome};
use crate::flags::Place;
use crate::protocol::Command;

/// Work that is done sooner is not worth a line.
const SOON: Duration = Duration::from_millis(500);

/// Asks the daemon; its result, or its failure as if it were ours.
pub fn ask(place: &Place, command: &Command) -> Outcome<Value> {
    Client::connect(&place.socket())?.call(command)
}

/// The same, for work that may take a while: `removing vol1 … 2 s`.
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
        // Back to the beginning, and away with it.
        let _ = write!(io::stderr(), "\r\x1b[K");
    }
    outcome
}

/// The result as what it should be.
pub fn understood<T: DeserializeOwned>(result: Value) -> Outcome<T> {
    serde_json::from_value(result)
        .map_err(|cause| Failure::new(Class::Protocol, format!("the daemon's answer makes no sense: {cause}")))
}
