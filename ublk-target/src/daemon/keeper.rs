//! Writes the groups down whenever they change, on a thread of its own: the control thread waits for no disk.
//!
//! ```text
//!   control thread ──► latest ──► thread: written beside its place, made durable, renamed
//! ```
//!
//! Only the latest is of interest: what came and went while the thread was writing is not written.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::error::{Class, OrFail, Outcome};
use crate::log;
use crate::state_dir::{GroupsRecord, StateDir};

/// What is to be written next.
#[derive(Default)]
struct Desk {
    latest: Mutex<Option<GroupsRecord>>,
    /// Held while it is written.
    writing: Mutex<()>,
    has_come: Condvar,
}

/// A handle on the thread.
pub struct Keeper(Arc<Desk>);

impl Keeper {
    /// Starts the thread.
    pub fn start(state_dir: Arc<StateDir>) -> Outcome<Self> {
        let desk = Arc::new(Desk::default());
        let own = Arc::clone(&desk);
        std::thread::Builder::new()
            .name("keeper".to_owned())
            .spawn(move || {
                loop {
                    let record = own.take();
                    let _writing = own.writing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    if let Err(failure) = state_dir.write_groups(&record) {
                        log::warn("W-STATE", failure.message);
                    }
                }
            })
            .or_fail(Class::Resource, "cannot start a thread")?;
        Ok(Self(desk))
    }

    /// Has it written, unless something later comes first.
    pub fn keep(&self, record: GroupsRecord) {
        *self.0.lock() = Some(record);
        self.0.has_come.notify_one();
    }

    /// At the end: what is written down goes, and nothing more is written.
    pub fn end(&self, state_dir: &StateDir) {
        let writing = self.0.writing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // Whoever waits for it waits until the process has ended.
        std::mem::forget(writing);
        state_dir.forget_groups();
    }
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Option<GroupsRecord>> {
        self.latest.lock().expect("nothing panics while it holds this lock")
    }

    fn take(&self) -> GroupsRecord {
        let mut latest = self.lock();
        loop {
            match latest.take() {
                Some(record) => return record,
                None => latest = self.has_come.wait(latest).expect("nothing panics while it holds this lock"),
            }
        }
    }
}
