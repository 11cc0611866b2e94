//! Taking over from a daemon that runs: a new binary in place of the old one, and a pause for whoever uses the devices.
//!
//! ```text
//!   new   configuration, rights ─► hand-over ─────────────► waits for the lock ─► begins as after a crash
//!   old                            all can be kept? answer, then it ends ─┘
//!                                  one cannot: E-CONFLICT, and nothing has happened
//! ```
//!
//! Everything about the new one that can be refused is refused before it asks.

use std::time::{Duration, Instant};

use crate::client::Client;
use crate::error::{Class, Failure, Outcome};
use crate::flags::Place;
use crate::log;
use crate::protocol::Command;
use crate::state_dir::StateDir;

/// How long the old daemon may take to end. It has to wait for nothing.
const LIMIT: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(2);

/// Asks the daemon of this place to leave its devices to us; its state directory, locked.
pub fn lock(place: &Place) -> Outcome<StateDir> {
    let mut old = match Client::connect(&place.socket()) {
        Ok(old) => old,
        Err(failure) if failure.class == Class::NoDaemon => {
            log::info("takeover: no daemon answers; starting as without");
            return StateDir::lock(&place.state_dir);
        }
        Err(failure) => return Err(failure.context("taking over")),
    };
    let answer = old.call(&Command::HandOver {}).map_err(|failure| failure.context("taking over"))?;
    log::info(format_args!("takeover: the daemon with pid {} ends", answer["pid"]));
    let began = Instant::now();
    loop {
        match StateDir::lock(&place.state_dir) {
            Err(failure) if failure.class == Class::Locked && began.elapsed() < LIMIT => std::thread::sleep(LOOK),
            Err(failure) if failure.class == Class::Locked => {
                return Err(Failure::new(
                    Class::Timeout,
                    format!(
                        "taking over: the old daemon was to end, and has not within {LIMIT:?}: {}",
                        failure.message
                    ),
                ));
            }
            outcome => return outcome,
        }
    }
}
