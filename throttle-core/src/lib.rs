//! QEMU-style throttle groups without a clock, a thread or I/O.
#![forbid(unsafe_code)]

mod bits;
pub mod bucket;
pub mod charge;
pub mod cost;
pub mod gate;
pub mod group;
mod heap;
mod held;
pub mod ids;
mod lease;
pub mod limiter;
pub mod limits;
mod pass;
mod planted;
pub mod request;
pub mod share;
mod sync;
pub mod throttle;
pub mod time;
pub mod tree;

#[cfg(test)]
mod tests;
