//! All devices and groups of the daemon, with their settings in force and their origin.
//!
//! ```text
//!   name ─► Entry  { device, described: settings at the start, origin: file or command, waiter: its client }
//!   name ─► Placed { group: settings in force, id: its place in the throttle, origin }
//! ```
//!
//! The changeable settings of a device are in the device ([`crate::device::Standing`]), those of a group in this table.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Number;
use throttle_core::ids::GroupId;
use tokio::sync::oneshot;
use ublk_throttle_config::{Config, Device as Description, Group, nearest, write_groups};

use crate::device::{Device, Status, limits, set_size};
use crate::error::{Class, Failure, Outcome};
use crate::state_dir::GroupsRecord;

/// The contents of `list`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listing {
    /// The devices, by name.
    pub devices: Vec<Status>,
    /// The groups of the start in file order, then later groups in the order of their addition.
    pub groups: Vec<GroupStatus>,
}

/// A group in facts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Name of the group.
    pub name: String,
    /// The parent group, whose limits hold as well.
    pub parent: Option<String>,
    /// The share in the rate of the parent, in proportion to the weights of all its members.
    pub weight: u32,
    /// The limits, by their keys in the configuration.
    pub limits: BTreeMap<String, Number>,
    /// The devices in it, without those of groups below it.
    pub devices: Vec<String>,
    /// Number of held requests at the moment, of all devices in the group and in the groups below it.
    pub held: u32,
}

impl GroupStatus {
    /// The settings of a group, without devices and held requests, which [`Table::listing`] adds.
    fn of(group: &Group) -> Self {
        Self {
            name: group.name.clone(),
            parent: group.parent.clone(),
            weight: group.weight,
            limits: limits(&group.limits),
            devices: Vec::new(),
            held: 0,
        }
    }
}

/// The origin of a device or group. A reload does not remove devices and groups that a command made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The configuration file.
    File,
    /// `add`, or `set --create`.
    Command,
}

/// The channel for the outcome of a start.
pub type Waiter = oneshot::Sender<Outcome<()>>;

/// A device in the table.
pub struct Entry {
    pub device: Device,
    /// The settings at the start of the device. A resize updates the size, a reload the line in the file.
    pub described: Description,
    pub origin: Origin,
    /// The channel to the command that waits until the device is live or waits for its backend. `None` after that, and
    /// for a device that the daemon started by itself.
    pub waiter: Option<Waiter>,
    pub is_starting: bool,
    /// Whether an earlier daemon left the device behind. Its users wait for this daemon, so the failure of a different
    /// device does not end the start.
    pub is_taken_up: bool,
    /// Whether the daemon is ending and leaves the device to the next daemon.
    pub is_kept: bool,
}

impl Entry {
    /// The settings in force, as a configuration. Keys that the configuration leaves open (id, size, `direct`) have the
    /// values that the device got at its start.
    pub fn in_force(&self) -> Description {
        let mut described = self.described.clone();
        let standing = self.device.standing();
        described.group.clone_from(&standing.group);
        described.weight = standing.weight;
        described.limits = standing.limits;
        drop(standing);
        described.id = self.device.id().or(described.id);
        if let (None, Some(size)) = (described.backend.size(), self.device.size()) {
            set_size(&mut described, size);
        }
        if let Some(is_direct) = self.device.is_direct() {
            described.backend.settle_direct(is_direct);
        }
        described
    }
}

/// A group in the table.
pub struct Placed {
    /// The settings in force.
    pub group: Group,
    pub id: GroupId,
    pub origin: Origin,
    /// The group as the configuration file has it; `None` if the file does not name it.
    pub entry: Option<Group>,
}

/// All devices and groups. Only the control thread uses the table; no task keeps a reference into it across an `await`.
#[derive(Default)]
pub struct Table {
    pub devices: BTreeMap<String, Entry>,
    /// First the groups of the start, in file order, then later groups in the order of their addition. A parent may
    /// follow its children.
    pub groups: Vec<Placed>,
    /// `limits.memory` in bytes: the bound on the buffers of all devices and the contents of memory devices.
    pub memory_max: Option<u64>,
    /// The Unix group with permission for `ping`, `list` and `stats`, as the configuration names it.
    pub readers: Option<String>,
}

impl Table {
    /// All devices and groups, for `list`.
    pub fn listing(&self) -> Listing {
        let devices: Vec<Status> = self.devices.values().map(|entry| entry.device.status()).collect();
        let mut groups: Vec<GroupStatus> = self.groups.iter().map(|placed| GroupStatus::of(&placed.group)).collect();
        for device in &devices {
            let own = self.places_above(device.group.as_deref());
            if let Some(own) = own.first() {
                groups[*own].devices.push(device.name.clone());
            }
            for above in own {
                groups[above].held += device.held;
            }
        }
        Listing { devices, groups }
    }

    /// The indices in `groups` of the group and all groups above it, up to the root.
    pub fn places_above(&self, group: Option<&str>) -> Vec<usize> {
        let place = |name: &str| self.groups.iter().position(|placed| placed.group.name == name);
        let parent = |at: &usize| self.groups[*at].group.parent.as_deref().and_then(place);
        std::iter::successors(group.and_then(place), parent).collect()
    }

    /// The device with this name, link (`/dev/ublk-throttle/NAME`) or node (`/dev/ublkbN`).
    pub fn device(&self, wanted: &str) -> Outcome<&Entry> {
        let name = wanted.strip_prefix("/dev/ublk-throttle/").unwrap_or(wanted);
        let id: Option<u32> = wanted.strip_prefix("/dev/ublkb").and_then(|id| id.parse().ok());
        let found = self
            .devices
            .get(name)
            .or_else(|| self.devices.values().find(|entry| id.is_some() && entry.device.id() == id));
        found.ok_or_else(|| unknown(Class::NoDevice, "device", wanted, self.devices.keys().map(String::as_str)))
    }

    /// The group with this name.
    pub fn group(&self, wanted: &str) -> Outcome<&Placed> {
        self.groups.iter().find(|placed| placed.group.name == wanted).ok_or_else(|| {
            unknown(Class::NoGroup, "group", wanted, self.groups.iter().map(|placed| placed.group.name.as_str()))
        })
    }

    pub fn group_mut(&mut self, name: &str) -> Option<&mut Placed> {
        self.groups.iter_mut().find(|placed| placed.group.name == name)
    }

    /// The throttle's id of a group, given by name; `None` for the top level.
    pub fn place(&self, group: Option<&str>) -> Outcome<Option<GroupId>> {
        group.map(|name| self.group(name).map(|placed| placed.id)).transpose()
    }

    /// The devices and groups directly in a group, in words.
    pub fn members(&self, group: &str) -> Vec<String> {
        let devices = self.devices.values().filter(|entry| entry.device.standing().group.as_deref() == Some(group));
        let devices = devices.map(|entry| format!("device {}", entry.device.name()));
        let groups = self.groups.iter().filter(|placed| placed.group.parent.as_deref() == Some(group));
        devices.chain(groups.map(|placed| format!("group {}", placed.group.name))).collect()
    }

    /// Fails if the name or the id of a new device belongs to a device of the table. Refusals of the kernel and the
    /// backend come from the start of the device.
    pub fn check_new(&self, new: &Description) -> Outcome<()> {
        let name = &new.name;
        if let Some(entry) = self.devices.get(name) {
            let status = entry.device.status();
            let is_there =
                entry.is_starting || ["starting", "waiting", "recovering", "live"].contains(&status.state.as_str());
            let class = if is_there { Class::Exists } else { Class::Conflict };
            let cure = if is_there { "choose another name, or `del` it first" } else { "try again when it has gone" };
            return Err(Failure::new(class, format!("device {name:?} exists and is {}; {cure}", status.state)));
        }
        self.check_id(new)
    }

    /// Fails if the id that the settings of a device name belongs to a different device of the table.
    pub fn check_id(&self, new: &Description) -> Outcome<()> {
        let name = &new.name;
        let has_id = |entry: &&Entry| new.id.is_some() && entry.device.name() != name && entry.in_force().id == new.id;
        if let Some(other) = self.devices.values().find(has_id) {
            let what = format!(
                "device {name:?}: id {} is taken by our device {:?}; choose another id, or none",
                new.id.unwrap_or_default(),
                other.device.name()
            );
            return Err(Failure::new(Class::IdTaken, what));
        }
        Ok(())
    }

    /// Ids that the configuration names for devices without a disk.
    pub fn named_ids(&self) -> Vec<u32> {
        let is_unmade = |entry: &&Entry| entry.device.id().is_none();
        self.devices.values().filter(is_unmade).filter_map(|entry| entry.described.id).collect()
    }

    /// Fails if the memory of all devices, with that of a new or resized device, is above `limits.memory`.
    pub fn check_memory(&self, new: &Description) -> Outcome<()> {
        let others = self.devices.iter().filter(|(name, _)| **name != new.name);
        let there = others.map(|(_, entry)| entry.described.memory_bytes()).fold(0, u64::saturating_add);
        let bytes = there.saturating_add(new.memory_bytes());
        match self.memory_max {
            Some(max) if bytes > max => Err(Failure::new(
                Class::Config,
                format!(
                    "device {:?}: it takes {} bytes, and with the others all would take {bytes}, above limits.memory ({max}); \
                     lower its depth, queues or size in memory, or raise limits.memory",
                    new.name,
                    new.memory_bytes()
                ),
            )),
            _ => Ok(()),
        }
    }

    /// The state file of the groups, for the next daemon: as in force, and as in the configuration file.
    pub fn groups_record(&self) -> GroupsRecord {
        let groups: Vec<Group> = self.groups.iter().map(|placed| placed.group.clone()).collect();
        let entries: Vec<Group> = self.groups.iter().filter_map(|placed| placed.entry.clone()).collect();
        GroupsRecord::new(write_groups(&groups), write_groups(&entries))
    }

    /// The settings in force, as a configuration, of all devices and groups that came from the file or that `with`
    /// names.
    pub fn in_force(&self, with: &Config) -> Config {
        self.described(
            |entry| entry.origin == Origin::File || with.device(entry.device.name()).is_some(),
            |placed| placed.origin == Origin::File || with.group(&placed.group.name).is_some(),
        )
    }

    /// The settings in force of all devices and groups, as a configuration.
    pub fn whole(&self) -> Config {
        self.described(|_| true, |_| true)
    }

    fn described(&self, has_device: impl Fn(&Entry) -> bool, has_group: impl Fn(&Placed) -> bool) -> Config {
        let groups = self.groups.iter().filter(|placed| has_group(placed)).map(|placed| placed.group.clone());
        let devices = self.devices.values().filter(|entry| has_device(entry)).map(Entry::in_force);
        Config {
            groups: groups.collect(),
            devices: devices.collect(),
            memory_max: self.memory_max,
            readers: self.readers.clone(),
        }
    }
}

/// The failure for a name that no device or group has, with the nearest name or up to 20 known names.
fn unknown<'a>(class: Class, what: &str, wanted: &str, known: impl Iterator<Item = &'a str> + Clone) -> Failure {
    let cure = match (nearest(wanted, known.clone()), known.take(20).collect::<Vec<_>>()) {
        (Some(near), _) => format!("did you mean {near:?}?"),
        (None, known) if known.is_empty() => "there are none".to_owned(),
        (None, known) => format!("there are: {}", known.join(", ")),
    };
    Failure::new(class, format!("no {what} {wanted:?} here; {cure}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_is_told_with_the_nearest_or_with_all() {
        let told = |wanted, known: &'static [&'static str]| {
            unknown(Class::NoGroup, "group", wanted, known.iter().copied()).message
        };
        assert_eq!(told("rak", &["tenant", "rack"]), "no group \"rak\" here; did you mean \"rack\"?");
        assert_eq!(told("x", &["tenant", "rack"]), "no group \"x\" here; there are: tenant, rack");
        assert_eq!(told("x", &[]), "no group \"x\" here; there are none");
    }
}
