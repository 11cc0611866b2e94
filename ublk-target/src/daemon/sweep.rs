//! What an earlier daemon left behind when it was killed: devices that nobody serves, their links and state files.
//!
//! ```text
//!   state file: NAME, id, nonce ──► is id still that device? ──yes──► STOP, DEL in a helper
//!                                            └──no──► somebody else has the id by now: only file and link go
//! ```
//!
//! The lock of the state directory is ours, so whoever wrote the files is dead and its devices are served by nobody: their
//! disks have failed already, and the ids are free to go.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::device::{Status, traces};
use crate::error::Outcome;
use crate::helper::{Errand, Helper, Target};
use crate::log;
use crate::state_dir::{self, StateDir};

/// How long a leftover may take. It has no requests to wait for, but on some kernels a queue that was full when its daemon
/// died takes 30 s to fail them.
const LIMIT: Duration = Duration::from_secs(35);
const LOOK: Duration = Duration::from_millis(10);

/// Clears away what the state files in `path` tell of.
pub fn sweep(state_dir: &StateDir, path: &Path) -> Outcome<()> {
    let leftovers = state_dir::read(path)?.unwrap_or_default();
    let helpers: Vec<(Status, Option<Helper>)> = leftovers
        .into_iter()
        .map(|status| {
            let helper = status.id.zip(status.nonce).map(|(id, nonce)| Target { id, nonce });
            let helper = helper.map(|target| Helper::spawn(target, Errand::Delete)).transpose()?;
            Ok((status, helper))
        })
        .collect::<Outcome<_>>()?;
    let began = Instant::now();
    for (status, helper) in helpers {
        let is_deleted = helper.is_none_or(|mut helper| {
            // Said, or ended without a word: then the id is somebody else's.
            while helper.heard().is_none() && helper.ended().is_none() {
                if began.elapsed() > LIMIT {
                    return false;
                }
                std::thread::sleep(LOOK);
            }
            // It would stay until the last user has closed the dead disk.
            helper.kill();
            true
        });
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
    Ok(())
}
