//! A device, from its configuration until no trace of it is left. One thread per device makes, watches
//! and removes it.
//!
//! ```text
//!   Recovering ───┐
//!   Starting ──► Live ──► Draining ──► Stopping ──► Reaping ──► Gone
//!      │          │ del, SIGTERM        ▲ helper: STOP             ▲ helper: DEL
//!      │          └─ foreign STOP ──────┴──────────► (Reaping) ────┤
//!      └── any step fails: everything made so far is undone ───────┘
//! ```
//!
//! | state | requests | the device thread waits for |
//! | --- | --- | --- |
//! | Starting | neither limited nor charged | queues ready, START, node, the end of the partition scan |
//! | Waiting | none: there is no disk | the backend, missing at the start ([`waiting`]); Starting follows |
//! | Recovering | wait in the kernel | the kernel to finish with the dead daemon, the backend, the queues |
//! | Live | limited | a removal |
//! | Draining | held ones charged up to a bound, new ones not | dispatch of the held ones, by their queue threads |
//! | Stopping | neither limited nor charged, until aborted | STOP (in a helper), then the queue threads |
//! | Reaping | none | the last user of the disk, up to a limit |
//!
//! A removal has a fixed order. The drain comes before STOP: otherwise STOP waits for tokens. STOP comes
//! before the end of the queues, because the queues end by its aborts. Every gate retires before its
//! queue thread is joined, so that no other member counts on a queue that is gone. The char device is
//! closed before DEL, because DEL waits for its close.

mod making;
mod partitions;
mod recovery;
mod removal;
mod resize;
mod standing;
mod stats;
mod status;
mod thread;
pub mod traces;
mod waiting;

use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use throttle_core::group::MemberOptions;
use throttle_core::ids::GroupId;
use throttle_core::limiter::Level;
use throttle_core::throttle::Throttle;
use ublk_throttle_config::{Backend, Device as Description, OnCrash};

pub use standing::Standing;
pub use stats::{DeviceStats, OperationStats};
pub use status::{Status, limits};

use crate::activity::Activity;
use crate::backend::place;
use crate::clock;
use crate::error::{Class, OrFail, Outcome};
use crate::queue;
use crate::state_dir::StateDir;
use crate::ublk::Transfer;
use crate::watcher::Watcher;

/// The state of a device: see the table of this module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The device thread makes the device.
    Starting,
    /// The backend is missing; the device is made as soon as the backend is there.
    Waiting,
    /// An earlier daemon left the device behind, and this daemon recovers it.
    Recovering,
    /// The queues serve requests under the limits.
    Live,
    /// The queues dispatch the held requests past the limits.
    Draining,
    /// The kernel removes the disk (STOP).
    Stopping,
    /// The device leaves the throttle and is deleted (DEL).
    Reaping,
    /// No trace of the device is left.
    Gone,
}

impl State {
    const ALL: [Self; 8] = [
        Self::Starting,
        Self::Waiting,
        Self::Recovering,
        Self::Live,
        Self::Draining,
        Self::Stopping,
        Self::Reaping,
        Self::Gone,
    ];

    /// The word for log and list.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Waiting => "waiting",
            Self::Recovering => "recovering",
            Self::Live => "live",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Reaping => "reaping",
            Self::Gone => "gone",
        }
    }
}

/// Default of [`Removal::patience`].
pub const PATIENCE: Duration = Duration::from_millis(4500);

/// A request to remove a device. The answer comes when the device is gone, is found to be in use, or after
/// `patience`.
pub struct Removal {
    /// Remove the device even if it is in use.
    pub is_forced: bool,
    /// Time from the request to the answer at the latest, which is then E-TIMEOUT; the removal goes on.
    pub patience: Duration,
    /// The daemon ends: a failed removal is tried again until it succeeds. After a failed removal that is
    /// not final, the device lives on.
    pub is_final: bool,
    /// Called once, on the device thread; by [`Device::remove`] if that thread has ended.
    pub answer: Answer<Removed>,
}

/// The result of a removal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// A note for the client of the removal: data that was not written back, users that keep the id.
    pub note: Option<String>,
}

/// The callback with which a device thread answers a request of the control thread.
pub type Answer<T> = Box<dyn FnOnce(Outcome<T>) + Send>;

/// A message to the device thread.
enum Message {
    Queue(queue::Report),
    Remove(Removal),
    Changed,
    /// Result of an open of the backend, from the looker.
    Looked(waiting::Found),
    /// Another ublk client is stopping the device, as the watcher reports.
    Stopped,
    Resize(u64, Answer<u64>),
}

/// A change that a device reports to the daemon, with the name of the device.
#[derive(Debug)]
pub enum Notice {
    /// The device serves.
    Live(String),
    /// The backend is missing. `Live` or `Failed` follows when the backend is there.
    Waiting(String),
    /// The device could not be made; nothing of it is left.
    Failed(String, crate::error::Failure),
    /// A device that was left behind cannot be served yet; the recovery is repeated until it succeeds.
    Recovering(String),
    /// The device has been removed.
    Gone(String),
    /// A device that was left behind is gone: another program removed it before its recovery.
    Lost(String),
}

/// The state that the device thread shares with the control thread.
struct Shared {
    description: Description,
    throttle: Arc<Throttle>,
    state: AtomicU8,
    /// The random number that ADD stores in the driver. It is drawn before the state file is written, so
    /// that a later daemon finds the device by its state file.
    nonce: u32,
    made: OnceLock<Made>,
    /// Whether the backend bypasses the page cache of its file or block device.
    is_direct: OnceLock<bool>,
    /// Why data is copied although `zero-copy` is not `off`, in words.
    copied_because: OnceLock<String>,
    /// The file or block device of the backend, if it has one.
    behind: OnceLock<Behind>,
    /// For the protected fields and the lock order, see [`standing`].
    standing: Mutex<Standing>,
}

/// The open file or block device of a backend.
#[derive(Clone, Copy, Debug)]
struct Behind {
    /// Device and inode number.
    identity: (u64, u64),
    /// The logical block size of the ublk device, in bytes.
    block: u32,
}

impl Behind {
    fn of(backend: &dyn crate::backend::Backend) -> Option<Self> {
        backend.identity().map(|identity| Self { identity, block: backend.geometry().logical_block })
    }
}

/// The facts that are known after ADD.
struct Made {
    id: u32,
    queues: Vec<Arc<queue::Handle>>,
    depth: u16,
    transfer: Transfer,
}

impl Shared {
    fn state(&self) -> State {
        State::ALL[usize::from(self.state.load(Ordering::Acquire))]
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().expect("nothing panics while it holds this lock")
    }

    fn set_state(&self, state: State) {
        self.state.store(state as u8, Ordering::Release);
    }
}

/// The parts of the daemon that a device needs.
pub struct Surroundings {
    /// The daemon's throttle.
    pub throttle: Arc<Throttle>,
    /// The group of the device in the throttle.
    pub group: Option<GroupId>,
    /// Ids that the configuration names for devices without a disk; no device without an `id` gets them.
    pub named_ids: Vec<u32>,
    /// The process that detects a foreign STOP.
    pub watcher: Arc<Watcher>,
    /// Queue threads mark it at the end of each turn with a request.
    pub activity: Arc<Activity>,
    /// The directory of the state file.
    pub state_dir: Arc<StateDir>,
    /// Reports a [`Notice`] to the daemon.
    pub notify: Box<dyn Fn(Notice) + Send>,
}

/// The input of [`Device::start`]: a device to be made or recovered.
pub struct Beginning {
    /// The settings to be in force.
    pub description: Description,
    /// The settings of the device in the configuration file, if it is there.
    pub entry: Option<Description>,
    /// The disk that an earlier daemon left behind.
    pub left: Option<LeftBehind>,
    /// The stored levels of the buckets, and the nanoseconds for which the buckets have drained since.
    pub levels: Option<(Vec<Level>, u64)>,
    /// Whether a new device waits for a missing backend; without it, the device fails.
    pub waits: bool,
}

/// A device in the kernel without a ublk server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftBehind {
    /// Its id and nonce.
    pub target: crate::helper::Target,
    /// Device and inode number of the file or block device of its backend.
    pub identity: Option<(u64, u64)>,
}

/// The handle of the control thread to a device.
pub struct Device {
    shared: Arc<Shared>,
    inbox: Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl Device {
    /// Starts the thread that makes the device. [`Notice::Live`], [`Notice::Waiting`] or [`Notice::Failed`] follows.
    ///
    /// The device joins the throttle here, so that its group cannot be removed during the start.
    pub fn start(beginning: Beginning, surroundings: Surroundings) -> Outcome<Self> {
        let Beginning { description, entry, left, levels, waits } = beginning;
        let name = description.name.clone();
        let throttle = Arc::clone(&surroundings.throttle);
        let (limits, weight) = (description.limits, description.weight);
        let member = throttle.join(&MemberOptions { limits, group: surroundings.group, weight }, clock::now());
        if let Some((levels, elapsed_ns)) = levels {
            throttle.resume_member(member, &levels, elapsed_ns, clock::now());
        }
        let group = description.group.clone();
        let state = if left.is_some() { State::Recovering } else { State::Starting };
        let shared = Arc::new(Shared {
            description,
            throttle: Arc::clone(&surroundings.throttle),
            state: AtomicU8::new(state as u8),
            nonce: left.as_ref().map_or_else(making::nonce, |left| left.target.nonce),
            made: OnceLock::new(),
            is_direct: OnceLock::new(),
            copied_because: OnceLock::new(),
            behind: OnceLock::new(),
            standing: Mutex::new(Standing {
                member: Some(member),
                group,
                weight,
                limits,
                size: None,
                entry,
                waiting_for: None,
            }),
        });
        let (inbox, messages) = std::sync::mpsc::channel();
        let start = thread::Start { left, waits };
        let body = thread::DeviceThread::new(Arc::clone(&shared), surroundings, start, inbox.clone(), messages);
        let thread = std::thread::Builder::new()
            .name(thread_name(&name, None))
            .spawn(move || body.run())
            .or_fail(Class::Resource, format!("device {name:?}: cannot start a thread"));
        let thread = thread.inspect_err(|_| {
            // `leave` cannot be refused: the member has no queues yet.
            let _ = throttle.leave(member, clock::now());
        })?;
        Ok(Self { shared, inbox, thread: Some(thread) })
    }

    /// The name in the configuration.
    pub fn name(&self) -> &str {
        &self.shared.description.name
    }

    /// The N of `/dev/ublkbN`, once there is one.
    pub fn id(&self) -> Option<u32> {
        self.shared.made.get().map(|made| made.id)
    }

    /// The size in bytes, once the device is made.
    pub fn size(&self) -> Option<u64> {
        self.shared.standing().size
    }

    /// Whether the backend bypasses the page cache of its file or block device, once that is open.
    pub fn is_direct(&self) -> Option<bool> {
        self.shared.is_direct.get().copied()
    }

    /// The status for `list`.
    pub fn status(&self) -> Status {
        self.shared.status()
    }

    /// Locks the settings in force, which may be changed: see [`Standing`]. Do not hold the guard across a wait.
    pub fn standing(&self) -> MutexGuard<'_, Standing> {
        self.shared.standing()
    }

    /// Reports a change of the standing to the device thread, which then writes the state file.
    pub fn note_change(&self) {
        // The send fails if the device is gone: then there is no state file to write.
        let _ = self.inbox.send(Message::Changed);
    }

    /// The counters of all its queues, summed.
    pub fn stats(&self) -> DeviceStats {
        let mut sum = DeviceStats::default();
        for queue in self.shared.made.get().into_iter().flat_map(|made| &made.queues) {
            sum.add(&queue.counters.snapshot());
        }
        sum
    }

    /// Requests a removal; a second removal joins the first. If the device is already gone, the answer comes at once.
    pub fn remove(&self, removal: Removal) {
        if let Err(unsent) = self.inbox.send(Message::Remove(removal))
            && let Message::Remove(removal) = unsent.0
        {
            (removal.answer)(Ok(Removed::default()));
        }
    }

    /// Resizes the live device to `size` bytes, cut to whole blocks. The answer is the new size in bytes.
    pub fn resize(&self, size: u64, answer: Answer<u64>) {
        if let Err(unsent) = self.inbox.send(Message::Resize(size, answer))
            && let Message::Resize(_, answer) = unsent.0
        {
            answer(Err(thread::is_going(self.name())));
        }
    }

    /// Passes the present size of the file or block device of the backend to `answer`, in bytes, cut to
    /// whole blocks. `None` without a file or block device, or if the device is not live. The error says in
    /// words that the path leads to another file or cannot be examined. `answer` is called at most once; for a
    /// backend with a path, on a separate thread, because a file server may not respond.
    pub fn look_behind(&self, answer: Box<dyn FnOnce(Result<Option<u64>, String>) + Send>) {
        let path = self.shared.description.backend.path().map(Path::to_owned);
        let Some((path, behind)) = path.zip(self.shared.behind.get().copied()) else { return answer(Ok(None)) };
        let is_live = self.shared.is_live();
        let look = move || {
            let size = place::size_behind(&path, behind.identity);
            answer(size.map(|size| size.filter(|_| is_live).map(|size| size - size % u64::from(behind.block))));
        };
        // If no thread can be started, `answer` is dropped without a call. The caller handles that like a
        // path that does not respond.
        let _ = std::thread::Builder::new().name(thread_name(self.name(), None)).spawn(look);
    }

    /// Whether the device waits for a missing backend and has no disk yet.
    pub fn is_waiting(&self) -> bool {
        self.shared.state() == State::Waiting
    }

    /// Whether the next daemon can continue the device if this daemon ends now. A waiting device has no disk to lose.
    pub fn can_outlive_us(&self) -> bool {
        match self.shared.state() {
            State::Waiting => true,
            State::Live | State::Recovering => self.shared.description.on_crash == OnCrash::Requeue,
            _ => false,
        }
    }

    /// The id and nonce of the device that would have to be deleted if the daemon ended now.
    pub fn remains(&self) -> Option<crate::helper::Target> {
        let made = self.shared.made.get()?;
        (self.shared.state() != State::Gone).then_some(crate::helper::Target { id: made.id, nonce: self.shared.nonce })
    }

    /// Joins the device thread, which has announced its end.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has ended the whole process.
            let _ = thread.join();
        }
    }
}

/// Sets the size in a description after a resize. The size of a block device is not part of it.
pub fn set_size(described: &mut Description, bytes: u64) {
    match &mut described.backend {
        Backend::File { size, .. } => *size = Some(bytes),
        Backend::Memory { size } | Backend::Null { size } => *size = bytes,
        Backend::Block { .. } => {}
    }
}

/// The name of a thread, within the kernel's 15 characters: "vol1", "vol1/q0".
fn thread_name(device: &str, queue: Option<u16>) -> String {
    let suffix = queue.map_or(String::new(), |queue| format!("/q{queue}"));
    let room = 15 - suffix.len();
    let cut: String = device.chars().take(room).collect();
    format!("{cut}{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_named_after_its_device_and_queue_within_15_characters() {
        // The kernel cuts longer names, and only the queue number distinguishes the threads in `top -H`.
        assert_eq!(thread_name("vol1", None), "vol1");
        assert_eq!(thread_name("a-very-long-device-name", Some(12)), "a-very-long/q12");
    }

    #[test]
    fn a_state_is_found_again_by_its_number() {
        for (index, state) in State::ALL.into_iter().enumerate() {
            assert_eq!(state as usize, index);
        }
    }
}
