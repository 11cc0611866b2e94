//! Warnings that need the whole configuration: allowed settings that are probably not meant.
//!
//! ```text
//!   the requests that fit into a device (queues x depth) ─┐ of all devices in a group and below it
//!                                                         ├─► ÷ average = how long the last one waits, at most 30 s
//!   a device's own limits, or those of the group ─────────┘
//! ```
//!
//! [`crate::parse`] checks a whole file; after a command, [`odd_device`] and [`odd_group`] check
//! the device or group that it touched.

use std::collections::BTreeMap;

use throttle_core::limits::{LimitKind, Limits};

use crate::fault::{Warning, WarningKind};
use crate::model::{Config, Device};

/// Guests and file systems abandon a request after 30 s.
const HOLD_MAX_S: u64 = 30;

/// The request size for the hold under a bytes limit: the kernel's default read-ahead.
const REQUEST_BYTES: u64 = 128 << 10;

/// The warnings about a device beside the rest of the configuration.
pub fn odd_device(config: &Config, name: &str) -> Vec<Warning> {
    let Some(device) = config.device(name) else { return Vec::new() };
    let beside = config.devices.iter().find(|other| {
        other.name != device.name
            && device.backend.path().is_some()
            && other.backend.path() == device.backend.path()
            && is_odd_pair(other.read_only, device.read_only, other.backend.is_shared() && device.backend.is_shared())
    });
    let beside = beside.map(|other| WarningKind::SharedPath {
        other: other.name.clone(),
        line: (other.line > 0).then_some(other.line),
    });
    beside.into_iter().chain(device_hold(device)).map(of_command).collect()
}

/// The warnings about a group and all its members.
pub fn odd_group(config: &Config, name: &str) -> Vec<Warning> {
    let Some((group, fit)) = config.group(name).zip(fits(config).get(name).copied()) else { return Vec::new() };
    long_hold(&group.limits, fit).map(of_command).into_iter().collect()
}

fn of_command(kind: WarningKind) -> Warning {
    Warning { at: None, path: String::new(), kind }
}

/// Whether, of two devices on a path, one writes and one only reads, unless both are `shared`.
pub(crate) const fn is_odd_pair(one_reads: bool, other_reads: bool, both_share: bool) -> bool {
    one_reads != other_reads && !both_share
}

/// The hold of a device's own limits, if it is too long.
pub(crate) fn device_hold(device: &Device) -> Option<WarningKind> {
    long_hold(&device.limits, fit(device))
}

/// For each group, the most requests that wait for its limits: all that fit into the devices in it
/// and below it. A group without devices has no entry.
pub(crate) fn fits(config: &Config) -> BTreeMap<&str, u64> {
    let mut fits: BTreeMap<&str, u64> = BTreeMap::new();
    for device in &config.devices {
        if let Some(group) = &device.group {
            *fits.entry(group).or_default() += fit(device);
        }
    }
    for group in config.groups_parents_first().into_iter().rev() {
        if let (Some(parent), Some(&fit)) = (&group.parent, fits.get(group.name.as_str())) {
            *fits.entry(parent).or_default() += fit;
        }
    }
    fits
}

/// The most requests that a device takes at once.
fn fit(device: &Device) -> u64 {
    u64::from(device.queues) * u64::from(device.depth)
}

/// The longest wait of a request when `requests` arrive at once, if it is too long. Bursts do not
/// count: they are used up in such a backlog.
pub(crate) fn long_hold(limits: &Limits, requests: u64) -> Option<WarningKind> {
    let holds = LimitKind::ALL.into_iter().filter_map(|kind| {
        let avg = limits.get(kind).avg;
        let request_bytes = (!kind.is_iops()).then_some(REQUEST_BYTES);
        let seconds = (requests * request_bytes.unwrap_or(1)).checked_div(avg)?;
        (seconds > HOLD_MAX_S).then_some((seconds, request_bytes))
    });
    let (seconds, request_bytes) = holds.max_by_key(|(seconds, _)| *seconds)?;
    Some(WarningKind::LongHold { seconds, requests, request_bytes })
}
