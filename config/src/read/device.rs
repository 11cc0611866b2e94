//! An entry of `devices`.

use std::path::Path;

use throttle_core::share::WEIGHT_DEFAULT;

use crate::fields::{Fields, Item, Leftovers, Notes};
use crate::model::{Backend, Device, ID_MAX, OnCrash, OnStop, ZeroCopy};
use crate::quantity;
use crate::read::cross::{Cross, Owner};
use crate::read::{Defaults, backend, limits, weight};
use crate::yaml::Value;

pub(crate) const KEYS: [&str; 14] = [
    "backend",
    "group",
    "weight",
    "limits",
    "queues",
    "depth",
    "id",
    "block-size",
    "read-only",
    "on-crash",
    "on-stop",
    "zero-copy",
    "cpus",
    "required",
];

/// The logical block sizes of disks.
const BLOCK_SIZES: [(&str, u32); 2] = [("512", 512), ("4096", 4096)];

pub(super) fn read<'n>(
    name: &'n str,
    item: &Item<'n>,
    base: Option<&Path>,
    defaults: &Defaults,
    cross: &mut Cross<'n>,
    notes: &mut Notes,
) -> Option<Device> {
    let mut fields = Fields::of(item, notes)?;
    let mut own = *defaults;
    let [on_crash_item, on_stop_item, zero_copy_item] = own.take_from(&mut fields, notes);
    let limits = fields.take("limits").map_or_else(Default::default, |item| limits::read(&item, notes));
    let id = fields.take("id").filter(|id| !id.is_word("auto")).and_then(|id| {
        let number = u32::try_from(id.count_or(notes, 0..=u64::from(ID_MAX), ", or `auto`")?).ok()?;
        cross.add_id(name, number, &id, notes);
        Some(number)
    });
    let group = fields.take("group").and_then(|group| {
        let of = group.text(notes, "allowed: the name of a group")?;
        cross.check_group(of, &group, notes);
        Some(of.to_owned())
    });
    let weight = weight::read(&mut fields, group.is_some(), "group", notes).unwrap_or(WEIGHT_DEFAULT);
    let read_only = fields.take("read-only").and_then(|item| item.bool(notes)).unwrap_or(false);
    let block_size = fields.take("block-size").and_then(|item| read_block_size(&item, notes));
    let backend_item = fields.take("backend");
    let leftovers = fields.finish(notes, &KEYS, &[]);
    let Some(backend_item) = backend_item else {
        if leftovers == Leftovers::Some {
            return None;
        }
        let cure = "add one, like `backend: { file: /srv/vol1.img }`, or block, memory or null";
        notes.fault(item.key_place, &item.path, "no backend", cure);
        return None;
    };
    let description = backend::read(&backend_item, base, read_only, notes)?;
    if let (Some((size, item)), Some(block_size)) = (&description.size, block_size) {
        backend::check_blocks(*size, item, block_size, notes);
    }
    let backend = description.backend;
    if let Some(path) = backend.path() {
        let key = format!("{}.{}", backend_item.path, backend.kind());
        let owner = Owner { device: name, read_only, shared: backend.is_shared(), place: description.place };
        cross.add_path(path, owner, &key, notes);
    }
    let Defaults { queues, depth, on_crash, on_stop, zero_copy, cpus, required } = own;
    let on_crash = match backend {
        Backend::Memory { .. } => {
            if let Some(item) = on_crash_item.filter(|_| on_crash == Some(OnCrash::Requeue)) {
                item.fault(notes, "`requeue` of a memory backend, whose bytes die with the daemon", "allowed: fail");
            }
            OnCrash::Fail
        }
        _ => on_crash.unwrap_or_default(),
    };
    let on_stop = match on_crash {
        OnCrash::Fail => {
            if let Some(item) = on_stop_item.filter(|_| on_stop == Some(OnStop::Keep)) {
                item.fault(notes, "`keep` of a device that ends with its daemon (`on-crash: fail`)", "allowed: remove");
            }
            OnStop::Remove
        }
        OnCrash::Requeue => on_stop.unwrap_or_default(),
    };
    let zero_copy = match backend.has_zero_copy() {
        true => zero_copy.unwrap_or_default(),
        false => {
            if let Some(item) = zero_copy_item.filter(|_| zero_copy == Some(ZeroCopy::On)) {
                let found = format!("`on` of a {} backend, which takes no pages of the kernel", backend.kind());
                item.fault(notes, found, "allowed: auto, off; file, block and memory backends have zero copy");
            }
            ZeroCopy::Off
        }
    };
    let line = item.key_place.line;
    let name = name.to_owned();
    Some(Device {
        name,
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
        line,
    })
}

/// Reads 512 or 4096, in any spelling of a number.
fn read_block_size(item: &Item<'_>, notes: &mut Notes) -> Option<u32> {
    let number = match &item.node.value {
        Value::Text { text, .. } => quantity::parse_count(text).ok(),
        _ => None,
    };
    let known = BLOCK_SIZES.iter().find(|(_, bytes)| number == Some(u64::from(*bytes)));
    known.map(|(_, bytes)| *bytes).or_else(|| item.word(notes, &BLOCK_SIZES, &[]))
}

/// A device outside any file: its path is absolute, and the caller checks its group.
pub(crate) fn read_alone(name: &str, item: &Item<'_>, notes: &mut Notes) -> Option<Device> {
    let mut cross = Cross::default();
    if let Some(group) = Fields::of(item, &mut Notes::default())?.take("group")
        && let Value::Text { text, .. } = &group.node.value
    {
        cross.add_group(text, &group);
    }
    read(name, item, None, &Defaults::default(), &mut cross, notes)
}
