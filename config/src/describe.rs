//! A configuration in plain words: the limits of each group and device.
//!
//! The sentence about a burst follows from the arithmetic of a bucket that fills with each request
//! and drains at the average:
//!
//! ```text
//!   no burst rate          holds a tenth of a second of the average
//!   burst length ≤ 1 s     holds max × length, at any speed: a pool
//!   burst length > 1 s     holds max × length, at no more than max a second; full after max × length / (max − avg)
//! ```

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use throttle_core::charge::{Charge, ChargeTable};
use throttle_core::limits::{Limit, LimitKind, Limits, SECOND_NS};

use crate::model::{Backend, Config, Device, Direct, Group, OnCrash, OnStop, ZeroCopy};
use crate::quantity::{Bytes, BytesPerSecond};
use crate::siblings::Siblings;

impl Config {
    /// A line about the daemon's settings, then a paragraph for each group and device, in file
    /// order. Every line ends with a newline.
    pub fn describe(&self) -> String {
        let mut out = String::new();
        describe_daemon(&mut out, self);
        let (siblings, charges) = (Siblings::of(self), inherited_charges(self));
        for group in &self.groups {
            describe_group(&mut out, group, &siblings, &charges[group.name.as_str()]);
        }
        for device in &self.devices {
            describe_device(&mut out, device, &siblings);
        }
        out
    }
}

fn describe_daemon(out: &mut String, config: &Config) {
    if let Some(max) = config.memory_max {
        let (needed, max) = (Bytes(config.memory_bytes()), Bytes(max));
        line(out, format_args!("memory: {needed} for all devices, of at most {max}"));
    }
    if let Some(readers) = &config.readers {
        line(out, format_args!("control: root changes; group {readers} may use the commands that only read"));
    }
}

/// The table that each group inherits; its own table is described by the differences.
fn inherited_charges(config: &Config) -> BTreeMap<&str, ChargeTable> {
    let (mut inherited, mut tables) = (BTreeMap::new(), BTreeMap::<&str, ChargeTable>::new());
    for group in config.groups_parents_first() {
        let parent = group.parent.as_deref().and_then(|parent| tables.get(parent));
        let table = parent.copied().unwrap_or_default();
        inherited.insert(group.name.as_str(), table);
        tables.insert(&group.name, group.charges.unwrap_or(table));
    }
    inherited
}

fn describe_group(out: &mut String, group: &Group, siblings: &Siblings<'_>, inherited: &ChargeTable) {
    let members: Vec<String> = siblings.children(&group.name).map_or_else(Vec::new, |children| {
        let groups = children.groups.iter().map(|name| format!("group {name}"));
        groups.chain(children.devices.iter().map(|name| (*name).to_owned())).collect()
    });
    let members = match members.len() {
        0 => "no devices".to_owned(),
        1 => members[0].clone(),
        2..=8 => format!("{}, all together", members.join(", ")),
        more => format!("{}, … {more} in all, all together", members[..8].join(", ")),
    };
    line(out, format_args!("group {}: {members}", group.name));
    describe_place(out, group.parent.as_deref(), group.weight, siblings, &group.limits);
    describe_limits(out, &group.limits);
    describe_charges(out, &group.charges.unwrap_or(*inherited), inherited);
}

fn describe_device(out: &mut String, device: &Device, siblings: &Siblings<'_>) {
    let Device {
        name,
        id,
        backend,
        group,
        weight,
        limits,
        queues,
        depth,
        block_size,
        read_only,
        on_crash,
        on_stop,
        zero_copy,
        cpus,
        required,
        ..
    } = device;
    let id = id.map_or_else(String::new, |id| format!(" (/dev/ublkb{id})"));
    let mode = if *read_only { "read-only" } else { "read and write" };
    let queues = match queues {
        1 => format!("1 queue of {depth} requests"),
        _ => format!("{queues} queues of {depth} requests each"),
    };
    let blocks = block_size.map_or_else(String::new, |bytes| format!(", blocks of {bytes} bytes"));
    line(out, format_args!("device {name}{id}: {}, {mode}{blocks}, {queues}", backend_words(backend)));
    describe_place(out, group.as_deref(), *weight, siblings, limits);
    describe_limits(out, limits);
    if *on_crash == OnCrash::Fail && !matches!(backend, Backend::Memory { .. }) {
        line(out, format_args!("  requests fail when the daemon dies, and the device ends"));
    }
    if *on_stop == OnStop::Keep {
        line(out, format_args!("  when the daemon is stopped, requests wait until the next one serves them"));
    }
    match zero_copy {
        ZeroCopy::On => {
            line(out, format_args!("  no request is copied between kernel and daemon; the kernel must have that"))
        }
        ZeroCopy::Off if backend.has_zero_copy() => {
            line(out, format_args!("  each request is copied between kernel and daemon"))
        }
        ZeroCopy::Auto | ZeroCopy::Off => {}
    }
    if let Some(cpus) = cpus {
        line(out, format_args!("  served on CPUs {cpus}"));
    }
    if *required && backend.path().is_some() {
        line(out, format_args!("  without its backend the daemon does not start"));
    }
}

/// The place of a device or group: the share of its group that it gets, besides its own limits.
fn describe_place(out: &mut String, above: Option<&str>, weight: u32, siblings: &Siblings<'_>, own: &Limits) {
    let Some(above) = above else {
        if own.is_unlimited() {
            line(out, format_args!("  no limit"));
        }
        return;
    };
    let besides = if own.is_unlimited() { "" } else { ", and besides it" };
    let share = siblings.share(above, weight).map_or_else(String::new, |share| {
        format!(", {share} of it while all in it are busy (weight {weight} of {})", share.of)
    });
    line(out, format_args!("  what group {above} allows{share}{besides}"));
}

/// The charges that differ from the inherited ones.
fn describe_charges(out: &mut String, charges: &ChargeTable, inherited: &ChargeTable) {
    let words = |charge| match charge {
        Charge::Free => "are free: they never wait",
        Charge::Op => "count as an operation without bytes",
        Charge::Bytes => "count as an operation and their bytes",
    };
    for (operations, charge, before) in [
        ("reads", Some(charges.read), Some(inherited.read)),
        ("writes", Some(charges.write), Some(inherited.write)),
        ("write-zeroes", charges.write_zeroes, inherited.write_zeroes),
        ("discards", Some(charges.discard), Some(inherited.discard)),
        ("flushes", Some(charges.flush), Some(inherited.flush)),
    ] {
        if let Some(charge) = charge.filter(|charge| Some(*charge) != before) {
            line(out, format_args!("  {operations} {}", words(charge)));
        }
    }
}

fn backend_words(backend: &Backend) -> String {
    let direct = |direct: &Direct| match direct {
        Direct::Auto => "",
        Direct::On => ", direct I/O",
        Direct::Off => ", through the page cache",
    };
    let shared = if backend.is_shared() { ", shared with other writers" } else { "" };
    match backend {
        Backend::File { path, size, create, direct: d, .. } => {
            let size = size.map_or_else(|| "its whole size".to_owned(), |size| Bytes(size).to_string());
            let create = if *create { ", made if there is none" } else { "" };
            format!("file {}, {size}{create}{}{shared}", path.display(), direct(d))
        }
        Backend::Block { path, direct: d, .. } => format!("block device {}{}{shared}", path.display(), direct(d)),
        Backend::Memory { size } => format!("memory, {}", Bytes(*size)),
        Backend::Null { size } => format!("null, {}", Bytes(*size)),
    }
}

fn describe_limits(out: &mut String, limits: &Limits) {
    for kind in LimitKind::ALL {
        let limit = limits.get(kind);
        if !limit.is_unlimited() {
            let what = match kind {
                LimitKind::BpsTotal | LimitKind::IopsTotal => "reads and writes together",
                LimitKind::BpsRead | LimitKind::IopsRead => "reads",
                LimitKind::BpsWrite | LimitKind::IopsWrite => "writes",
            };
            line(out, format_args!("  {what}: {}", limit_words(limit, kind.is_iops())));
        }
    }
    if limits.iops_size > 0 {
        let size = Bytes(limits.iops_size);
        line(out, format_args!("  a request of more than {size} counts as its size divided by that, in operations"));
    }
}

/// One limit in words. `is_iops` chooses the unit.
fn limit_words(limit: Limit, is_iops: bool) -> String {
    let Limit { avg, max, burst_length_ns } = limit;
    let volume = u128::from(max) * u128::from(burst_length_ns) / u128::from(SECOND_NS);
    let rate = |amount: u64| Amount { amount: amount.into(), is_iops, per_second: true };
    let total = |amount: u128| Amount { amount, is_iops, per_second: false };
    let refill = |volume: u128| Duration(volume * u128::from(SECOND_NS) / u128::from(avg));
    if max == 0 {
        let at_once = match is_iops {
            // A request that finds the bucket exactly full still passes.
            true => format!("{} at once (a tenth of a second, and one)", avg / 10 + 1),
            false => format!("{} at once (a tenth of a second)", total(u128::from(avg) / 10)),
        };
        format!("{}; after a rest {at_once}", rate(avg))
    } else if burst_length_ns <= SECOND_NS {
        format!(
            "{} on average; a pool of {} may go at any speed, and is full again after a rest of {}",
            rate(avg),
            total(volume),
            refill(volume)
        )
    } else if max == avg {
        format!("{}; after a rest {} may be caught up on, at no more than the same rate", rate(avg), total(volume))
    } else {
        let lasts = Duration(volume * u128::from(SECOND_NS) / u128::from(max - avg));
        format!(
            "{} on average; after a rest up to {} for about {lasts} (until a bucket of {}, which drains at the average, \
             is full), all of it again after a rest of {}",
            rate(avg),
            rate(max),
            total(volume),
            refill(volume)
        )
    }
}

fn line(out: &mut String, text: fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{text}");
}

/// Operations, or bytes in both kinds of unit.
struct Amount {
    amount: u128,
    is_iops: bool,
    per_second: bool,
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_iops {
            return write!(f, "{} operations{}", self.amount, if self.per_second { "/s" } else { "" });
        }
        // Volumes are at most 10^15, checked by the core's rules.
        let amount = u64::try_from(self.amount).unwrap_or(u64::MAX);
        if self.per_second { BytesPerSecond(amount).fmt(f) } else { Bytes(amount).fmt(f) }
    }
}

/// Nanoseconds for a reader: shorter durations are shown in finer units.
struct Duration(u128);

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0 / 1_000_000;
        let s = ms / 1000;
        match s {
            0 if ms == 0 => write!(f, "less than 1 ms"),
            0..600 if ms.is_multiple_of(1000) => write!(f, "{s} s"),
            0..600 => write!(f, "{s}.{} s", format!("{:03}", ms % 1000).trim_end_matches('0')),
            600..172_800 => write!(f, "{} h {} min", s / 3600, s % 3600 / 60),
            _ => write!(f, "{} days", s / 86_400),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(avg: u64, max: u64, seconds: f64) -> Limit {
        Limit { avg, max, burst_length_ns: (seconds * 1e9) as u64 }
    }

    #[test]
    fn sentences_follow_from_the_bucket() {
        // The worked examples of the throttling model, and the corners of the three forms.
        for (limit, is_iops, words) in [
            (limit(100, 0, 1.0), true, "100 operations/s; after a rest 11 at once (a tenth of a second, and one)"),
            (
                limit(131_072_000, 0, 1.0),
                false,
                "125 MiB/s (131.1 MB/s); after a rest 12800 KiB (13.1 MB) at once (a tenth of a second)",
            ),
            (
                limit(100, 2000, 1.0),
                true,
                "100 operations/s on average; a pool of 2000 operations may go at any speed, and is full again after a \
                 rest of 20 s",
            ),
            (
                limit(100, 2000, 60.0),
                true,
                "100 operations/s on average; after a rest up to 2000 operations/s for about 63.157 s (until a bucket \
                 of 120000 operations, which drains at the average, is full), all of it again after a rest of 0 h 20 min",
            ),
            (
                limit(10, 10, 2.0),
                true,
                "10 operations/s; after a rest 20 operations may be caught up on, at no more than the same rate",
            ),
        ] {
            assert_eq!(limit_words(limit, is_iops), words);
        }
    }
}
