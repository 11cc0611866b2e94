//! QEMU-style throttle groups without a clock, a thread or I/O.
#![forbid(unsafe_code)]

pub mod limits;
