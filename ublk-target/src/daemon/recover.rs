//! The plan for the devices, groups and levels that an earlier daemon left behind.
//!
//! ```text
//!   state file: NAME, id, nonce ──► a device of the kernel with that id and nonce?
//!       no                          file and link are removed; limits set while it waited for its backend are kept
//!       dead, or not recoverable    STOP, DEL in a helper; made anew if the configuration names it
//!       without a server            taken up, under its id: see [`crate::device`]
//!       with a living server        refused: two servers of a disk would destroy its data
//!   a device of ours in the kernel, without a state file: reported, and left alone
//!   a state file that cannot be read: reported and put aside; its device is one without a state file
//! ```
//!
//! A device that is taken up keeps its group, weight and limits as last set, if the configuration has the same values
//! of these three as when the state file was written. If the configuration has changed one of them, all three are those
//! of the configuration. If the configuration does not name the device, its settings stay, as if `add` had made it.
//! Both sides are compared after parsing, not as text: an older program stored fewer keys.
//!
//! This daemon holds the lock of the state directory, so the daemon that wrote the files is dead.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use ublk_throttle_config::{Config, Device as Description, Group, difference, new_device, parse, write_groups};

use super::levels::{Left, LevelsRecord};
use crate::clock;
use crate::cpus;
use crate::device::{Beginning, LeftBehind, State, Status, traces};
use crate::error::{Class, Failure, Outcome};
use crate::helper::{Answer, Errand, Helper, Target};
use crate::log;
use crate::state_dir::{GroupsRecord, Record, Settings, StateDir, Unread, boot};
use crate::ublk::DeviceInfo;
use crate::ublk::control::Control;

/// Limit for STOP and DEL of all devices that are not taken up. There are no requests to wait for, but on some kernels
/// a queue that was full when its daemon died takes 30 s to fail its requests.
const LIMIT: Duration = Duration::from_secs(35);
/// Delay of the warning `W-SLOW`, and the least interval between the spawns of two helpers for a device.
const TOLD: Duration = Duration::from_secs(1);
/// Interval at which a helper is polled.
const LOOK: Duration = Duration::from_millis(10);

/// The devices, groups and levels at the start of the daemon.
pub struct Plan {
    /// The settings of each group, and whether the configuration file names it.
    pub groups: Vec<(Group, bool)>,
    /// All devices, to be made or taken up.
    pub devices: Vec<Beginning>,
    /// The levels of the buckets.
    pub levels: Left,
}

/// Merges the configuration with the state files and the devices of the kernel. Removes the devices that cannot be
/// taken up (`clear`).
pub fn plan(state_dir: &StateDir, config: &Config) -> Outcome<Plan> {
    let (records, mut unread) = state_dir.records()?;
    let last_set = last_set(state_dir).unwrap_or_else(|file| {
        unread.push(file);
        LastSet::default()
    });
    let levels = levels(state_dir).unwrap_or_else(|file| {
        unread.push(file);
        Left::default()
    });
    let mut control = Control::open_aside()?;
    let devices = control.ours()?;
    // All checks that may fail precede the first change.
    let mut found: Vec<(Record, Description, Option<Remains>)> = Vec::new();
    for record in records {
        let described = match described(&record) {
            Ok(described) => described,
            Err(failure) => {
                unread.push(Unread::of_device(&record.status.name, failure));
                continue;
            }
        };
        let mut its = devices.iter().filter(|(nonce, info)| is_of(&record.status, *nonce, info));
        // If two devices of the kernel match, the record identifies neither: both are left alone and reported.
        let device = its.next().filter(|_| its.next().is_none());
        let left = device.map(|(nonce, info)| look(&record, *nonce, info)).transpose()?;
        found.push((record, described, left));
    }
    // A device that is taken up skips the check of its `cpus`: a CPU that has gone while no daemon ran must not end it.
    let is_left = |device: &&Description| {
        found
            .iter()
            .any(|(record, _, left)| record.status.name == device.name && matches!(left, Some(Remains::Waiting(_))))
    };
    cpus::expect_present(config.devices.iter().filter(|device| !is_left(device)))?;
    for unread in &unread {
        log::warn("W-STATE", state_dir.put_aside(unread));
    }
    for (nonce, info) in &devices {
        let is_known = found.iter().any(|(record, _, left)| left.is_some() && is_of(&record.status, *nonce, info));
        if !is_known && info.living_server().is_none() {
            log::warn(
                "W-UNKNOWN-DEVICE",
                format_args!(
                    "device {} (/dev/ublkb{}) was made by ublk-throttle, and no state file here tells of it; left as it is; \
                     `rublk del -n {}` removes it",
                    info.id, info.id, info.id
                ),
            );
        }
    }
    let mut plan = Plan { groups: Vec::new(), devices: Vec::new(), levels };
    let (mut ending, mut waited) = (Vec::new(), Vec::new());
    for (record, described, left) in found {
        let has_waited = record.status.state == State::Waiting.name() && config.device(&record.status.name).is_some();
        match left {
            Some(Remains::Waiting(left)) => plan.devices.push(taken_up(config, &record, described, left)),
            Some(Remains::Ending(target)) => ending.push((record, Some(target))),
            None if has_waited => waited.push((record, described)),
            None => ending.push((record, None)),
        }
    }
    clear(state_dir, ending);
    let taken_up: BTreeSet<String> = plan.devices.iter().map(|device| device.description.name.clone()).collect();
    for device in config.devices.iter().filter(|device| !taken_up.contains(&device.name)) {
        if let Some(id) = traces::linked(&device.name).filter(|id| is_waiting(&devices, *id)) {
            let waits = traces::waits_for_a_server(&device.name, id);
            log::error(&waits.context(format!("device {:?} is not made", device.name)));
            continue;
        }
        match plan.devices.iter().find(|left| has_path_of(left, device)) {
            Some(left) => log::error(&Failure::new(
                Class::Conflict,
                format!(
                    "device {:?} is not made: its path is that of {:?}, which was left behind and is served; `ublk-throttle \
                     del {}`, then `reload`",
                    device.name, left.description.name, left.description.name
                ),
            )),
            None => plan.devices.push(Beginning {
                description: as_last_set(device, &waited),
                entry: Some(device.clone()),
                left: None,
                levels: None,
                waits: !device.required,
            }),
        }
    }
    plan.groups = groups(config, &last_set, &plan.devices);
    for device in &mut plan.devices {
        device.levels = plan.levels.of_device(&device.description.name);
        let is_there = |name: &String| plan.groups.iter().any(|(group, _)| group.name == *name);
        if device.description.group.as_ref().is_some_and(|group| !is_there(group)) {
            let (name, group) = (&device.description.name, device.description.group.take().unwrap_or_default());
            log::warn("W-STATE", format_args!("device={name} its group {group} is gone; it has its own limits only"));
        }
    }
    Ok(plan)
}

/// The groups as an earlier daemon stored them since the boot; empty if there was none.
#[derive(Default)]
struct LastSet {
    in_force: Vec<Group>,
    /// As the configuration file had them.
    entries: Vec<Group>,
}

impl LastSet {
    fn read(written: &GroupsRecord) -> Outcome<Self> {
        Ok(Self { in_force: read_groups(&written.groups)?, entries: read_groups(&written.entries)? })
    }
}

fn last_set(state_dir: &StateDir) -> Result<LastSet, Unread> {
    let written = state_dir.groups()?.filter(|written| written.boot == boot());
    written.map_or_else(|| Ok(LastSet::default()), |written| LastSet::read(&written).map_err(Unread::of_groups))
}

fn levels(state_dir: &StateDir) -> Result<Left, Unread> {
    let noted: Option<LevelsRecord> = state_dir.levels()?;
    let levels = noted.map_or_else(|| Ok(Left::default()), |noted| noted.left(clock::now()));
    levels.map_err(|why| Unread::of_levels(Failure::new(Class::State, format!("the state file levels.json: {why}"))))
}

/// Whether `devices` contains disk `id`, recoverable and without a server.
fn is_waiting(devices: &[(u32, DeviceInfo)], id: u32) -> bool {
    devices.iter().any(|(_, info)| info.id == id && info.waits_for_a_server())
}

/// A device of the kernel that has a state file and no server.
enum Remains {
    /// Recoverable: taken up.
    Waiting(LeftBehind),
    /// Dead or not recoverable: removed.
    Ending(Target),
}

/// Whether `info` is the device of a state file. Two devices may have equal nonces of 32 bits by chance, but never
/// equal ids at one time. A state file has no id if its daemon was killed while it made the device, or could not store
/// the id. The device then matches if it has the stored depth and at most the stored number of queues.
fn is_of(status: &Status, nonce: u32, info: &DeviceInfo) -> bool {
    let has_shape = || info.depth == status.depth && info.queues <= status.queues;
    status.nonce == Some(nonce) && status.id.map_or_else(has_shape, |id| id == info.id)
}

fn look(record: &Record, nonce: u32, info: &DeviceInfo) -> Outcome<Remains> {
    let target = Target { id: info.id, nonce };
    if let Some(server) = info.living_server() {
        return Err(Failure::new(
            Class::Conflict,
            format!(
                "device {:?} (/dev/ublkb{}), which a daemon of this state directory made, is served by {server}; end that first",
                record.status.name, info.id
            ),
        ));
    }
    if info.waits_for_a_server() {
        return Ok(Remains::Waiting(LeftBehind { target, identity: record.identity }));
    }
    Ok(Remains::Ending(target))
}

/// The settings in a state file, parsed like the settings of `add`.
fn described(record: &Record) -> Outcome<Description> {
    read(&record.status.name, &record.device)
}

fn read(name: &str, settings: &Settings) -> Outcome<Description> {
    let pairs: Vec<(&str, &str)> = settings.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    new_device(name, &pairs).map(|(device, _)| device).map_err(|faults| {
        let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
        Failure::new(
            Class::State,
            format!("the state file {name}.device.json says what no device can be: {}", faults.join("; ")),
        )
    })
}

/// The settings of a device that is taken up. Logs a warning if the configuration does not name it, for changes of the
/// configuration that do not take effect, and for a size above that of the configuration.
fn taken_up(config: &Config, record: &Record, described: Description, left: LeftBehind) -> Beginning {
    let name = &record.status.name;
    let Some(entry) = config.device(name) else {
        log::warn(
            "W-NOT-IN-CONFIG",
            format_args!(
                "device={name} was left behind and is not in the configuration; served on, as if `add` had made it"
            ),
        );
        return Beginning { description: described, entry: None, left: Some(left), levels: None, waits: false };
    };
    let mut description = Description { line: entry.line, ..described };
    let then = entry_then(record);
    if then.as_ref().is_none_or(|then| has_other_place(then, entry)) {
        description.group.clone_from(&entry.group);
        (description.weight, description.limits) = (entry.weight, entry.limits);
    }
    if then.is_none_or(|then| then != Description { line: 0, ..entry.clone() }) {
        let alone = |device: &Description| Config { devices: vec![device.clone()], ..Config::default() };
        let differences = difference(&alone(&in_kernel(&description, &left)), &alone(entry));
        for line in differences.lines().iter().filter(|_| !differences.is_empty()) {
            log::warn("W-CHANGED", format_args!("{line}; it is taken up as it was; `reload` brings what can change"));
        }
    }
    if let Some((size, said)) = larger_size(&description, entry) {
        log::warn(
            "W-SIZE-KEPT",
            format_args!(
                "device={name} size={size} is kept, the configuration says {said}: write {size} there; `reload --allow-shrink` cuts \
                 the device, with what is behind"
            ),
        );
    }
    Beginning { description, entry: Some(entry.clone()), left: Some(left), levels: None, waits: false }
}

/// The settings of a new device of the configuration. If the device waited for its backend under the last daemon, it
/// keeps group, weight and limits as last set, unless the configuration has changed one of them since.
fn as_last_set(entry: &Description, waited: &[(Record, Description)]) -> Description {
    let Some((record, last)) = waited.iter().find(|(record, _)| record.status.name == entry.name) else {
        return entry.clone();
    };
    if entry_then(record).is_none_or(|then| has_other_place(&then, entry)) {
        return entry.clone();
    }
    Description { group: last.group.clone(), weight: last.weight, limits: last.limits, ..entry.clone() }
}

/// The device as the configuration had it when the record was written.
fn entry_then(record: &Record) -> Option<Description> {
    record.entry.as_ref().and_then(|settings| read(&record.status.name, settings).ok())
}

/// The size of a device that is taken up and the size in the configuration, if the device is larger. Both in bytes.
fn larger_size(taken_up: &Description, entry: &Description) -> Option<(u64, u64)> {
    taken_up.backend.size().zip(entry.backend.size()).filter(|(size, said)| size > said)
}

/// Whether two descriptions of a device differ in group, weight or limits: the keys, besides `size`, that `set`
/// changes.
fn has_other_place(one: &Description, other: &Description) -> bool {
    (&one.group, one.weight, one.limits) != (&other.group, other.weight, other.limits)
}

/// The description with the id of the device in the kernel.
fn in_kernel(description: &Description, left: &LeftBehind) -> Description {
    Description { id: Some(left.target.id), ..description.clone() }
}

/// Whether `left` is taken up and has the path of `new`. Two devices that are both `shared`, or both read-only, may
/// have one path.
fn has_path_of(left: &Beginning, new: &Description) -> bool {
    let (old, new) = (&left.description, new);
    left.left.is_some()
        && new.backend.path().is_some()
        && old.backend.path() == new.backend.path()
        && !(old.backend.is_shared() && new.backend.is_shared())
        && !(old.read_only && new.read_only)
}

/// The groups, each with whether the configuration file names it. A group of the file keeps its settings as last set
/// if its entry in the file has not changed since. Groups that a command made stay. A group that the file has dropped
/// stays if a device or a group needs it.
fn groups(config: &Config, last_set: &LastSet, devices: &[Beginning]) -> Vec<(Group, bool)> {
    let LastSet { in_force: before, entries } = last_set;
    let mut groups = Vec::new();
    for group in &config.groups {
        let is_as_it_was = entries.iter().any(|entry| is_same(entry, group));
        let last = before.iter().find(|last| last.name == group.name).filter(|_| is_as_it_was);
        groups.push((Group { line: group.line, ..last.unwrap_or(group).clone() }, true));
    }
    let is_of_file = |name: &str| entries.iter().any(|entry| entry.name == name);
    let mut needed: BTreeSet<String> = devices.iter().filter_map(|device| device.description.group.clone()).collect();
    loop {
        let is_there = |name: &str| groups.iter().any(|(group, _): &(Group, bool)| group.name == name);
        let more = before
            .iter()
            .find(|last| !is_there(&last.name) && (needed.contains(&last.name) || !is_of_file(&last.name)));
        let Some(more) = more.cloned() else { break };
        needed.extend(more.parent.clone());
        groups.push((more, false));
        let parents: Vec<String> = groups.iter().filter_map(|(group, _)| group.parent.clone()).collect();
        needed.extend(parents);
    }
    // Each group was valid in its own file, but the combination may be invalid: a parent may have come below its child.
    let all: Vec<Group> = groups.iter().map(|(group, _)| group.clone()).collect();
    if let Err(errors) = parse("groups.json", write_groups(&all).as_bytes()) {
        log::warn(
            "W-STATE",
            format_args!("groups as last set do not go with the configuration, which counts: {errors}"),
        );
        return config.groups.iter().map(|group| (group.clone(), true)).collect();
    }
    groups
}

fn is_same(one: &Group, other: &Group) -> bool {
    Group { line: 0, ..one.clone() } == Group { line: 0, ..other.clone() }
}

fn read_groups(text: &str) -> Outcome<Vec<Group>> {
    let (config, _) = parse("groups.json", text.as_bytes()).map_err(|errors| {
        Failure::new(Class::State, format!("the state file groups.json says what no groups can be ({errors})"))
    })?;
    Ok(config.groups)
}

/// Removes the devices with a target, and the links and state files of all records. The state file of a device that is
/// still not deleted stays.
fn clear(state_dir: &StateDir, ending: Vec<(Record, Option<Target>)>) {
    let mut sweeps: Vec<(Record, Option<Sweep>)> =
        ending.into_iter().map(|(record, target)| (record, target.map(Sweep::begin))).collect();
    let began = Instant::now();
    for (record, sweep) in &mut sweeps {
        let status = &record.status;
        let is_deleted = sweep.as_mut().is_none_or(|sweep| sweep.finish(&status.name, began));
        if let Some(id) = status.id {
            traces::remove_link(&status.name, id);
        }
        if is_deleted {
            state_dir.forget(&status.name);
            log::info(format_args!("device={} state=swept id={}", status.name, status.id.unwrap_or_default()));
        } else {
            log::warn("W-LEFTOVER", format_args!("device={} of an earlier daemon does not go away", status.name));
        }
    }
}

/// STOP and DEL of a device. If a helper fails or dies, a new helper repeats both commands.
struct Sweep {
    target: Target,
    helper: Option<Helper>,
    tried_at: Instant,
    is_told: bool,
}

impl Sweep {
    fn begin(target: Target) -> Self {
        let helper = Helper::spawn(target, Errand::Delete).ok();
        Self { target, helper, tried_at: Instant::now(), is_told: false }
    }

    /// Waits until the device is deleted, at most until [`LIMIT`] after `began`; false at the limit.
    fn finish(&mut self, name: &str, began: Instant) -> bool {
        while !self.is_done() {
            if began.elapsed() > LIMIT {
                return false;
            }
            if began.elapsed() > TOLD && !std::mem::replace(&mut self.is_told, true) {
                let what = "the start waits for STOP and DEL of what an earlier daemon left";
                log::warn("W-SLOW", format_args!("device={name} {what}, at most {LIMIT:?}"));
            }
            std::thread::sleep(LOOK);
        }
        // After DEL the helper would wait up to 500 ms longer for the last user to close the dead disk.
        self.helper.take().into_iter().for_each(Helper::kill);
        true
    }

    /// Whether a helper has reported the deletion, or has exited with status 0 without a report: the device was already
    /// gone. Replaces a helper that could not be spawned, failed or died.
    fn is_done(&mut self) -> bool {
        let Some(helper) = &mut self.helper else {
            if self.tried_at.elapsed() >= TOLD {
                *self = Self { is_told: self.is_told, ..Self::begin(self.target) };
            }
            return false;
        };
        match (helper.heard(), helper.ended()) {
            (Some(Answer::Failed(_)), _) => self.helper.take().into_iter().for_each(Helper::kill),
            (Some(_), _) => return true,
            (None, Some(status)) if status.success() => return true,
            (None, Some(_)) => self.helper = None,
            (None, None) => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ublk::{DiskState, Owner, Transfer};

    fn config(text: &str) -> Config {
        parse("c.yaml", format!("version: 1\n{text}").as_bytes()).unwrap().0
    }

    fn merged(file: &str, then: &str, in_force: &str, devices: &[Beginning]) -> Vec<(String, u64, bool)> {
        let written = GroupsRecord::new(write_groups(&config(in_force).groups), write_groups(&config(then).groups));
        let groups = groups(&config(file), &LastSet::read(&written).unwrap(), devices);
        let avg = |group: &Group| group.limits.get(throttle_core::limits::LimitKind::IopsTotal).avg;
        groups.iter().map(|(group, is_of_file)| (group.name.clone(), avg(group), *is_of_file)).collect()
    }

    fn group(name: &str, avg: u64, is_of_file: bool) -> (String, u64, bool) {
        (name.to_owned(), avg, is_of_file)
    }

    #[test]
    fn a_group_stays_as_last_set_unless_the_file_has_changed_its_mind() {
        let then = "groups: { g: { limits: { iops: 10 } }, h: { limits: { iops: 10 } } }";
        let in_force = "groups: { g: { limits: { iops: 20 } }, h: { limits: { iops: 20 } } }";
        let now = "groups: { g: { limits: { iops: 10 } }, h: { limits: { iops: 11 } } }";
        assert_eq!(merged(now, then, in_force, &[]), [group("g", 20, true), group("h", 11, true)]);
    }

    #[test]
    fn f66_a_group_with_a_weight_and_no_parent_stays_as_last_set() {
        // The weight was once not stored, so the file seemed to have changed.
        let then = "groups: { g: { weight: 200, limits: { iops: 100 } } }";
        let in_force = "groups: { g: { weight: 200, limits: { iops: 50 } } }";
        assert_eq!(merged(then, then, in_force, &[]), [group("g", 50, true)]);
        let set = "groups: { g: { weight: 500, limits: { iops: 50 } }, p: {} }";
        let file = "groups: { g: { parent: p, limits: { iops: 100 } }, p: {} }";
        assert_eq!(merged(file, file, set, &[]), [group("g", 50, true), group("p", 0, true)]);
    }

    #[test]
    fn a_group_that_a_command_made_stays_and_one_that_the_file_dropped_only_with_its_devices() {
        let then = "groups: { dropped: { limits: { iops: 1 } }, above: { limits: { iops: 2 } } }";
        let in_force = "groups: { dropped: { limits: { iops: 1 }, parent: above }, above: { limits: { iops: 2 } }, \
                        made: { limits: { iops: 3 } } }";
        assert_eq!(merged("groups: {}", then, in_force, &[]), [group("made", 3, false)]);
        let member = read("d", &vec![("null".into(), "512".into()), ("group".into(), "dropped".into())]).unwrap();
        let device = Beginning { description: member, entry: None, left: None, levels: None, waits: false };
        assert_eq!(
            merged("groups: {}", then, in_force, &[device]),
            [group("dropped", 1, false), group("above", 2, false), group("made", 3, false)]
        );
    }

    fn record(device: &Description, entry: Option<&Description>) -> Record {
        let status = serde_json::json!({
            "name": device.name, "state": "live", "id": 3, "node": null, "link": "", "size": 512, "backend": "null",
            "path": null, "group": null, "weight": 100, "limits": {}, "read_only": false, "queues": 1, "depth": 128,
            "held": 0, "held_ms_oldest": 0, "requests": 0, "errors": 0, "pid": 1, "nonce": 7,
        });
        let status = serde_json::from_value(status).unwrap();
        Record::new(status, device.settings(), entry.map(Description::settings), None)
    }

    #[test]
    fn a_device_has_what_was_last_set_unless_the_file_has_changed_its_mind() {
        let device = |avg: u32| {
            let text = format!("devices: {{ d: {{ backend: {{ \"null\": 512 }}, limits: {{ iops: {avg} }} }} }}");
            config(&text).devices.remove(0)
        };
        let left = || LeftBehind { target: Target { id: 3, nonce: 7 }, identity: None };
        let file = |avg: u32| Config { devices: vec![device(avg)], ..Config::default() };
        let written = record(&device(20), Some(&device(10)));
        let in_force = |config: &Config| {
            let begun = taken_up(config, &written, described(&written).unwrap(), left());
            (begun.description.limits, begun.entry.is_some())
        };
        assert_eq!(in_force(&file(10)), (device(20).limits, true));
        assert_eq!(in_force(&file(11)), (device(11).limits, true));
        assert_eq!(in_force(&Config::default()), (device(20).limits, false));
    }

    #[test]
    fn f87_a_device_that_waited_is_made_as_last_set_unless_the_file_has_changed_its_mind() {
        // Only group, weight and limits are kept; the rest of the keys are those of the file.
        let device = |avg: u32, more: &str| {
            let text = format!("devices: {{ d: {{ backend: {{ file: /d }}, limits: {{ iops: {avg} }}{more} }} }}");
            config(&text).devices.remove(0)
        };
        let written = record(&device(20, ""), Some(&device(10, "")));
        let waited = [(written.clone(), described(&written).unwrap())];
        let made = |entry: &Description| as_last_set(entry, &waited);
        assert_eq!(made(&device(10, ", depth: 7")), device(20, ", depth: 7"));
        assert_eq!(made(&device(11, "")), device(11, ""));
        assert_eq!(as_last_set(&device(10, ""), &[]), device(10, ""));
    }

    #[test]
    fn f79_a_device_that_was_made_larger_is_taken_up_so() {
        // The file had 64 MiB at all times: the size in force counts, and the difference is reported.
        let device = |size: &str| {
            config(&format!("devices: {{ d: {{ backend: {{ file: /f, size: {size} }} }} }}")).devices.remove(0)
        };
        let (entry, set) = (device("64MiB"), device("128MiB"));
        let left = LeftBehind { target: Target { id: 3, nonce: 7 }, identity: None };
        let written = record(&set, Some(&entry));
        let file = Config { devices: vec![entry.clone()], ..Config::default() };
        let begun = taken_up(&file, &written, described(&written).unwrap(), left);
        assert_eq!(begun.description.backend.size(), Some(128 << 20));
        assert_eq!(larger_size(&begun.description, &entry), Some((128 << 20, 64 << 20)));
        assert_eq!(larger_size(&entry, &set), None);
    }

    #[test]
    fn f94_a_device_with_the_nonce_of_another_is_not_taken_for_it() {
        // Equal nonces by chance, or with a device of a different state directory: the ids differ.
        let device = config("devices: { d: { backend: { \"null\": 512 } } }").devices.remove(0);
        let mut status = record(&device, None).status;
        let info = |id: u32, depth: u16| DeviceInfo {
            id,
            queues: 1,
            depth,
            request_bytes_max: 1 << 19,
            owner: Owner::ours(7),
            server: -1,
            state: DiskState::Quiesced,
            is_recoverable: true,
            transfer: Transfer::Copied,
        };
        assert!(is_of(&status, 7, &info(3, 128)));
        assert!(!is_of(&status, 7, &info(4, 128)) && !is_of(&status, 8, &info(3, 128)));
        // The daemon was killed before it stored the id.
        status.id = None;
        assert!(is_of(&status, 7, &info(4, 128)));
        assert!(!is_of(&status, 7, &info(4, 64)) && !is_of(&status, 8, &info(4, 128)));
        status.queues = 0;
        assert!(!is_of(&status, 7, &info(4, 128)));
    }

    #[test]
    fn f66_what_was_set_stays_although_the_record_is_of_an_older_program() {
        // An older program stored no weight of a device without a group. A new value of `depth`, which `set` cannot
        // change, leaves the limits as last set.
        let device = |text: &str| {
            config(&format!("devices: {{ d: {{ backend: {{ \"null\": 512 }}, {text} }} }}")).devices.remove(0)
        };
        let (then, set) = (device("limits: { iops: 10 }"), device("limits: { iops: 20 }"));
        let mut written = record(&set, Some(&then));
        written.entry.as_mut().unwrap().retain(|(key, _)| key != "weight");
        for now in ["limits: { iops: 10 }", "limits: { iops: 10 }, depth: 64"] {
            let file = Config { devices: vec![device(now)], ..Config::default() };
            let left = LeftBehind { target: Target { id: 3, nonce: 7 }, identity: None };
            let begun = taken_up(&file, &written, described(&written).unwrap(), left);
            assert_eq!(begun.description.limits, set.limits, "{now}");
        }
    }
}
