//! From the tree of nodes to a [`Config`]: the schema, one file for each of its parts.
//!
//! ```text
//!   version     1
//!   defaults    queues, depth, on-crash, on-stop, zero-copy, cpus, required ─── cpus.rs
//!   groups      NAME → group.rs   ─── parents.rs, charge.rs ─┐
//!   devices     NAME → device.rs  ─── backend.rs ────────────┴─ limits.rs, weight.rs
//!   limits      memory ─┬─ daemon.rs
//!   control     group  ─┘
//! ```
//!
//! Checks across entries follow (cross.rs): references, groups in trees, unique ids and paths, the
//! memory of all devices, and how long a full device may be held back.

pub(crate) mod backend;
mod charge;
mod cpus;
mod cross;
mod daemon;
pub(crate) mod device;
pub(crate) mod group;
pub(crate) mod limits;
mod parents;
pub(crate) mod weight;

use std::collections::BTreeMap;
use std::path::Path;

use throttle_core::charge::ChargeTable;

use crate::cpus::Cpus;
use crate::fields::{Fields, Item, Notes, named};
use crate::model::{Config, DEPTH_MAX, OnCrash, OnStop, QUEUES_MAX, ZeroCopy};
use crate::source::Place;
use crate::yaml::{Node, Value};

const KEYS: [&str; 6] = ["version", "defaults", "groups", "devices", "limits", "control"];
const KEYS_LATER: [&str; 1] = ["metrics"];

/// Reads a whole configuration. The result is sound only if no fault was noted.
pub(crate) fn config(root: &Node, base: &Path, notes: &mut Notes) -> Config {
    let item = Item { path: String::new(), key_place: Place::START, node: root };
    let mut config = Config::default();
    if !matches!(root.value, Value::Map(_)) {
        let found = match root.value {
            Value::Null => "the file is empty".to_owned(),
            _ => format!("the file is {}", item.kind()),
        };
        item.fault(notes, found, "it begins with `version: 1`, followed by `groups:` and `devices:`");
        return config;
    }
    let Some(mut fields) = Fields::of(&item, notes) else { return config };
    version(fields.take("version"), notes);
    let defaults = fields.take("defaults").map_or_else(Defaults::default, |item| Defaults::read(&item, notes));
    let groups = fields.take("groups");
    let devices = fields.take("devices");
    let memory_max = fields.take("limits").and_then(|item| daemon::memory_max(&item, notes));
    config.readers = fields.take("control").and_then(|item| daemon::readers(&item, notes));
    if let Some(metrics) = fields.take("metrics") {
        metrics.not_supported_yet(notes, "remove it; numbers come from `ublk-throttle stats --json` in this version");
    }
    fields.finish(notes, &KEYS, &KEYS_LATER);

    let groups = groups.and_then(|item| named(&item, notes)).unwrap_or_default();
    let mut cross = cross::Cross::default();
    // All names first: a group may come before its parent in the file.
    for (name, item) in &groups {
        cross.add_group(name, item);
        group::check_name(name, item, notes);
    }
    let mut charges = BTreeMap::new();
    for (name, item) in &groups {
        let Some((group, said)) = group::read(name, item, &mut cross, notes) else { continue };
        config.groups.push(group);
        charges.insert(*name, said);
    }
    for (name, item) in devices.and_then(|item| named(&item, notes)).unwrap_or_default() {
        cross.add_device(name, &item);
        config.devices.extend(device::read(name, &item, Some(base), &defaults, &mut cross, notes));
    }
    cross.check_parents(notes);
    if let Some((bytes, item)) = memory_max {
        config.memory_max = Some(bytes);
        daemon::check_memory(&config, bytes, &item, notes);
    }
    if notes.faults.is_empty() {
        inherit_charges(&mut config, &charges);
        cross.check(&config, notes);
    }
    config
}

/// Fills in the charges that groups inherit. The groups form trees.
fn inherit_charges(config: &mut Config, said: &BTreeMap<&str, charge::Said>) {
    let mut tables: BTreeMap<&str, ChargeTable> = BTreeMap::new();
    let mut own: BTreeMap<String, ChargeTable> = BTreeMap::new();
    for group in config.groups_parents_first() {
        let inherited = group.parent.as_deref().map_or(ChargeTable::DEFAULT, |parent| tables[parent]);
        let table = said[group.name.as_str()].over(&inherited);
        own.extend(table.map(|table| (group.name.clone(), table)));
        tables.insert(&group.name, table.unwrap_or(inherited));
    }
    for group in &mut config.groups {
        group.charges = own.remove(&group.name);
    }
}

fn version(item: Option<Item<'_>>, notes: &mut Notes) {
    match item {
        None => notes.fault(Place::START, "version", "missing", "add `version: 1` as the first line"),
        Some(item) => {
            if let Some(text) = item.text(notes, "allowed: 1").filter(|text| *text != "1") {
                let found = format!("{:?} is no version of this schema", crate::fault::shown(text, 40));
                item.fault(notes, found, "allowed: 1");
            }
        }
    }
}

/// The values of devices for keys that they leave out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Defaults {
    queues: u16,
    depth: u16,
    /// `None` if not given. A memory device always has `fail`.
    on_crash: Option<OnCrash>,
    /// `None` if not given. A device with `on-crash: fail` always has `remove`.
    on_stop: Option<OnStop>,
    /// `None` if not given. A null device always has `off`.
    zero_copy: Option<ZeroCopy>,
    cpus: Option<Cpus>,
    required: bool,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { queues: 1, depth: 128, on_crash: None, on_stop: None, zero_copy: None, cpus: None, required: false }
    }
}

impl Defaults {
    const KEYS: [&'static str; 7] = ["queues", "depth", "on-crash", "on-stop", "zero-copy", "cpus", "required"];

    fn read(item: &Item<'_>, notes: &mut Notes) -> Self {
        let mut defaults = Self::default();
        if let Some(mut fields) = Fields::of(item, notes) {
            defaults.take_from(&mut fields, notes);
            fields.finish(notes, &Self::KEYS, &[]);
        }
        defaults
    }

    /// Replaces the defaults by the given fields: the keys are the same in `defaults` and in a
    /// device. Returns the items of `on-crash`, `on-stop` and `zero-copy`, if given.
    fn take_from<'n>(&mut self, fields: &mut Fields<'n>, notes: &mut Notes) -> [Option<Item<'n>>; 3] {
        let mut count = |name: &str, max: u16| {
            let count = fields.take(name)?.count(notes, 1..=u64::from(max))?;
            u16::try_from(count).ok()
        };
        self.queues = count("queues", QUEUES_MAX).unwrap_or(self.queues);
        self.depth = count("depth", DEPTH_MAX).unwrap_or(self.depth);
        let on_crash = fields.take("on-crash");
        if let Some(item) = &on_crash {
            let words = [OnCrash::Requeue, OnCrash::Fail].map(|on_crash| (on_crash.word(), on_crash));
            self.on_crash = item.word(notes, &words, &[]).or(self.on_crash);
        }
        let on_stop = fields.take("on-stop");
        if let Some(item) = &on_stop {
            let words = [OnStop::Remove, OnStop::Keep].map(|on_stop| (on_stop.word(), on_stop));
            self.on_stop = item.word(notes, &words, &[]).or(self.on_stop);
        }
        let zero_copy = fields.take("zero-copy");
        if let Some(item) = &zero_copy {
            let words = ZeroCopy::ALL.map(|zero_copy| (zero_copy.word(), zero_copy));
            self.zero_copy = item.word(notes, &words, &[]).or(self.zero_copy);
        }
        if let Some(said) = fields.take("cpus").and_then(|item| cpus::read(&item, notes)) {
            self.cpus = said;
        }
        self.required = fields.take("required").and_then(|item| item.bool(notes)).unwrap_or(self.required);
        [on_crash, on_stop, zero_copy]
    }
}
