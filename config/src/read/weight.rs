//! `weight`, of a group or a device: its share among the members of its group.

use throttle_core::share::WEIGHT_MAX;

use crate::fault::WarningKind;
use crate::fields::{Fields, Notes};

/// The weight, if it is given and valid. Warns unless the entry `has_group`, named by the key
/// `group_key`: without a group a weight has no effect.
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
