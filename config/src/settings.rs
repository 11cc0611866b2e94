//! Settings given one at a time while the daemon runs: a group or device is changed, or a new one
//! is described.
//!
//! ```text
//!   set device vol1 iops=500 group=none size=40GiB      add vol9 file=/srv/vol9.img size=1GiB queues=2 iops=500
//!          │           │         │         │                         │                     │        │
//!          └── limits ─┘         └─ group, size            backend: { file, size }      queues   limits: { iops }
//!              change.rs            read/*.rs              └───────── read/device.rs, as from a file ─────────┘
//! ```
//!
//! Keys and values are those of the configuration, without its nesting: each key has a single
//! meaning. Each value is read by the code that reads a file, so both have the same rules. `none`
//! means no group.
//!
//! The caller must check, because this module does not know it: which groups exist
//! ([`crate::nearest`] helps), whether a parent would make a cycle, and whether a name, an id or a
//! path is taken.

use throttle_core::limits::Limits;
use throttle_core::share::WEIGHT_DEFAULT;

use crate::change::{entry, limits_over};
use crate::fault::{Fault, Warning};
use crate::fields::{Fields, Item, NAME_RULE, Notes, join, kebab, name_trouble};
use crate::model::{Backend, Device, Group};
use crate::read::backend::{self, ONE_KIND};
use crate::read::group::NONE;
use crate::read::{device, group, limits, weight};
use crate::source::Place;
use crate::yaml::{Entry, Node, Value};

/// A key and a value, as in the configuration.
type Setting<'s> = (&'s str, &'s str);

/// The result of settings with its warnings, or every fault.
type Outcome<T> = Result<(T, Vec<Warning>), Vec<Fault>>;

/// The two halves of a fault about a key that `set` does not take: the reason and the cure.
type Refusal = (&'static str, &'static str);

/// For keys that only the file changes.
const OF_FILE: Refusal = ("cannot be set", "change it in the file of the configuration, then `reload`");

/// The group in force after `settings`: limits, `weight` and `parent`. A fault's path is its key.
pub fn change_group(in_force: &Group, settings: &[Setting<'_>]) -> Outcome<Group> {
    let mut notes = Notes::default();
    let sorted = Sorted::of(settings, &["weight", "parent"], &group::KEYS, |_| OF_FILE, &mut notes);
    let limits = sorted.limits_over(&in_force.limits, &mut notes);
    let mut group = Group { limits, ..in_force.clone() };

    let node = map(sorted.own);
    let mut fields = Fields::of(&item("", &node), &mut notes);
    if let Some(parent) = fields.as_mut().and_then(|fields| fields.take("parent")) {
        group.parent = read_group(&parent, &mut notes);
        if group.parent.as_ref() == Some(&group.name) {
            parent.fault(
                &mut notes,
                format!("{} would stand below itself", group.name),
                "name another group, or `none`",
            );
        }
    }
    if let Some(fields) = fields.as_mut() {
        let weight = weight::read(fields, group.parent.is_some(), "parent", &mut notes);
        group.weight = weight.unwrap_or(group.weight);
    }
    sound(group, notes)
}

/// The device in force after `settings`: limits, `weight`, `group` and `size`. A fault's path is
/// its key. For a device on a block device, `size` changes nothing here: see [`wanted_size`].
pub fn change_device(in_force: &Device, settings: &[Setting<'_>]) -> Outcome<Device> {
    let fixed: Vec<&str> = device::KEYS.into_iter().chain(backend::KEYS).collect();
    let refusal = |key: &str| match key {
        // Read at the start of the daemon, so another device would not help.
        "required" => OF_FILE,
        _ => ("cannot change while the device runs", "remove the device and add it again"),
    };
    let mut notes = Notes::default();
    let sorted = Sorted::of(settings, &["weight", "group", "size"], &fixed, refusal, &mut notes);
    let limits = sorted.limits_over(&in_force.limits, &mut notes);
    let mut device = Device { limits, ..in_force.clone() };

    let node = map(sorted.own);
    let mut fields = Fields::of(&item("", &node), &mut notes);
    if let Some(group) = fields.as_mut().and_then(|fields| fields.take("group")) {
        device.group = read_group(&group, &mut notes);
    }
    if let Some(fields) = fields.as_mut() {
        let weight = weight::read(fields, device.group.is_some(), "group", &mut notes);
        device.weight = weight.unwrap_or(device.weight);
    }
    if let Some(size) = fields.as_mut().and_then(|fields| fields.take("size")) {
        resize(&mut device, &size, &mut notes);
    }
    sound(device, notes)
}

/// A new group: limits, `weight` and `parent`. A fault's path is its key, or `name`.
pub fn new_group(name: &str, settings: &[Setting<'_>]) -> Outcome<Group> {
    let mut notes = Notes::default();
    check_name(name, &mut notes);
    if name == NONE {
        notes.fault(
            Place::NOWHERE,
            "name",
            "a group called `none`",
            "`group=none` means no group; choose another name",
        );
    }
    let blank = Group {
        name: name.to_owned(),
        parent: None,
        weight: WEIGHT_DEFAULT,
        limits: Limits::UNLIMITED,
        charges: None,
        line: 0,
    };
    match change_group(&blank, settings) {
        Ok(new) if notes.faults.is_empty() => Ok(new),
        Ok(_) => Err(notes.faults),
        Err(faults) => Err(notes.faults.into_iter().chain(faults).collect()),
    }
}

/// A new device: the keys of its entry in a file, of its backend and of its limits. Its path is
/// absolute, because the client may run in a different directory than the daemon. A fault's path is
/// its key, or `name`.
pub fn new_device(name: &str, settings: &[Setting<'_>]) -> Outcome<Device> {
    let mut notes = Notes::default();
    check_name(name, &mut notes);
    let own = device::KEYS.into_iter().filter(|key| !["backend", "limits"].contains(key));
    let known: Vec<&str> = backend::KEYS.into_iter().chain(own).collect();
    let sorted = Sorted::of(settings, &known, &[], |_| OF_FILE, &mut notes);
    let (backend, mut own): (Vec<_>, Vec<_>) =
        sorted.own.into_iter().partition(|entry| backend::KEYS.contains(&kebab(&entry.key).as_ref()));
    if !backend.iter().any(|entry| backend::KINDS.contains(&entry.key.as_str())) {
        // No second fault if an unknown key was probably meant to be the backend.
        if notes.faults.iter().all(|fault| fault.path == "name") {
            notes.fault(Place::NOWHERE, "", "no backend", format!("{ONE_KIND}: say which, like `file=/srv/vol1.img`"));
        }
        return Err(notes.faults);
    }
    own.retain(|entry| !(entry.key == "group" && item("", &entry.node).is_word(NONE)));
    own.push(nested("backend", backend));
    own.push(nested("limits", sorted.limits.iter().map(|(key, value)| entry(key, value)).collect()));
    let node = map(own);
    let device = device::read_alone(name, &item("", &node), &mut notes);
    let paths = notes.faults.iter_mut().map(|fault| &mut fault.path);
    for path in paths.chain(notes.warnings.iter_mut().map(|(_, path, _)| path)) {
        let key = ["backend.", "limits."].into_iter().find_map(|level| path.strip_prefix(level));
        if let Some(key) = key.map(str::to_owned) {
            *path = key;
        }
    }
    match device {
        Some(device) => sound(device, notes),
        None => Err(notes.faults),
    }
}

/// Settings sorted by the code that reads them; unknown keys are noted as faults.
struct Sorted<'s> {
    own: Vec<Entry>,
    limits: Vec<Setting<'s>>,
}

impl<'s> Sorted<'s> {
    /// `fixed` keys are known and not to be set; `refusal` gives the reason and the cure for a key.
    fn of(
        settings: &[Setting<'s>],
        own: &[&str],
        fixed: &[&str],
        refusal: impl Fn(&str) -> Refusal,
        notes: &mut Notes,
    ) -> Self {
        let mut sorted = Self { own: Vec::new(), limits: Vec::new() };
        for &(key, value) in settings {
            let name = kebab(key);
            let path = join("", key);
            if own.contains(&name.as_ref()) {
                sorted.own.push(entry(key, value));
            } else if limits::is_key(key) {
                sorted.limits.push((key, value));
            } else if name == "limits" {
                notes.fault(Place::NOWHERE, &path, "holds several keys", "write each of them, like `iops-total=500`");
            } else if fixed.contains(&name.as_ref()) {
                let (found, cure) = refusal(&name);
                notes.fault(Place::NOWHERE, &path, found, cure);
            } else {
                let hint = notes.hint(&name, own.iter().copied().chain(limits::KEYS));
                let cure = format!("{hint}known keys: {}, and those of limits, like iops-total", own.join(", "));
                notes.fault(Place::NOWHERE, &path, "unknown key", cure);
            }
        }
        sorted
    }

    fn limits_over(&self, in_force: &Limits, notes: &mut Notes) -> Limits {
        let faults_before = notes.faults.len();
        let limits = limits_over(in_force, &self.limits, notes);
        if notes.faults.len() == faults_before { limits } else { *in_force }
    }
}

fn check_name(name: &str, notes: &mut Notes) {
    if let Some(trouble) = name_trouble(name) {
        notes.fault(Place::NOWHERE, "name", trouble, NAME_RULE);
    }
}

fn read_group(item: &Item<'_>, notes: &mut Notes) -> Option<String> {
    let name = item.text(notes, "allowed: the name of a group, or `none`")?;
    (name != NONE).then(|| name.to_owned())
}

fn resize(device: &mut Device, item: &Item<'_>, notes: &mut Notes) {
    let Some(wanted) = backend::read_size(item, notes) else { return };
    if let Some(block_size) = device.block_size {
        backend::check_blocks(wanted, item, block_size, notes);
    }
    match &mut device.backend {
        Backend::File { size, .. } => *size = Some(wanted),
        Backend::Memory { size } | Backend::Null { size } => *size = wanted,
        // No change: the size is that of the disk behind the device, which only the daemon can
        // query.
        Backend::Block { .. } => {}
    }
}

/// The `size` among the settings of a device, in bytes; `None` if it is absent or [`change_device`]
/// refuses it.
pub fn wanted_size(settings: &[Setting<'_>]) -> Option<u64> {
    let &(key, value) = settings.iter().find(|(key, _)| kebab(key) == "size")?;
    let size = entry(key, value);
    backend::read_size(&item(key, &size.node), &mut Notes::default())
}

fn sound<T>(thing: T, notes: Notes) -> Outcome<T> {
    if !notes.faults.is_empty() {
        return Err(notes.faults);
    }
    let warnings = notes.warnings.into_iter().map(|(_, path, kind)| Warning { at: None, path, kind });
    Ok((thing, warnings.collect()))
}

fn map(entries: Vec<Entry>) -> Node {
    Node { place: Place::NOWHERE, value: Value::Map(entries) }
}

fn nested(key: &str, entries: Vec<Entry>) -> Entry {
    Entry { key: key.to_owned(), place: Place::NOWHERE, node: map(entries) }
}

fn item<'n>(path: &str, node: &'n Node) -> Item<'n> {
    Item { path: path.to_owned(), key_place: Place::NOWHERE, node }
}
