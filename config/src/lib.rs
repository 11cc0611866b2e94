//! The configuration of ublk-throttle: the devices, their backends, and their limits.
//!
//! ```text
//!   path ──load──► bytes ──source──► text ──yaml──► nodes with places ──read──► Config + warnings
//!                    │                 │                                  │
//!                    └─────────────────┴──────── all faults ──────────────┴──► Errors
//! ```
//!
//! [`parse`] is pure; [`load`] only adds the reading of a file. For any input, both are free of
//! panics, take at most about a second and little memory: a configuration may come from a faulty
//! template, and the daemon that is asked to reload it is serving disks.
//!
//! Changes while the daemon runs are read by the same rules: a second file ([`difference`] of two
//! configurations), or single values ([`change_device`], [`new_device`] and their counterparts for
//! groups).
//!
//! The schema is documented by `config/examples/`; every file there is tested.

mod change;
mod cpus;
mod describe;
mod fault;
mod fields;
mod load;
mod model;
mod near;
mod nesting;
mod odd;
mod plan;
mod plan_words;
pub mod quantity;
mod read;
mod settings;
mod siblings;
mod source;
mod written;
mod yaml;

use std::path::Path;

pub use change::change_limits;
pub use cpus::{CPU_MAX, Cpus};
pub use fault::{Errors, Fault, Warning, WarningKind, warning_lines};
pub use load::{FILE_BYTES_MAX, load};
pub use model::{
    Backend, Config, DEPTH_MAX, Device, Direct, Group, ID_MAX, OnCrash, OnStop, QUEUES_MAX, REQUEST_BYTES_MAX, SECTOR,
    ZeroCopy,
};
pub use near::nearest;
pub use odd::{odd_device, odd_group};
pub use plan::{Changed, DeviceChange, FixedDevice, GroupChange, Plan, Remake, Resize, difference};
pub use settings::{change_device, change_group, new_device, new_group, wanted_size};
pub use source::Place;
pub use written::write_groups;

use fields::Notes;
use source::Source;

/// Parses and checks a configuration. No file is touched: relative paths are joined with the
/// directory of `file_name`.
pub fn parse(file_name: &str, text: &[u8]) -> Result<(Config, Vec<Warning>), Errors> {
    let file = Path::new(file_name);
    parse_in(file, file.parent().unwrap_or(Path::new("")), text)
}

fn parse_in(file: &Path, base: &Path, text: &[u8]) -> Result<(Config, Vec<Warning>), Errors> {
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(Errors::new(file, vec![too_large()], None));
    }
    let (source, fault) = Source::new(text);
    if let Some(fault) = fault {
        return Err(Errors::new(file, vec![fault], Some(&source)));
    }
    let root = match yaml::read(&source) {
        Ok(root) => root,
        Err(fault) => return Err(Errors::new(file, vec![fault], Some(&source))),
    };
    let mut notes = Notes::default();
    let config = read::config(&root, base, &mut notes);
    if !notes.faults.is_empty() {
        return Err(Errors::new(file, notes.faults, Some(&source)));
    }
    notes.warnings.sort_by_key(|(place, ..)| *place);
    let warnings = notes.warnings.into_iter();
    let at = |place| Some((file.to_owned(), place));
    Ok((config, warnings.map(|(place, path, kind)| Warning { at: at(place), path, kind }).collect()))
}

fn too_large() -> Fault {
    Fault::of_file(format!("is larger than {} MiB", FILE_BYTES_MAX >> 20), "split it, or look what it really is")
}
