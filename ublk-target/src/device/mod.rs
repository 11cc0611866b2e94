//! A device, from configuration to its last trace: one thread that makes it, watches it and removes it.
//!
//! ```text
//!   Recovering ───┐
//!   Starting ──► Live ──► Draining ──► Stopping ──► Reaping ──► Gone
//!      │          │ del, SIGTERM        ▲ helper: STOP             ▲ helper: DEL
//!      │          └─ stopped by others ─┴──────────► (Reaping) ────┤
//!      └── any step fails: everything made so far is undone ───────┘
//! ```
//!
//! | state | requests | what is waited for |
//! | --- | --- | --- |
//! | Starting | let through, uncharged | queues ready, START, node, the end of the partition scan |
//! | Waiting | none: there is no disk | the backend, which was missing at the start ([`waiting`]); Starting follows |
//! | Recovering | wait in the kernel | the kernel to be done with the old daemon, the backend, the queues |
//! | Live | limited | a removal |
//! | Draining | let through, uncharged | held ones, charged up to a bound, let go by their own threads |
//! | Stopping | let through, uncharged, until aborted | STOP (in a helper), then the queue threads |
//! | Reaping | none | the last user of the disk, for a while |
//!
//! The order of a removal: drain before STOP, or STOP waits for tokens; STOP before the queues end, their end *is* the abort;
//! every gate retired before its thread is joined, so that no other member counts on a queue that is gone; the character
//! device closed before DEL, which waits for that.

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

use throttle_core::group::{GroupId, MemberOptions};
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

/// Where in its life a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Being made.
    Starting,
    /// To be made as soon as its backend is there.
    Waiting,
    /// Left behind by an earlier daemon, and being taken up.
    Recovering,
    /// Serving.
    Live,
    /// Letting go of what it holds.
    Draining,
    /// The kernel is taking the disk down.
    Stopping,
    /// The rest is being cleared away.
    Reaping,
    /// No trace is left.
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

/// How long a removal leaves whoever asked without an answer, where nothing else was said.
pub const PATIENCE: Duration = Duration::from_millis(4500);

/// Asks a device to go. The answer comes when it has gone, or when it turned out to be in use.
pub struct Removal {
    /// Also if somebody uses it.
    pub is_forced: bool,
    /// When to answer at the latest, from when it is asked; the removal goes on.
    pub patience: Duration,
    /// The daemon ends: a removal that fails is tried again until it succeeds. Any other is refused, and the device lives on.
    pub is_final: bool,
    /// Called once, on the device's thread.
    pub answer: Answer<Removed>,
}

/// A device that has gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// What its user should know besides: what was not written back, who keeps its id.
    pub note: Option<String>,
}

/// How a device thread answers whoever asked it for something.
pub type Answer<T> = Box<dyn FnOnce(Outcome<T>) + Send>;

/// What reaches the thread of a device.
enum Message {
    Queue(queue::Report),
    Remove(Removal),
    Changed,
    /// Result of an open of the backend, from the looker.
    Looked(waiting::Found),
    /// Somebody else is stopping it.
    Stopped,
    Resize(u64, Answer<u64>),
}

/// What a device tells the daemon.
#[derive(Debug)]
pub enum Notice {
    /// It serves.
    Live(String),
    /// Its backend is missing. `Live` or `Failed` follows when the backend is there.
    Waiting(String),
    /// It could not be made; nothing of it is left.
    Failed(String, crate::error::Failure),
    /// It was left behind, and cannot be served yet; that is tried again until it can.
    Recovering(String),
    /// It has been removed.
    Gone(String),
    /// It was left behind, and removed by somebody else before it could be taken up.
    Lost(String),
}

/// What the thread of a device shows of it.
struct Shared {
    description: Description,
    throttle: Arc<Throttle>,
    state: AtomicU8,
    /// What ADD stores with it; drawn before, so that whoever finds the state file finds the device.
    nonce: u32,
    made: OnceLock<Made>,
    /// Whether the file or block device behind it is used around the page cache.
    is_direct: OnceLock<bool>,
    /// Why data is copied although `auto` would rather have zero copy, in words.
    copied_because: OnceLock<String>,
    /// The file or block device behind it, if there is one.
    behind: OnceLock<Behind>,
    /// What it protects, and in what order: see [`standing`].
    standing: Mutex<Standing>,
}

/// A file or block device that is open.
#[derive(Clone, Copy, Debug)]
struct Behind {
    /// Device and inode number.
    identity: (u64, u64),
    /// The logical block of a device on it, in bytes.
    block: u32,
}

impl Behind {
    fn of(backend: &dyn crate::backend::Backend) -> Option<Self> {
        backend.identity().map(|identity| Self { identity, block: backend.geometry().logical_block })
    }
}

/// What is known once the kernel has made it.
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

/// What a device needs of its surroundings.
pub struct Surroundings {
    /// The daemon's throttle.
    pub throttle: Arc<Throttle>,
    /// The group of the device there.
    pub group: Option<GroupId>,
    /// Ids that the configuration names for devices without a disk; no device without an `id` gets them.
    pub named_ids: Vec<u32>,
    /// Who tells whether somebody else stops it.
    pub watcher: Arc<Watcher>,
    /// Told of each turn of a queue with a request.
    pub activity: Arc<Activity>,
    /// Where its state file goes.
    pub state_dir: Arc<StateDir>,
    /// Tells the daemon.
    pub notify: Box<dyn Fn(Notice) + Send>,
}

/// A device to be made, or to be taken up.
pub struct Beginning {
    /// As it is to be in force.
    pub description: Description,
    /// As the file of the configuration has it, if it does.
    pub entry: Option<Description>,
    /// What an earlier daemon left of it.
    pub left: Option<LeftBehind>,
    /// How full its limits were, and for how long they have drained since, in nanoseconds.
    pub levels: Option<(Vec<Level>, u64)>,
    /// Whether a new device waits for a missing backend; without it, the device fails.
    pub waits: bool,
}

/// A device without a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftBehind {
    /// Which one.
    pub target: crate::helper::Target,
    /// Device and inode number of the file that was behind it.
    pub identity: Option<(u64, u64)>,
}

/// A device, as the control thread holds it.
pub struct Device {
    shared: Arc<Shared>,
    inbox: Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl Device {
    /// Starts the thread that makes the device. [`Notice::Live`], [`Notice::Waiting`] or [`Notice::Failed`] follows.
    ///
    /// Its place in the throttle it has from here on, so that nobody takes its group away meanwhile.
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
            // It has no queues yet, so nothing keeps it.
            let _ = throttle.leave(member, clock::now());
        })?;
        Ok(Self { shared, inbox, thread: Some(thread) })
    }

    /// Its name in the configuration.
    pub fn name(&self) -> &str {
        &self.shared.description.name
    }

    /// The N of `/dev/ublkbN`, once there is one.
    pub fn id(&self) -> Option<u32> {
        self.shared.made.get().map(|made| made.id)
    }

    /// Its size in bytes, once it is made.
    pub fn size(&self) -> Option<u64> {
        self.shared.standing().size
    }

    /// Whether the file or block device behind it is used around the page cache, once it is open.
    pub fn is_direct(&self) -> Option<bool> {
        self.shared.is_direct.get().copied()
    }

    /// What `list` shows.
    pub fn status(&self) -> Status {
        self.shared.status()
    }

    /// What is in force for it, to be changed: see [`Standing`]. Not to be held while anything is waited for.
    pub fn standing(&self) -> MutexGuard<'_, Standing> {
        self.shared.standing()
    }

    /// Tells it that its standing was changed, so that it writes it down.
    pub fn note_change(&self) {
        // A device that has gone has nothing to write down.
        let _ = self.inbox.send(Message::Changed);
    }

    /// What it has done so far.
    pub fn stats(&self) -> DeviceStats {
        let mut sum = DeviceStats::default();
        for queue in self.shared.made.get().into_iter().flat_map(|made| &made.queues) {
            sum.add(&queue.counters.snapshot());
        }
        sum
    }

    /// Asks it to go; a second removal joins the first. A device that has gone meanwhile answers at once.
    pub fn remove(&self, removal: Removal) {
        if let Err(unsent) = self.inbox.send(Message::Remove(removal))
            && let Message::Remove(removal) = unsent.0
        {
            (removal.answer)(Ok(Removed::default()));
        }
    }

    /// Gives it another size, in bytes, while it is in use. The answer is the size it has then: whole blocks.
    pub fn resize(&self, size: u64, answer: Answer<u64>) {
        if let Err(unsent) = self.inbox.send(Message::Resize(size, answer))
            && let Message::Resize(_, answer) = unsent.0
        {
            answer(Err(thread::is_going(self.name())));
        }
    }

    /// The bytes that what is behind it has now, in whole blocks: `None` without a file or block device, or while the device is not
    /// live. Or, in words, that the path leads to another file. In a thread of its own, because asking may wait for a server
    /// that does not answer; `answer` is called there, once.
    pub fn look_behind(&self, answer: Box<dyn FnOnce(Result<Option<u64>, String>) + Send>) {
        let path = self.shared.description.backend.path().map(Path::to_owned);
        let Some((path, behind)) = path.zip(self.shared.behind.get().copied()) else { return answer(Ok(None)) };
        let is_live = self.shared.is_live();
        let look = move || {
            let size = place::size_behind(&path, behind.identity);
            answer(size.map(|size| size.filter(|_| is_live).map(|size| size - size % u64::from(behind.block))));
        };
        // Without a thread the answer is dropped unheard, which says as much as one that never comes.
        let _ = std::thread::Builder::new().name(thread_name(self.name(), None)).spawn(look);
    }

    /// Whether the device waits for a missing backend and has no disk yet.
    pub fn is_waiting(&self) -> bool {
        self.shared.state() == State::Waiting
    }

    /// Whether it goes on with the next daemon if this one ends now. A waiting device has no disk to lose.
    pub fn can_outlive_us(&self) -> bool {
        match self.shared.state() {
            State::Waiting => true,
            State::Live | State::Recovering => self.shared.description.on_crash == OnCrash::Requeue,
            _ => false,
        }
    }

    /// The device and what would have to be deleted if the daemon ended now.
    pub fn remains(&self) -> Option<crate::helper::Target> {
        let made = self.shared.made.get()?;
        (self.shared.state() != State::Gone).then_some(crate::helper::Target { id: made.id, nonce: self.shared.nonce })
    }

    /// Waits for the end of a thread that has announced it.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic there has ended the whole process.
            let _ = thread.join();
        }
    }
}

/// What a device was made with, after a resize.
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
        // The kernel cuts longer ones, and the queue is what tells them apart in `top -H`.
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
