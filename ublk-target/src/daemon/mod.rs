//! The daemon: `ublk-throttle run`.
//!
//! ```text
//!   run ─► configuration ─► rights, driver, io_uring ─► state directory locked ─► process prepared ─► control thread
//!          3                6, 1                        5, 6                      best effort
//!                                                        nothing was touched up to here
//! ```

mod add;
mod budget;
mod claims;
mod control;
mod del;
mod follow;
mod keeper;
mod levels;
mod lines;
mod notify;
mod odd;
mod peers;
mod process;
mod recover;
mod reload;
mod seats;
mod server;
mod set;
mod signals;
mod socket;
pub mod stats;
mod table;
mod takeover;
mod waiting;

use std::path::Path;
use std::sync::Arc;

pub use table::{GroupStatus, Listing};

use control::Beginning;
use socket::Socket;

use crate::command::load;
use crate::error::{Class, Failure, OrFail, Outcome};
use crate::flags::Place;
use crate::state_dir::{StateDir, clear_socket};
use crate::ublk::control::Control;
use crate::{log, rights};

/// Serves the devices of the configuration until told to stop.
pub fn run(config: &Path, place: &Place, takes_over: bool) -> Outcome<()> {
    // A reload finds the same file, wherever we are by then.
    let config_path = std::path::absolute(config).or_fail(Class::Config, config.display())?;
    let config = load(config)?;
    check_rights()?;
    let readers = socket::resolve(config.readers.as_deref())?;
    // Shows that there is a driver and an io_uring before anything is made.
    drop(Control::open()?);
    let state_dir = Arc::new(if takes_over { takeover::lock(place)? } else { StateDir::lock(&place.state_dir)? });
    clear_socket(&place.socket())?;
    process::prepare()?;
    log::never_wait();
    let plan = recover::plan(&state_dir, &config)?;
    let socket = Socket::new(place.socket(), place.state_dir.clone(), readers);
    // Room for an answer to every client at once.
    let mut ring = tokio_uring::builder();
    ring.entries(seats::SEATS as u32 * 2).start(control::serve(Beginning {
        config,
        plan,
        config_path,
        state_dir,
        socket,
    }))
}

fn check_rights() -> Outcome<()> {
    if rights::has_capability(rights::CAP_SYS_ADMIN) {
        return Ok(());
    }
    Err(Failure::new(
        Class::Perm,
        "making block devices needs CAP_SYS_ADMIN; run as root (`check CONFIG` works without)",
    ))
}
