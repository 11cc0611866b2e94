//! The one place that says which lock and atomics are used, so that a model checker can put its own in place:
//! `RUSTFLAGS='--cfg loom'` or `'--cfg shuttle'`. The models are in `tests/models.rs`.

#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};
#[cfg(shuttle)]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};
