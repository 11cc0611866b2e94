//! Shares: how much of what a group grants each of its children has had, in *virtual time*.
//!
//! ```text
//!   group of 10 MB/s      A (weight 100) was let go 64 KiB: 6.55 ms of the group's time → A's clock + 6.55 ms
//!                         B (weight 200) was let go  4 KiB: 0.41 ms of the group's time → B's clock + 0.20 ms
//!   whose clock is least has the turn
//! ```
//!
//! What a request takes of a group is the time in which the group earns it: bytes over `bps`, operations over `iops`, the
//! larger where several limits bind. Limits that do not bind do not count: a bucket binds while it is at least half full
//! (when requests wait for it, it is at the brim; when it is far from limiting, nearly empty). This is start-time fair
//! queueing with the dominant share as length.
//!
//! A child that comes back after a pause is put at most [`LAG_MAX`] behind the others: what it did not ask for was lent
//! and is not owed, but a client that waits for each answer before it asks again does not lose its share by that.
//!
//! Shares are ratios, so they are floating point until they are added up; no limit depends on them.

/// A position on a virtual clock, in 1/1024 ns of the group's time for a child of weight [`WEIGHT_DEFAULT`].
pub(crate) type Virtual = u128;

/// The weight of a child that does not say.
pub const WEIGHT_DEFAULT: u32 = 100;

/// The largest weight.
pub const WEIGHT_MAX: u32 = 10_000;

const TICKS_PER_NS: f64 = 1024.0;

/// How far behind the others a child may come back: 50 ms of the group's time. For so long the others may have no turn, which
/// their clients feel; with less, a client that waits for each answer would lose its share on a slow host.
pub(crate) const LAG_MAX: Virtual = 50_000_000 * 1024;

/// How far the clock of a child of `weight` moves for a request that takes `group_ns` of its group's time.
pub(crate) fn advance(group_ns: f64, weight: u32) -> Virtual {
    // At least one tick, so that children of a group without limits still take turns. Saturates far beyond any wait.
    let ticks = (group_ns * TICKS_PER_NS * f64::from(WEIGHT_DEFAULT) / f64::from(weight)).clamp(1.0, 1e30);
    // Mostly below 2^63, which takes few instructions to convert; 128 bits take a routine.
    if ticks < 9e18 { ticks as i64 as Virtual } else { ticks as Virtual }
}
