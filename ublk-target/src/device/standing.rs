//! What may change about a device while it lives: its place in the throttle, its limits, its size.
//!
//! ```text
//!   control thread   locks those it changes, by name ─► Throttle::apply ─► writes what is in force now ─► unlocks
//!   device thread    locks its own: takes `member` away, and leaves the throttle; writes the size after a resize
//! ```
//!
//! Everything else about a device is its description, which is as it was configured for as long as the device lives.
//!
//! The lock protects the fields of [`Standing`], and by `member` the throttle's member from being asked about or changed once
//! it has left. The throttle's own lock may be taken inside it, never the other way round.

use throttle_core::group::MemberId;
use throttle_core::limits::Limits;
use ublk_throttle_config::Device as Description;

/// What is in force for a device at the moment.
#[derive(Clone, Debug)]
pub struct Standing {
    /// Its place in the throttle; `None` once it has left, and then there is nothing to change any more.
    pub member: Option<MemberId>,
    /// The group it is in.
    pub group: Option<String>,
    /// Its share of what the group allows, against the others in it.
    pub weight: u32,
    /// Its own limits, besides the group's.
    pub limits: Limits,
    /// Bytes, once the kernel has made it.
    pub size: Option<u64>,
    /// As the file of the configuration has it; none if a command made it, and then no reload takes it away.
    pub entry: Option<Description>,
}
