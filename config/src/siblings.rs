//! The children of each group, and the share of each child while all are busy.
//!
//! ```text
//!   rack ─┬─ tenant-a   weight 200   of 350 in all: 57.1 %
//!         ├─ tenant-b   weight 100                  28.6 %
//!         └─ scratch    weight  50                  14.3 %      (a device beside groups)
//! ```

use std::collections::BTreeMap;
use std::fmt;

use crate::model::Config;

/// The children of every group, groups before devices, each in file order.
#[derive(Debug, Default)]
pub(crate) struct Siblings<'c> {
    of: BTreeMap<&'c str, Children<'c>>,
}

/// The direct children of a group.
#[derive(Debug, Default)]
pub(crate) struct Children<'c> {
    pub(crate) groups: Vec<&'c str>,
    pub(crate) devices: Vec<&'c str>,
    weights: u64,
}

impl<'c> Siblings<'c> {
    pub(crate) fn of(config: &'c Config) -> Self {
        let mut of: BTreeMap<&str, Children<'_>> = BTreeMap::new();
        for group in &config.groups {
            if let Some(parent) = &group.parent {
                let children = of.entry(parent).or_default();
                children.groups.push(&group.name);
                children.weights += u64::from(group.weight);
            }
        }
        for device in &config.devices {
            if let Some(group) = &device.group {
                let children = of.entry(group).or_default();
                children.devices.push(&device.name);
                children.weights += u64::from(device.weight);
            }
        }
        Self { of }
    }

    /// The children of the group; `None` if it has none.
    pub(crate) fn children(&self, group: &str) -> Option<&Children<'c>> {
        self.of.get(group)
    }

    /// The share of `group` for a child of that weight; `None` without siblings.
    pub(crate) fn share(&self, group: &str, weight: u32) -> Option<Share> {
        let children = self.of.get(group)?;
        let has_siblings = children.groups.len() + children.devices.len() > 1;
        has_siblings.then_some(Share { weight: weight.into(), of: children.weights })
    }
}

/// A part of a whole; displayed to a tenth of a percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) weight: u64,
    pub(crate) of: u64,
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let permille = (self.weight * 1000 + self.of / 2) / self.of;
        match (permille / 10, permille % 10) {
            (0, 0) => write!(f, "less than 0.1 %"),
            (percent, 0) => write!(f, "{percent} %"),
            (percent, tenth) => write!(f, "{percent}.{tenth} %"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_told_to_a_tenth_of_a_percent() {
        for (weight, of, words) in [
            (100, 200, "50 %"),
            (200, 350, "57.1 %"),
            (2, 3, "66.7 %"),
            (1, 10_000, "less than 0.1 %"),
            (5, 5, "100 %"),
        ] {
            assert_eq!(Share { weight, of }.to_string(), words);
        }
    }
}
