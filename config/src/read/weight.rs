//! `weight`, of a group or a device: its share against the others in the same group.

use throttle_core::share::{WEIGHT_DEFAULT, WEIGHT_MAX};

use crate::fault::WarningKind;
use crate::fields::{Fields, Notes};

/// The weight, if it is given or not. It shares with nobody unless it `has_group` above it, which the key `group_key`
/// says.
pub(super) fn read(fields: &mut Fields<'_>, has_group: bool, group_key: &'static str, notes: &mut Notes) -> u32 {
    if let Some(item) = fields.peek("weight").filter(|_| !has_group) {
        notes.warn(item.key_place, &item.path, WarningKind::WeightAlone { group_key });
    }
    take(fields, notes).unwrap_or(WEIGHT_DEFAULT)
}

/// The weight, if it is given and one.
pub(crate) fn take(fields: &mut Fields<'_>, notes: &mut Notes) -> Option<u32> {
    let weight = fields.take("weight")?.count(notes, 1..=u64::from(WEIGHT_MAX))?;
    u32::try_from(weight).ok()
}
