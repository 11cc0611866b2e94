//! `list`: the devices and groups, from the daemon, or from what the last one wrote down.

use std::collections::BTreeMap;

use serde_json::{Number, json};

use super::ask::{ask, understood};
use super::{say, say_json};
use crate::daemon::Listing;
use crate::device::Status;
use crate::error::{Class, Failure, Outcome};
use crate::flags::Place;
use crate::log;
use crate::protocol::Command;
use crate::state_dir;

/// Asks and prints.
pub fn run(place: &Place, json: bool) -> Outcome<()> {
    let listing = match ask(place, &Command::List {}) {
        Ok(result) => understood(result)?,
        Err(failure) if failure.class == Class::NoDaemon => written(place, failure)?,
        Err(failure) => return Err(failure),
    };
    if json {
        say_json(&json!(listing));
    } else {
        print(&listing);
    }
    Ok(())
}

/// What the state files say. If they tell of no device: the first file that cannot be read, or the failure to reach a daemon.
fn written(place: &Place, unreached: Failure) -> Outcome<Listing> {
    let (devices, unread) = state_dir::read(&place.state_dir)?.unwrap_or_default();
    if devices.is_empty() {
        return Err(unread.into_iter().next().map_or(unreached, |unread| unread.failure));
    }
    log::warn("W-NODAEMON", format_args!("{}; this is what the last one wrote down", unreached.message));
    for unread in unread {
        log::warn("W-STATE", format_args!("{}; the next `run` puts it aside", unread.failure.message));
    }
    Ok(Listing { devices, groups: Vec::new() })
}

fn print(listing: &Listing) {
    let head = ["DEVICE", "NODE", "STATE", "SIZE", "BACKEND", "GROUP", "WEIGHT", "HELD", "LIMITS"];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(listing.devices.iter().map(row));
    table(&rows);
    listing.devices.iter().filter_map(wait).for_each(say);
    if listing.groups.is_empty() {
        return;
    }
    say("");
    let mut rows = vec![["GROUP", "PARENT", "WEIGHT", "DEVICES", "HELD", "LIMITS"].map(str::to_owned)];
    rows.extend(listing.groups.iter().map(|group| {
        [
            group.name.clone(),
            or_dash(group.parent.as_deref().unwrap_or_default()),
            weight(group.parent.as_deref(), group.weight),
            or_dash(&group.devices.join(",")),
            group.held.to_string(),
            words(&group.limits),
        ]
    }));
    table(&rows);
}

fn row(device: &Status) -> [String; 9] {
    let backend = match &device.path {
        Some(path) => format!("{} {path}", device.backend),
        None => device.backend.clone(),
    };
    [
        device.name.clone(),
        or_dash(device.node.as_deref().unwrap_or_default()),
        state(device),
        device.size.map_or("-".to_owned(), size),
        backend,
        or_dash(device.group.as_deref().unwrap_or_default()),
        weight(device.group.as_deref(), device.weight),
        device.held.to_string(),
        words(&device.limits),
    ]
}

/// Its state, and what is to be known with it.
fn state(device: &Status) -> String {
    let mut words = vec![device.state.as_str()];
    words.extend(device.read_only.then_some("ro"));
    words.extend((device.health == "degraded").then_some("degraded"));
    words.join(" ")
}

/// What a device waits for.
fn wait(device: &Status) -> Option<String> {
    let why = device.waiting_for.as_ref().filter(|_| device.state == "waiting")?;
    Some(format!("{} waits for its backend: {why}", device.name))
}

/// What is in force for one thing, as `set` would take it.
pub fn in_force(
    what: &str,
    name: &str,
    (key, above): (&str, Option<&str>),
    weight: u32,
    limits: &BTreeMap<String, Number>,
) -> String {
    let place = above.map_or(String::new(), |above| format!(" {key}={above} weight={weight}"));
    format!("{what} {name}: {}{place}", words(limits))
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// A weight means nothing without a group above.
fn weight(above: Option<&str>, weight: u32) -> String {
    above.map_or("-".to_owned(), |_| weight.to_string())
}

/// Limits as the configuration spells them.
fn words(limits: &BTreeMap<String, Number>) -> String {
    if limits.is_empty() {
        return "unlimited".to_owned();
    }
    let word = |(key, value): (&String, &Number)| match key {
        key if key.ends_with("-length") => format!("{key}={value}s"),
        key if key.starts_with("bps") || key == "iops-size" => {
            format!("{key}={}", size(value.as_u64().unwrap_or_default()))
        }
        key => format!("{key}={value}"),
    };
    limits.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// Bytes in the largest unit that needs no fraction, so that the number is exact and short.
pub fn size(bytes: u64) -> String {
    let units: [(u64, &str); 9] = [
        (1 << 40, "TiB"),
        (1 << 30, "GiB"),
        (1 << 20, "MiB"),
        (1 << 10, "KiB"),
        (1_000_000_000_000, "TB"),
        (1_000_000_000, "GB"),
        (1_000_000, "MB"),
        (1_000, "kB"),
        (1, "B"),
    ];
    // 80 MB are 78125 KiB: of two units that fit, the one with the smaller number.
    let fitting = units.into_iter().filter(|(one, _)| bytes.is_multiple_of(*one) && bytes >= *one);
    fitting
        .min_by_key(|(one, _)| bytes / one)
        .map_or_else(|| format!("{bytes}B"), |(one, unit)| format!("{}{unit}", bytes / one))
}

/// Prints rows in columns.
pub fn table<const N: usize>(rows: &[[String; N]]) {
    let width: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    for row in rows {
        let cells: Vec<String> = row.iter().zip(width).map(|(cell, width)| format!("{cell:<width$}")).collect();
        say(cells.join("  ").trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_told_exactly_in_the_largest_unit() {
        // Rounded sizes have made people compare the wrong disks.
        assert_eq!(size(1 << 30), "1GiB");
        assert_eq!(size(1_000_000_000), "1GB");
        assert_eq!(size(1_000_001), "1000001B");
        assert_eq!(size(0), "0B");
        assert_eq!(size(80_000_000), "80MB");
        assert_eq!(size(64 << 20), "64MiB");
    }

    #[test]
    fn limits_are_told_in_the_words_of_the_configuration() {
        let limits = BTreeMap::from([
            ("iops-total".to_owned(), 100.into()),
            ("iops-total-max-length".to_owned(), Number::from_f64(0.5).unwrap()),
            ("bps-read".to_owned(), 1_048_576.into()),
        ]);
        assert_eq!(words(&limits), "bps-read=1MiB iops-total=100 iops-total-max-length=0.5s");
        assert_eq!(words(&BTreeMap::new()), "unlimited");
    }
}
