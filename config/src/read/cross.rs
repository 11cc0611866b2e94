//! What one entry cannot know alone: whether a group exists, whether an id or a path is taken, and how long the last of
//! all requests that fit would wait.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use throttle_core::limits::{LimitKind, Limits};

use crate::fault::{WarningKind, shown};
use crate::fields::{Item, Notes};
use crate::model::{Config, Device};
use crate::read::parents::Parents;
use crate::source::Place;

/// Guests and file systems give up on a request after 30 s.
const HOLD_MAX_S: u64 = 30;

/// The request that a hold is reckoned with: the kernel's default read-ahead.
const REQUEST_BYTES: u64 = 128 << 10;

/// Names, ids and paths seen so far, each with its place.
#[derive(Debug, Default)]
pub(crate) struct Cross<'n> {
    /// Every name of a group, also of one that has faults of its own.
    groups: BTreeMap<&'n str, Place>,
    /// Where the groups begin.
    groups_line: Option<u32>,
    parents: Parents<'n>,
    devices: BTreeMap<&'n str, Place>,
    ids: BTreeMap<u32, (&'n str, Place)>,
    /// The first owner of each kind, of the four there are.
    paths: BTreeMap<PathBuf, Vec<Owner<'n>>>,
}

/// A device that has a path for its backend.
#[derive(Debug)]
pub(super) struct Owner<'n> {
    pub(super) device: &'n str,
    pub(super) read_only: bool,
    pub(super) shared: bool,
    pub(super) place: Place,
}

impl<'n> Cross<'n> {
    pub(super) fn add_group(&mut self, name: &'n str, item: &Item<'n>) {
        self.groups_line.get_or_insert(item.key_place.line);
        self.groups.insert(name, item.key_place);
    }

    /// Whether there is such a group.
    pub(super) fn check_group(&self, name: &str, item: &Item<'_>, notes: &mut Notes) -> bool {
        if self.groups.contains_key(name) {
            return true;
        }
        let hint = notes.hint(name, self.groups.keys().copied());
        let cure = match self.groups_line {
            None => "there are no groups; add one under `groups:`".to_owned(),
            Some(line) => format!("{hint}add it to the groups, from line {line} on, or name one of them"),
        };
        item.fault(notes, format!("no group is called {:?}", shown(name, 40)), cure);
        false
    }

    pub(super) fn add_parent(&mut self, group: &'n str, parent: &'n str, item: Item<'n>, notes: &mut Notes) {
        if self.check_group(parent, &item, notes) {
            self.parents.add(group, parent, item);
        }
    }

    pub(super) fn check_parents(&self, notes: &mut Notes) {
        self.parents.check(&self.groups, notes);
    }

    pub(super) fn add_id(&mut self, device: &'n str, id: u32, item: &Item<'n>, notes: &mut Notes) {
        match self.ids.get(&id) {
            Some((other, place)) => {
                let found = format!("{id} is already the id of {}, line {}", shown(other, 64), place.line);
                item.fault(notes, found, "ids are unique; remove one for the first free id");
            }
            None => {
                self.ids.insert(id, (device, item.place()));
            }
        }
    }

    /// Notes the path of a device's backend, and refuses a second writer, unless both say that they share it.
    pub(super) fn add_path(&mut self, path: &Path, owner: Owner<'n>, key: &str, notes: &mut Notes) {
        let owners = self.paths.entry(path.to_owned()).or_default();
        let mut others = owners.iter().filter(|other| !(other.shared && owner.shared));
        let line_and_name = |other: &Owner<'_>| (other.place.line, shown(other.device, 64));
        if let Some(writer) = others.clone().find(|other| !(other.read_only || owner.read_only)) {
            let (line, name) = line_and_name(writer);
            let found = format!("device {name} (line {line}) already writes to this path");
            let cure = "two writers destroy each other's data; give each its own path, or both `shared: true` if they \
                        are made for that";
            notes.fault(owner.place, key, found, cure);
        } else if let Some(other) = others.find(|other| other.read_only != owner.read_only) {
            let (line, other) = line_and_name(other);
            notes.warn(owner.place, key, WarningKind::SharedPath { other, line });
        }
        let is_alike = |other: &Owner<'_>| (other.read_only, other.shared) == (owner.read_only, owner.shared);
        if !owners.iter().any(is_alike) {
            owners.push(owner);
        }
    }

    pub(super) fn add_device(&mut self, name: &'n str, item: &Item<'n>) {
        self.devices.insert(name, item.key_place);
    }

    /// Warns of what can only be seen from the whole, which has no faults.
    pub(super) fn check(&self, config: &Config, notes: &mut Notes) {
        if config.devices.is_empty() {
            notes.warn(Place::START, "devices", WarningKind::NoDevices);
        }
        // Requests that fit into the devices of a group and of all groups below it: they wait for its limits.
        let mut fit_by_group: BTreeMap<&str, u64> = BTreeMap::new();
        for device in &config.devices {
            let fit = fit(device);
            if let Some(group) = &device.group {
                *fit_by_group.entry(group).or_default() += fit;
            }
            if let (Some(kind), Some(place)) = (long_hold(&device.limits, fit), self.devices.get(device.name.as_str()))
            {
                notes.warn(*place, &format!("devices.{}", device.name), kind);
            }
        }
        for group in config.groups_parents_first().into_iter().rev() {
            if let (Some(parent), Some(&fit)) = (&group.parent, fit_by_group.get(group.name.as_str())) {
                *fit_by_group.entry(parent).or_default() += fit;
            }
        }
        for group in &config.groups {
            let Some(place) = self.groups.get(group.name.as_str()) else { continue };
            let path = format!("groups.{}", group.name);
            match fit_by_group.get(group.name.as_str()) {
                None => notes.warn(*place, &path, WarningKind::GroupWithoutDevices),
                Some(fit) => {
                    if let Some(kind) = long_hold(&group.limits, *fit) {
                        notes.warn(*place, &path, kind);
                    }
                }
            }
        }
    }
}

/// How many requests a device takes at once.
fn fit(device: &Device) -> u64 {
    u64::from(device.queues) * u64::from(device.depth)
}

/// The longest wait of a request when `requests` come at once, if it is too long. Bursts are left out: they are spent
/// when it matters.
fn long_hold(limits: &Limits, requests: u64) -> Option<WarningKind> {
    let holds = LimitKind::ALL.into_iter().filter_map(|kind| {
        let avg = limits.get(kind).avg;
        let request_bytes = (!kind.is_iops()).then_some(REQUEST_BYTES);
        let seconds = (requests * request_bytes.unwrap_or(1)).checked_div(avg)?;
        (seconds > HOLD_MAX_S).then_some((seconds, request_bytes))
    });
    let (seconds, request_bytes) = holds.max_by_key(|(seconds, _)| *seconds)?;
    Some(WarningKind::LongHold { seconds, requests, request_bytes })
}
