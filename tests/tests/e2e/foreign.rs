//! A foreign client of the ublk driver: DEL without STOP, or STOP, a pause, and DEL.
//!
//! DEL without STOP does the work of STOP while it holds a lock of the driver: until the device has
//! completed every request, no ublk device of the host can be added or removed. The client is a
//! process of its own (this program, executed again), because the wait cannot be interrupted.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use ublk_target::ublk::control::Control;
use ublk_throttle_tests::command::{self, Started};

const DELETE: &str = "__delete";
const STOP_AND_DELETE: &str = "__stop_and_delete";

/// Executes the command of a foreign client if the arguments name one; returns its exit code.
pub(crate) fn errand() -> Option<ExitCode> {
    let words: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        [_, DELETE, id] => delete(id),
        [_, STOP_AND_DELETE, id, pause_ms] => stop_and_delete(id, pause_ms),
        _ => return None,
    };
    Some(match outcome {
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

fn stop_and_delete(id: &str, pause_ms: &str) -> Result<()> {
    let id = id.parse()?;
    let mut control = Control::open()?;
    control.stop(id).with_context(|| format!("STOP of {id}"))?;
    thread::sleep(Duration::from_millis(pause_ms.parse()?));
    control.delete(id).with_context(|| format!("DEL of {id}"))
}

/// Starts a client that sends STOP, and after `pause` DEL.
pub(crate) fn begin_stop_and_delete(dir: &Path, id: u32, pause: Duration) -> Result<Started> {
    let words = [STOP_AND_DELETE, &id.to_string(), &pause.as_millis().to_string()];
    command::start(dir, Command::new(std::env::current_exe()?).args(words))
}

/// Starts a client that sends DEL without STOP.
pub(crate) fn begin_delete(dir: &Path, id: u32) -> Result<Started> {
    command::start(dir, Command::new(std::env::current_exe()?).args([DELETE, &id.to_string()]))
}
