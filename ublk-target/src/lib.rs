//! `ublk-throttle`: throttled block devices over Linux ublk, daemon and command line.
//!
//! ```text
//!   flags ─► command ─► client ──socket──► daemon (control thread) ─► device (a thread each) ─► queue (a thread and a ring each)
//!            run, check,         protocol, state_dir          │                          │        │
//!            list, del,                                       ├─► helper ─► in_use       │        └─► backend ─► in_use
//!            features                                         └─► ublk ◄─────────────────┘
//!            simulate ─► simulate: the throttle alone, in virtual time
//! ```
//!
//! `throttle-core` decides which request is throttled and for how long; `ublk-throttle-config`
//! defines the configuration. This crate connects both with the kernel.

pub mod activity;
pub mod backend;
pub mod client;
pub mod clock;
pub mod command;
pub mod cpus;
pub mod crash_point;
pub mod daemon;
pub mod device;
pub mod error;
pub mod flags;
pub mod groups;
pub mod helper;
pub mod histogram;
pub mod in_use;
pub mod log;
pub mod mapping;
pub mod protocol;
pub mod queue;
pub mod rights;
pub mod settings;
pub mod simulate;
pub mod stack;
pub mod state_dir;
pub mod sys;
pub mod ublk;
pub mod watcher;
