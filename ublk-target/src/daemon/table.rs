//! Every device and group of the daemon, with what is in force for them and where they come from.
//!
//! ```text
//!   name ─► Entry  { device, described: as it was made, origin: file or command, waiter: who asked for it }
//!   name ─► Placed { group: as it is in force, id: its place in the throttle, origin }
//! ```
//!
//! What may change about a device stands in the device ([`crate::device::Standing`]), what may change about a group here.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Number;
use throttle_core::group::GroupId;
use tokio::sync::oneshot;
use ublk_throttle_config::{Config, Device as Description, Group, nearest, write_groups};

use crate::device::{Device, Status, limits, set_size};
use crate::error::{Class, Failure, Outcome};
use crate::state_dir::GroupsRecord;

/// What `list` shows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listing {
    /// The devices, by name.
    pub devices: Vec<Status>,
    /// The groups, in the order in which they were made.
    pub groups: Vec<GroupStatus>,
}

/// A group in facts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Its name in the configuration.
    pub name: String,
    /// The group above it, whose limits hold as well.
    pub parent: Option<String>,
    /// Its share of what the parent allows, against the others in it.
    pub weight: u32,
    /// Its limits, in the configuration's words.
    pub limits: BTreeMap<String, Number>,
    /// The devices in it, without those of groups below it.
    pub devices: Vec<String>,
    /// Requests waiting for a limit at the moment, of all devices in it and below it.
    pub held: u32,
}

impl GroupStatus {
    /// Nobody is in it yet.
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

/// Where a device or group comes from: what a command made, no reload takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The configuration.
    File,
    /// `add`, or `set --create`.
    Command,
}

/// Who is to be told what became of a start.
pub type Waiter = oneshot::Sender<Outcome<()>>;

/// A device.
pub struct Entry {
    pub device: Device,
    /// As it was made; its size follows a change.
    pub described: Description,
    pub origin: Origin,
    /// Until it is live: who waits for that. None for those of the daemon's own start.
    pub waiter: Option<Waiter>,
    pub is_starting: bool,
    /// Left behind by an earlier daemon: its users wait for this one, whatever becomes of the other devices.
    pub is_taken_up: bool,
    /// The daemon ends, and the next one is to serve it.
    pub is_kept: bool,
}

impl Entry {
    /// What is in force, as a configuration would say it. What it leaves open (id, size, `direct`) is what it has got.
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

/// A group.
pub struct Placed {
    pub group: Group,
    pub id: GroupId,
    pub origin: Origin,
    /// As the file of the configuration has it, if it does.
    pub entry: Option<Group>,
}

/// All of them. Used by one thread; nothing in it is kept across a wait.
#[derive(Default)]
pub struct Table {
    pub devices: BTreeMap<String, Entry>,
    /// Parents before children only at the start: a change may turn that round.
    pub groups: Vec<Placed>,
    /// The bound on all buffers.
    pub memory_max: Option<u64>,
    /// The Unix group that may look, as the configuration names it.
    pub readers: Option<String>,
}

impl Table {
    /// Everything, for `list`.
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

    /// Where the group and all above it stand in `groups`, from below.
    pub fn places_above(&self, group: Option<&str>) -> Vec<usize> {
        let place = |name: &str| self.groups.iter().position(|placed| placed.group.name == name);
        let parent = |at: &usize| self.groups[*at].group.parent.as_deref().and_then(place);
        std::iter::successors(group.and_then(place), parent).collect()
    }

    /// A device by name, link or node.
    pub fn device(&self, wanted: &str) -> Outcome<&Entry> {
        let name = wanted.strip_prefix("/dev/ublk-throttle/").unwrap_or(wanted);
        let id: Option<u32> = wanted.strip_prefix("/dev/ublkb").and_then(|id| id.parse().ok());
        let found = self
            .devices
            .get(name)
            .or_else(|| self.devices.values().find(|entry| id.is_some() && entry.device.id() == id));
        found.ok_or_else(|| unknown(Class::NoDevice, "device", wanted, self.devices.keys().map(String::as_str)))
    }

    /// A group by name.
    pub fn group(&self, wanted: &str) -> Outcome<&Placed> {
        self.groups.iter().find(|placed| placed.group.name == wanted).ok_or_else(|| {
            unknown(Class::NoGroup, "group", wanted, self.groups.iter().map(|placed| placed.group.name.as_str()))
        })
    }

    pub fn group_mut(&mut self, name: &str) -> Option<&mut Placed> {
        self.groups.iter_mut().find(|placed| placed.group.name == name)
    }

    /// The id of the group that a device or a group is to be in, if any.
    pub fn place(&self, group: Option<&str>) -> Outcome<Option<GroupId>> {
        group.map(|name| self.group(name).map(|placed| placed.id)).transpose()
    }

    /// Who is in a group itself, in words.
    pub fn members(&self, group: &str) -> Vec<String> {
        let devices = self.devices.values().filter(|entry| entry.device.standing().group.as_deref() == Some(group));
        let devices = devices.map(|entry| format!("device {}", entry.device.name()));
        let groups = self.groups.iter().filter(|placed| placed.group.parent.as_deref() == Some(group));
        devices.chain(groups.map(|placed| format!("group {}", placed.group.name))).collect()
    }

    /// Why a device may not be made beside those that there are, by its name and id. What the kernel and the backend will
    /// refuse, they will say themselves.
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

    /// Why a device may not have the id that is named for it.
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

    /// Why a device that is new, or changes its size, would be too much beside the others.
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

    /// What the next daemon would need to know of the groups.
    pub fn groups_record(&self) -> GroupsRecord {
        let groups: Vec<Group> = self.groups.iter().map(|placed| placed.group.clone()).collect();
        let entries: Vec<Group> = self.groups.iter().filter_map(|placed| placed.entry.clone()).collect();
        GroupsRecord::new(write_groups(&groups), write_groups(&entries))
    }

    /// What is in force, as a configuration: what came from the file, and what `with` names too.
    pub fn in_force(&self, with: &Config) -> Config {
        self.described(
            |entry| entry.origin == Origin::File || with.device(entry.device.name()).is_some(),
            |placed| placed.origin == Origin::File || with.group(&placed.group.name).is_some(),
        )
    }

    /// Everything that is in force, as a configuration.
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

/// There is none of that name.
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
