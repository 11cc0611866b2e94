//! The one clock, `CLOCK_MONOTONIC`: each turn of a thread reads it once.

use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep};
use throttle_core::time::Time;

/// The current instant. The clock stops only during suspend, and setting the wall clock does not
/// move it.
pub fn now() -> Time {
    let at =
        clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has CLOCK_MONOTONIC, and the argument is ours");
    Time::from_nanos(at.tv_sec() as u64 * 1_000_000_000 + at.tv_nsec() as u64)
}

/// Sleeps until `instant`. A signal ends the sleep early.
pub fn sleep_until(instant: Time) {
    let at = TimeSpec::from_duration(Duration::from_nanos(instant.as_nanos()));
    let _ = clock_nanosleep(ClockId::CLOCK_MONOTONIC, ClockNanosleepFlags::TIMER_ABSTIME, &at);
}
