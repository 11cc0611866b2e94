//! The lock and atomics of this crate, from std or from a model checker (`RUSTFLAGS='--cfg loom'`
//! or `'--cfg shuttle'`). The models are in `tests/models.rs`.

#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};
#[cfg(shuttle)]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};
