//! Checks across entries: whether a group exists, whether an id or a path is taken; and the places
//! in the file for warnings about the whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::fault::{WarningKind, shown};
use crate::fields::{Item, Notes};
use crate::model::Config;
use crate::odd::{device_hold, fits, is_odd_pair, long_hold};
use crate::read::parents::Parents;
use crate::source::Place;

/// Names, ids and paths seen so far, each with its place.
#[derive(Debug, Default)]
pub(crate) struct Cross<'n> {
    /// The name of every group, including groups with faults of their own.
    groups: BTreeMap<&'n str, Place>,
    /// The line of the first group.
    groups_line: Option<u32>,
    parents: Parents<'n>,
    devices: BTreeMap<&'n str, Place>,
    ids: BTreeMap<u32, (&'n str, Place)>,
    /// Per path, the first owner of each kind: read-only or not, shared or not.
    paths: BTreeMap<PathBuf, Vec<Owner<'n>>>,
}

/// A device with a path for its backend.
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

    /// Whether the group exists; notes a fault if not.
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

    /// Records the path of a device's backend. A path has one writer and no second device, or any
    /// number of devices that are read-only or `shared`: the same rule as that of the lock which a
    /// device takes at its start.
    pub(super) fn add_path(&mut self, path: &Path, owner: Owner<'n>, key: &str, notes: &mut Notes) {
        let owners = self.paths.entry(path.to_owned()).or_default();
        let is_alone = |owner: &Owner<'_>| !(owner.read_only || owner.shared);
        let line_and_name = |other: &Owner<'_>| (other.place.line, shown(other.device, 64));
        if let Some(other) = owners.iter().find(|other| is_alone(other) || is_alone(&owner)) {
            let (line, name) = line_and_name(other);
            let does = if other.read_only { "reads" } else { "writes to" };
            let found = format!("device {name} (line {line}) already {does} this path");
            let cure = match other.read_only || owner.read_only {
                true => {
                    "what is read may be old; give each its own path, or the writer `shared: true` if that is meant"
                }
                false => {
                    "two writers destroy each other's data; give each its own path, or both `shared: true` if they are made \
                     for that"
                }
            };
            notes.fault(owner.place, key, found, cure);
        } else if let Some(other) =
            owners.iter().find(|other| is_odd_pair(other.read_only, owner.read_only, other.shared && owner.shared))
        {
            let (line, other) = line_and_name(other);
            notes.warn(owner.place, key, WarningKind::SharedPath { other, line: Some(line) });
        }
        let is_alike = |other: &Owner<'_>| (other.read_only, other.shared) == (owner.read_only, owner.shared);
        if !owners.iter().any(is_alike) {
            owners.push(owner);
        }
    }

    pub(super) fn add_device(&mut self, name: &'n str, item: &Item<'n>) {
        self.devices.insert(name, item.key_place);
    }

    /// Notes warnings about the whole configuration, which has no faults.
    pub(super) fn check(&self, config: &Config, notes: &mut Notes) {
        if config.devices.is_empty() {
            notes.warn(Place::START, "devices", WarningKind::NoDevices);
        }
        for device in &config.devices {
            if let (Some(kind), Some(place)) = (device_hold(device), self.devices.get(device.name.as_str())) {
                notes.warn(*place, &format!("devices.{}", device.name), kind);
            }
        }
        let fits = fits(config);
        for group in &config.groups {
            let Some(place) = self.groups.get(group.name.as_str()) else { continue };
            let path = format!("groups.{}", group.name);
            match fits.get(group.name.as_str()) {
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
