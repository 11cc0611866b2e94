//! The part of a reload that remakes devices which wait for their backends. A device without a disk has no fixed keys.
//!
//! ```text
//!   key                            reload
//!   group, weight, limits          the Throttle::apply of the whole plan
//!   all remaining keys             the device is removed and started anew: live, or waiting for its new backend
//! ```

use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;
use ublk_throttle_config::Plan;

use super::control::Daemon;
use super::reload::{Left, expect_started, remove_devices};
use super::table::Origin;

/// Carries out [`Plan::device_remakes`] after the rest of the plan. Adds a failure to `left` for each device that is
/// not removed or not started.
pub async fn remake(daemon: &Rc<Daemon>, plan: &Plan, patience: Duration, left: &mut Left) {
    let names: Vec<String> = plan.device_remakes.iter().map(|remake| remake.device.name.clone()).collect();
    remove_devices(daemon, &names, patience, left).await;
    let mut started = Vec::new();
    for device in plan.device_remakes.iter().map(|remake| &remake.device) {
        // The removal failed, for example because the backend came during the reload and a program opened the disk.
        // `remove_devices` has added that failure.
        if daemon.table.borrow().devices.contains_key(&device.name) {
            continue;
        }
        // `required` applies to the start of the daemon only: the device may wait for its new backend.
        match daemon.start(device.clone(), Origin::File, true) {
            Ok(outcome) => started.push((device, outcome)),
            Err(failure) => left.failures.push(failure),
        }
    }
    let deadline = Instant::now() + patience;
    for (device, outcome) in started {
        left.failures.extend(expect_started(device, outcome, deadline).await.err());
    }
}
