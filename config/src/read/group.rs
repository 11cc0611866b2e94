//! One entry of `groups`.

use crate::fields::{Fields, Item, Notes};
use crate::model::Group;
use crate::read::limits;

const KEYS: [&str; 2] = ["limits", "weight"];
const KEYS_LATER: [&str; 2] = ["parent", "charge"];

/// What `weight` means for everyone, and the only value while it changes nothing.
const WEIGHT_DEFAULT: u64 = 100;

pub(super) fn read(name: &str, item: &Item<'_>, notes: &mut Notes) -> Option<Group> {
    let mut fields = Fields::of(item, notes)?;
    let limits = fields.take("limits").map_or_else(Default::default, |item| limits::read(&item, notes));
    if let Some(parent) = fields.take("parent") {
        parent.not_supported_yet(notes, "remove it; in this version a group has no other above it");
    }
    if let Some(weight) = fields.take("weight") {
        let value = weight.count(notes, 1..=10_000);
        if value.is_some_and(|value| value != WEIGHT_DEFAULT) {
            weight.not_supported_yet(notes, "remove it, or write 100; in this version all members count the same");
        }
    }
    if let Some(charge) = fields.take("charge") {
        charge.not_supported_yet(notes, "remove it; in this version the costs of operations are fixed");
    }
    fields.finish(notes, &KEYS, &KEYS_LATER);
    Some(Group { name: name.to_owned(), limits, line: item.key_place.line })
}
