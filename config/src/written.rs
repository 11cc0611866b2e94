//! A configuration written back as text, for a later process that takes over devices and groups.
//!
//! ```text
//!   Device  ──► file=/srv/vol1.img size=1073741824 iops-total=500 …  ──► new_device ──► the same Device, of no file
//!   groups  ──► {"version": 1, "groups": {"rack": {…}}}              ──► parse ──────► the same groups
//! ```
//!
//! The reader of this text is the reader of users' settings: there is one reader with one set of
//! rules, and a damaged text is refused like a faulty configuration.
//!
//! Every value that differs from its default is written, even without an effect at the moment (the
//! weight of a group without a parent): the reader compares the text with the file, and takes a
//! difference for a change of the file.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use throttle_core::charge::{Charge, ChargeTable};
use throttle_core::limits::{Field, LimitKind, Limits, SECOND_NS};
use throttle_core::share::WEIGHT_DEFAULT;
use throttle_core::tree;

use crate::model::{Backend, Device, Group};
use crate::quantity::exact_seconds;

/// A key and a value, as in the configuration.
type Setting = (String, String);

impl Device {
    /// Every setting of the device but its name, as [`crate::new_device`] takes them.
    pub fn settings(&self) -> Vec<(String, String)> {
        // Name every field, so that a new field is not forgotten.
        let Self {
            name: _,
            id,
            backend,
            group,
            weight,
            limits,
            queues,
            depth,
            block_size,
            read_only,
            on_crash,
            on_stop,
            zero_copy,
            cpus,
            required,
            line: _,
        } = self;
        let mut settings = backend_settings(backend);
        let mut add = |key: &str, value: String| settings.push((key.to_owned(), value));
        if let Some(id) = id {
            add("id", id.to_string());
        }
        if let Some(group) = group {
            add("group", group.clone());
        }
        add("weight", weight.to_string());
        add("queues", queues.to_string());
        add("depth", depth.to_string());
        if let Some(block_size) = block_size {
            add("block-size", block_size.to_string());
        }
        add("read-only", read_only.to_string());
        add("on-crash", on_crash.word().to_owned());
        add("on-stop", on_stop.word().to_owned());
        add("zero-copy", zero_copy.word().to_owned());
        if let Some(cpus) = cpus {
            add("cpus", cpus.to_string());
        }
        // An older program does not know the key.
        if *required {
            add("required", required.to_string());
        }
        settings.extend(limits_settings(limits));
        settings
    }
}

/// Groups as a configuration of their own. Every parent must be among `groups`.
pub fn write_groups(groups: &[Group]) -> String {
    let by_name: BTreeMap<&str, &Group> = groups.iter().map(|group| (group.name.as_str(), group)).collect();
    let groups: Vec<String> =
        groups.iter().map(|group| format!("{}: {}", quoted(&group.name), group_body(group, &by_name))).collect();
    format!("{{\"version\": 1, \"groups\": {{{}}}}}", groups.join(", "))
}

/// Leaves defaults out, so that a large configuration is not longer here than in its file.
fn group_body(group: &Group, by_name: &BTreeMap<&str, &Group>) -> String {
    let Group { name: _, parent, weight, limits, charges, line: _ } = group;
    let mut parts = Vec::new();
    if let Some(parent) = parent {
        parts.push(format!("\"parent\": {}", quoted(parent)));
    }
    if *weight != WEIGHT_DEFAULT {
        parts.push(format!("\"weight\": {weight}"));
    }
    let limits = limits_settings(limits);
    if !limits.is_empty() {
        parts.push(format!("\"limits\": {}", map(limits)));
    }
    if let Some(charges) = charges {
        parts.push(format!("\"charge\": {}", map(charge_settings(charges, &inherited_charges(group, by_name)))));
    }
    format!("{{{}}}", parts.join(", "))
}

/// The table that a group inherits from the groups above it.
fn inherited_charges(group: &Group, by_name: &BTreeMap<&str, &Group>) -> ChargeTable {
    let parent = |group: &&Group| by_name.get(group.parent.as_deref()?).copied();
    // Bounded, in case the groups form a cycle.
    let above = std::iter::successors(parent(&group), parent).take(tree::DEPTH_MAX);
    above.filter_map(|group| group.charges).next().unwrap_or(ChargeTable::DEFAULT)
}

fn backend_settings(backend: &Backend) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut add = |key: &str, value: String| settings.push((key.to_owned(), value));
    match backend {
        Backend::File { path, size, create, direct, shared } => {
            add("file", path.to_string_lossy().into_owned());
            if let Some(size) = size {
                add("size", size.to_string());
            }
            add("create", create.to_string());
            add("direct", direct.word().to_owned());
            add("shared", shared.to_string());
        }
        Backend::Block { path, direct, shared } => {
            add("block", path.to_string_lossy().into_owned());
            add("direct", direct.word().to_owned());
            add("shared", shared.to_string());
        }
        Backend::Memory { size } | Backend::Null { size } => add(backend.kind(), size.to_string()),
    }
    settings
}

/// The limits that are set, without settings that equal their defaults.
pub(crate) fn limits_settings(limits: &Limits) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut add = |field: Field, value: String| settings.push((field.to_string(), value));
    for kind in LimitKind::ALL {
        let limit = limits.get(kind);
        if limit.is_unlimited() {
            continue;
        }
        add(Field::Avg(kind), limit.avg.to_string());
        if limit.max != 0 {
            add(Field::Max(kind), limit.max.to_string());
            if limit.burst_length_ns != SECOND_NS {
                add(Field::BurstLength(kind), exact_seconds(limit.burst_length_ns));
            }
        }
    }
    if limits.iops_size > 0 {
        add(Field::IopsSize, limits.iops_size.to_string());
    }
    settings
}

/// Writes `auto` for write-zeroes only if the inherited table sets a charge: an older program does
/// not know the word.
fn charge_settings(charges: &ChargeTable, inherited: &ChargeTable) -> Vec<Setting> {
    let ChargeTable { read, write, write_zeroes, discard, flush } = *charges;
    let word = |charge| match charge {
        Charge::Free => "free",
        Charge::Op => "op",
        Charge::Bytes => "bytes",
    };
    let zeroes = write_zeroes.map(word).or(inherited.write_zeroes.map(|_| "auto"));
    [
        ("read", Some(word(read))),
        ("write", Some(word(write))),
        ("write-zeroes", zeroes),
        ("discard", Some(word(discard))),
        ("flush", Some(word(flush))),
    ]
    .into_iter()
    .filter_map(|(key, word)| Some((key.to_owned(), word?.to_owned())))
    .collect()
}

/// A flow map of quoted keys and values.
fn map(settings: Vec<Setting>) -> String {
    let entries: Vec<String> =
        settings.into_iter().map(|(key, value)| format!("{}: {}", quoted(&key), bare(&value))).collect();
    format!("{{{}}}", entries.join(", "))
}

/// A number or word: no character of it has a meaning in YAML.
fn bare(value: &str) -> String {
    debug_assert!(value.chars().all(|c| c.is_ascii_alphanumeric() || c == '.'), "{value:?}");
    value.to_owned()
}

/// The text in double quotes, as JSON and YAML both read it.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            // Writing to a String cannot fail.
            c if (c as u32) < 0x20 => drop(write!(out, "\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
