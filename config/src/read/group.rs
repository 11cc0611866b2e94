//! An entry of `groups`.

use throttle_core::share::WEIGHT_DEFAULT;

use crate::fields::{Fields, Item, Notes};
use crate::model::Group;
use crate::read::cross::Cross;
use crate::read::{charge, limits, weight};

pub(crate) const KEYS: [&str; 4] = ["parent", "weight", "limits", "charge"];

/// The value of `group` and `parent` that means no group: `group=none`.
pub(crate) const NONE: &str = "none";

/// Refuses a group called `none`, which `set` could not tell from no group.
pub(crate) fn check_name(name: &str, item: &Item<'_>, notes: &mut Notes) {
    if name == NONE {
        let found = "a group called `none`";
        notes.fault(item.key_place, &item.path, found, "`group=none` means no group; choose another name");
    }
}

/// The group without its charges, which depend on the groups above it, and the entries it gives for
/// them.
pub(super) fn read<'n>(
    name: &'n str,
    item: &Item<'n>,
    cross: &mut Cross<'n>,
    notes: &mut Notes,
) -> Option<(Group, charge::Said)> {
    let mut fields = Fields::of(item, notes)?;
    let limits = fields.take("limits").map_or_else(Default::default, |item| limits::read(&item, notes));
    let parent = fields.take("parent").and_then(|parent| {
        let of = parent.text(notes, "allowed: the name of a group")?;
        cross.add_parent(name, of, parent, notes);
        Some(of.to_owned())
    });
    let weight = weight::read(&mut fields, parent.is_some(), "parent", notes).unwrap_or(WEIGHT_DEFAULT);
    let said = fields.take("charge").map_or_else(Default::default, |item| charge::read(&item, notes));
    fields.finish(notes, &KEYS, &[]);
    let line = item.key_place.line;
    Some((Group { name: name.to_owned(), parent, weight, limits, charges: None, line }, said))
}
