//! Shares: the part of a group's rate that each child has received, in *virtual time*.
//!
//! ```text
//!   group of 10 MB/s      A (weight 100) gets 64 KiB: 6.55 ms of the group's time → A's clock + 6.55 ms
//!                         B (weight 200) gets  4 KiB: 0.41 ms of the group's time → B's clock + 0.20 ms
//!   the child with the least clock has the turn
//! ```
//!
//! A request takes from a group the time in which the group earns it: bytes over `bps`, operations
//! over `iops`, the larger if several limits bind. Limits that do not bind do not count. A bucket
//! binds while it is at least half full: with requests waiting it is at the brim, far below its
//! limit nearly empty. This is start-time fair queueing with the dominant share as length.
//!
//! A child that comes back after a pause starts at most [`LAG_MAX`] behind its siblings. The share
//! that it did not use in the pause was lent and is not owed, but a client that waits for each
//! answer before it sends again does not lose its share by that.
//!
//! Shares are ratios, so they are floating point until they are added up; no limit depends on them.

/// A position on a virtual clock, in 1/1024 ns of the group's time for a child of weight [`WEIGHT_DEFAULT`].
pub(crate) type Virtual = u128;

/// The weight of a child without a setting.
pub const WEIGHT_DEFAULT: u32 = 100;

/// The largest weight.
pub const WEIGHT_MAX: u32 = 10_000;

const TICKS_PER_NS: f64 = 1024.0;

/// The largest lag of a child behind its siblings after a pause: 50 ms of the group's time. The
/// siblings may have no turn for as long, which their clients notice; with less, a client that
/// waits for each answer would lose its share on a slow host.
pub(crate) const LAG_MAX: Virtual = 50_000_000 * 1024;

/// The ticks by which the clock of a child of `weight` advances for a request that takes `group_ns`
/// of its group's time.
pub(crate) fn advance(group_ns: f64, weight: u32) -> Virtual {
    // At least one tick, so that children of a group without limits take turns too. Saturates far
    // beyond any wait.
    let ticks = (group_ns * TICKS_PER_NS * f64::from(WEIGHT_DEFAULT) / f64::from(weight)).clamp(1.0, 1e30);
    // Usually below 2^63, which converts in few instructions; 128 bits take a routine.
    if ticks < 9e18 { ticks as i64 as Virtual } else { ticks as Virtual }
}
