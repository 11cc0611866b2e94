//! `check`: describes a configuration and changes nothing.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::{Number, Value, json};
use throttle_core::charge::{Charge, ChargeTable};
use ublk_throttle_config::{Backend, Config, Device, Direct, Group};

use super::{load, say, say_json};
use crate::device::limits;
use crate::error::Outcome;

/// A configuration under its own keys, with the defaults filled in.
#[derive(Serialize)]
struct Checked {
    limits: Bounds,
    /// Bytes of the buffers of all devices.
    buffer_bytes: u64,
    /// `buffer_bytes` plus the bytes of all memory devices; at most `limits.memory`.
    memory_bytes: u64,
    control: Control,
    groups: Vec<GroupFacts>,
    devices: Vec<DeviceFacts>,
}

#[derive(Serialize)]
struct Bounds {
    memory: Option<u64>,
}

#[derive(Serialize)]
struct Control {
    group: Option<String>,
}

#[derive(Serialize)]
struct GroupFacts {
    name: String,
    parent: Option<String>,
    weight: u32,
    limits: BTreeMap<String, Number>,
    /// The charge of each operation in the group, including those that its own table leaves to the
    /// parent. Absent if the group has no table.
    charge: Option<BTreeMap<&'static str, &'static str>>,
    devices: Vec<String>,
    line: u32,
}

#[derive(Serialize)]
struct DeviceFacts {
    name: String,
    id: Option<u32>,
    backend: &'static str,
    path: Option<String>,
    /// Absent if the size is that of the file or the block device.
    size: Option<u64>,
    create: bool,
    /// True, false, or `auto`.
    direct: Value,
    shared: bool,
    group: Option<String>,
    weight: u32,
    limits: BTreeMap<String, Number>,
    queues: u16,
    depth: u16,
    block_size: Option<u32>,
    read_only: bool,
    on_crash: &'static str,
    on_stop: &'static str,
    zero_copy: &'static str,
    /// Absent for all CPUs.
    cpus: Option<String>,
    required: bool,
    line: u32,
}

/// Checks the configuration at `path`.
pub fn run(path: &Path, json: bool) -> Outcome<()> {
    let config = load(path)?;
    if json {
        say_json(&Checked::of(&config));
    } else {
        say(config.describe().trim_end());
    }
    Ok(())
}

// Every destructuring names all fields, without `..`: a new key of the model does not compile until
// it appears here.

impl Checked {
    fn of(config: &Config) -> Self {
        let Config { groups, devices, memory_max, readers } = config;
        let members = |group: &str| config.members(group).map(|device| device.name.clone()).collect();
        Self {
            limits: Bounds { memory: *memory_max },
            buffer_bytes: config.buffer_bytes(),
            memory_bytes: config.memory_bytes(),
            control: Control { group: readers.clone() },
            groups: groups.iter().map(|group| GroupFacts::of(group, members(&group.name))).collect(),
            devices: devices.iter().map(DeviceFacts::of).collect(),
        }
    }
}

impl GroupFacts {
    fn of(group: &Group, devices: Vec<String>) -> Self {
        let Group { name, parent, weight, limits: own, charges, line } = group;
        Self {
            name: name.clone(),
            parent: parent.clone(),
            weight: *weight,
            limits: limits(own),
            charge: charges.as_ref().map(charge),
            devices,
            line: *line,
        }
    }
}

impl DeviceFacts {
    fn of(device: &Device) -> Self {
        let Device {
            name,
            id,
            backend,
            group,
            weight,
            limits: own,
            queues,
            depth,
            block_size,
            read_only,
            on_crash,
            on_stop,
            zero_copy,
            cpus,
            required,
            line,
        } = device;
        let (create, direct, shared) = match backend {
            Backend::File { path: _, size: _, create, direct, shared } => (*create, truth(*direct), *shared),
            Backend::Block { path: _, direct, shared } => (false, truth(*direct), *shared),
            Backend::Memory { size: _ } | Backend::Null { size: _ } => (false, json!(false), false),
        };
        Self {
            name: name.clone(),
            id: *id,
            backend: backend.kind(),
            path: backend.path().map(|path| path.display().to_string()),
            size: backend.size(),
            create,
            direct,
            shared,
            group: group.clone(),
            weight: *weight,
            limits: limits(own),
            queues: *queues,
            depth: *depth,
            block_size: *block_size,
            read_only: *read_only,
            on_crash: on_crash.word(),
            on_stop: on_stop.word(),
            zero_copy: zero_copy.word(),
            cpus: cpus.map(|cpus| cpus.to_string()),
            required: *required,
            line: *line,
        }
    }
}

/// `direct` as in the configuration.
fn truth(direct: Direct) -> Value {
    match direct {
        Direct::Auto => json!(Direct::Auto.word()),
        direct => json!(direct == Direct::On),
    }
}

/// A charge table in the words of the configuration. Write-zeroes are left out if their charge
/// depends on the backend.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_of_the_reference_is_in_the_facts() {
        // The keys of `file-backed` are taken from the text of the file, dashes as underscores.
        let text = include_bytes!("../../../config/examples/reference.yaml");
        let (config, _) = ublk_throttle_config::parse("/etc/reference.yaml", text).unwrap();
        let facts = json!(Checked::of(&config));
        let text = std::str::from_utf8(text).unwrap();
        let device = text.split_once("  file-backed:\n").unwrap().1.split_once("  block-backed:").unwrap().0;
        let keys = device.lines().filter_map(|line| line.trim().split_once(':')).map(|(key, _)| key.replace('-', "_"));
        for key in keys.filter(|key| key != "backend" && key != "file") {
            assert!(!facts["devices"][0][&key].is_null(), "{key}: {}", facts["devices"][0]);
        }
        assert_eq!(
            facts["devices"][0],
            json!({
                "name": "file-backed", "id": 7, "backend": "file", "path": "/srv/reference.img", "size": 20u64 << 30,
                "create": true, "direct": "auto", "shared": false, "group": "part", "weight": 100,
                "limits": { "iops-total": 500 }, "queues": 2, "depth": 64, "block_size": 4096, "read_only": false,
                "on_crash": "requeue", "on_stop": "remove", "zero_copy": "auto", "cpus": "0-3,8", "required": false,
                "line": facts["devices"][0]["line"],
            })
        );
        assert_eq!(facts["limits"], json!({ "memory": 1 << 30 }));
        // Four times 128 requests of 512 KiB.
        assert_eq!(facts["buffer_bytes"], json!(256 << 20));
        assert_eq!(facts["memory_bytes"], json!(768 << 20));
        assert_eq!(facts["control"], json!({ "group": "disk" }));
        assert_eq!(facts["groups"][1]["parent"], json!("everything"));
        assert_eq!(facts["groups"][0]["charge"]["write-zeroes"], json!("op"));
    }
}
