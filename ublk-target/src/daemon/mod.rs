//! The daemon: `ublk-throttle run`.
//!
//! ```text
//!   run ─► configuration ─► rights, driver, io_uring ─► state directory locked ─► process prepared ─► control thread
//!          3                6, 1                        5, 6                      best effort
//!                                                        nothing was touched up to here
//! ```

mod control;
mod notify;
mod process;
mod server;
mod sweep;

use std::path::Path;
use std::sync::Arc;

pub use control::{GroupStatus, Listing};

use crate::command::load;
use crate::error::{Class, Failure, Outcome};
use crate::flags::Place;
use crate::state_dir::{StateDir, clear_socket};
use crate::ublk::control::Control;

/// Serves the devices of the configuration until told to stop.
pub fn run(config: &Path, place: &Place) -> Outcome<()> {
    let config = load(config)?;
    check_rights()?;
    // Shows that there is a driver and an io_uring before anything is made.
    drop(Control::open()?);
    let state_dir = Arc::new(StateDir::lock(&place.state_dir)?);
    let socket = place.socket();
    clear_socket(&socket)?;
    process::prepare()?;
    sweep::sweep(&state_dir, &place.state_dir)?;
    tokio_uring::start(control::serve(config, state_dir, socket))
}

fn check_rights() -> Outcome<()> {
    if process::has_capability(process::CAP_SYS_ADMIN) {
        return Ok(());
    }
    Err(Failure::new(
        Class::Perm,
        "making block devices needs CAP_SYS_ADMIN; run as root (`check CONFIG` works without)",
    ))
}
