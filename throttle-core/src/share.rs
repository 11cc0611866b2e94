//! Shares: the weights by which the children of a group divide its limits.

/// The weight of a child without a setting.
pub const WEIGHT_DEFAULT: u32 = 100;

/// The largest weight.
pub const WEIGHT_MAX: u32 = 10_000;
