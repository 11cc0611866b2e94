//! The commands: what each flag set does, and the exit code it ends with.
//!
//! Facts go to stdout, everything else to stderr. A reader that closes stdout early is no error.

mod check;
mod client;
mod features;
mod list;
mod manual;
mod simulate;

use std::fmt;
use std::io::Write;
use std::path::Path;

use clap::Parser;
use serde::Serialize;
use ublk_throttle_config::Config;

use crate::daemon;
use crate::error::{Class, Failure, Outcome};
use crate::flags::{Command, Flags};
use crate::helper::{self, Errand, Target};
use crate::log;
use crate::protocol;

/// Runs the command line of this process; the exit code.
pub fn main() -> u8 {
    let flags = Flags::parse();
    let outcome = match flags.command {
        Command::Run { config, place } => daemon::run(&config, &place),
        Command::Check { config, json } => check::run(&config, json),
        Command::List { json, place } => list::run(&place, json),
        Command::Del { device, force, timeout, place } => {
            let timeout_ms = timeout.as_millis() as u64;
            client::ask(&place, protocol::Command::Del { device, force, timeout_ms }).map(drop)
        }
        Command::Features { json } => features::run(json),
        Command::Simulate { config, trace, summary, json } => simulate::run(&config, &trace, summary, json),
        Command::Man { command } => manual::page(command.as_deref()),
        Command::Completions { shell } => manual::completions(shell),
        Command::HelpStart { id, nonce, server } => return helper::run(Target { id, nonce }, Errand::Start { server }),
        Command::HelpStop { id, nonce, force } => {
            return helper::run(Target { id, nonce }, Errand::Stop { is_forced: force });
        }
        Command::HelpResize { id, nonce, size, shrink } => {
            return helper::run(Target { id, nonce }, Errand::Resize { size, is_shrinking: shrink });
        }
        Command::HelpDel { id, nonce } => return helper::run(Target { id, nonce }, Errand::Delete),
    };
    match outcome {
        Ok(()) => 0,
        Err(failure) => {
            log::error(&failure);
            failure.class.exit()
        }
    }
}

/// Reads a configuration; prints its warnings.
pub fn load(path: &Path) -> Outcome<Config> {
    match ublk_throttle_config::load(path) {
        Ok((config, warnings)) => {
            for warning in &warnings {
                let _ = writeln!(std::io::stderr(), "{warning}");
            }
            Ok(config)
        }
        Err(errors) => {
            let text = errors.to_string();
            // Each of several errors brings its own head; the first one's is put back when the failure is printed.
            let first = format!("error[{}]: ", Class::Config.name());
            Err(Failure::new(Class::Config, text.strip_prefix(&first).unwrap_or(&text)))
        }
    }
}

/// Prints a line of facts.
fn say(line: impl fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Prints facts for programs.
fn say_json(facts: &impl Serialize) {
    say(serde_json::to_string_pretty(facts).expect("facts are plain data"));
}
