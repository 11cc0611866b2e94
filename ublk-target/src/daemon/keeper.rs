//! Writes the groups to their state file whenever they change, and the levels of the limits as they
//! change, on a thread of its own: the control thread never waits for a disk.
//!
//! ```text
//!   control thread ──► latest ──► thread: written beside its place, made durable, renamed
//! ```
//!
//! Only the latest record counts: a record that is replaced while the thread writes an earlier one
//! is never written.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::levels::LevelsRecord;
use crate::error::{Class, OrFail, Outcome};
use crate::log;
use crate::state_dir::{GroupsRecord, StateDir};

/// The records to write next, and the locks between the control thread and the writing thread.
#[derive(Default)]
struct Desk {
    latest: Mutex<Latest>,
    /// Held during a write.
    writing: Mutex<()>,
    has_come: Condvar,
}

#[derive(Default)]
struct Latest {
    groups: Option<GroupsRecord>,
    levels: Option<LevelsRecord>,
}

impl Latest {
    fn write(&self, state_dir: &StateDir) {
        let groups = self.groups.as_ref().map(|record| state_dir.write_groups(record));
        let levels = self.levels.as_ref().map(|record| state_dir.write_levels(record));
        for failure in [groups, levels].into_iter().flatten().filter_map(Result::err) {
            log::warn("W-STATE", failure.message);
        }
    }
}

/// A handle on the writing thread.
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
                    own.wait();
                    let _writing = own.writing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    // Taken only with `writing` locked: `end` waits for this lock, so a record that
                    // was taken is written before `end` goes on.
                    let latest = std::mem::take(&mut *own.lock());
                    latest.write(&state_dir);
                }
            })
            .or_fail(Class::Resource, "cannot start a thread")?;
        Ok(Self(desk))
    }

    /// Has the groups written, unless a later record replaces them first.
    pub fn keep_groups(&self, record: GroupsRecord) {
        self.0.lock().groups = Some(record);
        self.0.has_come.notify_one();
    }

    /// Has the levels written, unless a later record replaces them first.
    pub fn keep_levels(&self, record: LevelsRecord) {
        self.0.lock().levels = Some(record);
        self.0.has_come.notify_one();
    }

    /// The last write of the daemon. Removes the state file of the groups unless `keeps_groups`;
    /// the levels stay. Nothing is written afterwards.
    pub fn end(&self, state_dir: &StateDir, keeps_groups: bool) {
        let writing = self.0.writing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut latest = std::mem::take(&mut *self.0.lock());
        latest.groups.take_if(|_| !keeps_groups);
        latest.write(state_dir);
        // Never unlocked: the thread blocks on this lock until the process has ended.
        std::mem::forget(writing);
        if !keeps_groups {
            state_dir.forget_groups();
        }
    }
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Latest> {
        self.latest.lock().expect("nothing panics while it holds this lock")
    }

    fn wait(&self) {
        let mut latest = self.lock();
        while latest.groups.is_none() && latest.levels.is_none() {
            latest = self.has_come.wait(latest).expect("nothing panics while it holds this lock");
        }
    }
}
