//! What a configuration would do to a load: the throttle itself, fed from a file, in virtual time.
//!
//! ```text
//!   trace ──line──► Trace ──Event──► World ──held, went, moved──► Printer   a line for each request that went
//!   JSON lines      reads,           throttle-core, a clock,      Summary   a table for each device and group
//!                   locates faults   one gate for each device
//! ```
//!
//! It is the same core that the daemon runs, decision for decision, only that here nobody sleeps: the clock jumps from one
//! thing that happens to the next. So a limit is tried on an hour of load in seconds, without root, without ublk, and with
//! the same result every time.
//!
//! What is left out: the backend is instant; a request is there the moment its line says so, however many wait already
//! (a real queue has a depth, and its client waits outside); and `queues` do not matter, as one gate serves a device: a
//! member's requests stand in one line whichever queue they came through.

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

/// Plays the trace of that name to its end and prints each request as it is let go. Stops, without a fault, when nobody
/// reads any more.
pub fn lines(config: &Config, name: &str, input: impl BufRead, output: impl Write) -> Outcome<()> {
    let mut printer = Printer::new(config, output);
    let played = play(config, name, input, &mut printer);
    // What was let go before a fault is printed before it.
    printer.finish()?;
    played
}

/// Plays the trace of that name to its end and counts.
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
