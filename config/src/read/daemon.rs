//! `limits` and `control` at the top of a file: the daemon's memory bound, and the group that may
//! query it.

use crate::fault::shown;
use crate::fields::{Fields, Item, Notes};
use crate::model::{Config, Device};
use crate::quantity::{self, Bytes, Unit};

/// The longest name that the tools for groups accept; Linux's `LOGIN_NAME_MAX` is larger.
const GROUP_NAME_MAX: usize = 32;

/// The memory bound of all devices together, and the item that gives it.
pub(super) fn memory_max<'n>(item: &Item<'n>, notes: &mut Notes) -> Option<(u64, Item<'n>)> {
    const ALLOWED: &str = "allowed: a size like 4GiB, above 0; leave it out for no bound";
    let mut fields = Fields::of(item, notes)?;
    let memory = fields.take("memory");
    fields.finish(notes, &["memory"], &[]);
    let memory = memory?;
    let bytes = memory.amount(notes, ALLOWED, |text| quantity::parse(text, Unit::Bytes))?;
    if bytes == 0 {
        memory.fault(notes, "a bound of 0", ALLOWED);
        return None;
    }
    Some((bytes, memory))
}

/// Refuses devices that together take more than `bytes_max`: their buffers, and the contents of
/// full memory devices.
pub(super) fn check_memory(config: &Config, bytes_max: u64, item: &Item<'_>, notes: &mut Notes) {
    let (needed, buffers) = (config.memory_bytes(), config.buffer_bytes());
    let Some(largest) = config.devices.iter().max_by_key(|device| device.memory_bytes()) else { return };
    if needed > bytes_max {
        let Device { name, line, queues, depth, .. } = largest;
        let of_memory = match needed - buffers {
            0 => String::new(),
            bytes => format!(", devices of memory {}", Bytes(bytes)),
        };
        let found = format!(
            "all devices take {} (buffers of queues x depth x 512 KiB each {}{of_memory}), which is above {}",
            Bytes(needed),
            Bytes(buffers),
            Bytes(bytes_max)
        );
        let name = shown(name, 64);
        let cure = if largest.own_bytes() > largest.buffer_bytes() {
            format!("make a device of memory smaller, first of {name} (line {line}): {}", Bytes(largest.own_bytes()))
        } else {
            format!(
                "lower depth or queues, first of {name} (line {line}): {queues} x {depth} requests take {}",
                Bytes(largest.buffer_bytes())
            )
        };
        item.fault(notes, found, format!("{cure}; or raise this"));
    }
}

/// The Unix group that may use the reading commands. Whether the group exists is for the running
/// system to check.
pub(super) fn readers(item: &Item<'_>, notes: &mut Notes) -> Option<String> {
    const ALLOWED: &str = "allowed: a group's name, as in /etc/group, or its number";
    let mut fields = Fields::of(item, notes)?;
    let group = fields.take("group");
    fields.finish(notes, &["group"], &[]);
    let group = group?;
    let name = group.text(notes, ALLOWED)?;
    if !is_group(name) {
        group.fault(notes, format!("{:?} names no Unix group", shown(name, 40)), ALLOWED);
        return None;
    }
    Some(name.to_owned())
}

/// A number below 2^32 - 1 (which the kernel reads as "no id"), or a name that `groupadd` accepts.
fn is_group(name: &str) -> bool {
    if name.bytes().all(|byte| byte.is_ascii_digit()) {
        return name.parse::<u32>().is_ok_and(|number| number < u32::MAX);
    }
    let plain = name.strip_suffix('$').unwrap_or(name);
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    name.len() <= GROUP_NAME_MAX && plain.chars().all(is_plain) && plain.starts_with(|c: char| c != '-' && c != '.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unix_group_is_a_name_or_a_number() {
        // Names that groupadd and the kernel accept, on both sides of the borders.
        for name in ["disk", "_ublk", "a.b-c", "machine$", "0", "1000", "4294967294", &"x".repeat(32)] {
            assert!(is_group(name), "{name}");
        }
        for name in ["-disk", ".disk", "a b", "a:b", "$", "4294967295", "99999999999", &"x".repeat(33)] {
            assert!(!is_group(name), "{name}");
        }
    }
}
