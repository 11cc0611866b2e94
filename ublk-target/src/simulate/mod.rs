//! The effect of a configuration on a load: the throttle itself, fed from a file, in virtual time.
//!
//! ```text
//!   trace ──line──► Trace ──Event──► World ──held, went, moved──► Printer   a line for each dispatched request
//!   JSON lines      reads,           throttle-core, a clock,      Summary   a table for each device and group
//!                   locates faults   one gate for each device
//! ```
//!
//! The core is that of the daemon, decision for decision, but no thread sleeps: the clock jumps
//! from one event to the next. This way a limit is tried on an hour of load in seconds, without
//! root, without ublk, and with the same result every time.
//!
//! The simulation leaves out three things. The backend is instant. A request arrives at the time of
//! its line, for any number of requests that wait already (a real queue has a depth, and its client
//! waits outside). And `queues` have no effect, as a single gate serves a device: the requests of a
//! member wait in one line, regardless of their queues.

mod cast;

mod histogram;
mod print;
mod set;
mod summary;
mod text;
pub mod trace;
mod waiting;
mod world;

use std::io::{BufRead, Write};

use ublk_throttle_config::Config;

pub use cast::Node;
pub use print::Printer;
pub use summary::Summary;
pub use trace::{Event, Trace};
pub use world::{Observer, Went, World};

use crate::error::Outcome;

/// Plays a trace to its end and prints each request as it is dispatched; `name` is for messages.
/// Stops without a failure when the reader of `output` has gone.
pub fn lines(config: &Config, name: &str, input: impl BufRead, output: impl Write) -> Outcome<()> {
    let mut printer = Printer::new(config, output);
    let played = play(config, name, input, &mut printer);
    // Requests that were dispatched before a fault are printed before it.
    printer.finish()?;
    played
}

/// Plays a trace to its end and counts; `name` is for messages.
pub fn summary(config: &Config, name: &str, input: impl BufRead) -> Outcome<Summary> {
    let mut summary = Summary::new(config);
    play(config, name, input, &mut summary)?;
    Ok(summary)
}

fn play(config: &Config, name: &str, input: impl BufRead, observer: &mut impl Observer) -> Outcome<()> {
    let mut world = World::new(config, observer);
    let mut trace = Trace::new(name, input);
    while world.observer().wants_more() {
        let Some((at, event)) = trace.next(world.cast())? else {
            return world.finish().map_err(|refusal| trace.refuse_file(&refusal));
        };
        world.advance(at);
        world.apply(event).map_err(|refusal| trace.refuse_line(&refusal))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
