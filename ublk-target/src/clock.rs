//! The one clock: `CLOCK_MONOTONIC`, read once a turn by whoever has a turn.

use throttle_core::time::Time;

/// The instant now. Not stopped by anything but suspend, not moved by anyone who sets the wall clock.
pub fn now() -> Time {
    let at = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .expect("every Linux has CLOCK_MONOTONIC, and the argument is ours");
    Time::from_nanos(at.tv_sec() as u64 * 1_000_000_000 + at.tv_nsec() as u64)
}
