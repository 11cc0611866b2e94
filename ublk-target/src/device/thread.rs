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
//! first, an abort in the middle of anything is not lost.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use throttle_core::group::{MemberId, MemberOptions};

use super::{Made, Message, Notice, Removal, Shared, State, Surroundings, thread_name, traces};
use crate::backend::{self, Backend};
use crate::clock;
use crate::error::{Class, Failure, OrFail, Outcome};
use crate::helper::{self, Answer, Errand, Helper, Target};
use crate::log;
use crate::queue::{self, Handle, Report};
use crate::ublk::control::{Control, NewDevice};
use crate::ublk::queue::CharDevice;
use crate::ublk::{DeviceInfo, Owner};

/// The longest read or write: one buffer of this size for each tag, touched only as far as it is used.
const REQUEST_BYTES_MAX: u32 = 512 * 1024;

/// Until every queue thread has offered its tags. It takes milliseconds; a kernel that does not answer must not hang us.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// Until START has returned: on some kernels it reads the partition table, from our backend.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Until the node has appeared.
const NODE_LIMIT: Duration = Duration::from_secs(5);
/// A device without a new request for so long has been scanned for partitions, by the kernel and by udev.
const QUIET: Duration = Duration::from_millis(50);
/// One that never gets quiet is in use already.
const QUIET_LIMIT: Duration = Duration::from_secs(2);
/// How long DEL may wait for those who still have the disk open, before the id is left to them: enough for udev, which looks
/// at a disk that changes, and not so long that a forced removal seems to hang.
const DELETE_LIMIT: Duration = Duration::from_millis(500);
/// How often a helper is looked after, and the quiet is checked.
const TICK: Duration = Duration::from_millis(10);
/// How often a device that holds requests is looked at for the sign of a foreign STOP.
const LOOK: Duration = Duration::from_millis(250);
/// A request held no longer than this is no reason to look.
const HELD_LONG: Duration = Duration::from_millis(100);
/// How often a wait without a limit is reported.
const REPORT: Duration = Duration::from_secs(10);

pub(super) struct DeviceThread {
    shared: Arc<Shared>,
    surroundings: Surroundings,
    /// For the queue threads.
    inbox: Sender<Message>,
    messages: Receiver<Message>,
    // What was made so far, in the order of making.
    backend: Option<Arc<dyn Backend>>,
    target: Option<Target>,
    char_device: Option<Arc<CharDevice>>,
    queues: Vec<JoinHandle<()>>,
    is_start_sent: bool,
    // What the messages said.
    ready: usize,
    ended: usize,
    is_ending: bool,
    queue_failure: Option<Failure>,
    removals: Vec<Removal>,
    is_watched: Arc<AtomicBool>,
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
        self.answer_removals(&Ok(()));
    }

    fn name(&self) -> &str {
        &self.shared.description.name
    }

    // ---- making ----

    fn make(&mut self) -> Outcome<()> {
        let description = &self.shared.description;
        let backend: Arc<dyn Backend> = backend::open(&description.backend, description.read_only)?.into();
        let geometry = backend.geometry();
        if geometry.usable_size() != geometry.size {
            log::warn(
                "W-SIZE",
                format_args!(
                    "device={} size={} of {} bytes: the rest is less than a block of {}",
                    description.name,
                    geometry.usable_size(),
                    geometry.size,
                    geometry.logical_block
                ),
            );
        }
        self.backend = Some(Arc::clone(&backend));
        let mut control = Control::open()?;
        let info = self.add(&mut control)?;
        control.set_params(info.id, &geometry.params(info.request_bytes_max)).map_err(|errno| {
            Failure::new(Class::Failed, format!("the kernel refuses its parameters: {}", errno.desc()))
        })?;
        let files: Vec<RawFd> = backend.files();
        self.char_device = Some(Arc::new(CharDevice::open(&info, &files)?));
        self.join_throttle();
        self.start_queues(&mut control, &info, &backend)?;
        self.start_disk()?;
        self.settle();
        Ok(())
    }

    fn add(&mut self, control: &mut Control) -> Outcome<DeviceInfo> {
        let description = &self.shared.description;
        let nonce = nonce();
        let wanted = NewDevice {
            id: description.id,
            queues: description.queues,
            depth: description.depth,
            request_bytes_max: REQUEST_BYTES_MAX,
            owner: Owner::ours(nonce),
        };
        let info = control.add(&wanted).map_err(|errno| self.refused(control, errno))?;
        self.target = Some(Target { id: info.id, nonce });
        if info.queues != description.queues {
            log::warn(
                "W-QUEUES",
                format_args!(
                    "device={} queues={} of {}: the kernel gives no more than it has CPUs",
                    description.name, info.queues, description.queues
                ),
            );
        }
        let mut handles = Vec::new();
        for _ in 0..info.queues {
            handles.push(Handle::new()?);
        }
        let size = self.backend.as_ref().map_or(0, |backend| backend.geometry().usable_size());
        let made = Made { id: info.id, nonce, size, queues: handles, depth: info.depth };
        assert!(self.shared.made.set(made).is_ok(), "a device is made once");
        // Now, not at the end: a daemon killed during the start leaves a device too.
        self.write_state();
        Ok(info)
    }

    /// The reason why ADD was refused.
    fn refused(&self, control: &mut Control, errno: Errno) -> Failure {
        match (errno, self.shared.description.id) {
            (Errno::EEXIST, Some(id)) => {
                let owner = control.info(id).map_or(-1, |info| info.server);
                Failure::new(
                    Class::IdTaken,
                    format!("id {id} is taken by {}; choose another id, or none", process_in_words(owner)),
                )
            }
            (Errno::EPERM | Errno::EACCES, _) => {
                Failure::new(Class::Perm, "the kernel lets only CAP_SYS_ADMIN add ublk devices; run as root")
            }
            (Errno::ENOSPC | Errno::EUSERS | Errno::EBUSY, _) => {
                Failure::new(Class::KernelLimit, format!("the kernel takes no more ublk devices: {}", errno.desc()))
            }
            _ => Err::<(), _>(errno).or_fail(Class::Failed, "the kernel refuses to add a device").unwrap_err(),
        }
    }

    /// A device without limits and group stays outside: it costs nothing.
    fn join_throttle(&mut self) {
        let description = &self.shared.description;
        if description.limits.is_unlimited() && self.surroundings.group.is_none() {
            return;
        }
        let options =
            MemberOptions { limits: description.limits, group: self.surroundings.group, ..MemberOptions::default() };
        let member = self.surroundings.throttle.join(&options, clock::now());
        *self.member() = Some(member);
    }

    fn start_queues(&mut self, control: &mut Control, info: &DeviceInfo, backend: &Arc<dyn Backend>) -> Outcome<()> {
        let member: Option<MemberId> = *self.member();
        for id in 0..info.queues {
            let inbox = Mutex::new(self.inbox.clone());
            let setup = queue::Setup {
                device: Arc::clone(self.char_device.as_ref().expect("opened before")),
                id,
                depth: info.depth,
                request_bytes_max: info.request_bytes_max,
                // A matter of speed only.
                cpus: control.affinity(info.id, id).ok(),
                backend: Arc::clone(backend),
                is_read_only: self.shared.description.read_only,
                membership: member.map(|member| (Arc::clone(&self.surroundings.throttle), member)),
                handle: Arc::clone(&self.made().queues[usize::from(id)]),
                is_watched: Arc::clone(&self.is_watched),
                report: Box::new(move |report| {
                    // The device thread outlives its queues.
                    let _ = inbox.lock().expect("used by one thread").send(Message::Queue(report));
                }),
            };
            let thread = std::thread::Builder::new()
                .name(thread_name(self.name(), Some(id)))
                .spawn(move || queue::run(setup))
                .or_fail(Class::Resource, format!("cannot start the thread of queue {id}"))?;
            self.queues.push(thread);
        }
        let all = self.queues.len();
        let in_time = self.wait(READY_LIMIT, |this| this.ready == all || this.ended > 0);
        match self.queue_failure.take() {
            Some(failure) => Err(failure),
            None if in_time && self.ended == 0 => Ok(()),
            None => {
                let what = format!("only {} of {all} queues were ready within {READY_LIMIT:?}", self.ready);
                Err(Failure::new(Class::Failed, what))
            }
        }
    }

    fn start_disk(&mut self) -> Outcome<()> {
        let target = self.target.expect("added before");
        self.is_start_sent = true;
        let helper = Helper::spawn(target, Errand::Start { server: std::process::id() })?;
        self.finish(helper, Some(START_LIMIT), "START")?;
        if !self.wait(NODE_LIMIT, |_| traces::has_node(target.id)) {
            let what = format!(
                "{} did not appear within {NODE_LIMIT:?}; is devtmpfs or udev at work?",
                traces::node(target.id)
            );
            return Err(Failure::new(Class::Node, what));
        }
        traces::make_link(self.name(), target.id)
    }

    /// Waits for the end of the partition scan, then turns the limits on.
    fn settle(&mut self) {
        let (began, mut changed) = (Instant::now(), Instant::now());
        let mut before = self.fetched();
        self.wait(QUIET_LIMIT, |this| {
            let fetched = this.fetched();
            if fetched != before {
                (before, changed) = (fetched, Instant::now());
            }
            changed.elapsed() >= QUIET || began.elapsed() >= QUIET_LIMIT
        });
        let member = *self.member();
        if let Some(member) = member {
            self.surroundings.throttle.go_live(member);
        }
        self.shared.set_state(State::Live);
    }

    fn announce(&mut self) {
        self.write_state();
        let made = self.made();
        log::info(format_args!(
            "device={} state=started node={} queues={} depth={} size={}",
            self.name(),
            traces::node(made.id),
            made.queues.len(),
            made.depth,
            made.size
        ));
    }

    /// A daemon that cannot write its state serves all the same.
    fn write_state(&self) {
        if let Err(failure) = self.surroundings.state_dir.write(&self.shared.status()) {
            log::warn("W-STATE", format_args!("device={} {}", self.name(), failure.message));
        }
    }

    /// Takes back a start that failed at whatever step.
    fn undo(&mut self) {
        if self.is_start_sent && self.ended == 0 {
            self.drain();
            self.shared.set_state(State::Stopping);
            if let Err(failure) = self.stop(true) {
                log::error(&failure.context(format!("device {:?}: undoing a failed start", self.name())));
            }
        } else if let Some(made) = self.shared.made.get() {
            made.queues.iter().for_each(|queue| queue.leave());
            let all = self.queues.len();
            self.wait_for_ever("queues", |this| this.ended == all);
        }
        self.reap();
    }

    // ---- living ----

    /// Until the device has been stopped, by us or by somebody else.
    fn live(&mut self) {
        loop {
            // First what may have come during the start.
            if !self.removals.is_empty() && self.remove() {
                return;
            }
            let is_watching = self.is_watched.load(Ordering::Acquire);
            if self.is_ending || (is_watching && self.watch()) {
                return self.follow_foreign_stop();
            }
            self.receive(is_watching.then_some(LOOK));
        }
    }

    /// While something is held: whether the kernel is taking the disk down behind our back.
    fn watch(&mut self) -> bool {
        let member = *self.member();
        let Some(member) = member else { return false };
        let held = self.surroundings.throttle.held(member);
        if held.count == 0 {
            self.is_watched.store(false, Ordering::Release);
            // A queue that began to hold before that store said nothing: it found somebody watching.
            if self.surroundings.throttle.held(member).count > 0 {
                self.is_watched.store(true, Ordering::Release);
            }
            return false;
        }
        let long = held.oldest.is_some_and(|since| clock::until(since, clock::now()) > HELD_LONG);
        long && self.target.is_some_and(|target| traces::disk_is_going(target.id))
    }

    /// Another ublk client stopped the device: let go of what is held, and serve until the last abort.
    fn follow_foreign_stop(&mut self) {
        self.drain();
        log::warn("W-REMOVED-EXTERNALLY", format_args!("device={} state=draining", self.name()));
        self.shared.set_state(State::Stopping);
        let all = self.queues.len();
        self.wait_for_ever("abort", |this| this.ended == all);
    }

    /// Goes through with a removal as far as STOP; false if the device is in use and lives on.
    fn remove(&mut self) -> bool {
        let is_forced = self.removals.iter().any(|removal| removal.is_forced);
        match self.stop(is_forced) {
            Ok(()) => true,
            Err(failure) if self.is_ending => {
                // Somebody else was faster.
                log::warn("W-REMOVED-EXTERNALLY", format_args!("device={} {}", self.name(), failure.message));
                self.follow_foreign_stop();
                true
            }
            Err(failure) => {
                self.answer_removals(&Err(failure));
                false
            }
        }
    }

    /// The in-use check, drain, and STOP, until every queue thread has ended.
    fn stop(&mut self, is_forced: bool) -> Outcome<()> {
        let target = self.target.expect("only a device that was added is stopped");
        let mut helper = Helper::spawn(target, Errand::Stop { is_forced })?;
        match self.hear(&mut helper, "in-use check") {
            Some(Answer::Claimed) => {}
            Some(Answer::Busy(users)) => {
                return Err(Failure::new(
                    Class::Busy,
                    format!(
                        "device {:?} ({}) is in use: {users}; unmount or close it first, or use --force",
                        self.name(),
                        traces::node(target.id)
                    ),
                ));
            }
            said => {
                let status = self.outlive(&mut helper);
                return Err(helper::failure("cannot stop the device", said, status));
            }
        }
        self.drain();
        log::info(format_args!("device={} state=stopping forced={is_forced}", self.name()));
        self.shared.set_state(State::Stopping);
        helper.go();
        self.finish(helper, None, "STOP")?;
        let all = self.queues.len();
        self.wait_for_ever("queues", |this| this.ended == all);
        Ok(())
    }

    /// Lets go of everything held, now and from now on.
    fn drain(&mut self) {
        if self.shared.is_live() {
            self.shared.set_state(State::Draining);
        }
        let member = *self.member();
        if let Some(member) = member {
            self.surroundings.throttle.drain(member, clock::now());
        }
    }

    // ---- clearing away ----

    /// The queue threads have ended or are about to: takes every other trace away.
    fn reap(&mut self) {
        self.shared.set_state(State::Reaping);
        for queue in self.queues.drain(..) {
            // A panic there has ended the whole process.
            let _ = queue.join();
        }
        let member = self.member().take();
        if let Some(member) = member {
            let left = self.surroundings.throttle.leave(member, clock::now());
            assert!(left.is_ok(), "every queue thread retired its gate before it ended: {left:?}");
        }
        // The last owners of the character device and of what it has registered; DEL waits for the former.
        self.char_device = None;
        self.backend = None;
        let Some(target) = self.target.take() else { return };
        traces::remove_link(self.name(), target.id);
        self.delete(target);
        self.surroundings.state_dir.forget(self.name());
    }

    fn delete(&mut self, target: Target) {
        let mut helper = match Helper::spawn(target, Errand::Delete) {
            Ok(helper) => helper,
            Err(failure) => return log::error(&failure.context(format!("device {:?}: DEL", self.name()))),
        };
        let said = self.hear(&mut helper, "DEL");
        let mut status = None;
        let is_free = self.wait(DELETE_LIMIT, |_| {
            status = helper.ended();
            status.is_some()
        });
        if !is_free {
            // The disk itself is gone; only its number waits for the last close.
            helper.kill();
            log::warn(
                "W-ID-RESERVED",
                format_args!("device={} id={} stays reserved until the last user closes it", self.name(), target.id),
            );
        } else if status.is_none_or(|status| !status.success()) {
            let failure = helper::failure("DEL", said, status.unwrap_or_default());
            log::error(&failure.context(format!("device {:?}", self.name())));
        }
    }

    // ---- messages and waits ----

    /// Waits for a helper to do its errand.
    fn finish(&mut self, mut helper: Helper, limit: Option<Duration>, what: &str) -> Outcome<()> {
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
    fn hear(&mut self, helper: &mut Helper, what: &str) -> Option<Answer> {
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

    fn outlive(&mut self, helper: &mut Helper) -> std::process::ExitStatus {
        let mut status = None;
        self.wait_for_ever("helper", |_| {
            status = helper.ended();
            status.is_some()
        });
        status.unwrap_or_default()
    }

    /// Notes messages until `is_done`, which is asked at least every [`TICK`]; false if that took longer than `limit`.
    fn wait(&mut self, limit: Duration, mut is_done: impl FnMut(&mut Self) -> bool) -> bool {
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
    fn wait_for_ever(&mut self, what: &str, mut is_done: impl FnMut(&mut Self) -> bool) {
        while !self.wait(REPORT, &mut is_done) {
            log::warn(
                "W-SLOW",
                format_args!("device={} state={} waiting for {what}", self.name(), self.shared.state().name()),
            );
        }
    }

    /// Waits for one message, no longer than `limit`.
    fn receive(&mut self, limit: Option<Duration>) {
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

    fn answer_removals(&mut self, outcome: &Outcome<()>) {
        for removal in self.removals.drain(..) {
            (removal.answer)(outcome.clone());
        }
    }

    // ---- looks at what is shared ----

    fn made(&self) -> &Made {
        self.shared.made.get().expect("only used once the device was added")
    }

    fn member(&self) -> std::sync::MutexGuard<'_, Option<MemberId>> {
        self.shared.member.lock().expect("nothing panics while it holds this lock")
    }

    fn fetched(&self) -> u64 {
        self.made().queues.iter().map(|queue| queue.fetched()).sum()
    }
}

/// Tells this device from every other that had or will have its id. Uniqueness is enough, it is no secret.
fn nonce() -> u32 {
    use std::hash::{BuildHasher, Hasher};
    // Seeded by the system for each value.
    std::hash::RandomState::new().build_hasher().finish() as u32
}

fn process_in_words(pid: i32) -> String {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    match comm {
        Ok(comm) if pid > 0 => format!("{} (pid {pid})", comm.trim()),
        _ => "a device that no process serves".to_owned(),
    }
}
