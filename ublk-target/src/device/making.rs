//! Making a device, in an order in which each step can be undone.
//!
//! ```text
//!   backend ─► ADD ─► parameters ─► char device ─► queues, all ready ─► START ─► node, link ─► quiet ─► Live
//!   └────────────────────── any failure: `undo` takes back the steps made so far ───────────────────────┘
//! ```
//!
//! One helper process sends ADD and START, or DEL after ADD if a step in between fails.
//!
//! Until the device is quiet it is neither limited nor charged: the kernel and udev read the disk as soon
//! as it exists. Limited to one request a second, these reads would delay START, and START every other
//! device.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use ublk_throttle_config::{ID_MAX, OnCrash, REQUEST_BYTES_MAX, ZeroCopy};

use super::partitions::must_come_later;
use super::thread::DeviceThread;
use super::{Behind, Made, Message, State, thread_name, traces};
use crate::backend::Backend;
use crate::cpus;
use crate::crash_point::{self, Point};
use crate::error::{Class, Failure, OrFail, Outcome};
use crate::helper::{ANY_ID, Answer, Errand, Helper, Target, Word};
use crate::log;
use crate::queue::{self, Handle};
use crate::rights::{CAP_SYS_ADMIN, has_capability};
use crate::ublk::control::{Control, NewDevice};
use crate::ublk::features::AUTO_BUF_REG;
use crate::ublk::queue::CharDevice;
use crate::ublk::{DeviceInfo, DiskState, Transfer};

/// Limit until every queue thread has offered its tags, which takes milliseconds. Without the limit, a kernel
/// that does not respond would block the device thread for ever.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// Limit until ADD has returned. ADD takes milliseconds, and a lock that all ublk devices of the host share.
const ADD_LIMIT: Duration = Duration::from_secs(30);
/// Limit until an id is free that a helper of a dead daemon has added, and deletes.
const FREED_LIMIT: Duration = Duration::from_secs(1);
/// Interval at which ADD is repeated meanwhile.
const FREED_LOOK: Duration = Duration::from_millis(50);
/// Limit until START has returned. START may read the partition table, from the backend of this daemon.
pub(super) const START_LIMIT: Duration = Duration::from_secs(30);
/// Limit until the node has appeared.
const NODE_LIMIT: Duration = Duration::from_secs(5);
/// After this time without a new request, the partition scans of the kernel and of udev count as finished.
const QUIET: Duration = Duration::from_millis(50);
/// The driver's bound on the number of devices. Before Linux 6.15 and its stable updates the bound counts all
/// devices, since then those of processes without CAP_SYS_ADMIN.
const BOUND: &str = "/sys/module/ublk_drv/parameters/ublks_max";
/// Limit of the wait for a quiet device. A device that is not quiet by then is in use already.
const QUIET_LIMIT: Duration = Duration::from_secs(2);

impl DeviceThread {
    /// Makes the device on an open backend.
    pub(super) fn make(&mut self, backend: Arc<dyn Backend>) -> Outcome<()> {
        let description = &self.shared.description;
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
        for remark in backend.remarks() {
            log::warn(remark.code, format_args!("device={} {}", description.name, remark.text));
        }
        if let Some(is_direct) = backend.is_direct() {
            assert!(self.shared.is_direct.set(is_direct).is_ok(), "a backend is opened once");
        }
        if let Some(behind) = Behind::of(&*backend) {
            assert!(self.shared.behind.set(behind).is_ok(), "a backend is opened once");
        }
        self.backend = Some(Arc::clone(&backend));
        spare_descriptors(description.queues)?;
        let mut control = Control::open_aside()?;
        let features = match control.features() {
            Err(Errno::EAGAIN) => return Err(Errno::EAGAIN).or_fail(Class::Failed, "GET_FEATURES"),
            // A driver before Linux 6.5 does not know the command, and has none of the features.
            known => known.unwrap_or(0),
        };
        self.expect_free_name(&mut control)?;
        let transfer = self.transfer(features, &*backend)?;
        let info = self.add(&mut control, transfer)?;
        let params = geometry.params(info.request_bytes_max, info.transfer);
        control.set_params(info.id, &params).or_fail(Class::Failed, "the kernel refuses its parameters")?;
        crash_point::at(Point::ParamsSet);
        self.char_device = Some(Arc::new(CharDevice::open(&info)?));
        let partx = self.shared.description.on_crash == OnCrash::Requeue && must_come_later(features);
        self.start_queues(&mut control, &info, &backend, !partx)?;
        crash_point::at(Point::QueuesReady);
        self.start_disk()?;
        crash_point::at(Point::Published);
        if partx {
            self.look_for_partitions(QUIET_LIMIT);
        }
        self.settle();
        crash_point::at(Point::Settled);
        Ok(())
    }

    /// Fails if a different live process serves a disk of this name, or if such a disk waits for a server. All daemons of
    /// a host share the directory of stable names: a second device of the same name would lead the clients of the first
    /// to a different disk.
    fn expect_free_name(&self, control: &mut Control) -> Outcome<()> {
        let name = self.name();
        let Some(info) = traces::linked(name).and_then(|id| control.info(id).ok()) else { return Ok(()) };
        if info.owner.nonce().is_some() && info.waits_for_a_server() {
            return Err(traces::waits_for_a_server(name, info.id));
        }
        let is_other = info.server != std::process::id().cast_signed();
        let Some(server) = info.living_server().filter(|_| is_other) else { return Ok(()) };
        Err(Failure::new(
            Class::Exists,
            format!(
                "{} leads to /dev/ublkb{}, which {server} serves; daemons of one host need different names for their devices",
                traces::link(name),
                info.id
            ),
        ))
    }

    /// The transfer of data between the kernel and the backend: copied or zero copy.
    fn transfer(&self, features: u64, backend: &dyn Backend) -> Outcome<Transfer> {
        let obstacle = obstacle(features, backend);
        match (self.shared.description.zero_copy, obstacle) {
            (ZeroCopy::Off, _) => Ok(Transfer::Copied),
            (ZeroCopy::Auto | ZeroCopy::On, None) => Ok(Transfer::Registered),
            (ZeroCopy::Auto, Some(why)) => {
                let _ = self.shared.copied_because.set(why);
                Ok(Transfer::Copied)
            }
            (ZeroCopy::On, Some(why)) => Err(Failure::new(
                Class::Unsupported,
                format!("`zero-copy: on` cannot be had: {why}; say `auto` or `off`"),
            )),
        }
    }

    fn add(&mut self, control: &mut Control, transfer: Transfer) -> Outcome<DeviceInfo> {
        let description = &self.shared.description;
        // Write the state file before ADD: if the daemon is killed after ADD, the next daemon finds the device
        // by this file.
        self.write_state();
        let wanted = NewDevice {
            queues: description.queues,
            depth: description.depth,
            request_bytes_max: REQUEST_BYTES_MAX,
            is_recoverable: description.on_crash == OnCrash::Requeue,
            transfer,
        };
        crash_point::at(Point::StateWritten);
        let added = self.add_with_id(control, wanted);
        let added = added.and_then(|added| added.map_err(|errno| self.refused(control, errno)));
        let target = added.inspect_err(|_| {
            // With a target, `undo` deletes the device, then forgets it.
            if self.target.is_none() {
                self.surroundings.state_dir.forget(self.name());
            }
        })?;
        self.target = Some(target);
        crash_point::at(Point::Added);
        let info = control.info(target.id).or_fail(Class::Failed, "GET_INFO")?;
        let description = &self.shared.description;
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
        self.shared.standing().size = self.backend.as_ref().map(|backend| backend.geometry().usable_size());
        let made = Made { id: info.id, queues: handles, depth: info.depth, transfer: info.transfer };
        assert!(self.shared.made.set(made).is_ok(), "a device is made once");
        self.write_state();
        crash_point::at(Point::IdWritten);
        Ok(info)
    }

    /// ADD with the `id` of the device, or with the first free id that no configuration entry names. The inner error
    /// is the driver's.
    fn add_with_id(&mut self, control: &mut Control, wanted: NewDevice) -> Outcome<Result<Target, Errno>> {
        let id = self.shared.description.id;
        if id.is_some() || self.surroundings.named_ids.is_empty() {
            let began = Instant::now();
            loop {
                let added = self.add_by_helper(control, id, wanted)?;
                if added != Err(Errno::EEXIST) || began.elapsed() >= FREED_LIMIT || !is_half_made(control, id) {
                    return Ok(added);
                }
                self.wait(FREED_LOOK, |_| false);
            }
        }
        for id in 0..=ID_MAX {
            if self.surroundings.named_ids.contains(&id) || traces::has_char_device(id) {
                continue;
            }
            match self.add_by_helper(control, Some(id), wanted)? {
                // A different thread or program has added this id since `has_char_device`.
                Err(Errno::EEXIST) => {}
                added => return Ok(added),
            }
        }
        Ok(Err(Errno::ENOSPC))
    }

    /// ADD in a helper, which then waits for [`Word::Go`]. If the helper dies after ADD, `target` is set.
    fn add_by_helper(
        &mut self,
        control: &mut Control,
        id: Option<u32>,
        device: NewDevice,
    ) -> Outcome<Result<Target, Errno>> {
        let nonce = self.shared.nonce;
        let wanted = Target { id: id.unwrap_or(ANY_ID), nonce };
        let mut helper = Helper::spawn(wanted, Errand::Add { server: std::process::id(), device })?;
        let began = Instant::now();
        match self.hear_unless(&mut helper, "ADD", |_| began.elapsed() >= ADD_LIMIT) {
            Some(Answer::Added(id)) => {
                self.helper = Some(helper);
                Ok(Ok(Target { id, nonce }))
            }
            Some(Answer::Refused(errno)) => {
                helper.leave();
                Ok(Err(errno))
            }
            None if helper.ended().is_none() => {
                helper.leave();
                let what = format!(
                    "ADD has not returned within {ADD_LIMIT:?}; look for an oops in the kernel's log (Linux 6.18.4 and 6.18.5 \
                     have one in ublk_init_queues)"
                );
                Err(Failure::new(Class::Failed, what))
            }
            said => {
                // The kernel has finished the command before it ended the process.
                self.target = (control.ours()?.into_iter())
                    .find(|(its, _)| *its == nonce)
                    .map(|(nonce, info)| Target { id: info.id, nonce });
                Err(self.disappointed(helper, "ADD", said))
            }
        }
    }

    /// The reason why ADD was refused.
    fn refused(&self, control: &mut Control, errno: Errno) -> Failure {
        let id = self.shared.description.id;
        let owner = id.and_then(|id| control.info(id).ok()).map_or(-1, |info| info.server);
        refusal(errno, id, owner, has_capability(CAP_SYS_ADMIN))
    }

    /// Starts the queue threads, and waits until each has offered its tags. `may_be_scanned` is false if START
    /// must not scan for partitions.
    pub(super) fn start_queues(
        &mut self,
        control: &mut Control,
        info: &DeviceInfo,
        backend: &Arc<dyn Backend>,
        may_be_scanned: bool,
    ) -> Outcome<()> {
        let member = self.member().expect("it leaves the throttle after its queues");
        cpus::warn_if_offline(&self.shared.description);
        for id in 0..info.queues {
            let inbox = Mutex::new(self.inbox.clone());
            let setup = queue::Setup {
                device: Arc::clone(self.char_device.as_ref().expect("opened before")),
                id,
                depth: info.depth,
                request_bytes_max: info.request_bytes_max,
                transfer: info.transfer,
                // A missing affinity costs only speed.
                cpus: cpus::of_queue(&self.shared.description, control.affinity(info.id, id).ok()),
                may_be_scanned,
                backend: Arc::clone(backend),
                is_read_only: self.shared.description.read_only,
                throttle: Arc::clone(&self.surroundings.throttle),
                member,
                handle: Arc::clone(&self.made().queues[usize::from(id)]),
                name: self.name().to_owned(),
                is_watched: Arc::clone(&self.is_watched),
                activity: Arc::clone(&self.surroundings.activity),
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
        let mut helper = self.helper.take().expect("waits for its next word since ADD");
        self.is_start_sent = true;
        helper.tell(Word::Go);
        self.finish(helper, START_LIMIT, "START").inspect_err(|_| self.is_start_sent = self.is_sent)?;
        self.has_disk = true;
        crash_point::at(Point::StartReturned);
        self.publish(target)
    }

    /// Waits for the node, and makes the stable name, a link to it.
    pub(super) fn publish(&mut self, target: Target) -> Outcome<()> {
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
        let member = self.member();
        if let Some(member) = member {
            self.surroundings.throttle.go_live(member);
        }
        self.shared.set_state(State::Live);
    }

    pub(super) fn announce(&mut self, how: &str) {
        self.write_state();
        let made = self.made();
        log::info(format_args!(
            "device={} state={how} node={} queues={} depth={} transfer={} size={}",
            self.name(),
            traces::node(made.id),
            made.queues.len(),
            made.depth,
            made.transfer.word(),
            self.shared.standing().size.unwrap_or_default()
        ));
    }

    /// Writes the state file. A failure is logged only: the device is served all the same.
    pub(super) fn write_state(&self) {
        if let Err(failure) = self.surroundings.state_dir.write(&self.shared.record()) {
            log::warn("W-STATE", format_args!("device={} {}", self.name(), failure.message));
        }
    }

    /// Undoes a start that failed at any step. Once START was sent, only STOP ends the queues, so STOP is repeated
    /// until it succeeds.
    pub(super) fn undo(&mut self) {
        if self.is_start_sent {
            self.stop_in_any_case();
        } else if let Some(made) = self.shared.made.get() {
            made.queues.iter().for_each(|queue| queue.leave());
            let all = self.queues.len();
            self.wait_for_ever("queues", |this| this.ended == all);
        }
        self.reap();
    }
}

/// Whether this program has added the device and no process serves it yet: its daemon may have died, and its helper
/// then deletes it.
fn is_half_made(control: &mut Control, id: Option<u32>) -> bool {
    let info = id.and_then(|id| control.info(id).ok());
    info.is_some_and(|info| {
        info.owner.nonce().is_some() && info.state == DiskState::Dead && info.living_server().is_none()
    })
}

/// Why a device on this backend cannot have zero copy, in words.
pub(super) fn obstacle(features: u64, backend: &dyn Backend) -> Option<String> {
    if features & (1 << AUTO_BUF_REG) == 0 {
        return Some("this kernel's ublk has no AUTO_BUF_REG, which came with Linux 6.16".to_owned());
    }
    if !backend.takes_registered() {
        return Some("its backend takes no pages of the kernel".to_owned());
    }
    backend.needs_stable_pages().map(str::to_owned)
}

/// Fails if the process has too few free descriptors for a device. Without this check, libublk reports the
/// lack only after 3 s, as a char device that does not open.
fn spare_descriptors(queues: u16) -> Outcome<()> {
    // Three per queue: ring, eventfd, file of the backend. The 12 are for the driver, the char device and the
    // pipes of a helper.
    let wanted = usize::from(queues) * 3 + 12;
    let spare: io::Result<Vec<File>> = (0..wanted).map(|_| File::open("/dev/null")).collect();
    spare.map(drop).or_fail(Class::Resource, format!("{wanted} file descriptors are needed"))
}

/// Draws the nonce of a device, which distinguishes it from earlier and later devices with the same id. It
/// must be unique, and need not be secret.
pub(super) fn nonce() -> u32 {
    use std::hash::{BuildHasher, Hasher};
    // The system seeds the keys once per thread; each `RandomState` differs from the earlier ones.
    std::hash::RandomState::new().build_hasher().finish() as u32
}

/// The failure for an errno of ADD. `id` is the configured id of the device, `owner` the process that serves
/// that id now, and `is_privileged` whether this process has CAP_SYS_ADMIN.
fn refusal(errno: Errno, id: Option<u32>, owner: i32, is_privileged: bool) -> Failure {
    match (errno, id) {
        (Errno::EEXIST, Some(id)) => Failure::new(
            Class::IdTaken,
            format!("id {id} is taken by {}; choose another id, or none", process_in_words(owner)),
        ),
        // Drivers that count every device check the bound before any further cause of EACCES.
        (Errno::EACCES, _) if is_privileged => {
            let bound = std::fs::read_to_string(BOUND).unwrap_or_default();
            Failure::new(Class::KernelLimit, bound_in_words(bound.trim()))
        }
        (Errno::EPERM, _) if is_privileged => Failure::new(
            Class::Perm,
            "the kernel refuses ADD although this process has CAP_SYS_ADMIN: it counts in the user namespace of the host only; run \
             the daemon outside of the container's, or ask the security module (SELinux, AppArmor)",
        ),
        (Errno::EPERM | Errno::EACCES, _) => {
            Failure::new(Class::Perm, "the kernel lets only CAP_SYS_ADMIN add ublk devices; run as root")
        }
        (Errno::ENOSPC | Errno::EUSERS | Errno::EBUSY, _) => {
            Failure::new(Class::KernelLimit, format!("the kernel takes no more ublk devices: {}", errno.desc()))
        }
        _ => Err::<(), _>(errno).or_fail(Class::Failed, "the kernel refuses to add a device").unwrap_err(),
    }
}

/// The driver's refusal of a device above its bound; `bound` is empty if it cannot be read.
fn bound_in_words(bound: &str) -> String {
    let bound = if bound.is_empty() { String::new() } else { format!(" ({bound})") };
    format!(
        "the ublk driver has as many devices as {BOUND}{bound} allows, which counts all of them before Linux 6.15; write a larger \
         number there, or load the module with it (`ublks_max=` in /etc/modprobe.d)"
    )
}

fn process_in_words(pid: i32) -> String {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    match comm {
        Ok(comm) if pid > 0 => format!("{} (pid {pid})", comm.trim()),
        _ => "a device that no process serves".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f17_a_kernel_without_room_for_a_device_says_so() {
        // No free minor, or the bound of the driver: the configuration is not at fault, and a different id would
        // not help.
        for errno in [Errno::ENOSPC, Errno::EUSERS] {
            let failure = refusal(errno, None, -1, true);
            assert_eq!((failure.class, failure.class.exit()), (Class::KernelLimit, 1), "{}", failure.message);
        }
        assert_eq!(refusal(Errno::EEXIST, Some(7), -1, true).class, Class::IdTaken);
        assert_eq!(refusal(Errno::ENOMEM, None, -1, true).class, Class::Resource);
    }

    #[test]
    fn f84_the_bound_of_the_driver_is_told_apart_from_a_missing_right() {
        // EACCES has both causes, and `run as root` does not help root.
        let told = |errno, is_privileged| {
            let failure = refusal(errno, None, -1, is_privileged);
            (failure.class, failure.message)
        };
        let (class, message) = told(Errno::EACCES, true);
        assert_eq!(class, Class::KernelLimit, "{message}");
        assert!(message.contains(BOUND) && !message.contains("root"), "{message}");
        for errno in [Errno::EACCES, Errno::EPERM] {
            let (class, message) = told(errno, false);
            assert_eq!(class, Class::Perm, "{message}");
            assert!(message.contains("run as root"), "{message}");
        }
        let (class, message) = told(Errno::EPERM, true);
        assert_eq!(class, Class::Perm, "{message}");
        assert!(!message.contains("run as root"), "{message}");
        assert!(bound_in_words("64").contains("ublks_max (64) allows"), "{}", bound_in_words("64"));
        assert!(bound_in_words("").contains("ublks_max allows"), "{}", bound_in_words(""));
    }
}
