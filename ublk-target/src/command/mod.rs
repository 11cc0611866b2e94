//! The commands: the action for each parsed command line, and the exit code.
//!
//! Facts go to stdout, warnings and errors to stderr. A reader that closes stdout early is no
//! error.

mod ask;
mod change;
mod check;
mod features;
mod list;
mod manual;
mod simulate;
mod stats;

use std::fmt;
use std::io::{self, Write};
use std::path::Path;

use clap::Parser;
use serde::Serialize;
use ublk_throttle_config::{Config, Warning, warning_lines};

use crate::daemon;
use crate::error::{Class, Failure, Outcome};
use crate::flags::{Command, Flags};
use crate::helper::{self, Errand};
use crate::{log, protocol, watcher};

/// Runs the command line of this process; returns the exit code.
pub fn main() -> u8 {
    // Not by `Flags`: building the parser for all flags would take a third of the run time of a
    // helper, and users wait for helpers.
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(words) = words.iter().map(|word| word.to_str()).collect::<Option<Vec<_>>>() {
        if let Some((target, errand)) = Errand::of_words(&words) {
            return helper::run(target, errand);
        }
        if words == [watcher::WORD] {
            return watcher::run();
        }
    }
    let flags = Flags::parse();
    let outcome = match flags.command {
        Command::Run { config, takeover, place } => daemon::run(&config, &place, takeover),
        Command::Check { config, json } => check::run(&config, json),
        Command::List { json, place } => list::run(&place, json),
        Command::Stats { name, interval, count, json, place } => stats::run(&place, name, interval, count, json),
        Command::Add { name, parts, timeout, json, place } => change::add(&place, name, *parts, timeout, json),
        Command::Del { device, group, force, timeout, json, place } => {
            change::del(&place, device, group, force, timeout, json)
        }
        Command::Set { what } => change::set(what),
        Command::Reload { config, dry_run, allow_shrink, timeout, json, place } => {
            let timeout_ms = change::ms(timeout);
            change::reload(&place, protocol::Command::Reload { config, dry_run, allow_shrink, timeout_ms }, json)
        }
        Command::Features { json } => features::run(json),
        Command::Simulate { config, trace, summary, json } => simulate::run(&config, &trace, summary, json),
        Command::Man { command } => manual::page(command.as_deref()),
        Command::Completions { shell } => manual::completions(shell),
        #[cfg(debug_assertions)]
        Command::CrashPoints => {
            crate::crash_point::list();
            Ok(())
        }
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
    let (config, warnings) = read(path)?;
    odd(&warnings).iter().for_each(log::Warning::log);
    Ok(config)
}

/// The warnings of a configuration, in the form that every command uses.
pub fn odd(warnings: &[Warning]) -> Vec<log::Warning> {
    warning_lines(warnings).iter().map(log::Warning::of_config).collect()
}

/// Reads a configuration.
pub fn read(path: &Path) -> Outcome<(Config, Vec<Warning>)> {
    ublk_throttle_config::load(path).map_err(|errors| {
        let text = errors.to_string();
        // Each error of the list has a head. Printing the failure adds the head of the first one.
        let first = format!("error[{}]: ", Class::Config.name());
        Failure::new(Class::Config, text.strip_prefix(&first).unwrap_or(&text))
    })
}

/// Prints a line of facts. Exits with 0 once the reader has closed stdout.
fn say(line: impl fmt::Display) {
    if writeln!(std::io::stdout(), "{line}").is_err_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe) {
        std::process::exit(0);
    }
}

/// Prints facts for programs.
fn say_json(facts: &impl Serialize) {
    say(serde_json::to_string_pretty(facts).expect("facts are plain data"));
}

/// Prints facts for programs on one line, for repeated output.
fn say_json_line(facts: &impl Serialize) {
    say(serde_json::to_string(facts).expect("facts are plain data"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_odd_is_told_once_with_its_code_and_place() {
        // `run`, `check`, `reload`, the log and the answer use one form.
        let text = b"version: 1\ndevices: { a: { backend: { memory: 1MiB }, limits: { iops: 0 } } }\n";
        let (_, warnings) = ublk_throttle_config::parse("f.yaml", text).unwrap();
        let told: Vec<String> = odd(&warnings).iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 1);
        let wanted = "warning[W-CONFIG]: f.yaml:2:60: devices.a.limits.iops-total: 0 means no limit";
        assert!(told[0].starts_with(wanted), "{told:?}");
    }
}
