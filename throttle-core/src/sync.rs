//! The one place that says which lock is used, so that a model checker can put its own in place:
//! `RUSTFLAGS='--cfg loom'` or `'--cfg shuttle'`. The models are in `tests/models.rs`.

#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard};
#[cfg(shuttle)]
pub(crate) use shuttle::sync::{Mutex, MutexGuard};
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::sync::{Mutex, MutexGuard};
