//! Another client of the ublk driver, ruder than rublk: DEL without a STOP before it.
//!
//! DEL does STOP's work while it holds the driver's own lock: until the device has let go of every request, no ublk device of
//! anybody on the host can be added or removed. In a process of its own (this program, executed again), because the wait
//! cannot be interrupted.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use ublk_target::ublk::control::Control;
use ublk_throttle_tests::command::{self, Started};

const DELETE: &str = "__delete";

/// What this process was sent to do, if it is not the suite; its exit code.
pub(crate) fn errand() -> Option<ExitCode> {
    let words: Vec<String> = std::env::args().collect();
    let [_, errand, id] = words.as_slice() else { return None };
    if errand != DELETE {
        return None;
    }
    Some(match delete(id) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    })
}

fn delete(id: &str) -> Result<()> {
    Control::open()?.delete(id.parse()?).with_context(|| format!("DEL of {id}"))
}

/// Starts a DEL of a device, without a STOP before it.
pub(crate) fn begin_delete(dir: &Path, id: u32) -> Result<Started> {
    command::start(dir, Command::new(std::env::current_exe()?).args([DELETE, &id.to_string()]))
}
