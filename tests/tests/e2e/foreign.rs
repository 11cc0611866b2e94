//! Another client of the ublk driver: DEL without a STOP before it, or STOP, a pause, and DEL.
//!
//! DEL does STOP's work while it holds the driver's own lock: until the device has let go of every request, no ublk device of
//! anybody on the host can be added or removed. In a process of its own (this program, executed again), because the wait
//! cannot be interrupted.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use ublk_target::ublk::control::Control;
use ublk_throttle_tests::command::{self, Started};

const DELETE: &str = "__delete";
const STOP_AND_DELETE: &str = "__stop_and_delete";

/// What this process was sent to do, if it is not the suite; its exit code.
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

/// Starts a client that sends STOP, and DEL `pause` later.
pub(crate) fn begin_stop_and_delete(dir: &Path, id: u32, pause: Duration) -> Result<Started> {
    let words = [STOP_AND_DELETE, &id.to_string(), &pause.as_millis().to_string()];
    command::start(dir, Command::new(std::env::current_exe()?).args(words))
}

/// Starts a DEL of a device, without a STOP before it.
pub(crate) fn begin_delete(dir: &Path, id: u32) -> Result<Started> {
    command::start(dir, Command::new(std::env::current_exe()?).args([DELETE, &id.to_string()]))
}
