//! The device thread. It makes, watches and removes the device; it serves no request and holds no lock
//! for long.
//!
//! ```text
//!   inbox ◄── queue threads: Ready, Busy, Ending, NoThread, Ended
//!         ◄── control thread: Remove, Changed, Resize
//!         ◄── looker: Looked
//!         ◄── watcher: Stopped
//!     │
//!     └─► `note` records each message in a field at once; the steps read the fields
//! ```
//!
//! A message may therefore come at any time: a removal requested during the start waits for the end of
//! the start, a second removal joins the first, and an abort during any step is not lost. The steps
//! themselves are in `waiting`, `making`, `recovery`, `removal` and `resize`.
//!
//! Each client of a removal gets an answer within its [`Removal::patience`]. If the removal takes longer,
//! the answer is E-TIMEOUT and names the step that the removal waits for; the removal goes on.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use throttle_core::ids::MemberId;

use super::recovery::TakenUp;
use super::waiting::Found;
use super::{LeftBehind, Made, Message, Notice, Removal, Removed, Shared, State, Surroundings, traces};
use crate::backend::Backend;
use crate::error::{Class, Failure, Outcome};
use crate::helper::{self, Answer, Errand, Helper, Target};
use crate::log;
use crate::queue::Report;
use crate::ublk::queue::CharDevice;

/// Longest interval between two checks of the condition of a `wait`: the end of a helper, a quiet disk, …
const TICK: Duration = Duration::from_millis(10);
/// That interval during the first [`MOMENTS`] of a `wait`: most steps of a removal end within them.
const SHORT_TICK: Duration = Duration::from_millis(1);
/// Time for which a `wait` uses [`SHORT_TICK`].
const MOMENTS: Duration = Duration::from_millis(200);
/// Interval between two log lines about a wait without a limit.
const REPORT: Duration = Duration::from_secs(10);
/// Pause between a failed step and its next try.
const AGAIN: Duration = Duration::from_secs(1);
/// Time for which a removal repeats the spawn of a helper while processes, descriptors or memory are short.
/// Less than [`super::PATIENCE`], so that the answer is the failure of the spawn instead of E-TIMEOUT.
const SPAWN_LIMIT: Duration = Duration::from_secs(4);

/// Time for a helper that has failed to end, before it is killed.
pub(super) const HELPER_END: Duration = Duration::from_secs(1);

/// A removal that has not been answered.
pub(super) struct Waiting {
    pub(super) removal: Removal,
    since: Instant,
}

pub(super) struct DeviceThread {
    pub(super) shared: Arc<Shared>,
    pub(super) surroundings: Surroundings,
    /// The disk that an earlier daemon left behind.
    left: Option<LeftBehind>,
    /// Whether the device waits for a missing backend.
    pub(super) waits: bool,
    /// The device has been in state waiting, so it has a state file.
    pub(super) has_waited: bool,
    /// Result of the last open of the backend, from the looker.
    pub(super) found: Option<Found>,
    /// The sender that queue threads, looker and watcher get a clone of.
    pub(super) inbox: Sender<Message>,
    pub(super) messages: Receiver<Message>,
    // The parts made so far, in the order of their making.
    pub(super) backend: Option<Arc<dyn Backend>>,
    pub(super) target: Option<Target>,
    /// The check for a foreign STOP, with its open sysfs file.
    pub(super) take_down: traces::TakeDown,
    pub(super) char_device: Option<Arc<CharDevice>>,
    pub(super) queues: Vec<JoinHandle<()>>,
    pub(super) is_start_sent: bool,
    /// The last helper of [`Self::finish`] has reported [`Answer::Sent`], or did not end within its limit.
    pub(super) is_sent: bool,
    /// The kernel has, or had, a disk of the device.
    pub(super) has_disk: bool,
    // The content of the messages so far.
    pub(super) ready: usize,
    pub(super) ended: usize,
    pub(super) is_ending: bool,
    /// Another ublk client has sent STOP, which waits for the requests that the daemon has, or has returned.
    pub(super) is_stopped: bool,
    pub(super) queue_failure: Option<Failure>,
    pub(super) removals: Vec<Waiting>,
    pub(super) resizes: VecDeque<(u64, super::Answer<u64>)>,
    pub(super) is_watched: Arc<AtomicBool>,
    /// Instant of the partition scan, if a scan is due.
    pub(super) partitions_at: Option<Instant>,
    // The progress of the removal.
    /// The helper that waits for its next word: after ADD for START or DEL, after STOP for DEL.
    pub(super) helper: Option<Helper>,
    /// The daemon ends, and the device with it: from now on a failed removal is tried again.
    pub(super) must_go: bool,
    /// The last failure that [`Self::try_again`] has logged.
    pub(super) told: String,
    /// `Some` after a removal was answered with E-TIMEOUT before its end; true if a removal so far was forced.
    pub(super) late_removal: Option<bool>,
    /// A removal is past the in-use check, or the device is gone: resizes are refused.
    pub(super) is_going: bool,
    /// The step that the thread waits for, in words, for the answer to a late removal.
    pub(super) stage: &'static str,
    /// Queues whose threads still wait for the backend. Their threads are not joined.
    pub(super) stuck: Vec<u16>,
    /// Notes for the clients of the removal ([`Removed::note`]).
    pub(super) notes: Vec<String>,
}

/// The input of a new device thread.
pub(super) struct Start {
    /// The disk that an earlier daemon left behind.
    pub(super) left: Option<LeftBehind>,
    /// Whether the device waits for a missing backend.
    pub(super) waits: bool,
}

/// The result of making or recovering the device.
enum Begun {
    Live { is_recovered: bool },
    Stopped,
    Lost,
}

impl DeviceThread {
    pub(super) fn new(
        shared: Arc<Shared>,
        surroundings: Surroundings,
        start: Start,
        inbox: Sender<Message>,
        messages: Receiver<Message>,
    ) -> Self {
        Self {
            shared,
            surroundings,
            left: start.left,
            waits: start.waits,
            has_waited: false,
            found: None,
            inbox,
            messages,
            backend: None,
            target: None,
            take_down: traces::TakeDown::default(),
            char_device: None,
            queues: Vec::new(),
            is_start_sent: false,
            is_sent: false,
            has_disk: false,
            ready: 0,
            ended: 0,
            is_ending: false,
            is_stopped: false,
            queue_failure: None,
            removals: Vec::new(),
            resizes: VecDeque::new(),
            is_watched: Arc::new(AtomicBool::new(false)),
            partitions_at: None,
            helper: None,
            must_go: false,
            told: String::new(),
            late_removal: None,
            is_going: false,
            stage: "starting",
            stuck: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Makes or recovers the device, watches it and removes it. Returns when the device is gone.
    pub(super) fn run(mut self) {
        let name = self.name().to_owned();
        match self.begin() {
            Ok(Begun::Live { is_recovered }) => {
                self.announce(if is_recovered { "recovered" } else { "started" });
                (self.surroundings.notify)(Notice::Live(name.clone()));
                self.live();
                self.reap();
                self.end();
            }
            Ok(Begun::Stopped) => {
                self.reap();
                self.end();
            }
            Ok(Begun::Lost) => {
                self.surroundings.state_dir.forget(&name);
                self.reap();
                self.shared.set_state(State::Gone);
                (self.surroundings.notify)(Notice::Lost(name));
            }
            Err(failure) => {
                self.undo();
                self.shared.set_state(State::Gone);
                (self.surroundings.notify)(Notice::Failed(name.clone(), failure.context(format!("device {name:?}"))));
            }
        }
        // A removal that came after the end succeeds as well: the device is gone.
        self.is_going = true;
        self.drain_inbox();
        let note = (!self.notes.is_empty()).then(|| self.notes.join("; "));
        self.answer_removals(&Ok(Removed { note }));
        self.refuse_resizes();
    }

    /// Makes the device, or recovers it.
    fn begin(&mut self) -> Outcome<Begun> {
        let Some(left) = self.left.take() else {
            let Some(backend) = self.await_backend()? else { return Ok(Begun::Stopped) };
            return self.make(backend).map(|()| Begun::Live { is_recovered: false });
        };
        match self.take_up(&left) {
            TakenUp::Live => Ok(Begun::Live { is_recovered: true }),
            TakenUp::Removed => Ok(Begun::Stopped),
            TakenUp::Lost => {
                log::warn("W-LOST", format_args!("device={} was removed while no daemon served it", self.name()));
                Ok(Begun::Lost)
            }
        }
    }

    fn end(&self) {
        self.shared.set_state(State::Gone);
        log::info(format_args!("device={} state=gone", self.name()));
        (self.surroundings.notify)(Notice::Gone(self.name().to_owned()));
    }

    pub(super) fn name(&self) -> &str {
        &self.shared.description.name
    }

    /// Spawns a helper for a removal; repeats that for up to [`SPAWN_LIMIT`] while processes, descriptors or
    /// memory are short. Descriptors may be short while several devices are removed at once: the first
    /// removals to end give theirs back.
    pub(super) fn send(&mut self, target: Target, errand: Errand) -> Outcome<Helper> {
        let mut sent = Helper::spawn(target, errand);
        self.stage = "a helper process: processes, descriptors or memory are short";
        self.wait(SPAWN_LIMIT, |_| {
            if sent.as_ref().is_err_and(|failure| failure.class == Class::Resource) {
                sent = Helper::spawn(target, errand);
            }
            sent.as_ref().map_or_else(|failure| failure.class != Class::Resource, |_| true)
        });
        sent
    }

    /// Waits for the end of a helper and returns its result. Kills the helper after `limit`.
    pub(super) fn finish(&mut self, mut helper: Helper, limit: Duration, what: &'static str) -> Outcome<()> {
        self.stage = what;
        let (mut status, mut said, mut is_sent) = (None, None, false);
        let in_time = self.wait(limit, |_| {
            status = helper.ended();
            if let Some(word) = helper.heard() {
                is_sent |= word == Answer::Sent;
                said = Some(word);
            }
            status.is_some()
        });
        is_sent |= !in_time;
        // The last answers of a helper that has ended may still be in the pipe.
        while let Some(last) = helper.heard() {
            is_sent |= last == Answer::Sent;
            said = Some(last);
        }
        self.is_sent = is_sent;
        if !in_time {
            helper.kill();
            return Err(Failure::new(Class::Failed, format!("{what} has not returned within {limit:?}")));
        }
        let status = status.unwrap_or_default();
        if status.success() { Ok(()) } else { Err(helper::failure(what, said, status)) }
    }

    /// Waits for the next answer of a helper. `None` if the helper ended without an answer.
    pub(super) fn hear(&mut self, helper: &mut Helper, what: &'static str) -> Option<Answer> {
        self.hear_unless(helper, what, |_| false)
    }

    /// Like [`Self::hear`], but also returns `None` when `is_moot` becomes true.
    pub(super) fn hear_unless(
        &mut self,
        helper: &mut Helper,
        what: &'static str,
        mut is_moot: impl FnMut(&Self) -> bool,
    ) -> Option<Answer> {
        let mut said = None;
        self.wait_for_ever(what, |this| {
            said = helper.heard();
            // The last answers of a helper that has ended may still be in the pipe.
            if said.is_none() && helper.ended().is_some() {
                said = helper.heard();
                return true;
            }
            said.is_some() || is_moot(this)
        });
        said
    }

    /// Returns the failure of a helper whose answer was not the expected one, or missing. Kills the helper if it
    /// does not end within [`HELPER_END`].
    pub(super) fn disappointed(&mut self, mut helper: Helper, what: &'static str, said: Option<Answer>) -> Failure {
        let mut status = None;
        self.wait(HELPER_END, |_| {
            status = helper.ended();
            status.is_some()
        });
        if status.is_none() {
            helper.kill();
        }
        helper::failure(what, said, status.unwrap_or_default())
    }

    /// Logs a failed step, unless its message is that of the last logged failure, and waits for the next
    /// try: [`AGAIN`], or until `is_moot` is true.
    pub(super) fn try_again(&mut self, failure: &Failure, is_moot: impl FnMut(&mut Self) -> bool) {
        if self.told != failure.message {
            self.told.clone_from(&failure.message);
            log::warn(
                "W-TRIED-AGAIN",
                format_args!("device={} {}; tried again each second", self.name(), failure.message),
            );
        }
        self.wait(AGAIN, is_moot);
    }

    /// Receives messages until `is_done` is true, and evaluates it at least every [`TICK`]. False after `limit`.
    pub(super) fn wait(&mut self, limit: Duration, mut is_done: impl FnMut(&mut Self) -> bool) -> bool {
        let began = Instant::now();
        loop {
            if is_done(self) {
                return true;
            }
            let so_far = began.elapsed();
            if so_far >= limit {
                return false;
            }
            self.receive(Some(if so_far < MOMENTS { SHORT_TICK } else { TICK }));
            self.answer_late();
        }
    }

    /// Like [`Self::wait`], without a limit. Logs `what` every 10 s, so that a stuck removal shows its cause.
    pub(super) fn wait_for_ever(&mut self, what: &'static str, mut is_done: impl FnMut(&mut Self) -> bool) {
        self.stage = what;
        while !self.wait(REPORT, &mut is_done) {
            log::warn(
                "W-SLOW",
                format_args!("device={} state={} waiting for {what}", self.name(), self.shared.state().name()),
            );
        }
    }

    /// Waits for one message, at most `limit`.
    pub(super) fn receive(&mut self, limit: Option<Duration>) {
        let message = match limit {
            Some(limit) => self.messages.recv_timeout(limit),
            None => self.messages.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match message {
            Ok(message) => self.note(message),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => unreachable!("this thread keeps a sender for its queues"),
        }
    }

    /// Records all messages in the inbox, without a wait.
    pub(super) fn drain_inbox(&mut self) {
        while let Ok(message) = self.messages.try_recv() {
            self.note(message);
        }
    }

    fn note(&mut self, message: Message) {
        match message {
            Message::Queue(Report::Ready) => self.ready += 1,
            // The message only ends the wait of `live`, which then checks for a foreign STOP.
            Message::Queue(Report::Busy) => {}
            Message::Queue(Report::Ending) => self.is_ending = true,
            Message::Queue(Report::NoThread { queue }) => log::warn(
                "W-THREADS",
                format_args!(
                    "device={} queue={queue}: the kernel cannot make a thread for a request, which waits for one; look at pids.max \
                     (TasksMax=) and kernel.threads-max",
                    self.name()
                ),
            ),
            Message::Queue(Report::Ended { queue, outcome, stuck }) => {
                self.ended += 1;
                if stuck > 0 {
                    self.stuck.push(queue);
                }
                if let Err(failure) = outcome {
                    self.fail(failure);
                }
            }
            Message::Remove(removal) => {
                self.must_go |= removal.is_final;
                self.removals.push(Waiting { removal, since: Instant::now() });
            }
            Message::Stopped => self.is_stopped = true,
            // Before the device has a state file and after its removal there is no file to write.
            Message::Changed if self.target.is_some() || self.has_waited => self.write_state(),
            Message::Changed => {}
            Message::Looked(found) => self.found = Some(found),
            Message::Resize(size, answer) => {
                self.resizes.push_back((size, answer));
                if self.is_going {
                    self.refuse_resizes();
                }
            }
        }
    }

    /// Handles the failure of a queue thread. Before START, the start fails. Once START was sent, the process
    /// aborts: the requests of the queue would otherwise wait for ever.
    fn fail(&mut self, failure: Failure) {
        if self.is_start_sent {
            log::error(&failure.context(format!("device {:?}", self.name())));
            // Once this process is gone, the kernel fails the requests in flight, or requeues them for the next
            // daemon (`on-crash: requeue`).
            std::process::abort();
        }
        self.queue_failure.get_or_insert(failure);
    }

    /// Whether a removal was requested and has not failed.
    pub(super) fn is_removal_wanted(&self) -> bool {
        self.must_go || self.late_removal.is_some() || !self.removals.is_empty()
    }

    /// Whether a forced removal was requested: one that also removes a device in use.
    pub(super) fn is_forced(&self) -> bool {
        self.must_go || self.late_removal == Some(true) || self.removals.iter().any(|waiting| waiting.removal.is_forced)
    }

    pub(super) fn answer_removals(&mut self, outcome: &Outcome<Removed>) {
        for waiting in self.removals.drain(..) {
            (waiting.removal.answer)(outcome.clone());
        }
    }

    pub(super) fn refuse_resizes(&mut self) {
        for (_, answer) in std::mem::take(&mut self.resizes) {
            answer(Err(is_going(self.name())));
        }
    }

    /// Answers each removal whose patience is over with E-TIMEOUT and the step that is waited for. The removal
    /// goes on.
    fn answer_late(&mut self) {
        let late = |waiting: &mut Waiting| waiting.since.elapsed() >= waiting.removal.patience;
        for waiting in self.removals.extract_if(.., late).collect::<Vec<_>>() {
            let what = format!(
                "device {:?} is not gone after {:?}: {}; the removal goes on, `list` tells",
                self.name(),
                waiting.removal.patience,
                self.stage
            );
            self.late_removal = Some(self.is_forced() || waiting.removal.is_forced);
            (waiting.removal.answer)(Err(Failure::new(Class::Timeout, what)));
        }
    }

    pub(super) fn made(&self) -> &Made {
        self.shared.made.get().expect("only used once the device was added")
    }

    /// The member of the device in the throttle, until it leaves.
    pub(super) fn member(&self) -> Option<MemberId> {
        self.shared.standing().member
    }

    pub(super) fn fetched(&self) -> u64 {
        self.made().queues.iter().map(|queue| queue.fetched()).sum()
    }
}

/// The answer to a resize of a device that is being removed.
pub(super) fn is_going(name: &str) -> Failure {
    Failure::new(Class::Conflict, format!("device {name:?} is being removed"))
}
