//! The control thread: knows which devices there are, hears signals, notices and clients, and never blocks.
//!
//! ```text
//!   signalfd ───────────┐
//!   device threads ─────┼─► one channel of events ─► `serve`: starting → ready → stopping → gone
//!   clients ◄─► server ─┴─► looks and removals, between events
//! ```
//!
//! All on one thread, so the table of devices needs no lock. It owns no device: it asks their threads.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::sys::stat::{Mode, umask};
use serde::{Deserialize, Serialize};
use serde_json::Number;
use throttle_core::throttle::Throttle;
use tokio::net::UnixListener;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use ublk_throttle_config::{Config, Group};

use super::{notify, server};
use crate::clock;
use crate::device::{Device, Notice, Removal, Removed, Status, Surroundings, limits};
use crate::error::{Class, Failure, OrFail, Outcome};
use crate::groups;
use crate::helper::{Errand, Helper};
use crate::log;
use crate::state_dir::StateDir;

/// What `list` shows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listing {
    /// The devices, by name.
    pub devices: Vec<Status>,
    /// The groups, in the order of the configuration.
    pub groups: Vec<GroupStatus>,
}

/// A group in facts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Its name in the configuration.
    pub name: String,
    /// The group above it, whose limits hold as well.
    pub parent: Option<String>,
    /// Its share of what the parent allows, against the others in it.
    pub weight: u32,
    /// Its limits, in the configuration's words.
    pub limits: BTreeMap<String, Number>,
    /// The devices in it, without those of groups below it.
    pub devices: Vec<String>,
    /// Requests waiting for a limit at the moment, of all devices in it and below it.
    pub held: u32,
}

impl GroupStatus {
    /// Nobody is in it yet.
    fn of(group: &Group) -> Self {
        Self {
            name: group.name.clone(),
            parent: group.parent.clone(),
            weight: group.weight,
            limits: limits(&group.limits),
            devices: Vec::new(),
            held: 0,
        }
    }
}

/// What reaches the control thread.
enum Event {
    Signal,
    Device(Notice),
}

/// The table of devices and groups, shared by the tasks of the control thread.
pub struct Table {
    devices: BTreeMap<String, Device>,
    groups: Vec<Group>,
}

impl Table {
    /// Everything, for `list`.
    pub fn listing(&self) -> Listing {
        let devices: Vec<Status> = self.devices.values().map(Device::status).collect();
        let mut groups: Vec<GroupStatus> = self.groups.iter().map(GroupStatus::of).collect();
        let places: BTreeMap<&str, usize> = self.groups.iter().zip(0..).map(|(group, n)| (&*group.name, n)).collect();
        let place = |name: &Option<String>| name.as_deref().and_then(|name| places.get(name).copied());
        for device in &devices {
            let own = place(&device.group);
            if let Some(own) = own {
                groups[own].devices.push(device.name.clone());
            }
            for above in std::iter::successors(own, |&n| place(&self.groups[n].parent)) {
                groups[above].held += device.held;
            }
        }
        Listing { devices, groups }
    }

    /// Asks a device to go, by name, link or node; the outcome comes through the channel.
    pub fn remove(&self, device: &str, is_forced: bool) -> Outcome<oneshot::Receiver<Outcome<Removed>>> {
        let found = self.find(device).ok_or_else(|| {
            let known: Vec<&str> = self.devices.keys().map(String::as_str).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            Failure::new(Class::NoDevice, format!("no device {device:?} here; there are: {known}"))
        })?;
        let (answer, outcome) = oneshot::channel();
        // Whoever asked may have gone; the removal goes on.
        let answer = Box::new(move |outcome| drop(answer.send(outcome)));
        found.remove(Removal { is_forced, answer });
        Ok(outcome)
    }

    fn find(&self, wanted: &str) -> Option<&Device> {
        let name = wanted.strip_prefix("/dev/ublk-throttle/").unwrap_or(wanted);
        let id: Option<u32> = wanted.strip_prefix("/dev/ublkb").and_then(|id| id.parse().ok());
        self.devices.get(name).or_else(|| self.devices.values().find(|device| id.is_some() && device.id() == id))
    }

    fn remove_all(&self) {
        for device in self.devices.values() {
            device.remove(Removal { is_forced: true, answer: Box::new(|_| {}) });
        }
    }
}

/// Serves until every device has been removed, after a signal or a failed start.
pub async fn serve(config: Config, state_dir: Arc<StateDir>, socket: PathBuf) -> Outcome<()> {
    let (sender, mut events) = unbounded_channel();
    let listener = listen(&socket)?;
    hear_signals(sender.clone())?;
    let (mut starting, groups) = (config.devices.len(), config.groups.clone());
    let table = Rc::new(RefCell::new(Table { devices: BTreeMap::new(), groups }));
    let mut failure = start_devices(config, &state_dir, &sender, &table).err();
    tokio_uring::spawn(server::serve(listener, Rc::clone(&table)));

    let mut is_stopping = failure.is_some();
    if let Some(failure) = &failure {
        log::error(failure);
        table.borrow().remove_all();
    } else if starting == 0 {
        announce();
    }
    while !(is_stopping && table.borrow().devices.is_empty()) {
        match events.recv().await.expect("this function keeps a sender") {
            Event::Device(Notice::Live(_)) => {
                starting -= 1;
                if starting == 0 && !is_stopping {
                    announce();
                }
            }
            Event::Device(Notice::Failed(name, cause)) => {
                forget(&table, &name);
                log::error(&cause);
                // All or none: a host must not come up with half its disks and no word to who waits for READY.
                failure.get_or_insert(cause);
                if !is_stopping {
                    is_stopping = true;
                    table.borrow().remove_all();
                }
            }
            Event::Device(Notice::Gone(name)) => forget(&table, &name),
            Event::Signal if is_stopping => {
                hurry(&table.borrow());
                break;
            }
            Event::Signal => {
                is_stopping = true;
                log::info(format_args!("state=stopping devices={}", table.borrow().devices.len()));
                notify::tell("STOPPING=1");
                table.borrow().remove_all();
            }
        }
    }
    let _ = std::fs::remove_file(&socket);
    // Not by returning: the reads of signals and clients that are under way have nobody left to wait for.
    std::process::exit(failure.map_or(0, |failure| failure.class.exit().into()));
}

fn announce() {
    log::info("ready");
    notify::tell("READY=1");
}

/// Drops a device whose thread has announced its end.
fn forget(table: &Rc<RefCell<Table>>, name: &str) {
    if let Some(mut device) = table.borrow_mut().devices.remove(name) {
        // It has nothing left to do but to return.
        device.join();
    }
}

/// The socket, for root alone: nobody can connect between its making and a later change of mode.
fn listen(socket: &std::path::Path) -> Outcome<UnixListener> {
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(socket);
    umask(before);
    listener.or_fail(Class::State, format!("cannot listen on {}", socket.display()))
}

/// SIGTERM and SIGINT, blocked in every thread, come as something to read.
fn hear_signals(events: UnboundedSender<Event>) -> Outcome<()> {
    let wanted = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    let descriptor = SignalFd::new(&wanted).or_fail(Class::Resource, "cannot make a signalfd")?;
    let descriptor = std::os::fd::AsFd::as_fd(&descriptor)
        .try_clone_to_owned()
        .or_fail(Class::Resource, "cannot make a signalfd")?;
    let signals = tokio_uring::fs::File::from_std(descriptor.into());
    tokio_uring::spawn(async move {
        let mut buffer = vec![0; size_of::<libc::signalfd_siginfo>()];
        loop {
            let (result, back) = signals.read_at(buffer, 0).await;
            buffer = back;
            match result {
                Ok(_) if events.send(Event::Signal).is_ok() => {}
                Ok(_) => return,
                // Interrupted by a debugger or the freezer.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    });
    Ok(())
}

fn start_devices(
    config: Config,
    state_dir: &Arc<StateDir>,
    events: &UnboundedSender<Event>,
    table: &Rc<RefCell<Table>>,
) -> Outcome<()> {
    let throttle = Throttle::new();
    let groups = groups::make(&config, &throttle, clock::now())?;
    for description in config.devices {
        let events = events.clone();
        let surroundings = Surroundings {
            throttle: Arc::clone(&throttle),
            group: description.group.as_ref().map(|name| groups[name]),
            state_dir: Arc::clone(state_dir),
            notify: Box::new(move |notice| drop(events.send(Event::Device(notice)))),
        };
        let device = Device::start(description, surroundings)?;
        table.borrow_mut().devices.insert(device.name().to_owned(), device);
    }
    Ok(())
}

/// Ends at once: the kernel fails what is in flight when the process is gone, and helpers that outlive it clear away.
fn hurry(table: &Table) {
    for device in table.devices.values() {
        let Some(target) = device.remains() else { continue };
        log::warn("W-HURRY", format_args!("device={} ends without waiting for its requests", device.name()));
        if let Err(failure) = Helper::spawn(target, Errand::Delete) {
            log::error(&failure);
        }
    }
}
