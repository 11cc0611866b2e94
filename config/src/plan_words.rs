//! A plan in words, as `reload --dry-run` prints it.
//!
//! ```text
//!   group tenant-a: iops-total 500 → 1000, weight 100 → 200
//!   device vol1: group rack → tenant-a, size 20GiB → 40GiB
//!   device vol9: added (file /srv/vol9.img, 1GiB, group rack)
//! ```
//!
//! Keys and values are those of the configuration.

use std::fmt;

use throttle_core::charge::{Charge, ChargeTable};
use throttle_core::limits::{Field, LimitKind, Limits};
use throttle_core::share::WEIGHT_DEFAULT;

use crate::model::{Device, Group};
use crate::plan::{Changed, DeviceChange, FixedDevice, GroupChange, Plan, Remake, Resize};
use crate::quantity::{exact_bytes, exact_seconds};

impl Plan {
    /// A line for each change, refusals last; a single line that says so if there is no change.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(Changed { from, to }) = &self.memory_max {
            let words = |max: &Option<u64>| max.map_or_else(|| "no bound".to_owned(), exact_bytes);
            lines.push(format!("limits: memory {} → {}", words(from), words(to)));
        }
        if let Some(Changed { from, to }) = &self.readers {
            lines.push(format!("control: group {} → {}", or_none(from), or_none(to)));
        }
        lines.extend(self.group_additions.iter().map(added_group));
        lines.extend(self.group_changes.iter().map(changed_group));
        lines.extend(self.group_removals.iter().map(|name| format!("group {name}: removed")));
        lines.extend(self.device_changes.iter().map(changed_device));
        lines.extend(self.device_remakes.iter().map(remade_device));
        lines.extend(self.device_additions.iter().map(added_device));
        lines.extend(self.device_removals.iter().map(|name| format!("device {name}: removed")));
        lines.extend(self.refusals.iter().map(FixedDevice::to_string));
        if lines.is_empty() {
            lines.push("nothing changes".to_owned());
        }
        lines
    }
}

/// [`Plan::lines`], without a final newline.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.lines().join("\n"))
    }
}

impl FixedDevice {
    /// The keys that cannot change: `queues 1 → 2, direct false → true`.
    pub fn found(&self) -> String {
        key_changes(&self.keys).join(", ")
    }

    /// The cure for the refusal.
    pub fn cure(&self) -> String {
        let name = &self.name;
        format!(
            "remove the device and add it again: `ublk-throttle del {name}`, then `reload`; or put back what it has"
        )
    }
}

/// One line: the device, its line in the file, the refused keys, and the cure.
impl fmt::Display for FixedDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, line, .. } = self;
        write!(f, "device {name} (line {line}): {} cannot change while it runs; {}", self.found(), self.cure())
    }
}

fn added_group(group: &Group) -> String {
    let mut words = Vec::new();
    words.extend(group.parent.as_ref().map(|parent| format!("parent {parent}")));
    words.extend(limits_words(&group.limits));
    words.extend(weight_words(group.weight));
    words.extend(group.charges.as_ref().map(|charges| format!("charge {}", charges_words(Some(charges)))));
    added("group", &group.name, &words)
}

fn added_device(device: &Device) -> String {
    let backend = &device.backend;
    let mut words = vec![match backend.path() {
        Some(path) => format!("{} {}", backend.kind(), path.display()),
        None => backend.kind().to_owned(),
    }];
    words.extend(backend.size().map(exact_bytes));
    words.extend(device.id.map(|id| format!("id {id}")));
    words.extend(device.group.as_ref().map(|group| format!("group {group}")));
    words.extend(limits_words(&device.limits));
    words.extend(weight_words(device.weight));
    words.extend(device.read_only.then(|| "read-only".to_owned()));
    added("device", &device.name, &words)
}

fn added(what: &str, name: &str, words: &[String]) -> String {
    if words.is_empty() {
        format!("{what} {name}: added")
    } else {
        format!("{what} {name}: added ({})", words.join(", "))
    }
}

fn changed_group(change: &GroupChange) -> String {
    let GroupChange { name, limits, weight, parent, charges } = change;
    let mut words = Vec::new();
    words.extend(parent.as_ref().map(|of| format!("parent {} → {}", or_none(&of.from), or_none(&of.to))));
    words.extend(limits.iter().flat_map(limit_changes));
    words.extend(weight.map(|Changed { from, to }| format!("weight {from} → {to}")));
    words.extend(charges.as_ref().map(|Changed { from, to }| {
        format!("charge {} → {}", charges_words(from.as_ref()), charges_words(to.as_ref()))
    }));
    format!("group {name}: {}", words.join(", "))
}

fn changed_device(change: &DeviceChange) -> String {
    let DeviceChange { name, limits, weight, group, size } = change;
    let mut words = Vec::new();
    words.extend(group.as_ref().map(|of| format!("group {} → {}", or_none(&of.from), or_none(&of.to))));
    words.extend(limits.iter().flat_map(limit_changes));
    words.extend(weight.map(|Changed { from, to }| format!("weight {from} → {to}")));
    words.extend(size.map(|Resize { from, to }| {
        let from = from.map_or_else(|| "that of the file".to_owned(), exact_bytes);
        format!("size {from} → {}", exact_bytes(to))
    }));
    format!("device {name}: {}", words.join(", "))
}

fn remade_device(remake: &Remake) -> String {
    let Remake { device, keys } = remake;
    format!("device {}, which waits for its backend: {}", device.name, key_changes(keys).join(", "))
}

fn key_changes(keys: &[(&'static str, Changed<String>)]) -> Vec<String> {
    keys.iter().map(|(key, Changed { from, to })| format!("{key} {from} → {to}")).collect()
}

fn or_none(name: &Option<String>) -> &str {
    name.as_deref().unwrap_or("none")
}

fn weight_words(weight: u32) -> Option<String> {
    (weight != WEIGHT_DEFAULT).then(|| format!("weight {weight}"))
}

/// The key and value of each limit that is set.
fn limits_words(limits: &Limits) -> Vec<String> {
    let pairs = settings(&Limits::UNLIMITED).into_iter().zip(settings(limits));
    pairs.filter(|(none, own)| none != own).map(|(_, (key, value))| format!("{key} {value}")).collect()
}

fn limit_changes(changed: &Changed<Limits>) -> Vec<String> {
    let pairs = settings(&changed.from).into_iter().zip(settings(&changed.to));
    let differ = pairs.filter(|(from, to)| from != to);
    differ.map(|((key, from), (_, to))| format!("{key} {from} → {to}")).collect()
}

/// Every key of limits with its value, always the same keys in the same order.
fn settings(limits: &Limits) -> Vec<(Field, String)> {
    let mut settings = Vec::new();
    for kind in LimitKind::ALL {
        let limit = limits.get(kind);
        let rate = |rate: u64| match rate {
            0 => "unlimited".to_owned(),
            _ if kind.is_iops() => rate.to_string(),
            _ => format!("{}/s", exact_bytes(rate)),
        };
        settings.push((Field::Avg(kind), rate(limit.avg)));
        settings.push((Field::Max(kind), rate(limit.max)));
        settings.push((Field::BurstLength(kind), exact_seconds(limit.burst_length_ns)));
    }
    let iops_size = if limits.iops_size == 0 { "none".to_owned() } else { exact_bytes(limits.iops_size) };
    settings.push((Field::IopsSize, iops_size));
    settings
}

/// The entries that differ from the default table, as in the file.
fn charges_words(charges: Option<&ChargeTable>) -> String {
    let Some(charges) = charges else { return "as above it".to_owned() };
    let word = |charge| match charge {
        Charge::Free => "free",
        Charge::Op => "op",
        Charge::Bytes => "bytes",
    };
    let default = &ChargeTable::DEFAULT;
    let own: Vec<String> = [
        ("read", Some(charges.read), Some(default.read)),
        ("write", Some(charges.write), Some(default.write)),
        ("write-zeroes", charges.write_zeroes, default.write_zeroes),
        ("discard", Some(charges.discard), Some(default.discard)),
        ("flush", Some(charges.flush), Some(default.flush)),
    ]
    .into_iter()
    .filter(|(_, charge, default)| charge != default)
    .filter_map(|(operation, charge, _)| Some(format!("{operation}: {}", word(charge?))))
    .collect();
    if own.is_empty() { "by default".to_owned() } else { format!("{{{}}}", own.join(", ")) }
}
