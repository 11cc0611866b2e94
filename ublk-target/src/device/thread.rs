//! The thread of a device. It makes, watches and removes; it serves no request and holds no lock for long.
//!
//! ```text
//!   inbox ◄── queue threads: Ready, Busy, Ending, Ended
//!         ◄── control thread: Remove, Changed, Resize
//!         ◄── looker: Looked
//!     │
//!     └─► `note` records each message in a field, whatever is going on; the steps look at the fields
//! ```
//!
//! So a message can come at any time: a removal asked for during the start waits for its end, a second removal joins the
//! first, an abort in the middle of anything is not lost. The steps themselves are in `waiting`, `making`, `removal`
//! and `resize`.
//!
//! Whoever waits for a removal gets an answer within [`Removal::patience`], whatever the removal waits for: by name, and it goes on.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use throttle_core::group::MemberId;

use super::recovery::TakenUp;
use super::waiting::Found;
use super::{LeftBehind, Made, Message, Notice, Removal, Removed, Shared, State, Surroundings, traces};
use crate::backend::Backend;
use crate::error::{Class, Failure, Outcome};
use crate::helper::{self, Answer, Errand, Helper, Target};
use crate::log;
use crate::queue::Report;
use crate::ublk::queue::CharDevice;

/// How often a helper is looked after, and the quiet is checked.
const TICK: Duration = Duration::from_millis(10);
/// The same while it may be a matter of moments: the steps of a removal are.
const SHORT_TICK: Duration = Duration::from_millis(1);
/// How long that is.
const MOMENTS: Duration = Duration::from_millis(200);
/// How often a wait without a limit is reported.
const REPORT: Duration = Duration::from_secs(10);
/// How long after it has failed something is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a removal waits for what a helper process needs. Less than [`super::PATIENCE`], so that the answer tells the limit
/// that was reached.
const SPAWN_LIMIT: Duration = Duration::from_secs(4);

/// How long a helper that has failed may take to end.
pub(super) const HELPER_END: Duration = Duration::from_secs(1);

/// A removal that has not been answered.
pub(super) struct Waiting {
    pub(super) removal: Removal,
    since: Instant,
}

pub(super) struct DeviceThread {
    pub(super) shared: Arc<Shared>,
    pub(super) surroundings: Surroundings,
    /// What an earlier daemon left of it.
    left: Option<LeftBehind>,
    /// Whether the device waits for a missing backend.
    pub(super) waits: bool,
    /// The device has been in state waiting, so it has a state file.
    pub(super) has_waited: bool,
    /// Result of the last open of the backend, from the looker.
    pub(super) found: Option<Found>,
    /// For the queue threads.
    pub(super) inbox: Sender<Message>,
    pub(super) messages: Receiver<Message>,
    // What was made so far, in the order of making.
    pub(super) backend: Option<Arc<dyn Backend>>,
    pub(super) target: Option<Target>,
    /// Whether somebody else takes its disk down.
    pub(super) take_down: traces::TakeDown,
    pub(super) char_device: Option<Arc<CharDevice>>,
    pub(super) queues: Vec<JoinHandle<()>>,
    pub(super) is_start_sent: bool,
    /// The last helper of [`Self::finish`] has said so, or is still out.
    pub(super) is_sent: bool,
    /// There is, or was, a disk.
    pub(super) has_disk: bool,
    // What the messages said.
    pub(super) ready: usize,
    pub(super) ended: usize,
    pub(super) is_ending: bool,
    /// Another ublk client has sent STOP: it waits for the requests that are with us, or has returned.
    pub(super) is_stopped: bool,
    pub(super) queue_failure: Option<Failure>,
    pub(super) removals: Vec<Waiting>,
    pub(super) resizes: VecDeque<(u64, super::Answer<u64>)>,
    pub(super) is_watched: Arc<AtomicBool>,
    /// When partitions are to be looked for, if they are.
    pub(super) partitions_at: Option<Instant>,
    // How the removal goes.
    /// The helper that has stopped the device, and will delete it.
    pub(super) helper: Option<Helper>,
    /// The daemon ends, and the device with it: no removal is refused any more.
    pub(super) must_go: bool,
    /// Why the last try of what is tried again has failed, as told.
    pub(super) told: String,
    /// A removal was answered before its end, and whether one of those was forced.
    pub(super) late_removal: Option<bool>,
    /// The device is on its way out, for good.
    pub(super) is_going: bool,
    /// What is being waited for.
    pub(super) stage: &'static str,
    /// Queues whose threads wait for the backend, and are not waited for.
    pub(super) stuck: Vec<u16>,
    /// What the user is to be told besides.
    pub(super) notes: Vec<String>,
}

/// How a device thread starts.
pub(super) struct Start {
    /// The disk that an earlier daemon left behind.
    pub(super) left: Option<LeftBehind>,
    /// Whether the device waits for a missing backend.
    pub(super) waits: bool,
}

/// How its life begins.
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

    /// The whole life.
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
        // Removals that came too late have got what they wanted: it is gone.
        self.is_going = true;
        self.drain_inbox();
        let note = (!self.notes.is_empty()).then(|| self.notes.join("; "));
        self.answer_removals(&Ok(Removed { note }));
        self.refuse_resizes();
    }

    /// Makes it, or takes it up.
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

    /// Sends a helper out for a removal. Descriptors may be short while several devices go at once: the first to go give
    /// theirs back.
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

    /// Waits for a helper to do its errand.
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
        // What it said before it ended may still be in the pipe.
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

    /// The next word of a helper, or nothing if it ended without one.
    pub(super) fn hear(&mut self, helper: &mut Helper, what: &'static str) -> Option<Answer> {
        self.hear_unless(helper, what, |_| false)
    }

    /// The same, but nothing too if meanwhile something became true.
    pub(super) fn hear_unless(
        &mut self,
        helper: &mut Helper,
        what: &'static str,
        mut is_moot: impl FnMut(&Self) -> bool,
    ) -> Option<Answer> {
        let mut said = None;
        self.wait_for_ever(what, |this| {
            said = helper.heard();
            // What it said before it ended may still be in the pipe.
            if said.is_none() && helper.ended().is_some() {
                said = helper.heard();
                return true;
            }
            said.is_some() || is_moot(this)
        });
        said
    }

    /// The failure of a helper that said something else than expected, or nothing.
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

    /// Tells that something has failed and is tried again, once for each reason, and waits until it is time for that, or until
    /// `is_moot`.
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

    /// Notes messages until `is_done`, which is asked at least every [`TICK`]; false if that took longer than `limit`.
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

    /// The same for what nothing can call off. It is told, so that a stuck removal has a name.
    pub(super) fn wait_for_ever(&mut self, what: &'static str, mut is_done: impl FnMut(&mut Self) -> bool) {
        self.stage = what;
        while !self.wait(REPORT, &mut is_done) {
            log::warn(
                "W-SLOW",
                format_args!("device={} state={} waiting for {what}", self.name(), self.shared.state().name()),
            );
        }
    }

    /// Waits for one message, no longer than `limit`.
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

    /// Notes what has come.
    pub(super) fn drain_inbox(&mut self) {
        while let Ok(message) = self.messages.try_recv() {
            self.note(message);
        }
    }

    fn note(&mut self, message: Message) {
        match message {
            Message::Queue(Report::Ready) => self.ready += 1,
            // The look that follows is the reaction.
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
            // Before it is made and after it has gone there is nothing to write about.
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

    /// A queue thread could not go on. Before START that fails the start; afterwards requests would wait for ever.
    fn fail(&mut self, failure: Failure) {
        if self.is_start_sent {
            log::error(&failure.context(format!("device {:?}", self.name())));
            // The kernel fails the requests in flight once this process is gone.
            std::process::abort();
        }
        self.queue_failure.get_or_insert(failure);
    }

    /// Whether a removal was asked for and has not been refused.
    pub(super) fn is_removal_wanted(&self) -> bool {
        self.must_go || self.late_removal.is_some() || !self.removals.is_empty()
    }

    /// Whether a removal was asked for that does not care who uses the device.
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

    /// Tells those who have waited long enough what is being waited for. The removal goes on without them.
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

    /// Its place in the throttle, if it has not left.
    pub(super) fn member(&self) -> Option<MemberId> {
        self.shared.standing().member
    }

    pub(super) fn fetched(&self) -> u64 {
        self.made().queues.iter().map(|queue| queue.fetched()).sum()
    }
}

/// The answer to whoever wants to change a device on its way out.
pub(super) fn is_going(name: &str) -> Failure {
    Failure::new(Class::Conflict, format!("device {name:?} is being removed"))
}
