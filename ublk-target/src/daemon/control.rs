//! The control thread: keeps the table of devices, serves signals, notices and clients, and never blocks.
//!
//! ```text
//!   signals ────────────┐
//!   device threads ─────┼─► one channel of events ─► `serve`: starting → serving → stopping → gone
//!   clients ◄─► server ─┴─► reads, and changes (add, del, set, reload), each a task between events
//! ```
//!
//! All tasks run on one thread and switch only at an `await`, so their shared state needs no lock. A command that waits
//! claims the names of the devices and groups that must not change during the wait; a second command on a claimed name
//! is refused ([`Class::Conflict`]), never queued. The control thread owns no device: it sends requests to the device
//! threads.

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use throttle_core::throttle::Throttle;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use ublk_throttle_config::{Config, Device as Description, OnStop};

use super::claims::Claims;
use super::keeper::Keeper;
use super::levels::{self, LevelsRecord};
use super::signals::{self, Asked};
use super::socket::Socket;
use super::table::{Entry, Origin, Placed, Table};
use super::{add, del, notify, recover, reload, server, set, stats};
use crate::activity::Activity;
use crate::clock;
use crate::device::{Beginning as Begun, Device, Notice, PATIENCE, Removal, Surroundings, traces};
use crate::error::{Class, Failure, Outcome};
use crate::groups;
use crate::helper::{Errand, Helper};
use crate::log;
use crate::protocol::{self, Command};
use crate::state_dir::StateDir;
use crate::watcher::Watcher;

/// Highest age of a cached answer to `list` or `stats`: a flood of these commands reads the table once per 20 ms.
const TOLD_AGE: Duration = Duration::from_millis(20);

/// A cached answer, with the instant at which it was made.
type Told = (Instant, Rc<str>);

/// The events of the control thread, besides commands of clients.
enum Event {
    Signal(Asked),
    Device(Notice),
    /// [`HAND_OVER_DELAY`] after the answer to a takeover.
    HandOver,
}

/// Time in which the answer to the daemon that takes over is written, before this daemon stops.
const HAND_OVER_DELAY: Duration = Duration::from_millis(50);

/// The phase of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Starting,
    Serving,
    Stopping,
}

/// The shared state of the tasks of the control thread.
pub struct Daemon {
    pub throttle: Arc<Throttle>,
    pub table: RefCell<Table>,
    pub socket: Socket,
    /// The configuration file with which the daemon was started.
    pub config: PathBuf,
    /// Notified when a device has left the table.
    pub gone: Notify,
    state_dir: Arc<StateDir>,
    keeper: Keeper,
    /// The flag that wakes the task which stores the levels.
    pub activity: Arc<Activity>,
    /// The levels as last given to the keeper.
    noted: RefCell<Option<LevelsRecord>>,
    watcher: Arc<Watcher>,
    events: UnboundedSender<Event>,
    phase: Cell<Phase>,
    pub claims: Claims,
    listed: RefCell<Option<Told>>,
    counted: RefCell<Option<Told>>,
    /// Whether a reload by SIGHUP is in progress.
    is_reloading: Cell<bool>,
    /// Whether SIGHUP has asked for a reload that has not begun.
    wants_reload: Cell<bool>,
}

impl Daemon {
    /// The answer to `ping`.
    pub fn ping(&self) -> Rc<str> {
        let about = json!({
            "protocol": protocol::VERSION,
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
        });
        about.to_string().into()
    }

    /// The answer to `list`.
    pub fn list(&self) -> Rc<str> {
        told(&self.listed, || to_json(&self.table.borrow().listing()))
    }

    /// The answer to `stats`.
    pub fn stats(&self, name: Option<&str>) -> Outcome<Rc<str>> {
        let table = self.table.borrow();
        match name {
            Some(name) => stats::report_on(&table, &self.throttle, name).map(|report| to_json(&report)),
            None => Ok(told(&self.counted, || to_json(&stats::report(&table, &self.throttle)))),
        }
    }

    /// The id of the Unix group with permission for `ping`, `list` and `stats`.
    pub fn readers(&self) -> Option<u32> {
        self.socket.readers()
    }

    /// Executes a command that changes devices, groups or the daemon.
    pub async fn change(self: &Rc<Self>, command: Command) -> Outcome<Value> {
        let limit = Duration::from_millis(command.timeout_ms());
        self.expect_serving()?;
        let outcome = match command {
            Command::Add { device, settings, .. } => add::device(self, &device, &settings, limit).await,
            Command::Del { device: Some(device), group: None, force, .. } => {
                del::device(self, &device, force, limit).await
            }
            Command::Del { device: None, group: Some(group), force: false, .. } => del::group(self, &group),
            Command::Set { device: Some(device), group: None, settings, create: false, .. } => {
                set::device(self, &device, &settings, limit).await
            }
            Command::Set { device: None, group: Some(group), settings, create, .. } => {
                set::group(self, &group, &settings, create)
            }
            Command::Reload { config, dry_run, allow_shrink, .. } => {
                reload::reload(self, config, dry_run, allow_shrink, limit).await
            }
            Command::HandOver {} => self.hand_over(),
            Command::Del { .. } | Command::Set { .. } => Err(Failure::new(
                Class::Protocol,
                "one of `device` and `group` is wanted; `force` goes with a device, `create` with a group",
            )),
            Command::Ping {} | Command::List {} | Command::Stats { .. } => unreachable!("reading changes nothing"),
        };
        self.listed.replace(None);
        outcome
    }

    /// Fails with the reason while the daemon is starting or stopping, because commands can then change nothing.
    pub fn expect_serving(&self) -> Outcome<()> {
        match self.phase.get() {
            Phase::Serving => Ok(()),
            Phase::Starting => Err(Failure::new(Class::Conflict, "the daemon is starting; try again when it is ready")),
            Phase::Stopping => Err(Failure::new(Class::Conflict, "the daemon is stopping: everything will be gone")),
        }
    }

    /// Starts a device for a command, which reads the outcome from the channel. With `waits`, a missing backend is no
    /// failure.
    pub fn start(&self, new: Description, origin: Origin, waits: bool) -> Outcome<oneshot::Receiver<Outcome<()>>> {
        let (waiter, outcome) = oneshot::channel();
        let what = format!("device={} state=adding backend={}", new.name, new.backend.kind());
        let entry = (origin == Origin::File).then(|| new.clone());
        self.insert(Begun { description: new, entry, left: None, levels: None, waits }, Some(waiter))?;
        // The device thread runs: its line with `started` or `failed` follows.
        log::info(what);
        Ok(outcome)
    }

    fn insert(&self, begun: Begun, waiter: Option<super::table::Waiter>) -> Outcome<()> {
        let described = begun.description.clone();
        let (group, named_ids) = {
            let table = self.table.borrow();
            (table.place(described.group.as_deref())?, table.named_ids())
        };
        let events = self.events.clone();
        let surroundings = Surroundings {
            throttle: Arc::clone(&self.throttle),
            group,
            named_ids,
            watcher: Arc::clone(&self.watcher),
            activity: Arc::clone(&self.activity),
            state_dir: Arc::clone(&self.state_dir),
            notify: Box::new(move |notice| drop(events.send(Event::Device(notice)))),
        };
        let origin = if begun.entry.is_some() { Origin::File } else { Origin::Command };
        let is_taken_up = begun.left.is_some();
        let device = Device::start(begun, surroundings)?;
        let entry = Entry { device, described, origin, waiter, is_starting: true, is_taken_up, is_kept: false };
        self.table.borrow_mut().devices.insert(entry.described.name.clone(), entry);
        Ok(())
    }

    /// Gives the settings of the groups in force to the keeper, which writes them.
    pub fn keep_groups(&self, table: &Table) {
        self.keeper.keep_groups(table.groups_record());
    }

    /// Gives the levels to the keeper if they have changed or are above 0. Returns whether a level is above 0, and thus
    /// changes without requests.
    fn note_levels(&self, is_final: bool) -> bool {
        let record = LevelsRecord::note(&self.table.borrow(), &self.throttle, clock::now(), is_final);
        let mut noted = self.noted.borrow_mut();
        let is_known = noted.as_ref().is_some_and(|noted| record.says_no_more_than(noted));
        // A draining level is stored even if equal, because the instant of its note has changed.
        let is_draining = !record.is_idle();
        if !is_known || is_draining {
            self.keeper.keep_levels(record.clone());
            *noted = Some(record);
        }
        is_draining
    }

    /// Waits until a device in state Gone has left the table, so that its name is free.
    pub async fn forgotten(&self, name: &str) {
        loop {
            let gone = self.gone.notified();
            let is_forgotten =
                self.table.borrow().devices.get(name).is_none_or(|entry| entry.device.status().state != "gone");
            if is_forgotten {
                return;
            }
            gone.await;
        }
    }

    /// Removes a device from the table after the last notice of its thread.
    fn forget(&self, name: &str) -> Option<Entry> {
        let mut entry = self.table.borrow_mut().devices.remove(name)?;
        // The join does not block: after this notice the thread only returns.
        entry.device.join();
        self.listed.replace(None);
        self.gone.notify_waiters();
        Some(entry)
    }

    fn remove_all(&self) {
        for entry in self.table.borrow().devices.values().filter(|entry| !entry.is_kept) {
            let answer = Box::new(|_| {});
            entry.device.remove(Removal { is_forced: true, is_final: true, patience: PATIENCE, answer });
        }
    }

    /// Stops the daemon. A device that can outlive the daemon is left to the next daemon if `keeps_all` is set or the
    /// device has `on-stop: keep`. The remaining devices are removed.
    fn stop(&self, keeps_all: bool) {
        self.phase.set(Phase::Stopping);
        log::info(format_args!("state=stopping devices={}", self.table.borrow().devices.len()));
        notify::tell("STOPPING=1");
        for (name, entry) in &mut self.table.borrow_mut().devices {
            let is_wanted = keeps_all || entry.described.on_stop == OnStop::Keep;
            entry.is_kept = is_wanted && entry.device.can_outlive_us();
            if entry.is_kept && !entry.device.is_waiting() {
                log::info(format_args!("device={name} state=kept: its requests wait for the next daemon"));
            }
        }
        // Note the levels before the removals: a final note does not contain the requests that their drains dispatch.
        self.note_levels(!self.has_kept());
        self.remove_all();
    }

    /// Agrees to a takeover if all devices can outlive this daemon, and refuses it if one cannot.
    fn hand_over(self: &Rc<Self>) -> Outcome<Value> {
        let table = self.table.borrow();
        let ending: Vec<&str> = table
            .devices
            .iter()
            .filter(|(_, entry)| !entry.device.can_outlive_us())
            .map(|(name, _)| name.as_str())
            .collect();
        if !ending.is_empty() {
            return Err(Failure::new(
                Class::Conflict,
                format!(
                    "{} would end with this daemon (`on-crash: fail`, in memory, or on the way in or out); `del` that first, or \
                     stop the daemon",
                    ending.join(", ")
                ),
            ));
        }
        let devices: Vec<&String> = table.devices.keys().collect();
        let answer = json!({ "pid": std::process::id(), "devices": devices });
        // In this phase every command that changes a device or group is refused.
        self.phase.set(Phase::Stopping);
        let events = self.events.clone();
        tokio_uring::spawn(async move {
            tokio::time::sleep(HAND_OVER_DELAY).await;
            drop(events.send(Event::HandOver));
        });
        Ok(answer)
    }

    /// Whether all devices in the table are kept for the next daemon.
    fn is_done(&self) -> bool {
        self.table.borrow().devices.values().all(|entry| entry.is_kept)
    }

    fn has_kept(&self) -> bool {
        self.table.borrow().devices.values().any(|entry| entry.is_kept)
    }

    /// Makes the groups, and starts or takes up the devices.
    fn begin(&self, config: &Config, plan: recover::Plan) -> Outcome<()> {
        {
            let mut table = self.table.borrow_mut();
            (table.memory_max, table.readers) = (config.memory_max, config.readers.clone());
            let groups = plan.groups.iter().map(|(group, _)| group.clone()).collect();
            let all = Config { groups, ..Config::default() };
            let ids = groups::make(&all, &self.throttle, clock::now())?;
            for (name, id) in &ids {
                if let Some((levels, elapsed_ns)) = plan.levels.of_group(name) {
                    self.throttle.resume_group(*id, &levels, elapsed_ns, clock::now());
                }
            }
            let placed = |(group, is_of_file): (ublk_throttle_config::Group, bool)| Placed {
                id: ids[&group.name],
                entry: config.group(&group.name).cloned(),
                group,
                origin: if is_of_file { Origin::File } else { Origin::Command },
            };
            table.groups = plan.groups.into_iter().map(placed).collect();
            self.keep_groups(&table);
        }
        // Devices left behind come first, because their users wait. Devices with an `id` come before devices that get a
        // free id.
        let mut devices = plan.devices;
        devices.sort_by_key(|device| (device.left.is_none(), device.description.id.is_none()));
        devices.into_iter().try_for_each(|device| self.insert(device, None))
    }

    /// Whether an earlier daemon left a device behind: its users wait for this daemon.
    fn has_taken_up(&self) -> bool {
        self.table.borrow().devices.values().any(|entry| entry.is_taken_up)
    }

    /// Handles a notice of a device thread. Returns the failure of a device that ends the start of the daemon.
    fn note(&self, notice: Notice) -> Option<Failure> {
        match notice {
            Notice::Live(name) | Notice::Waiting(name) => {
                {
                    let mut table = self.table.borrow_mut();
                    let entry = table.devices.get_mut(&name)?;
                    entry.is_starting = false;
                    if let Some(waiter) = entry.waiter.take() {
                        // The send fails if the command no longer waits; the device stays.
                        let _ = waiter.send(Ok(()));
                    }
                }
                self.listed.replace(None);
                if self.phase.get() == Phase::Serving {
                    notify::tell(&self.status_line());
                }
                None
            }
            Notice::Recovering(name) => {
                let mut table = self.table.borrow_mut();
                // A device in recovery does not delay `READY=1`.
                table.devices.get_mut(&name)?.is_starting = false;
                self.listed.replace(None);
                None
            }
            Notice::Lost(name) => {
                let entry = self.forget(&name)?;
                let described = entry.device.standing().entry.clone()?;
                if self.phase.get() == Phase::Stopping {
                    return None;
                }
                // The configuration file names the device, so it is made anew.
                let begun = Begun {
                    waits: !described.required,
                    description: described.clone(),
                    entry: Some(described),
                    left: None,
                    levels: None,
                };
                let cause = self.insert(begun, None).err()?;
                // Handled like a device that failed during its start.
                self.note(Notice::Failed(name, cause))
            }
            Notice::Failed(name, cause) => {
                let waiter = self.forget(&name).and_then(|entry| entry.waiter);
                match waiter {
                    None if self.phase.get() == Phase::Serving => {
                        // The daemon serves the remaining devices.
                        let what = format!("{}; `reload` tries again", cause.message);
                        log::error(&Failure::new(cause.class, what));
                        None
                    }
                    None => {
                        log::error(&cause);
                        // A failed device ends the start of the daemon, unless an earlier daemon left devices behind:
                        // their users wait for this daemon.
                        (self.phase.get() == Phase::Starting && !self.has_taken_up()).then_some(cause)
                    }
                    Some(waiter) => {
                        log::info(format_args!("device={name} state=failed {}: {}", cause.class.name(), cause.message));
                        // The send fails if the command no longer waits.
                        let _ = waiter.send(Err(cause));
                        None
                    }
                }
            }
            Notice::Gone(name) => {
                self.forget(&name);
                None
            }
        }
    }

    fn announce(&self) {
        self.phase.set(Phase::Serving);
        log::info("ready");
        self.tell_ready();
    }

    /// Reports `READY=1` to systemd: the start or a reload has ended.
    pub fn tell_ready(&self) {
        notify::tell(&format!("READY=1\n{}", self.status_line()));
    }

    /// The `STATUS=` of systemd: the number of served devices, and of devices that wait for their backends.
    fn status_line(&self) -> String {
        let table = self.table.borrow();
        let waiting = table.devices.values().filter(|entry| entry.device.is_waiting()).count();
        let served = table.devices.len() - waiting;
        let more = if waiting == 0 { String::new() } else { format!(", {waiting} waiting for a backend") };
        format!("STATUS=serving {served} devices{more}")
    }

    /// Reloads the configuration file of the start, now or after the reload by SIGHUP that is in progress. While the
    /// daemon is starting, the reload waits for the end of the start.
    fn reload(self: &Rc<Self>) {
        self.wants_reload.set(true);
        if self.phase.get() != Phase::Serving || self.is_reloading.replace(true) {
            return;
        }
        let daemon = Rc::clone(self);
        tokio_uring::spawn(async move {
            while daemon.wants_reload.replace(false) {
                if let Err(failure) = reload::reload(&daemon, None, false, false, reload::LIMIT).await {
                    log::error(&failure.context("reload"));
                }
                daemon.listed.replace(None);
                daemon.activity.see();
            }
            daemon.is_reloading.set(false);
        });
    }
}

/// The cached answer if it is younger than [`TOLD_AGE`], or a new one.
fn told(last: &RefCell<Option<Told>>, now: impl FnOnce() -> Rc<str>) -> Rc<str> {
    if let Some((at, told)) = &*last.borrow()
        && at.elapsed() < TOLD_AGE
    {
        return Rc::clone(told);
    }
    let told = now();
    last.replace(Some((Instant::now(), Rc::clone(&told))));
    told
}

fn to_json(facts: &impl Serialize) -> Rc<str> {
    serde_json::to_string(facts).expect("facts are plain data").into()
}

/// The arguments of [`serve`].
pub struct Beginning {
    pub config: Config,
    pub plan: recover::Plan,
    pub config_path: PathBuf,
    pub state_dir: Arc<StateDir>,
    pub socket: Socket,
}

/// Serves until every device has been removed or left to the next daemon, after a signal or a failed start.
pub async fn serve(beginning: Beginning) -> Outcome<()> {
    let Beginning { config, plan, config_path, state_dir, socket } = beginning;
    let (sender, mut events) = unbounded_channel();
    let listener = socket.listen()?;
    let signals = sender.clone();
    signals::hear(move |asked| drop(signals.send(Event::Signal(asked))))?;
    let daemon = Rc::new(Daemon {
        throttle: Throttle::in_company(),
        table: RefCell::default(),
        socket,
        config: config_path,
        gone: Notify::new(),
        keeper: Keeper::start(Arc::clone(&state_dir))?,
        activity: Arc::default(),
        noted: RefCell::default(),
        watcher: Arc::default(),
        state_dir,
        events: sender,
        phase: Cell::new(Phase::Starting),
        claims: Claims::default(),
        listed: RefCell::default(),
        counted: RefCell::default(),
        is_reloading: Cell::new(false),
        wants_reload: Cell::new(false),
    });
    if let Some(interval) = notify::watchdog() {
        tokio_uring::spawn(async move {
            loop {
                notify::tell("WATCHDOG=1");
                tokio::time::sleep(interval).await;
            }
        });
    }
    let mut has_stopped = false;
    let mut failure = daemon.begin(&config, plan).err();
    if let Some(failure) = &failure {
        log::error(failure);
        if daemon.has_taken_up() {
            // The devices stay in the kernel, and their users wait for a daemon that can start.
            std::process::exit(failure.class.exit().into());
        }
        daemon.phase.set(Phase::Stopping);
        has_stopped = true;
        daemon.remove_all();
    }
    tokio_uring::spawn(server::serve(listener, Rc::clone(&daemon)));
    let noting = Rc::clone(&daemon);
    tokio_uring::spawn(async move {
        while noting.phase.get() != Phase::Stopping {
            noting.activity.forget();
            if !noting.note_levels(false) {
                noting.activity.seen().await;
            }
            tokio::time::sleep(Duration::from_secs(levels::PERIOD_S)).await;
        }
    });

    loop {
        let is_starting = |entry: &Entry| entry.is_starting;
        if daemon.phase.get() == Phase::Starting && !daemon.table.borrow().devices.values().any(is_starting) {
            daemon.announce();
            if daemon.wants_reload.get() {
                daemon.reload();
            }
        }
        if has_stopped && daemon.is_done() {
            break;
        }
        match events.recv().await.expect("the daemon keeps a sender") {
            Event::Device(notice) => {
                daemon.activity.see();
                let Some(cause) = daemon.note(notice) else { continue };
                // A failed device ends the start: a host must not come up with half of its disks while the units that
                // wait for `READY=1` do not learn of it.
                failure.get_or_insert(cause);
                if !std::mem::replace(&mut has_stopped, true) {
                    daemon.phase.set(Phase::Stopping);
                    daemon.remove_all();
                }
            }
            Event::Signal(Asked::Reload) => daemon.reload(),
            Event::Signal(Asked::Stop) if has_stopped => {
                hurry(&daemon.table.borrow());
                break;
            }
            Event::HandOver if has_stopped => {}
            event @ (Event::Signal(Asked::Stop) | Event::HandOver) => {
                has_stopped = true;
                // The phase is Stopping here only after `hand_over`, which has promised all devices to the next daemon.
                // A signal before `HandOver` must keep that promise.
                let is_promised = daemon.phase.get() == Phase::Stopping;
                daemon.stop(is_promised || matches!(event, Event::HandOver));
            }
        }
    }
    daemon.socket.remove();
    if daemon.has_kept() {
        // Kept devices were served until now, and their requests were charged.
        daemon.note_levels(false);
    }
    daemon.keeper.end(&daemon.state_dir, daemon.has_kept());
    // Exit instead of returning: the runtime would first cancel the reads of signals and clients, and wait for them.
    std::process::exit(failure.map_or(0, |failure| failure.class.exit().into()));
}

/// Ends the daemon without waiting for requests. The kernel fails the requests in flight when the process has gone, and
/// helpers that outlive the process delete the devices.
fn hurry(table: &Table) {
    for entry in table.devices.values().filter(|entry| !entry.is_kept) {
        let device = &entry.device;
        let Some(target) = device.remains() else { continue };
        log::warn("W-HURRY", format_args!("device={} ends without waiting for its requests", device.name()));
        traces::remove_link(device.name(), target.id);
        if let Err(failure) = Helper::spawn(target, Errand::Delete) {
            log::error(&failure);
        }
    }
}
