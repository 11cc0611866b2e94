//! The groups of a configuration, as the throttle has them.
//!
//! ```text
//!   in the file      tenant, rack, disk        any order
//!   made             rack, tenant, disk        parents first: a child names the id of its parent
//! ```

use std::collections::BTreeMap;

use throttle_core::group::GroupOptions;
use throttle_core::ids::GroupId;
use throttle_core::throttle::Throttle;
use throttle_core::time::Time;
use ublk_throttle_config::Config;

use crate::error::{Class, Failure, Outcome};

/// Makes every group of the configuration; their ids by name.
pub fn make(config: &Config, throttle: &Throttle, now: Time) -> Outcome<BTreeMap<String, GroupId>> {
    let mut ids: BTreeMap<String, GroupId> = BTreeMap::new();
    for group in config.groups_parents_first() {
        let options = GroupOptions {
            limits: group.limits,
            parent: group.parent.as_ref().map(|parent| ids[parent]),
            weight: group.weight,
            charges: group.charges,
        };
        let id = throttle
            .add_group(&options, now)
            .map_err(|refused| Failure::new(Class::Config, format!("groups.{}: {refused}", group.name)))?;
        ids.insert(group.name.clone(), id);
    }
    Ok(ids)
}
