//! QEMU-style throttle groups without a clock, a thread or I/O.
#![forbid(unsafe_code)]

pub mod bucket;
pub mod cost;
pub mod gate;
pub mod group;
pub mod limiter;
pub mod limits;
mod sync;
pub mod throttle;
pub mod time;
mod turn;

#[cfg(test)]
mod tests;
