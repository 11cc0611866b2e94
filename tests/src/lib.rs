//! Building blocks of the end-to-end tests.
//!
//! ```text
//!   trial ── Need?  missing: a counted skip that prints its reason (a failure with UBLK_THROTTLE_REQUIRE_ALL=1)
//!     └─ Scene      a directory per trial, the state before it, and a check at the end that nothing is left behind
//!          ├─ Daemon    the real binary, from its line `ready` to SIGTERM and exit 0
//!          ├─ Command   the same binary's short commands, each with a time limit
//!          ├─ Client    a bare client of its socket: whole questions, half lines, garbage, silence
//!          ├─ Fio       a job of fio-jobs/, its report, the time of each completion
//!          ├─ disks     RAM disks, a slow disk, mounts: backends and users of a device
//!          ├─ mapper    disks that fail, stall or wait on demand
//!          ├─ export    disks that the kernel exports (nvmet, LIO)
//!          ├─ Setting   a changed setting of the kernel, restored at the end
//!          └─ process   memory, descriptors and threads of a process
//!   mode           judgement of a run, and the number of its repetitions
//! ```
//!
//! This crate contains no claims: claims are in `tests/e2e/` and `fio-jobs/`. Every wait has a
//! limit: a hang is a failure that names the awaited condition. A failed trial prints every log of
//! its scene.

pub mod command;
pub mod daemon;
pub mod direct;
pub mod disks;
pub mod export;
mod faults;
pub mod fio;
pub mod mapper;
pub mod mode;
pub mod needs;
pub mod process;
pub mod scene;
pub mod setting;
pub mod socket;
pub mod sysfs;
pub mod wait;

/// The folder of the workspace.
pub fn workspace() -> &'static std::path::Path {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in a folder of the workspace")
}
