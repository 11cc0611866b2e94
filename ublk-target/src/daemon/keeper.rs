//! Writes down the groups whenever they change, and the levels as they go, on a thread of its own: the control thread waits for
//! no disk.
//!
//! ```text
//!   control thread ──► latest ──► thread: written beside its place, made durable, renamed
//! ```
//!
//! Only the latest is of interest: what came and went while the thread was writing is not written.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::levels::LevelsRecord;
use crate::error::{Class, OrFail, Outcome};
use crate::log;
use crate::state_dir::{GroupsRecord, StateDir};

/// What is to be written next.
#[derive(Default)]
struct Desk {
    latest: Mutex<Latest>,
    /// Held while it is written.
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
                    own.wait();
                    let _writing = own.writing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    // Taken only now: what is taken is written before `end` goes on.
                    let latest = std::mem::take(&mut *own.lock());
                    latest.write(&state_dir);
                }
            })
            .or_fail(Class::Resource, "cannot start a thread")?;
        Ok(Self(desk))
    }

    /// Has the groups written, unless something later comes first.
    pub fn keep_groups(&self, record: GroupsRecord) {
        self.0.lock().groups = Some(record);
        self.0.has_come.notify_one();
    }

    /// Has the levels written, unless something later comes first.
    pub fn keep_levels(&self, record: LevelsRecord) {
        self.0.lock().levels = Some(record);
        self.0.has_come.notify_one();
    }

    /// At the end: what is written down of the groups goes, unless they are kept; the levels stay; nothing more is written.
    pub fn end(&self, state_dir: &StateDir, keeps_groups: bool) {
        let writing = self.0.writing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut latest = std::mem::take(&mut *self.0.lock());
        latest.groups.take_if(|_| !keeps_groups);
        latest.write(state_dir);
        // Whoever waits for it waits until the process has ended.
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
