//! `set`: changes limits, weights, places and sizes while requests wait.
//!
//! ```text
//!   settings in force + those of the command ─► parsed like a file ─► one Throttle::apply ─► state files
//! ```
//!
//! A command takes effect as a whole or not at all. The kernel may refuse a size after the throttle
//! has accepted the rest of a command, so a size needs a command of its own.

use std::rc::Rc;
use std::time::Duration;

use serde_json::{Value, json};
use throttle_core::group::{Change, GroupOptions};
use throttle_core::ids::{GroupId, MemberId};
use throttle_core::tree::BadParent;
use tokio::sync::oneshot;
use tokio::time::timeout;
use ublk_throttle_config::{
    Device as Description, Fault, Group, Warning, change_device, change_group, new_group, wanted_size,
};

use super::add::refused;
use super::claims::Name;
use super::control::Daemon;
use super::odd;
use super::table::{Origin, Placed, Table};
use crate::clock;
use crate::device::set_size;
use crate::error::{Class, Failure, Outcome};
use crate::log;
use crate::settings::Settings;

/// Changes a group, or makes it if `create` is set. Returns its settings in force, with warnings.
pub fn group(daemon: &Rc<Daemon>, name: &str, settings: &Settings, create: bool) -> Outcome<Value> {
    let mut table = daemon.table.borrow_mut();
    let (given, word) = if create && table.group(name).is_err() {
        (make_group(daemon, &mut table, name, settings)?, "added")
    } else {
        (change_a_group(daemon, &mut table, name, settings)?, "changed")
    };
    daemon.keep_groups(&table);
    log::info(format!("group={name} state={word} {}", words(settings)).trim_end());
    let odd = odd::group(&table.whole(), name, given, settings.get("parent").is_some());
    let listing = table.listing();
    Ok(odd::tell(&odd, json!(listing.groups.iter().find(|group| group.name == name))))
}

fn make_group(daemon: &Daemon, table: &mut Table, name: &str, settings: &Settings) -> Outcome<Vec<Warning>> {
    let (new, given) = new_group(name, &settings.pairs()).map_err(|faults| refused_group(name, &faults))?;
    daemon.claims.expect_free(&names(Name::group(name), new.parent.as_deref()))?;
    let options =
        GroupOptions { limits: new.limits, parent: place(table, &new)?, weight: new.weight, charges: new.charges };
    let id = daemon.throttle.add_group(&options, clock::now()).map_err(|cause| misplaced(name, cause))?;
    table.groups.push(Placed { group: new, id, origin: Origin::Command, entry: None });
    Ok(given)
}

fn change_a_group(daemon: &Daemon, table: &mut Table, name: &str, settings: &Settings) -> Outcome<Vec<Warning>> {
    expect_some(settings)?;
    let placed = table.group(name)?;
    let (id, before) = (placed.id, &placed.group);
    let (after, given) = change_group(before, &settings.pairs()).map_err(|faults| refused_group(name, &faults))?;
    daemon.claims.expect_free(&names(Name::group(name), after.parent.as_deref()))?;
    let changes = group_changes(id, before, &after, place(table, &after)?);
    daemon.throttle.apply(&changes, clock::now()).map_err(|cause| misplaced(name, cause))?;
    if let Some(placed) = table.group_mut(name) {
        placed.group = after;
    }
    Ok(given)
}

fn refused_group(name: &str, faults: &[Fault]) -> Failure {
    refused(&format!("group {name:?}"), faults)
}

/// Changes a device. Returns its status, with warnings.
pub async fn device(daemon: &Rc<Daemon>, wanted: &str, settings: &Settings, limit: Duration) -> Outcome<Value> {
    expect_some(settings)?;
    let (name, before) = {
        let table = daemon.table.borrow();
        let entry = table.device(wanted)?;
        (entry.device.name().to_owned(), entry.in_force())
    };
    let (after, given) =
        change_device(&before, &settings.pairs()).map_err(|faults| refused(&format!("device {name:?}"), &faults))?;
    daemon.claims.expect_free(&names(Name::device(&name), after.group.as_deref()))?;
    expect_staying(&daemon.table.borrow(), &name)?;
    match wanted_size(&settings.pairs()) {
        None => apply(daemon, &name, &before, &after)?,
        Some(_) if settings.0.len() > 1 => {
            let what = format!(
                "device {name:?}: `size` changes alone, or half of the command might be done; set it by itself"
            );
            return Err(Failure::new(Class::Config, what));
        }
        Some(bytes) => {
            daemon.table.borrow().check_memory(&after)?;
            resize(daemon, &name, bytes, limit).await?;
        }
    }
    log::info(format_args!("device={name} state=changed {}", words(settings)));
    let table = daemon.table.borrow();
    let entry = table.devices.get(&name).ok_or_else(|| going(&name))?;
    let odd = odd::device(&table.whole(), &name, given, settings.get("group").is_some());
    Ok(odd::tell(&odd, json!(entry.device.status())))
}

fn apply(daemon: &Daemon, name: &str, before: &Description, after: &Description) -> Outcome<()> {
    let table = daemon.table.borrow();
    let group = table.place(after.group.as_deref())?;
    let entry = table.devices.get(name).ok_or_else(|| going(name))?;
    let mut standing = entry.device.standing();
    let member = standing.member.ok_or_else(|| going(name))?;
    let changes = member_changes(member, before, after, group);
    daemon.throttle.apply(&changes, clock::now()).map_err(|cause| misplaced(name, cause))?;
    standing.group.clone_from(&after.group);
    (standing.weight, standing.limits) = (after.weight, after.limits);
    drop(standing);
    entry.device.note_change();
    Ok(())
}

async fn resize(daemon: &Rc<Daemon>, name: &str, bytes: u64, limit: Duration) -> Outcome<u64> {
    let _claim = daemon.claims.claim(vec![Name::device(name)])?;
    resize_claimed(daemon, name, bytes, limit).await
}

/// Resizes a device that the caller has claimed. Returns its new size in bytes.
pub async fn resize_claimed(daemon: &Rc<Daemon>, name: &str, bytes: u64, limit: Duration) -> Outcome<u64> {
    let (answer, outcome) = oneshot::channel();
    {
        let table = daemon.table.borrow();
        let entry = table.devices.get(name).ok_or_else(|| going(name))?;
        entry.device.resize(bytes, Box::new(move |outcome| drop(answer.send(outcome))));
    }
    let bytes = match timeout(limit, outcome).await {
        Ok(Ok(outcome)) => outcome?,
        Ok(Err(_)) => return Err(going(name)),
        Err(_) => {
            let what = format!("device {name:?} has not changed its size within {:.1} s", limit.as_secs_f64());
            return Err(Failure::new(Class::Timeout, format!("{what}; the daemon goes on with it, `list` tells")));
        }
    };
    if let Some(entry) = daemon.table.borrow_mut().devices.get_mut(name) {
        set_size(&mut entry.described, bytes);
    }
    Ok(bytes)
}

/// The changes that turn the group `before` into `after`; `parent` is the new parent.
pub fn group_changes(id: GroupId, before: &Group, after: &Group, parent: Option<GroupId>) -> Vec<Change> {
    let mut changes = Vec::new();
    if before.limits != after.limits {
        changes.push(Change::GroupLimits(id, after.limits));
    }
    if before.weight != after.weight {
        changes.push(Change::GroupWeight(id, after.weight));
    }
    if before.charges != after.charges {
        changes.push(Change::GroupCharges(id, after.charges));
    }
    if before.parent != after.parent {
        changes.push(Change::GroupParent(id, parent));
    }
    changes
}

/// The changes that turn the device `before` into `after`; `group` is the new group.
pub fn member_changes(id: MemberId, before: &Description, after: &Description, group: Option<GroupId>) -> Vec<Change> {
    let mut changes = Vec::new();
    if before.limits != after.limits {
        changes.push(Change::MemberLimits(id, after.limits));
    }
    if before.weight != after.weight {
        changes.push(Change::MemberWeight(id, after.weight));
    }
    if before.group != after.group {
        changes.push(Change::MemberGroup(id, group));
    }
    changes
}

fn place(table: &Table, group: &Group) -> Outcome<Option<GroupId>> {
    table.place(group.parent.as_deref())
}

/// The names that no claim may hold during a change: `own`, and the group above it afterwards.
fn names(own: Name, to: Option<&str>) -> Vec<Name> {
    std::iter::once(own).chain(to.map(Name::group)).collect()
}

fn expect_some(settings: &Settings) -> Outcome<()> {
    if settings.0.is_empty() {
        return Err(Failure::new(Class::Config, "nothing to set; give KEY=VALUE, like iops-total=500"));
    }
    Ok(())
}

/// Fails if the device is gone or being removed.
pub fn expect_staying(table: &Table, name: &str) -> Outcome<()> {
    let entry = table.devices.get(name).ok_or_else(|| going(name))?;
    match entry.device.status().state.as_str() {
        "starting" | "waiting" | "recovering" | "live" => Ok(()),
        _ => Err(going(name)),
    }
}

fn going(name: &str) -> Failure {
    Failure::new(Class::Conflict, format!("device {name:?} is being removed"))
}

/// The failure of a command with a place that the throttle refuses.
pub fn misplaced(name: &str, cause: BadParent) -> Failure {
    Failure::new(Class::Config, format!("{name:?}: {cause}; choose another group"))
}

fn words(settings: &Settings) -> String {
    settings.0.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
}
