//! What the end-to-end tests are made of.
//!
//! ```text
//!   trial ── Need?  missing: a counted skip that prints its reason (a failure with UBLK_THROTTLE_REQUIRE_ALL=1)
//!     └─ Scene      a directory of its own, what existed before, and at the end: is anything left behind?
//!          ├─ Daemon    the real binary, from its line `ready` to SIGTERM and exit 0
//!          ├─ Command   the same binary's short commands, each with a time limit
//!          ├─ Client    a bare client of its socket: whole questions, half lines, garbage, silence
//!          ├─ Fio       a job of fio-jobs/, its report, the instant of every completion
//!          ├─ disks     RAM disks, a slow disk, mounts: what backends and users need
//!          ├─ mapper    disks that fail, stall or wait on demand
//!          ├─ Setting   what the kernel is set to, and what it was before
//!          └─ process   what a process holds: memory, descriptors, threads
//!   mode           judgement of a run, and the number of its repetitions
//! ```
//!
//! Nothing here knows a claim: those are in `tests/e2e/` and `fio-jobs/`. Nothing waits without a limit: a hang is a
//! failure that says what was waited for. What fails prints every log of its scene.

pub mod command;
pub mod daemon;
pub mod direct;
pub mod disks;
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

/// The workspace that this crate lies in.
pub fn workspace() -> &'static std::path::Path {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in a folder of the workspace")
}
