//! `check`: says what a configuration means, without touching anything.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::Number;

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
    limits: BTreeMap<String, Number>,
    devices: Vec<String>,
}

#[derive(Serialize)]
struct Device {
    name: String,
    id: Option<u32>,
    backend: &'static str,
    path: Option<String>,
    group: Option<String>,
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
        limits: limits(&group.limits),
        devices: config.members(&group.name).map(|device| device.name.clone()).collect(),
    });
    let devices = config.devices.iter().map(|device| Device {
        name: device.name.clone(),
        id: device.id,
        backend: device.backend.kind(),
        path: device.backend.path().map(|path| path.display().to_string()),
        group: device.group.clone(),
        limits: limits(&device.limits),
        queues: device.queues,
        depth: device.depth,
        read_only: device.read_only,
    });
    say_json(&Checked { groups: groups.collect(), devices: devices.collect() });
    Ok(())
}
