//! `del`: removes a device or a group.

use std::rc::Rc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::claims::Name;
use super::control::Daemon;
use crate::clock;
use crate::device::{Device, Removal, Removed};
use crate::error::{Class, Failure, Outcome};
use crate::log;

/// Time beyond the limit of a removal in which the control thread still waits for the device thread.
/// At the limit the device thread itself answers `E-TIMEOUT` with the reason, which the control thread
/// does not know.
pub const ANSWER_GRACE: Duration = Duration::from_millis(500);

/// Removes a device, given by name, link or node. A second removal of a device joins the first.
pub async fn device(daemon: &Rc<Daemon>, wanted: &str, is_forced: bool, limit: Duration) -> Outcome<Value> {
    let (name, outcome) = {
        let table = daemon.table.borrow();
        let entry = table.device(wanted)?;
        let name = entry.device.name().to_owned();
        daemon.claims.expect_free(&[Name::device(&name)])?;
        (name, ask(&entry.device, is_forced, limit))
    };
    let removed = match timeout(limit.saturating_add(ANSWER_GRACE), outcome).await {
        Ok(Ok(outcome)) => outcome?,
        // The device thread has ended and dropped the answer: the device is already gone.
        Ok(Err(_)) => Removed::default(),
        Err(_) => {
            let what = format!(
                "device {name:?} is not gone after {:.1} s; the removal goes on, `list` tells",
                limit.as_secs_f64()
            );
            return Err(Failure::new(Class::Timeout, what));
        }
    };
    daemon.forgotten(&name).await;
    Ok(json!({ "device": name, "note": removed.note }))
}

/// Sends a removal to the device thread, which answers through the channel within `patience`.
pub fn ask(device: &Device, is_forced: bool, patience: Duration) -> oneshot::Receiver<Outcome<Removed>> {
    let (answer, outcome) = oneshot::channel();
    // The send fails if the client has disconnected; the removal continues.
    let answer = Box::new(move |outcome| drop(answer.send(outcome)));
    device.remove(Removal { is_forced, is_final: false, patience, answer });
    outcome
}

/// Removes an empty group; a group with members is refused.
pub fn group(daemon: &Rc<Daemon>, wanted: &str) -> Outcome<Value> {
    let mut table = daemon.table.borrow_mut();
    let (name, id) = table.group(wanted).map(|placed| (placed.group.name.clone(), placed.id))?;
    daemon.claims.expect_free(&[Name::group(&name)])?;
    in_use(&name, &table.members(&name))?;
    daemon.throttle.remove_group(id, clock::now()).map_err(|cause| {
        Failure::new(Class::GroupInUse, format!("group {name:?}: {cause}; try again when they have gone"))
    })?;
    table.groups.retain(|placed| placed.id != id);
    daemon.keep_groups(&table);
    log::info(format_args!("group={name} state=removed"));
    Ok(json!({ "group": name }))
}

/// Fails with the names of the members, if the group has any.
pub fn in_use(group: &str, members: &[String]) -> Outcome<()> {
    if members.is_empty() {
        return Ok(());
    }
    let what = format!("group {group:?} is in use by {}; move or remove them first", members.join(", "));
    Err(Failure::new(Class::GroupInUse, what))
}
