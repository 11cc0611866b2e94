//! The thread of a device. It makes, watches and removes; it serves no request and holds no lock for long.
//!
//! ```text
//!   inbox ◄── queue threads: Ready, Holding, Ending, Ended
//!         ◄── control thread: Remove
//!     │
//!     └─► `note` records each message in a field, whatever is going on; the steps look at the fields
//! ```
//!
//! So a message can come at any time: a removal asked for during the start waits for its end, a second removal joins the
//! first, an abort in the middle of anything is not lost. The steps themselves are in `making` and `removal`.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use throttle_core::group::MemberId;

use super::{Made, Message, Notice, Removal, Removed, Shared, State, Surroundings};
use crate::backend::Backend;
use crate::error::{Class, Failure, Outcome};
use crate::helper::{self, Answer, Helper, Target};
use crate::log;
use crate::queue::Report;
use crate::ublk::queue::CharDevice;

/// How often a helper is looked after, and the quiet is checked.
const TICK: Duration = Duration::from_millis(10);
/// How often a wait without a limit is reported.
const REPORT: Duration = Duration::from_secs(10);

pub(super) struct DeviceThread {
    pub(super) shared: Arc<Shared>,
    pub(super) surroundings: Surroundings,
    /// For the queue threads.
    pub(super) inbox: Sender<Message>,
    pub(super) messages: Receiver<Message>,
    // What was made so far, in the order of making.
    pub(super) backend: Option<Arc<dyn Backend>>,
    pub(super) target: Option<Target>,
    pub(super) char_device: Option<Arc<CharDevice>>,
    pub(super) queues: Vec<JoinHandle<()>>,
    pub(super) is_start_sent: bool,
    // What the messages said.
    pub(super) ready: usize,
    pub(super) ended: usize,
    pub(super) is_ending: bool,
    pub(super) queue_failure: Option<Failure>,
    pub(super) removals: Vec<Removal>,
    pub(super) is_watched: Arc<AtomicBool>,
}

impl DeviceThread {
    pub(super) fn new(
        shared: Arc<Shared>,
        surroundings: Surroundings,
        inbox: Sender<Message>,
        messages: Receiver<Message>,
    ) -> Self {
        Self {
            shared,
            surroundings,
            inbox,
            messages,
            backend: None,
            target: None,
            char_device: None,
            queues: Vec::new(),
            is_start_sent: false,
            ready: 0,
            ended: 0,
            is_ending: false,
            queue_failure: None,
            removals: Vec::new(),
            is_watched: Arc::new(AtomicBool::new(false)),
        }
    }

    /// The whole life.
    pub(super) fn run(mut self) {
        let name = self.name().to_owned();
        match self.make() {
            Ok(()) => {
                self.announce();
                (self.surroundings.notify)(Notice::Live(name.clone()));
                self.live();
                self.reap();
                self.shared.set_state(State::Gone);
                log::info(format_args!("device={name} state=gone"));
                (self.surroundings.notify)(Notice::Gone(name));
            }
            Err(failure) => {
                self.undo();
                self.shared.set_state(State::Gone);
                (self.surroundings.notify)(Notice::Failed(name.clone(), failure.context(format!("device {name:?}"))));
            }
        }
        // Removals that came too late have got what they wanted: it is gone.
        self.drain_inbox();
        self.answer_removals(&Ok(Removed::default()));
    }

    pub(super) fn name(&self) -> &str {
        &self.shared.description.name
    }

    /// Waits for a helper to do its errand.
    pub(super) fn finish(&mut self, mut helper: Helper, limit: Option<Duration>, what: &str) -> Outcome<()> {
        let mut status = None;
        let mut has_ended = |_: &mut Self| {
            status = helper.ended();
            status.is_some()
        };
        match limit {
            Some(limit) if !self.wait(limit, &mut has_ended) => {
                return Err(Failure::new(Class::Failed, format!("{what} has not returned within {limit:?}")));
            }
            Some(_) => {}
            None => self.wait_for_ever(what, has_ended),
        }
        let status = status.unwrap_or_default();
        if status.success() { Ok(()) } else { Err(helper::failure(what, helper.heard(), status)) }
    }

    /// The first word of a helper, or nothing if it ended without one.
    pub(super) fn hear(&mut self, helper: &mut Helper, what: &str) -> Option<Answer> {
        let mut said = None;
        self.wait_for_ever(what, |_| {
            said = helper.heard();
            // What it said before it ended may still be in the pipe.
            if said.is_none() && helper.ended().is_some() {
                said = helper.heard();
                return true;
            }
            said.is_some()
        });
        said
    }

    pub(super) fn outlive(&mut self, helper: &mut Helper) -> std::process::ExitStatus {
        let mut status = None;
        self.wait_for_ever("helper", |_| {
            status = helper.ended();
            status.is_some()
        });
        status.unwrap_or_default()
    }

    /// Notes messages until `is_done`, which is asked at least every [`TICK`]; false if that took longer than `limit`.
    pub(super) fn wait(&mut self, limit: Duration, mut is_done: impl FnMut(&mut Self) -> bool) -> bool {
        let began = Instant::now();
        loop {
            if is_done(self) {
                return true;
            }
            if began.elapsed() >= limit {
                return false;
            }
            self.receive(Some(TICK));
        }
    }

    /// The same for what nothing can call off. It is told, so that a stuck removal has a name.
    pub(super) fn wait_for_ever(&mut self, what: &str, mut is_done: impl FnMut(&mut Self) -> bool) {
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

    fn drain_inbox(&mut self) {
        while let Ok(message) = self.messages.try_recv() {
            self.note(message);
        }
    }

    fn note(&mut self, message: Message) {
        match message {
            Message::Queue(Report::Ready) => self.ready += 1,
            // The look that follows is the reaction.
            Message::Queue(Report::Holding) => {}
            Message::Queue(Report::Ending) => self.is_ending = true,
            Message::Queue(Report::Ended(outcome)) => {
                self.ended += 1;
                if let Err(failure) = outcome {
                    self.fail(failure);
                }
            }
            Message::Remove(removal) => self.removals.push(removal),
            // Before it is made and after it has gone there is nothing to write about.
            Message::Changed if self.target.is_some() => self.write_state(),
            Message::Changed => {}
            Message::Resize(size, answer) => {
                let what = format!("device {:?} cannot become {size} bytes while it is there", self.name());
                answer(Err(Failure::new(Class::Unsupported, what)));
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

    pub(super) fn answer_removals(&mut self, outcome: &Outcome<Removed>) {
        for removal in self.removals.drain(..) {
            (removal.answer)(outcome.clone());
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
