//! `weight`, of a group or a device: its share against the others in the same group.

use throttle_core::share::WEIGHT_MAX;

use crate::fault::WarningKind;
use crate::fields::{Fields, Notes};

/// The weight, if it is given and one. It shares with nobody unless it `has_group` above it, which the key `group_key` says.
pub(crate) fn read(
    fields: &mut Fields<'_>,
    has_group: bool,
    group_key: &'static str,
    notes: &mut Notes,
) -> Option<u32> {
    let item = fields.take("weight")?;
    if !has_group {
        notes.warn(item.key_place, &item.path, WarningKind::WeightAlone { group_key });
    }
    u32::try_from(item.count(notes, 1..=u64::from(WEIGHT_MAX))?).ok()
}
