//! Sizes that a reload takes from the backend: of block devices, and of files without `size` in the
//! configuration.
//!
//! ```text
//!   backend   UPDATE_SIZE     reload
//!   larger    offered         the device takes the size, as part of the plan
//!   larger    not offered     W-SIZE-KEPT
//!   smaller   offered         W-SIZE-KEPT; with --allow-shrink the device takes the size
//!   smaller   not offered     W-SIZE-KEPT
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};
use ublk_throttle_config::{Config, Plan, Resize};

use super::control::Daemon;
use super::reload::{blocking, can_resize};
use super::table::Table;
use crate::error::Outcome;
use crate::log::Warning;

/// Limit of a reload for the `stat` of all backend paths. A path without an answer by then is skipped.
const PATHS_LIMIT: Duration = Duration::from_secs(1);

/// The sizes of the backends and the paths that lead to a different file, by the names of their devices.
#[derive(Debug, Default)]
pub struct Behind {
    /// Bytes.
    sizes: BTreeMap<String, u64>,
    /// Texts of warnings, for the devices with a path that no longer leads to the open file.
    replaced: BTreeMap<String, String>,
    /// Whether the driver has UPDATE_SIZE.
    can_resize: bool,
}

impl Behind {
    /// Reads the size behind every backend's path, and queries the driver for UPDATE_SIZE if a size differs.
    pub async fn look(daemon: &Daemon) -> Outcome<Self> {
        let mut asked = Vec::new();
        for (name, entry) in &daemon.table.borrow().devices {
            let (answer, found) = oneshot::channel();
            entry.device.look_behind(Box::new(move |behind| drop(answer.send(behind))));
            asked.push((name.clone(), entry.device.size(), found));
        }
        let deadline = Instant::now() + PATHS_LIMIT;
        let (mut behind, mut differs) = (Self::default(), false);
        for (name, size, found) in asked {
            match timeout_at(deadline, found).await {
                Ok(Ok(Ok(Some(bytes)))) => {
                    differs |= size != Some(bytes);
                    behind.sizes.insert(name, bytes);
                }
                Ok(Ok(Err(words))) => drop(behind.replaced.insert(name, words)),
                _ => {}
            }
        }
        if differs {
            behind.can_resize = blocking("reload", "what the driver can do", can_resize).await?;
        }
        Ok(behind)
    }

    /// A warning about each device that stays although its path no longer leads to the open file.
    pub fn replaced(&self, plan: &Plan) -> Vec<Warning> {
        let staying = self.replaced.iter().filter(|(name, _)| !plan.device_removals.contains(name));
        staying.map(|(name, words)| Warning::new("W-BACKING-CHANGED", format_args!("device={name} {words}"))).collect()
    }

    /// Adds the sizes that `to` leaves open to `plan`, which leads to `to`. Returns a warning for each
    /// size that is kept.
    pub fn follow(&self, plan: &mut Plan, table: &Table, to: &Config, may_shrink: bool) -> Vec<Warning> {
        let mut kept = Vec::new();
        for device in to.devices.iter().filter(|device| device.backend.size().is_none()) {
            let Some(size) = table.devices.get(&device.name).and_then(|entry| entry.device.size()) else { continue };
            let Some((&behind, path)) = self.sizes.get(&device.name).zip(device.backend.path()) else { continue };
            match decide(size, behind, self.can_resize, may_shrink) {
                Decision::Same => {}
                Decision::Take => plan.resize(to, &device.name, Resize { from: Some(size), to: behind }),
                Decision::Keep(why) => {
                    let (name, path) = (&device.name, path.display());
                    let words = format_args!("device={name} size={size} is kept, {path} has {behind} now: {why}");
                    kept.push(Warning::new("W-SIZE-KEPT", words));
                }
            }
        }
        kept
    }
}

/// The decision about the size of a device.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Same,
    Take,
    /// With the reason and the cure.
    Keep(&'static str),
}

/// `size` of the device and `behind` of its backend, both in bytes.
fn decide(size: u64, behind: u64, can_resize: bool, may_shrink: bool) -> Decision {
    let is_smaller = behind < size;
    if behind == size {
        Decision::Same
    } else if !can_resize {
        Decision::Keep(
            "this kernel cannot resize a live ublk device (Linux 6.16 or newer can); remove the device and add it again",
        )
    } else if is_smaller && !may_shrink {
        Decision::Keep(
            "requests behind that fail; extend it again, or `reload --allow-shrink` makes the device smaller",
        )
    } else {
        Decision::Take
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f80_a_device_takes_a_larger_size_and_a_smaller_one_only_when_told() {
        for (behind, can_resize, may_shrink, expected) in [
            (10, true, false, Ok(Decision::Same)),
            (20, true, false, Ok(Decision::Take)),
            (20, false, false, Err("6.16")),
            (5, true, false, Err("--allow-shrink")),
            (5, true, true, Ok(Decision::Take)),
            (5, false, true, Err("6.16")),
        ] {
            match (decide(10, behind, can_resize, may_shrink), expected) {
                (Decision::Keep(why), Err(word)) => assert!(why.contains(word), "{why}"),
                (found, expected) => assert_eq!(Ok(found), expected, "{behind} {can_resize} {may_shrink}"),
            }
        }
    }
}
