//! An independent judge of shares.
//!
//! ```text
//!   trees ─ seed ─► plan ─► drive ─► grants, gaps, meters ─► judge ─► complaints
//!   cases ─ names ─► plan ┘                                    ▲
//!                     └────────────── paths, costs ────────────┘
//! ```
//!
//! A [`plan`] is a tree of groups and devices as plain data. The [`drive`] module runs it against the
//! throttle in virtual time and counts grants. The [`judge`] decides from the plan and the counts
//! alone, so it shares no code and no notion of a turn with the scheduler. The [`meter`] module
//! replays each bucket in integers.

mod cases;
mod classes;
mod drive;
mod judge;
mod meter;
mod plan;
mod random;
mod trees;
