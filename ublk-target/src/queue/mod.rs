//! A queue thread: fetches requests, asks the gate, hands them to the backend, answers them.
//!
//! ```text
//!        ┌──────────────────────────── one turn ────────────────────────────┐
//!   wait │ events ──► Delivered ─► gate.request_all ──► lane.issue ──► commit│ submit, and wait until
//!        │       └──► Backend ──► continue or commit    ▲                    │ an event or the gate's
//!        │ bell.take, gate.poll ─► dispatched tags ─────┘                    │ deadline
//!        └──────────────────────────────────────────────────────────────────┘
//! ```
//!
//! 1. The thread blocks once per turn, in `io_uring_enter`, at most until the gate's deadline. If
//!    every new read or write would be held until then, it blocks in `clock_nanosleep` instead (at
//!    most 1 ms), so that new requests do not wake it. It reads the clock once a turn, after the
//!    wait. Whether time, an event or a signal ended the wait does not matter: everything due by
//!    the clock is done. If nothing is due, the thread may yield before it waits (`spell`).
//! 2. Only this thread touches the tags of its queue. All that a different thread does is ring the
//!    bell.
//! 3. A held request is a tag not given back: the kernel's hardware queue fills up, and the client
//!    waits. Nothing is allocated.
//! 4. The thread ends when the kernel has aborted every tag and the gate has retired: no reference
//!    to the queue is left then.
//! 5. A device that is being removed does not wait for ever for its backend: a request that the
//!    backend has had for [`PATIENCE`] gets EIO. The ring entry is still in flight, so its buffer,
//!    its file and this thread outlive the queue until it completes. With zero copy the kernel
//!    keeps the request as well: the backend has the client's pages, without a buffer in between.

mod bell;
pub mod buffers;
pub mod counters;
mod spell;
mod tags;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use caps::{CapSet, Capability};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::prctl::set_timerslack;
use nix::unistd::Pid;
use throttle_core::cost::Operation;
use throttle_core::gate::Gate;
use throttle_core::ids::MemberId;
use throttle_core::request::{Request as Arrived, Tag};
use throttle_core::throttle::{Doorbell, Throttle};
use throttle_core::time::Time;

pub use bell::Bell;
use buffers::Buffers;
use counters::Counters;
use spell::Spell;
use tags::Tags;

use crate::activity::Activity;
use crate::backend::{self, Backend, Data, Lane, Progress, Request, Step};
use crate::clock;
use crate::crash_point::{self, Point};
use crate::error::{Class, Failure, Outcome};
use crate::log;
use crate::ublk::Transfer;
use crate::ublk::queue::outlast as ring_outlast;
use crate::ublk::queue::{CharDevice, Descriptor, Entry, Event, LOOK_AFTER, QueueRing, Wait, operation};

/// A message from a queue thread to the thread of its device.
#[derive(Debug)]
pub enum Report {
    /// Every tag is offered to the kernel: START may be sent.
    Ready,
    /// The queue keeps requests over the end of a turn while [`Setup::is_watched`] is false.
    Busy,
    /// The kernel aborted a tag: the device is being stopped.
    Ending,
    /// A request waits until the kernel can make a thread for it. Reported once.
    NoThread {
        /// The number of the queue.
        queue: u16,
    },
    /// The queue has ended, as planned or because of a failure.
    Ended {
        /// The number of the queue.
        queue: u16,
        /// Success, or the failure that ended it.
        outcome: Outcome<()>,
        /// Entries that are still with the backend. The queue thread waits for them, so it must not
        /// be joined.
        stuck: usize,
    },
}

/// How long a device that is being removed waits for the backend's answer to a request.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// Interval at which it is checked whether [`PATIENCE`] has passed.
const PATIENCE_LOOK: Duration = Duration::from_millis(100);

/// The side of a queue that other threads use.
pub struct Handle {
    bell: Bell,
    must_leave: AtomicBool,
    must_hurry: AtomicBool,
    is_busy: AtomicBool,
    fetched: AtomicU64,
    /// Counts of the queue's work.
    pub counters: Counters,
}

impl Handle {
    /// The handle of a queue that is about to start.
    pub fn new() -> Outcome<Arc<Self>> {
        Ok(Arc::new(Self {
            bell: Bell::new()?,
            must_leave: AtomicBool::new(false),
            must_hurry: AtomicBool::new(false),
            is_busy: AtomicBool::new(false),
            fetched: AtomicU64::new(0),
            counters: Counters::default(),
        }))
    }

    /// Prepares the handle for a new thread, after that of a failed recovery has ended.
    pub fn reset(&self) {
        self.must_leave.store(false, Ordering::Release);
        self.must_hurry.store(false, Ordering::Release);
        self.is_busy.store(false, Ordering::SeqCst);
    }

    /// Ends the thread of a device that was not started or not recovered. Once the disk is served,
    /// only an abort by the kernel ends it.
    pub fn leave(&self) {
        self.must_leave.store(true, Ordering::Release);
        self.bell.ring();
    }

    /// From now on a request that the backend does not answer within [`PATIENCE`] gets EIO.
    pub fn hurry(&self) {
        self.must_hurry.store(true, Ordering::Release);
        self.bell.ring();
    }

    /// Ends [`Self::hurry`], after a removal was called off: a backend may take its time again.
    pub fn take_time(&self) {
        self.must_hurry.store(false, Ordering::Release);
        self.bell.ring();
    }

    /// Whether the queue keeps a request, held or with the backend.
    pub fn is_busy(&self) -> bool {
        // Pairs with `publish`: either this load sees the store there, or the queue sees
        // `is_watched` false and reports that it is busy.
        self.is_busy.load(Ordering::SeqCst)
    }

    /// Requests fetched so far.
    pub fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }
}

impl Doorbell for Handle {
    fn ring(&self) {
        self.bell.ring();
    }
}

/// The parameters of a queue thread.
pub struct Setup {
    /// The character device.
    pub device: Arc<CharDevice>,
    /// The number of the queue.
    pub id: u16,
    /// The number of its tags.
    pub depth: u16,
    /// The longest read or write, in bytes.
    pub request_bytes_max: u32,
    /// How data gets into this process and back.
    pub transfer: Transfer,
    /// The CPUs whose requests come to this queue; `None` = any.
    pub cpus: Option<CpuSet>,
    /// Whether START may scan for partitions.
    pub may_be_scanned: bool,
    /// The backend of the device.
    pub backend: Arc<dyn Backend>,
    /// Whether writes are refused.
    pub is_read_only: bool,
    /// The daemon's throttle.
    pub throttle: Arc<Throttle>,
    /// The device as a member of the throttle.
    pub member: MemberId,
    /// The side that other threads use.
    pub handle: Arc<Handle>,
    /// The name of the device.
    pub name: String,
    /// Whether the device thread already watches the requests of the device.
    pub is_watched: Arc<AtomicBool>,
    /// Notified at the end of each turn that fetched a request.
    pub activity: Arc<Activity>,
    /// Sends a report to the device thread.
    pub report: Box<dyn Fn(Report) + Send>,
}

/// The body of a queue thread.
pub fn run(setup: Setup) {
    let (outcome, rest) = match serve(&setup) {
        Ok(rest) => (Ok(()), rest),
        Err(failure) => (Err(failure), None),
    };
    let Setup { device, id, backend, handle, report, name, .. } = setup;
    // `Rest` needs neither of them, and the id is not free before they are dropped.
    drop(device);
    report(Report::Ended { queue: id, outcome, stuck: rest.as_ref().map_or(0, |rest| rest.entries) });
    drop(report);
    if let Some(rest) = rest {
        rest.outlast(&name);
    }
    // Ring and bell are needed until here; dropping the backend releases the lock on its file.
    drop((handle, backend));
}

/// Serves until the end of the queue. Returns the entries that are still with the backend then, if
/// any.
fn serve(setup: &Setup) -> Outcome<Option<Rest>> {
    if let Some(cpus) = &setup.cpus {
        // A matter of speed only: without affinity requests cross CPUs.
        let _ = sched_setaffinity(Pid::from_raw(0), cpus);
    }
    // For this thread alone, and a matter of precision only: the default timer slack may lengthen a
    // sleep by 50 us.
    let _ = set_timerslack(1);
    let mut queue = Queue::open(setup)?;
    if !setup.may_be_scanned {
        // For this thread alone. The kernel checks the capability when tags are offered; no work of
        // a queue needs it.
        caps::drop(None, CapSet::Effective, Capability::CAP_SYS_ADMIN).map_err(|cause| {
            Failure::new(Class::Perm, format!("queue {}: giving up CAP_SYS_ADMIN: {cause}", setup.id))
        })?;
    }
    crash_point::at(Point::QueueMapped);
    let served = queue.serve();
    if !queue.tags.all_dead() && queue.tags.stuck() == 0 {
        queue.ring.leave_offers();
    }
    served?;
    let Queue { lane, buffers, tags, .. } = queue;
    Ok((tags.stuck() > 0).then_some(Rest { entries: tags.stuck(), _lane: lane, buffers }))
}

/// The entries that are still with the backend when the queue is gone, and all that they refer to.
struct Rest {
    entries: usize,
    /// Holds the file that the entries name.
    _lane: Box<dyn Lane>,
    buffers: Buffers,
}

impl Rest {
    fn outlast(self, name: &str) {
        log::warn(
            "W-BACKEND-STUCK",
            format_args!(
                "device={name} entries={}: the backend does not answer; its file stays locked until it does, and this \
                 process cannot end before",
                self.entries
            ),
        );
        match ring_outlast(self.entries) {
            Ok(()) => log::info(format_args!("device={name} state=released: the backend has answered after all")),
            // The kernel may still use the buffers at any time: leak their memory, so that it is
            // not reused.
            Err(_) => std::mem::forget(self.buffers),
        }
    }
}

/// A request between delivery and commit.
#[derive(Clone, Copy)]
struct Slot {
    request: Request,
    /// Bytes that the backend has done.
    done: usize,
    arrived: Time,
    /// When the backend first got the request.
    issued: Time,
    /// Serial number of its latest entry. An entry with a different number was given up.
    serial: u32,
    /// The latest entry is a pause, after which the request is issued again.
    is_pausing: bool,
}

/// The queue's number for a tag from the gate.
fn own(tag: Tag) -> u16 {
    u16::try_from(tag).expect("the gate hands back the tags that it was given")
}

struct Queue<'a> {
    setup: &'a Setup,
    ring: QueueRing<'a>,
    lane: Box<dyn Lane>,
    buffers: Buffers,
    gate: Gate,
    tags: Tags,
    slots: Vec<Slot>,
    /// To be submitted with the next wait: at most one for each tag, the poll of the bell and the
    /// timer of `look`.
    entries: Vec<Entry>,
    events: Vec<Event>,
    /// Requests of this turn for `gate.request_all`, in order of arrival.
    arrived: Vec<Arrived>,
    let_go: Vec<Tag>,
    /// Answers of this turn.
    answers: u32,
    spell: Spell,
    fetched: u64,
    is_busy: bool,
    /// When the latest turn read the clock.
    turned_at: Time,
    /// The earliest time at which requests of this turn may have arrived.
    since: Time,
    /// When a request last arrived; `None` once the memory of the buffers was given back, or
    /// without buffers.
    used_at: Option<Time>,
    /// The timer of `look` is running.
    is_look_due: bool,
    /// The instant since which backend answers are limited by [`PATIENCE`].
    hurried: Option<Time>,
    /// The kernel has reported for all tags at once that it delivers nothing more.
    is_over: bool,
    has_retired: bool,
    /// A request had to wait for a kernel thread, which was reported.
    has_paused: bool,
}

impl<'a> Queue<'a> {
    fn open(setup: &'a Setup) -> Outcome<Self> {
        let depth = setup.depth;
        let ring = QueueRing::open(&setup.device, setup.id)?;
        let buffers = match setup.transfer {
            Transfer::Copied if setup.backend.wants_data() => Buffers::map(depth, setup.request_bytes_max)?,
            Transfer::Copied => Buffers::map_one(depth, setup.request_bytes_max)?,
            Transfer::Registered => Buffers::none(),
        };
        let bell = Arc::clone(&setup.handle) as Arc<dyn Doorbell>;
        let gate = Gate::new(Arc::clone(&setup.throttle), setup.member, depth, bell);
        let nothing = Request { operation: Operation::Flush, offset: 0, length: 0, is_fua: false, keeps_space: false };
        Ok(Self {
            setup,
            ring,
            lane: setup.backend.lane(depth)?,
            buffers,
            gate,
            tags: Tags::parked(depth),
            slots: vec![
                Slot {
                    request: nothing,
                    done: 0,
                    arrived: Time::ZERO,
                    issued: Time::ZERO,
                    serial: 0,
                    is_pausing: false
                };
                depth.into()
            ],
            entries: Vec::with_capacity(usize::from(depth) + 2),
            events: Vec::with_capacity(usize::from(depth) * 2 + 64),
            arrived: Vec::with_capacity(depth.into()),
            let_go: Vec::with_capacity(depth.into()),
            answers: 0,
            spell: Spell::default(),
            fetched: 0,
            is_busy: false,
            turned_at: Time::ZERO,
            since: Time::ZERO,
            used_at: None,
            is_look_due: false,
            hurried: None,
            is_over: false,
            has_retired: false,
            has_paused: false,
        })
    }

    /// From the first offer to the end.
    fn serve(&mut self) -> Outcome<()> {
        self.offer_all()?;
        crash_point::at(Point::QueueOffered);
        (self.setup.report)(Report::Ready);
        while !self.has_ended() {
            self.turn().map_err(|cause| {
                let what = format!("queue {}: waiting: {}", self.setup.id, crate::error::plain(&cause));
                Failure::new(Class::Failed, what)
            })?;
        }
        Ok(())
    }

    /// Offers every tag to the kernel and makes sure that none was refused: START would wait for it
    /// for ever.
    fn offer_all(&mut self) -> Outcome<()> {
        self.entries.push(QueueRing::watch_bell(self.setup.handle.bell.descriptor()));
        for tag in 0..self.setup.depth {
            self.ring.offer(tag, self.buffers.address(tag));
        }
        let failed = |cause: io::Error| {
            Failure::new(Class::Failed, format!("queue {}: first turn: {}", self.setup.id, crate::error::plain(&cause)))
        };
        self.ring.turn(&mut self.entries, Wait::Until(clock::now()), &mut self.events).map_err(failed)?;
        // Any further events are left for the first turn.
        let refused = self.events.iter().find_map(|event| match event {
            Event::Refused(tag, errno) => Some((tag, Errno::from_raw(*errno))),
            _ => None,
        });
        refused.map_or(Ok(()), |(tag, errno)| {
            let what = format!("queue {}: the kernel refused tag {tag}: {}", self.setup.id, errno.desc());
            Err(Failure::new(Class::Failed, what))
        })
    }

    fn has_ended(&self) -> bool {
        self.has_retired
    }

    fn turn(&mut self) -> io::Result<()> {
        let answers = std::mem::take(&mut self.answers);
        let mut wait = self.wait();
        if self.spell.is_over(answers) && wait == Wait::Forever {
            wait = Wait::AfterOthers;
        }
        self.ring.turn(&mut self.entries, wait, &mut self.events)?;
        let now = clock::now();
        // Requests arrive early in such a sleep, as clients send the next ones right after the
        // answers of the last turn.
        self.since = if matches!(wait, Wait::Through(_)) { self.turned_at } else { now };
        self.turned_at = now;
        let mut events = std::mem::take(&mut self.events);
        let is_quiet = events.iter().all(|event| *event == Event::Look);
        for event in events.drain(..) {
            self.apply(event, now);
        }
        self.events = events;
        self.ask(now);
        self.look(is_quiet, now);

        // Clear the bell before polling the gate. A ring after this line starts another turn; if
        // the bell were cleared after the poll, that ring would be lost. Pairs with `Bell::ring`.
        let is_rung = self.setup.handle.bell.take();
        let mut let_go = std::mem::take(&mut self.let_go);
        if let Some(due) = self.gate.deadline().filter(|due| *due <= now) {
            self.setup.handle.counters.late(now.nanos_since(due));
        }
        self.gate.poll(now, is_rung, &mut let_go);
        for tag in let_go.drain(..) {
            let tag = own(tag);
            self.tags.let_go(tag);
            let waited_ns = now.nanos_since(self.slots[usize::from(tag)].arrived);
            self.let_through(tag, Some(waited_ns), now);
        }
        self.let_go = let_go;

        if is_rung {
            let must_hurry = self.setup.handle.must_hurry.load(Ordering::Acquire);
            self.hurried = must_hurry.then(|| self.hurried.unwrap_or(now));
        }
        if let Some(since) = self.hurried {
            self.give_up(since, now);
        }

        self.publish();
        let must_leave = is_rung && self.setup.handle.must_leave.load(Ordering::Acquire);
        if (self.tags.all_dead() && !self.ring.is_unsent()) || (must_leave && self.tags.is_backend_idle()) {
            // Restart work may still be under way to this queue; the bell rings when it arrives.
            self.has_retired = self.gate.retire().is_ok();
        }
        Ok(())
    }

    fn wait(&self) -> Wait {
        // Do not sleep through completions of the backend.
        if self.gate.is_calm() && self.hurried.is_none() && self.tags.is_backend_idle() {
            return self.gate.deadline().map_or(Wait::Forever, Wait::Through);
        }
        let may_give_up = self.hurried.is_some() && !self.tags.is_backend_idle();
        let look = may_give_up.then(|| clock::now().plus_nanos(PATIENCE_LOOK.as_nanos() as u64));
        self.gate.deadline().into_iter().chain(look).min().map_or(Wait::Forever, Wait::Until)
    }

    /// Gives the memory of the buffers back if no request has arrived for [`LOOK_AFTER`], none is
    /// kept, and this turn had no event but the timer's. As long as there is memory to give back,
    /// the timer runs.
    fn look(&mut self, is_quiet: bool, now: Time) {
        let Some(used_at) = self.used_at.filter(|_| !self.is_look_due) else { return };
        let is_unused = is_quiet && !self.tags.is_busy() && self.tags.stuck() == 0;
        if is_unused && now.nanos_since(used_at) >= LOOK_AFTER.as_nanos() as u64 {
            self.buffers.release();
            self.used_at = None;
        } else {
            self.entries.push(QueueRing::look_later());
            self.is_look_due = true;
        }
    }

    /// Answers requests with EIO that the backend has had for [`PATIENCE`].
    fn give_up(&mut self, since: Time, now: Time) {
        for tag in 0..self.setup.depth {
            let Slot { issued, serial, .. } = self.slots[usize::from(tag)];
            if !self.tags.is_running(tag) || now.nanos_since(issued.max(since)) < PATIENCE.as_nanos() as u64 {
                continue;
            }
            // Without memory for a new buffer the tag waits on.
            if self.buffers.replace(tag).is_err() {
                continue;
            }
            self.slots[usize::from(tag)].serial = QueueRing::next_serial(serial);
            self.tags.give_up(tag);
            self.answer(tag, Err(Errno::EIO), now);
        }
    }

    fn apply(&mut self, event: Event, now: Time) {
        match event {
            Event::Delivered(tag) => {
                self.tags.deliver(tag);
                self.fetched += 1;
                self.used_at = (self.setup.transfer == Transfer::Copied).then_some(now);
                self.begin(tag, now);
            }
            Event::Backend(tag, serial, _) if serial != self.slots[usize::from(tag)].serial => self.tags.late(),
            Event::Backend(tag, _, result) => {
                self.tags.done(tag);
                let slot = &mut self.slots[usize::from(tag)];
                if std::mem::take(&mut slot.is_pausing) {
                    return self.issue(tag, now);
                }
                match backend::progress(&slot.request, slot.done, result) {
                    Progress::Again => self.pause(tag),
                    Progress::Done(outcome) => {
                        let outcome = self.lane.settle(tag, &slot.request, outcome);
                        self.answer(tag, outcome, now);
                    }
                    Progress::Continue(done) => {
                        slot.done = done;
                        self.issue(tag, now);
                    }
                }
            }
            Event::Aborted(tag) => self.abort(tag),
            Event::Over => {
                self.is_over = true;
                for tag in 0..self.setup.depth {
                    if self.tags.is_parked(tag) {
                        self.abort(tag);
                    }
                }
            }
            Event::Bell { is_armed: false } => {
                self.entries.push(QueueRing::watch_bell(self.setup.handle.bell.descriptor()));
            }
            Event::Bell { is_armed: true } => {}
            Event::Look => self.is_look_due = false,
            // The kernel refuses a COMMIT only if it is wrong: a wrong tag, a wrong thread, a
            // second answer. If the thread went on, a client would wait for ever.
            Event::Refused(tag, errno) => {
                panic!("queue {}: commit of tag {tag} refused: {}", self.setup.id, Errno::from_raw(errno))
            }
        }
    }

    /// Begins a delivered request.
    fn begin(&mut self, tag: u16, now: Time) {
        let described = self.ring.descriptor(tag);
        self.buffers.delivered(tag, described.operation == operation::WRITE, described.length);
        let request = match self.admit(&described) {
            Ok(request) => request,
            Err(errno) => return self.commit(tag, -(errno as i32)),
        };
        let slot = &mut self.slots[usize::from(tag)];
        let serial = QueueRing::next_serial(slot.serial);
        *slot = Slot { request, done: 0, arrived: now, issued: now, serial, is_pausing: false };
        let (operation, bytes) = (request.operation, request.length);
        if self.arrived.is_empty() && self.gate.passes(operation, bytes, now) {
            self.let_through(tag, None, now);
        } else {
            self.arrived.push(Arrived { tag: tag.into(), operation, bytes, since: self.since });
        }
    }

    /// Asks the gate about the requests that `begin` has put into `arrived`.
    fn ask(&mut self, now: Time) {
        if self.arrived.is_empty() {
            return;
        }
        let mut arrived = std::mem::take(&mut self.arrived);
        let mut let_go = std::mem::take(&mut self.let_go);
        self.gate.request_all(&arrived, now, &mut let_go);
        let mut next = let_go.drain(..).peekable();
        for tag in arrived.drain(..).map(|request| own(request.tag)) {
            if next.next_if(|let_go| own(*let_go) == tag).is_some() {
                self.let_through(tag, None, now);
            } else {
                self.tags.hold(tag);
            }
        }
        drop(next);
        (self.arrived, self.let_go) = (arrived, let_go);
    }

    /// Hands an admitted request to the backend, at once or after `waited_ns` of being held.
    fn let_through(&mut self, tag: u16, waited_ns: Option<u64>, now: Time) {
        let slot = &mut self.slots[usize::from(tag)];
        slot.issued = now;
        self.setup.handle.counters.let_through(slot.request.operation, slot.request.length, waited_ns);
        // While entries are stuck at the backend, it gets no more requests: each would take up to
        // [`PATIENCE`].
        if self.tags.stuck() > 0 {
            return self.answer(tag, Err(Errno::EIO), now);
        }
        self.lane.begin(tag, &slot.request);
        self.issue(tag, now);
    }

    /// The request of an io descriptor, or the errno if the device does not support it.
    fn admit(&self, described: &Descriptor) -> Result<Request, Errno> {
        let operation = match described.operation {
            operation::READ => Operation::Read,
            operation::WRITE => Operation::Write,
            operation::FLUSH => Operation::Flush,
            operation::DISCARD => Operation::Discard,
            // Only offered where the backend has a way that moves no data.
            operation::WRITE_ZEROES => Operation::WriteZeroes { as_data: false },
            _ => return Err(Errno::EOPNOTSUPP),
        };
        // The kernel refuses them already; a backend opened read-only must not depend on that.
        if self.setup.is_read_only
            && matches!(operation, Operation::Write | Operation::Discard | Operation::WriteZeroes { .. })
        {
            return Err(Errno::EROFS);
        }
        let request = Request {
            operation,
            offset: described.offset,
            length: described.length,
            is_fua: described.is_fua,
            keeps_space: described.keeps_space,
        };
        if request.data_length() > self.setup.request_bytes_max as usize {
            return Err(Errno::EINVAL);
        }
        Ok(request)
    }

    /// Hands the rest of a request to the backend.
    fn issue(&mut self, tag: u16, now: Time) {
        let Slot { request, done, serial, .. } = self.slots[usize::from(tag)];
        let data = match self.setup.transfer {
            Transfer::Registered => Data::Registered(tag),
            Transfer::Copied => Data::Buffer(self.buffers.slice(tag, request.data_length())),
        };
        match self.lane.issue(tag, &request, data, done) {
            Step::Done(outcome) => self.answer(tag, outcome, now),
            Step::Submit(entry) => {
                self.tags.run(tag);
                self.entries.push(QueueRing::backend(entry, tag, serial));
            }
        }
    }

    /// Issues a request again 10 ms later. Until then it counts as being with the backend.
    fn pause(&mut self, tag: u16) {
        if !std::mem::replace(&mut self.has_paused, true) {
            (self.setup.report)(Report::NoThread { queue: self.setup.id });
        }
        let slot = &mut self.slots[usize::from(tag)];
        slot.is_pausing = true;
        self.tags.run(tag);
        self.entries.push(QueueRing::backend(QueueRing::pause(), tag, slot.serial));
    }

    /// Answers a request that the backend is done with.
    fn answer(&mut self, tag: u16, outcome: Result<(), Errno>, now: Time) {
        let Slot { request, issued, .. } = self.slots[usize::from(tag)];
        let counters = &self.setup.handle.counters;
        counters.answered(now.nanos_since(issued), outcome.is_err(), now);
        match outcome {
            Ok(()) => self.commit(tag, request.data_length() as i32),
            Err(errno) => {
                counters.failed(request.operation);
                self.commit(tag, -(errno as i32));
            }
        }
    }

    /// The kernel delivers nothing more under this tag.
    fn abort(&mut self, tag: u16) {
        if !self.tags.is_ending() {
            (self.setup.report)(Report::Ending);
        }
        self.tags.abort(tag);
    }

    /// Gives the tag back to the kernel, with the full length of its request or an error, never a
    /// part.
    fn commit(&mut self, tag: u16, result: i32) {
        self.tags.commit(tag);
        self.answers += 1;
        self.ring.commit(tag, self.buffers.address(tag), result);
        if self.is_over {
            self.abort(tag);
        }
    }

    /// Publishes the state of the queue at the end of a turn.
    fn publish(&mut self) {
        let handle = &self.setup.handle;
        if handle.fetched.load(Ordering::Relaxed) != self.fetched {
            handle.fetched.store(self.fetched, Ordering::Relaxed);
            self.setup.activity.see();
        }
        if self.is_busy != self.tags.is_busy() {
            self.is_busy = !self.is_busy;
            // Store before the load of `is_watched`, in the single order of SeqCst: the device
            // thread clears `is_watched` first and then reads `is_busy`. Pairs with `watch` of the
            // device thread.
            handle.is_busy.store(self.is_busy, Ordering::SeqCst);
        }
        // Load before swap: while the device thread watches, which is as long as there is work, the
        // cache line is not written.
        let watched = &self.setup.is_watched;
        if self.is_busy && !watched.load(Ordering::SeqCst) && !watched.swap(true, Ordering::SeqCst) {
            (self.setup.report)(Report::Busy);
        }
    }
}
