//! `stats`: counts and times of devices and groups, and the credit left in their limits.
//!
//! The counts of a device only grow; a client takes the difference of two reports for a rate. The
//! counts of a group are sums over the devices that are in it or below it now, so they fall when a
//! device leaves.

use serde::{Deserialize, Serialize};
use throttle_core::limiter::Credit;
use throttle_core::throttle::Throttle;

use super::table::{Entry, Placed, Table};
use crate::clock;
use crate::device::DeviceStats;
use crate::error::{Class, Failure, Outcome};

/// Devices and groups at one instant.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The instant, in nanoseconds of `CLOCK_MONOTONIC`.
    pub at_ns: u64,
    /// The devices, in the order of their names.
    pub devices: Vec<DeviceReport>,
    /// The groups.
    pub groups: Vec<GroupReport>,
    /// Lines of the log that stderr did not take, since the start of the daemon.
    pub log_lines_lost: u64,
}

/// The report on one device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Its name.
    pub name: String,
    /// Distinguishes the device from earlier and later devices of its name.
    pub nonce: Option<u32>,
    /// Requests that a limit holds at the moment.
    pub held: u32,
    /// Its counts and times.
    pub stats: DeviceStats,
    /// The credit left in each of its own limits.
    pub credit: Vec<CreditReport>,
}

/// The report on one group.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupReport {
    /// Its name.
    pub name: String,
    /// The devices in it and below it.
    pub devices: Vec<String>,
    /// Requests of these devices that a limit holds at the moment.
    pub held: u32,
    /// The sums over these devices.
    pub stats: DeviceStats,
    /// The credit left in each limit of the group.
    pub credit: Vec<CreditReport>,
}

/// The credit left in one limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreditReport {
    /// Its key in the configuration.
    pub limit: String,
    /// Operations or bytes that pass without a wait.
    pub left: u64,
    /// The largest possible value of `left`.
    pub capacity: u64,
    /// Operations or bytes above the capacity, for which later requests wait.
    pub debt: u64,
}

impl From<Credit> for CreditReport {
    fn from(credit: Credit) -> Self {
        let Credit { kind, left, capacity, debt } = credit;
        Self { limit: kind.name().to_owned(), left, capacity, debt }
    }
}

/// The report on all devices and groups.
pub fn report(table: &Table, throttle: &Throttle) -> Report {
    let entries: Vec<&Entry> = table.devices.values().collect();
    let groups: Vec<&Placed> = table.groups.iter().collect();
    tell(table, throttle, &entries, &groups)
}

/// The report on one device, without its groups, or on one group and the devices in it or below it.
pub fn report_on(table: &Table, throttle: &Throttle, name: &str) -> Outcome<Report> {
    if let Ok(entry) = table.device(name) {
        return Ok(tell(table, throttle, &[entry], &[]));
    }
    let Ok(group) = table.group(name) else {
        return Err(Failure::new(Class::NoDevice, format!("no device or group {name:?} here; `list` shows all")));
    };
    let is_in = |entry: &&Entry| {
        let own = entry.device.standing().group.clone();
        table.places_above(own.as_deref()).into_iter().any(|above| table.groups[above].id == group.id)
    };
    let entries: Vec<&Entry> = table.devices.values().filter(is_in).collect();
    Ok(tell(table, throttle, &entries, &[group]))
}

fn tell(table: &Table, throttle: &Throttle, entries: &[&Entry], groups: &[&Placed]) -> Report {
    let now = clock::now();
    let mut devices = Vec::new();
    let group = |placed: &&Placed| GroupReport {
        name: placed.group.name.clone(),
        devices: Vec::new(),
        held: 0,
        stats: DeviceStats::default(),
        credit: throttle.group_credit(placed.id, now).into_iter().map(CreditReport::from).collect(),
    };
    let mut groups: Vec<GroupReport> = groups.iter().map(group).collect();
    for entry in entries {
        let stats = entry.device.stats();
        let (group, held, credit) = {
            let standing = entry.device.standing();
            // Under the lock of `standing`: without it, the member might leave the throttle in
            // between.
            let held = standing.member.map(|member| throttle.held(member)).unwrap_or_default();
            let credit = standing.member.map(|member| throttle.member_credit(member, now)).unwrap_or_default();
            (standing.group.clone(), held.count, credit)
        };
        for above in table.places_above(group.as_deref()) {
            let name = &table.groups[above].group.name;
            let Some(group) = groups.iter_mut().find(|group| group.name == *name) else { continue };
            group.devices.push(entry.device.name().to_owned());
            group.held += held;
            group.stats.add(&stats);
        }
        devices.push(DeviceReport {
            name: entry.device.name().to_owned(),
            nonce: entry.device.status().nonce,
            held,
            stats,
            credit: credit.into_iter().map(CreditReport::from).collect(),
        });
    }
    Report { at_ns: now.as_nanos(), devices, groups, log_lines_lost: crate::log::lost() }
}
