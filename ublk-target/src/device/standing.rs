//! The settings of a device that can change while it lives: group, weight, limits, size.
//!
//! ```text
//!   control thread   locks the devices of a change, in the order of names ─► Throttle::apply ─► fields ─► unlocks
//!   device thread    locks its own device: sets `size` (ADD, recovery, resize); takes `member`, leaves the throttle
//! ```
//!
//! All settings besides are in the description of the device, which never changes.
//!
//! The lock protects the fields of [`Standing`]. Because the device thread takes `member` under this
//! lock, no thread queries or changes a member that has left the throttle. Order of locks: this lock
//! first, then the throttle's own.

use throttle_core::ids::MemberId;
use throttle_core::limits::Limits;
use ublk_throttle_config::Device as Description;

/// The changeable settings of a device that are in force.
#[derive(Clone, Debug)]
pub struct Standing {
    /// The member in the throttle; `None` once the device leaves it, after which no setting can change.
    pub member: Option<MemberId>,
    /// The group of the device.
    pub group: Option<String>,
    /// The share in the rate of the group, in proportion to the weights of all its members.
    pub weight: u32,
    /// The limits of the device itself, besides those of its group.
    pub limits: Limits,
    /// Size in bytes; `None` until ADD or the recovery of the device.
    pub size: Option<u64>,
    /// The device as the configuration file has it. `None` if a command made it; a reload then does not
    /// remove it.
    pub entry: Option<Description>,
    /// The reason, in words, while the device waits for its backend.
    pub waiting_for: Option<String>,
}
