//! `add`: makes a device from the settings of a command, not of the configuration file.
//!
//! ```text
//!   settings ─► parsed like a file ─► name, id, group, memory free? ─► device thread makes it ─► live, or removed
//! ```

use std::rc::Rc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;
use ublk_throttle_config::{Fault, new_device};

use super::claims::Name;
use super::control::Daemon;
use super::odd;
use super::table::Origin;
use crate::cpus;
use crate::error::{Class, Failure, Outcome};
use crate::settings::Settings;

/// Makes a device. Returns its status as in `list`, with warnings.
pub async fn device(daemon: &Rc<Daemon>, name: &str, settings: &Settings, limit: Duration) -> Outcome<Value> {
    let (new, given) =
        new_device(name, &settings.pairs()).map_err(|faults| refused(&format!("device {name:?}"), &faults))?;
    let names = std::iter::once(Name::device(name)).chain(new.group.as_deref().map(Name::group));
    daemon.claims.expect_free(&names.collect::<Vec<_>>())?;
    {
        let table = daemon.table.borrow();
        table.check_new(&new)?;
        table.check_memory(&new)?;
    }
    cpus::expect_present([&new])?;
    let outcome = daemon.start(new, Origin::Command, false)?;
    match timeout(limit, outcome).await {
        Ok(Ok(outcome)) => outcome?,
        // The sender was dropped without an outcome: the device was removed during its start.
        Ok(Err(_)) => {
            return Err(Failure::new(Class::Conflict, format!("device {name:?} was removed before it was there")));
        }
        Err(_) => {
            let what = format!(
                "device {name:?} is not there after {:.1} s; the daemon goes on with it, `list` tells",
                limit.as_secs_f64()
            );
            return Err(Failure::new(Class::Timeout, what));
        }
    }
    let table = daemon.table.borrow();
    let made =
        table.devices.get(name).map(|entry| json!(entry.device.status())).ok_or_else(|| {
            Failure::new(Class::Conflict, format!("device {name:?} was removed as soon as it was there"))
        })?;
    Ok(odd::tell(&odd::device(&table.whole(), name, given, true), made))
}

/// The failure that lists all faults of the settings, in one line.
pub fn refused(what: &str, faults: &[Fault]) -> Failure {
    let faults: Vec<String> = faults.iter().map(Fault::to_string).collect();
    Failure::new(Class::Config, format!("{what}: {}", faults.join("; ")))
}
