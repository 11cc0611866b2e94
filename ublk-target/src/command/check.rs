//! `check`: says what a configuration means, without touching anything.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::Number;
use throttle_core::charge::{Charge, ChargeTable};

use super::{load, say, say_json};
use crate::device::limits;
use crate::error::Outcome;

#[derive(Serialize)]
struct Checked {
    groups: Vec<Group>,
    devices: Vec<Device>,
}

#[derive(Serialize)]
struct Group {
    name: String,
    parent: Option<String>,
    weight: u32,
    limits: BTreeMap<String, Number>,
    /// What operations count as in it, if it says so; all of them, with what it leaves to its parent.
    charge: Option<BTreeMap<&'static str, &'static str>>,
    devices: Vec<String>,
}

#[derive(Serialize)]
struct Device {
    name: String,
    id: Option<u32>,
    backend: &'static str,
    path: Option<String>,
    group: Option<String>,
    weight: u32,
    limits: BTreeMap<String, Number>,
    queues: u16,
    depth: u16,
    read_only: bool,
}

/// Checks the configuration at `path`.
pub fn run(path: &Path, json: bool) -> Outcome<()> {
    let config = load(path)?;
    if !json {
        say(config.describe().trim_end());
        return Ok(());
    }
    let groups = config.groups.iter().map(|group| Group {
        name: group.name.clone(),
        parent: group.parent.clone(),
        weight: group.weight,
        limits: limits(&group.limits),
        charge: group.charges.as_ref().map(charge),
        devices: config.members(&group.name).map(|device| device.name.clone()).collect(),
    });
    let devices = config.devices.iter().map(|device| Device {
        name: device.name.clone(),
        id: device.id,
        backend: device.backend.kind(),
        path: device.backend.path().map(|path| path.display().to_string()),
        group: device.group.clone(),
        weight: device.weight,
        limits: limits(&device.limits),
        queues: device.queues,
        depth: device.depth,
        read_only: device.read_only,
    });
    say_json(&Checked { groups: groups.collect(), devices: devices.collect() });
    Ok(())
}

/// A table in the configuration's words. Write-zeroes are left out where they depend on the backend.
fn charge(table: &ChargeTable) -> BTreeMap<&'static str, &'static str> {
    let word = |charge| match charge {
        Charge::Free => "free",
        Charge::Op => "op",
        Charge::Bytes => "bytes",
    };
    let always = [("read", table.read), ("write", table.write), ("discard", table.discard), ("flush", table.flush)];
    let zeroes = table.write_zeroes.map(|charge| ("write-zeroes", charge));
    always.into_iter().chain(zeroes).map(|(operation, charge)| (operation, word(charge))).collect()
}
