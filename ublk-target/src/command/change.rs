//! `add`, `del`, `set`, `reload`: changes of a running daemon.

use std::io::Write;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::ask::{ask, ask_patiently, understood};
use super::{list, say, say_json};
use crate::daemon::GroupStatus;
use crate::device::Status;
use crate::error::Outcome;
use crate::flags::{Parts, Place, SetWhat, absolute};
use crate::protocol::Command;
use crate::settings::Settings;

/// Makes a device.
pub fn add(place: &Place, name: String, parts: Parts, timeout: Duration, json: bool) -> Outcome<()> {
    let settings = Settings::unique(parts.settings()?)?;
    let doing = format!("adding {name}");
    let command = Command::Add { device: name, settings, timeout_ms: ms(timeout) };
    let made = ask_patiently(place, &command, &doing)?;
    tell_warnings(&made);
    if json {
        say_json(&made);
    } else {
        say(understood::<Status>(made)?.node.unwrap_or_default());
    }
    Ok(())
}

/// Removes a device or a group.
pub fn del(
    place: &Place,
    device: Option<String>,
    group: Option<String>,
    force: bool,
    timeout: Duration,
    json: bool,
) -> Outcome<()> {
    let doing = format!("removing {}", device.as_deref().or(group.as_deref()).unwrap_or_default());
    let command = Command::Del { device, group, force, timeout_ms: ms(timeout) };
    let gone = ask_patiently(place, &command, &doing)?;
    if json {
        say_json(&gone);
    } else if let Some(note) = gone["note"].as_str() {
        tell(note);
    }
    Ok(())
}

/// Changes a device or a group.
pub fn set(what: SetWhat) -> Outcome<()> {
    match what {
        SetWhat::Group { name, settings, create, json, place } => {
            let settings = Settings::unique(settings)?;
            let command = Command::Set { group: Some(name), device: None, settings, create, timeout_ms: 0 };
            let after = ask(&place, &command)?;
            show(json, after, |group: GroupStatus| {
                let parent = group.parent.as_deref();
                list::in_force("group", &group.name, ("parent", parent), group.weight, &group.limits)
            })
        }
        SetWhat::Device { name, settings, timeout, json, place } => {
            let doing = format!("changing {name}");
            let settings = Settings::unique(settings)?;
            let command =
                Command::Set { device: Some(name), group: None, settings, create: false, timeout_ms: ms(timeout) };
            let after = ask_patiently(&place, &command, &doing)?;
            show(json, after, |device: Status| {
                let group = device.group.as_deref();
                let line = list::in_force("device", &device.name, ("group", group), device.weight, &device.limits);
                device.size.map_or(line.clone(), |bytes| format!("{line} size={}", list::size(bytes)))
            })
        }
    }
}

fn show<T: for<'a> Deserialize<'a>>(json: bool, after: Value, words: impl FnOnce(T) -> String) -> Outcome<()> {
    tell_warnings(&after);
    if json {
        say_json(&after);
    } else {
        say(words(understood(after)?));
    }
    Ok(())
}

#[derive(Deserialize)]
struct Reloaded {
    changes: Vec<String>,
}

/// Brings the settings in force in line with a configuration file.
pub fn reload(place: &Place, mut command: Command, json: bool) -> Outcome<()> {
    if let Command::Reload { config: Some(config), .. } = &mut command {
        *config = absolute(config)?.into();
    }
    let result = ask_patiently(place, &command, "reloading")?;
    tell_warnings(&result);
    if json {
        say_json(&result);
    } else {
        let Reloaded { changes } = understood(result)?;
        changes.iter().for_each(say);
        if changes.is_empty() {
            say("nothing changes");
        }
    }
    Ok(())
}

/// Prints the warnings of an answer, in the form of `check`.
fn tell_warnings(answer: &Value) {
    answer["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str).for_each(tell);
}

/// Prints a warning or a note to stderr.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

pub fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
