//! The changes that lead from the configuration in force to a new one, without a gap for unchanged
//! devices.
//!
//! ```text
//!   from                      to                            plan
//!   group rack   1000 iops    group rack   2000 iops   ──►  group rack: limits
//!   device a     in rack      device a     in tenant   ──►  device a: group            (and group tenant: added)
//!   device b                                           ──►  device b: removed
//!   device c     1 queue      device c     2 queues    ──►  refused: made with its queues
//! ```
//!
//! Devices and groups are identified by name. A plan is pure data: it changes nothing and knows
//! nothing of the kernel, and can be printed ([`Plan::lines`]) instead of carried out. A plan with
//! refusals must not be carried out in part.

use std::collections::BTreeMap;
use std::path::Path;

use throttle_core::charge::ChargeTable;
use throttle_core::limits::Limits;

use crate::cpus::Cpus;
use crate::model::{Backend, Config, Device, Direct, Group};
use crate::quantity::exact_bytes;

/// The differences of two configurations.
///
/// Carry it out in this order: groups added, devices removed, groups and devices changed, devices
/// added, groups removed. A parent may swap places with a group below it, so the changes of all
/// groups belong in one step; add a new group without its parent, which that step then sets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Parents first.
    pub group_additions: Vec<Group>,
    /// In the order of the new configuration.
    pub group_changes: Vec<GroupChange>,
    /// Children first. A removed group is empty once devices and groups have changed.
    pub group_removals: Vec<String>,
    /// In the order of the new configuration.
    pub device_changes: Vec<DeviceChange>,
    /// In the order of the new configuration. Their ids and paths may be those of devices that are removed.
    pub device_additions: Vec<Device>,
    /// In the order of the old configuration.
    pub device_removals: Vec<String>,
    /// The memory bound of all devices.
    pub memory_max: Option<Changed<Option<u64>>>,
    /// The Unix group that may use the reading commands.
    pub readers: Option<Changed<Option<String>>>,
    /// Devices that wait for their backends and get new values, see [`Plan::remake`].
    pub device_remakes: Vec<Remake>,
    /// Changes that a running device does not allow, in the order of the new configuration.
    pub refusals: Vec<FixedDevice>,
}

/// An old and a new value, which differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed<T> {
    /// The value in force.
    pub from: T,
    /// The value wanted.
    pub to: T,
}

impl<T: Clone + PartialEq> Changed<T> {
    fn of(from: &T, to: &T) -> Option<Self> {
        (from != to).then(|| Self { from: from.clone(), to: to.clone() })
    }
}

/// The changes of a group; at least one of its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupChange {
    /// The group.
    pub name: String,
    /// All limits of the group, including those that stay.
    pub limits: Option<Changed<Limits>>,
    /// The group's share of its parent.
    pub weight: Option<Changed<u32>>,
    /// The parent of the group.
    pub parent: Option<Changed<Option<String>>>,
    /// The charge of each operation in the group.
    pub charges: Option<Changed<Option<ChargeTable>>>,
}

/// The changes of a device that goes on serving; at least one of its fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceChange {
    /// The device.
    pub name: String,
    /// All limits of the device, including those that stay.
    pub limits: Option<Changed<Limits>>,
    /// The device's share of its group.
    pub weight: Option<Changed<u32>>,
    /// The group of the device.
    pub group: Option<Changed<Option<String>>>,
    /// Its size.
    pub size: Option<Resize>,
}

/// A new size of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resize {
    /// `None`: the size of its file.
    pub from: Option<u64>,
    /// The size that is wanted.
    pub to: u64,
}

/// A device with a difference in a setting that is fixed at its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FixedDevice {
    /// The device.
    pub name: String,
    /// The line at which the device begins in the new file.
    pub line: u32,
    /// Key, old and new value, as the file has them; at least one.
    pub keys: Vec<(&'static str, Changed<String>)>,
}

/// A device that waits for its backend and gets new values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remake {
    /// As the new configuration has it.
    pub device: Device,
    /// Key, old and new value, as the file has them; at least one.
    pub keys: Vec<(&'static str, Changed<String>)>,
}

/// The plan that leads from `from`, which is in force, to `to`.
///
/// Ids, sizes and `direct` that `to` leaves open stay as they are, so `from` must hold the actual
/// values of the devices.
pub fn difference(from: &Config, to: &Config) -> Plan {
    let mut plan = Plan {
        memory_max: Changed::of(&from.memory_max, &to.memory_max),
        readers: Changed::of(&from.readers, &to.readers),
        ..Plan::default()
    };
    let groups_before: BTreeMap<&str, &Group> = by_name(&from.groups, |group| &group.name);
    let groups_after: BTreeMap<&str, &Group> = by_name(&to.groups, |group| &group.name);
    for group in to.groups_parents_first() {
        if !groups_before.contains_key(group.name.as_str()) {
            plan.group_additions.push(group.clone());
        }
    }
    for group in &to.groups {
        plan.group_changes.extend(groups_before.get(group.name.as_str()).and_then(|before| change(before, group)));
    }
    for group in from.groups_parents_first().into_iter().rev() {
        if !groups_after.contains_key(group.name.as_str()) {
            plan.group_removals.push(group.name.clone());
        }
    }

    let devices_before: BTreeMap<&str, &Device> = by_name(&from.devices, |device| &device.name);
    let devices_after: BTreeMap<&str, &Device> = by_name(&to.devices, |device| &device.name);
    for device in &to.devices {
        match devices_before.get(device.name.as_str()) {
            None => plan.device_additions.push(device.clone()),
            Some(before) => {
                plan.refusals.extend(fixed(before, device));
                plan.device_changes.extend(live(before, device));
            }
        }
    }
    let gone = from.devices.iter().filter(|device| !devices_after.contains_key(device.name.as_str()));
    plan.device_removals.extend(gone.map(|device| device.name.clone()));
    plan
}

fn by_name<T>(things: &[T], name: impl Fn(&T) -> &String) -> BTreeMap<&str, &T> {
    things.iter().map(|thing| (name(thing).as_str(), thing)).collect()
}

fn change(from: &Group, to: &Group) -> Option<GroupChange> {
    // Name every field, so that a new field is not forgotten.
    let Group { name, parent, weight, limits, charges, line: _ } = to;
    let change = GroupChange {
        name: name.clone(),
        limits: Changed::of(&from.limits, limits),
        weight: Changed::of(&from.weight, weight),
        parent: Changed::of(&from.parent, parent),
        charges: Changed::of(&from.charges, charges),
    };
    let GroupChange { limits, weight, parent, charges, .. } = &change;
    let is_any = limits.is_some() || weight.is_some() || parent.is_some() || charges.is_some();
    is_any.then_some(change)
}

/// The changes that a running device allows.
fn live(from: &Device, to: &Device) -> Option<DeviceChange> {
    // A backend of a different kind is refused anyway, so its size does not count as a change.
    let is_same_kind = from.backend.kind() == to.backend.kind();
    let size = to.backend.size().filter(|size| is_same_kind && from.backend.size() != Some(*size));
    let change = DeviceChange {
        name: to.name.clone(),
        limits: Changed::of(&from.limits, &to.limits),
        weight: Changed::of(&from.weight, &to.weight),
        group: Changed::of(&from.group, &to.group),
        size: size.map(|to| Resize { from: from.backend.size(), to }),
    };
    let DeviceChange { limits, weight, group, size, .. } = &change;
    let is_any = limits.is_some() || weight.is_some() || group.is_some() || size.is_some();
    is_any.then_some(change)
}

/// The differences in settings that are fixed at the start of a device.
fn fixed(from: &Device, to: &Device) -> Option<FixedDevice> {
    let Device {
        name,
        line,
        id,
        backend,
        queues,
        depth,
        block_size,
        read_only,
        on_crash,
        on_stop,
        zero_copy,
        cpus,
        ..
    } = to;
    let block_words =
        |size: Option<u32>| size.map_or_else(|| "that of the backend".to_owned(), |size| size.to_string());
    let cpu_words = |cpus: Option<Cpus>| cpus.map_or_else(|| "all".to_owned(), |cpus| cpus.to_string());
    let pairs = [
        ("backend", place(&from.backend), place(backend)),
        ("direct", direct_words(from.backend.direct()), direct_words(settled_direct(from, backend))),
        ("shared", from.backend.is_shared().to_string(), backend.is_shared().to_string()),
        ("id", id_words(from.id), id_words(id.or(from.id))),
        ("queues", from.queues.to_string(), queues.to_string()),
        ("depth", from.depth.to_string(), depth.to_string()),
        ("block-size", block_words(from.block_size), block_words(*block_size)),
        ("read-only", from.read_only.to_string(), read_only.to_string()),
        ("on-crash", from.on_crash.word().to_owned(), on_crash.word().to_owned()),
        ("on-stop", from.on_stop.word().to_owned(), on_stop.word().to_owned()),
        ("zero-copy", from.zero_copy.word().to_owned(), zero_copy.word().to_owned()),
        ("cpus", cpu_words(from.cpus), cpu_words(*cpus)),
    ];
    let keys: Vec<_> = pairs.iter().filter_map(|(key, from, to)| Some((*key, Changed::of(from, to)?))).collect();
    (!keys.is_empty()).then(|| FixedDevice { name: name.clone(), line: *line, keys })
}

/// Every key that differs and that a device is made with, including the keys that `to` leaves open.
fn made_with(from: &Device, to: &Device) -> Vec<(&'static str, Changed<String>)> {
    let size_words = |size: Option<u64>| size.map_or_else(|| "that of the backend".to_owned(), exact_bytes);
    let create_words = |backend: &Backend| matches!(backend, Backend::File { create: true, .. }).to_string();
    let mut keys = fixed(from, to).map(|fixed| fixed.keys).unwrap_or_default();
    let open = [
        ("size", size_words(from.backend.size()), size_words(to.backend.size())),
        ("create", create_words(&from.backend), create_words(&to.backend)),
        ("direct", direct_words(from.backend.direct()), direct_words(to.backend.direct())),
        ("id", id_words(from.id), id_words(to.id)),
    ];
    for (key, from, to) in open {
        if !keys.iter().any(|(known, _)| *known == key) {
            keys.extend(Changed::of(&from, &to).map(|changed| (key, changed)));
        }
    }
    keys
}

fn id_words(id: Option<u32>) -> String {
    id.map_or_else(|| "auto".to_owned(), |id| id.to_string())
}

/// The kind, and the path as the kernel gets it.
fn place(backend: &Backend) -> String {
    let path = backend.path().map(Path::display);
    path.map_or_else(|| backend.kind().to_owned(), |path| format!("{} {path}", backend.kind()))
}

/// The `direct` wanted; `auto` accepts the setting that the device has.
fn settled_direct(from: &Device, to: &Backend) -> Option<Direct> {
    match (from.backend.direct(), to.direct()) {
        (Some(before), Some(Direct::Auto)) => Some(before),
        (_, wanted) => wanted,
    }
}

fn direct_words(direct: Option<Direct>) -> String {
    direct.map_or("none", Direct::word).to_owned()
}

impl Plan {
    /// The devices that would become smaller, each with its sizes.
    pub fn shrinking(&self) -> impl Iterator<Item = (&str, Resize)> {
        let sizes = self.device_changes.iter().filter_map(|change| Some((change.name.as_str(), change.size?)));
        sizes.filter(|(_, size)| size.from.is_some_and(|from| size.to < from))
    }

    /// Adds a new size to the plan for a device if the new configuration `to` leaves its size open.
    pub fn resize(&mut self, to: &Config, name: &str, size: Resize) {
        let place = |name: &str| to.devices.iter().position(|device| device.name == name);
        let at = self.device_changes.partition_point(|change| place(&change.name) < place(name));
        if self.device_changes.get(at).is_none_or(|change| change.name != name) {
            self.device_changes.insert(at, DeviceChange { name: name.to_owned(), ..DeviceChange::default() });
        }
        self.device_changes[at].size = Some(size);
    }

    /// Turns the refusals about a device that waits for its backend into a remake. `from` is the device in force,
    /// `to` the same device of the new configuration. Changes of group, weight and limits stay changes.
    pub fn remake(&mut self, from: &Device, to: &Device) {
        self.refusals.retain(|fixed| fixed.name != to.name);
        for change in self.device_changes.iter_mut().filter(|change| change.name == to.name) {
            change.size = None;
        }
        let nothing = DeviceChange { name: to.name.clone(), ..DeviceChange::default() };
        self.device_changes.retain(|change| *change != nothing);
        let keys = made_with(from, to);
        if !keys.is_empty() {
            self.device_remakes.push(Remake { device: to.clone(), keys });
        }
    }

    /// Whether the two configurations have no difference.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
