//! How a device that an earlier daemon left behind is taken up: its disk is there, and its users wait.
//!
//! ```text
//!   backend, as large as the disk ─► leftovers ─► START_RECOVERY ─► queues, all ready ─► limits on ─► END_RECOVERY ─► Live
//!   └──────────── any failure: what was made is given back, and a second later it is tried again ────────────┘
//!                 a removal: STOP of a disk without a server          the kernel knows it no more: made anew, or forgotten
//! ```
//!
//! What was in flight when the daemon died comes again, and is charged then, once: the limits hold from the first request on, as
//! no partition is looked for. Nothing is created and nothing taken for what it may not be: the file must be the one that was
//! behind it, and the disk must fit in it.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use ublk_throttle_config::{Backend as Place, ZeroCopy};

use super::making::{self, START_LIMIT};
use super::partitions::must_come_later;
use super::thread::DeviceThread;
use super::{Behind, LeftBehind, Made, Notice, State, set_size, traces};
use crate::backend::{self, Backend};
use crate::crash_point::{self, Point};
use crate::error::{Class, Failure, OrFail, Outcome};
use crate::helper::{Errand, Helper, Target};
use crate::log;
use crate::queue::Handle;
use crate::ublk::control::Control;
use crate::ublk::params::Disk;
use crate::ublk::queue::CharDevice;
use crate::ublk::{DeviceInfo, DiskState, Owner, Transfer, leftovers};

/// How often a backend that cannot be had is tried.
const AGAIN: Duration = Duration::from_secs(1);
/// When partitions are looked for: what was known of them is known still, and a process for each device would take CPUs from those
/// whose users still wait.
const PARTITIONS_AFTER: Duration = Duration::from_secs(2);
/// The pause before the next START_RECOVERY while the kernel has not done with the old daemon.
const BUSY_AGAIN: Duration = Duration::from_millis(20);
/// The same once the wait was reported: each try is three commands, and each command a thread and a worker of the kernel.
const BUSY_AGAIN_LATER: Duration = Duration::from_millis(200);
/// When that is told. Some kernels need 30 s where every tag of a queue was taken.
const BUSY_TOLD: Duration = Duration::from_secs(1);
const BUSY_LIMIT: Duration = Duration::from_secs(40);

/// What became of a device that was left behind.
pub(super) enum TakenUp {
    /// It serves.
    Live,
    /// It was stopped, as somebody asked for; the rest is to be cleared away.
    Removed,
    /// The kernel knows it no more.
    Lost,
}

/// One try.
enum Try {
    Live,
    Lost,
    /// Somebody asked for its removal meanwhile.
    Wanted,
    /// And it was stopped.
    Removed,
}

impl DeviceThread {
    /// Tries until the device serves or is gone.
    pub(super) fn take_up(&mut self, left: &LeftBehind) -> TakenUp {
        self.target = Some(left.target);
        self.has_disk = true;
        let mut told = String::new();
        loop {
            match self.try_to_take_up(left) {
                Ok(Try::Live) => return TakenUp::Live,
                Ok(Try::Lost) => {
                    self.give_back();
                    // The daemon that gave it its name is dead, and whoever removed it does not know of the name.
                    traces::remove_link(self.name(), left.target.id);
                    self.target = None;
                    return TakenUp::Lost;
                }
                Ok(Try::Wanted) => self.give_back(),
                Ok(Try::Removed) => return TakenUp::Removed,
                Err(failure) => {
                    self.give_back();
                    if told != failure.message {
                        told.clone_from(&failure.message);
                        let name = self.name();
                        log::error(&failure.context(format!(
                            "device {name:?} was left behind and cannot be served yet; tried again each second"
                        )));
                    }
                    (self.surroundings.notify)(Notice::Recovering(self.name().to_owned()));
                }
            }
            let began = Instant::now();
            while began.elapsed() < AGAIN && !self.is_removal_wanted() {
                self.receive(Some(AGAIN.saturating_sub(began.elapsed())));
            }
            if self.is_removal_wanted() && self.remove() {
                return TakenUp::Removed;
            }
        }
    }

    fn try_to_take_up(&mut self, left: &LeftBehind) -> Outcome<Try> {
        let mut control = Control::open_aside()?;
        let Some(info) = known(&mut control, left.target)? else { return Ok(Try::Lost) };
        self.expect_queues(&info)?;
        let disk = control.params(info.id).map_err(|errno| refused("GET_PARAMS", errno))?;
        let backend = self.reopen(left, &disk)?;
        self.backend = Some(backend.into());
        crash_point::at(Point::Reopened);
        if let Some(done) = self.wait_for_the_old_server(&mut control, left.target)? {
            return Ok(done);
        }
        crash_point::at(Point::RecoveryBegun);
        let backend = self.backend.clone().expect("opened above");
        self.char_device = Some(CharDevice::open(&info)?.into());
        // END_RECOVERY looks for nothing.
        self.start_queues(&mut control, &info, &backend, true)?;
        let member = self.member();
        if let Some(member) = member {
            self.surroundings.throttle.go_live(member);
        }
        crash_point::at(Point::RecoveryReady);
        self.drain_inbox();
        if self.is_ending {
            return Err(Failure::new(Class::Failed, "the kernel took a queue back before it served"));
        }
        match self.end_recovery(&mut control, left.target)? {
            Try::Live => {}
            ended => return Ok(ended),
        }
        crash_point::at(Point::RecoveryReturned);
        // Its users have it open; a name that cannot be had is no reason to keep them waiting.
        if let Err(failure) = self.publish(left.target) {
            log::error(&failure.context(format!("device {:?}", self.name())));
        }
        crash_point::at(Point::Recovered);
        self.tell_obstacle(&mut control, &*backend);
        self.shared.set_state(State::Live);
        if control.features().is_ok_and(must_come_later) {
            // The daemon may have been killed before it came to that.
            self.partitions_at = Some(Instant::now() + PARTITIONS_AFTER);
        }
        Ok(Try::Live)
    }

    /// END_RECOVERY, by one helper after the other: what was made for it stays, so its users wait no longer than for a helper that
    /// lives. Fails only while the device is not served, and nothing that was sent can change that.
    fn end_recovery(&mut self, control: &mut Control, target: Target) -> Outcome<Try> {
        loop {
            let failure = match Helper::spawn(target, Errand::Recover { server: std::process::id() }) {
                Ok(helper) => {
                    self.is_start_sent = true;
                    self.finish(helper, START_LIMIT, "END_RECOVERY").err()
                }
                Err(failure) => Some(failure),
            };
            let Some(failure) = failure else { return Ok(Try::Live) };
            match known(control, target) {
                Ok(Some(info)) if info.state == DiskState::Live => return Ok(Try::Live),
                Ok(Some(_)) => {}
                Ok(None) => {
                    self.is_start_sent = false;
                    return Ok(Try::Lost);
                }
                // No thread to ask by: the next round asks again.
                Err(unknown) => log::warn("W-SLOW", format_args!("device={} {}", self.name(), unknown.message)),
            }
            (self.surroundings.notify)(Notice::Recovering(self.name().to_owned()));
            self.try_again(&failure, |this| this.is_ending || this.is_removal_wanted());
            if self.is_ending {
                self.is_start_sent = false;
                return Err(Failure::new(Class::Failed, "the kernel took a queue back before it served"));
            }
            if self.is_removal_wanted() && self.remove() {
                return Ok(Try::Removed);
            }
        }
    }

    /// Handles for its queues, as many as the kernel has.
    fn expect_queues(&mut self, info: &DeviceInfo) -> Outcome<()> {
        match self.shared.made.get() {
            Some(made) => made.queues.iter().for_each(|queue| queue.reset()),
            None => {
                let queues = (0..info.queues).map(|_| Handle::new()).collect::<Outcome<_>>()?;
                let made = Made { id: info.id, queues, depth: info.depth, transfer: info.transfer };
                assert!(self.shared.made.set(made).is_ok(), "there was none");
            }
        }
        Ok(())
    }

    /// Whether the file is the one that was behind the device, by device and inode number.
    fn expect_same(&self, left: &LeftBehind, found: (u64, u64)) -> Outcome<()> {
        let Some(was) = left.identity.filter(|was| *was != found) else { return Ok(()) };
        let path = self.shared.description.backend.path().map(|path| path.display().to_string()).unwrap_or_default();
        let what = format!(
            "{path} is another file now (device {} inode {}, was device {} inode {}); put the right one there, or \
             `ublk-throttle del --force {}`",
            found.0,
            found.1,
            was.0,
            was.1,
            self.name()
        );
        Err(Failure::new(Class::Backing, what))
    }

    /// What was behind it, if it is still that.
    fn reopen(&mut self, left: &LeftBehind, disk: &Disk) -> Outcome<Box<dyn Backend>> {
        let mut description = self.shared.description.clone();
        let size = disk.size();
        self.shared.standing().size = Some(size);
        if description.backend.size().is_some() {
            set_size(&mut description, size);
        }
        if let Place::File { create, .. } = &mut description.backend {
            // An empty file in place of a lost one would be a disk of zeroes.
            *create = false;
        }
        // Before it is opened, which locks it; and after that, as it may have been replaced in between.
        if let Some(metadata) = description.backend.path().and_then(|path| std::fs::metadata(path).ok()) {
            self.expect_same(left, (metadata.dev(), metadata.ino()))?;
        }
        let backend = backend::open(&description.backend, description.read_only, description.block_size)?;
        let found = backend.identity();
        found.map_or(Ok(()), |found| self.expect_same(left, found))?;
        let misfits = disk.misfits(&backend.geometry());
        if !misfits.is_empty() {
            let what = format!("what is behind it has {}; put it back as it was", misfits.join("; "));
            return Err(Failure::new(Class::Backing, what));
        }
        if let Some(is_direct) = backend.is_direct() {
            let _ = self.shared.is_direct.set(is_direct);
        }
        if let Some(behind) = Behind::of(&*backend) {
            // Tried again, it is the same one.
            let _ = self.shared.behind.set(behind);
        }
        Ok(backend)
    }

    /// The way of its data was settled when it was made, perhaps by an older program, or before the disk below changed.
    fn tell_obstacle(&self, control: &mut Control, backend: &dyn Backend) {
        let description = &self.shared.description;
        let obstacle = making::obstacle(control.features().unwrap_or(0), backend);
        let Some(why) = obstacle.filter(|_| description.zero_copy != ZeroCopy::Off) else { return };
        if self.made().transfer == Transfer::Copied {
            let _ = self.shared.copied_because.set(why);
            return;
        }
        log::warn(
            "W-ZERO-COPY",
            format_args!(
                "device={} has zero copy, and {why}: a page that changes while it is written leaves a wrong checksum or parity; \
                 remove the device and add it again",
                description.name
            ),
        );
    }

    /// Sends START_RECOVERY until the kernel takes it.
    fn wait_for_the_old_server(&mut self, control: &mut Control, target: Target) -> Outcome<Option<Try>> {
        let (began, mut is_told, mut answer) = (Instant::now(), false, Err(Errno::EBUSY));
        let mut is_made_good = control.features().is_ok_and(leftovers::are_cleared_by_the_driver);
        loop {
            let info = match known(control, target)? {
                None => return Ok(Some(Try::Lost)),
                Some(_) if self.is_removal_wanted() => return Ok(Some(Try::Wanted)),
                Some(info) => info,
            };
            if !is_made_good && info.state == DiskState::Quiesced {
                is_made_good = match leftovers::make_good(&info) {
                    Ok(()) => true,
                    Err(cause) if cause.raw_os_error() == Some(libc::EBUSY) => false,
                    Err(cause) => return Err(cause).or_fail(Class::Failed, format!("/dev/ublkc{}", target.id)),
                };
            }
            if is_made_good && began.elapsed() < BUSY_LIMIT {
                answer = control.start_recovery(target.id);
            }
            match answer {
                Ok(()) => return Ok(None),
                // Its daemon was killed while START made the disk: some kernels do not notice then that the server has gone, ever.
                // It has never done anything for anybody.
                Err(Errno::EBUSY)
                    if began.elapsed() >= BUSY_TOLD
                        && info.state == DiskState::Live
                        && traces::is_unused(target.id) =>
                {
                    let helper = Helper::spawn(target, Errand::Delete)?;
                    self.finish(helper, START_LIMIT, "STOP and DEL of a disk that was never used")?;
                    return Ok(Some(Try::Lost));
                }
                Err(Errno::EBUSY) if began.elapsed() < BUSY_LIMIT => {}
                Err(errno) => return Err(refused("START_RECOVERY", errno)),
            }
            if !is_told && began.elapsed() >= BUSY_TOLD {
                is_told = true;
                let name = self.name();
                log::warn(
                    "W-SLOW",
                    format_args!(
                        "device={name} state=recovering waiting for the kernel, which has not done with the old daemon \
                         (up to 30 s, if every tag of a queue was taken)"
                    ),
                );
            }
            self.wait(if is_told { BUSY_AGAIN_LATER } else { BUSY_AGAIN }, |_| false);
        }
    }

    /// Gives back what a try has made. Nothing is served by it: after END_RECOVERY only STOP ends the queues.
    fn give_back(&mut self) {
        assert!(!self.is_start_sent, "given back while it may be served");
        if let Some(made) = self.shared.made.get() {
            made.queues.iter().for_each(|queue| queue.leave());
        }
        let all = self.queues.len();
        self.wait_for_ever("queues", |this| this.ended == all);
        for queue in self.queues.drain(..) {
            // A panic there has ended the whole process.
            let _ = queue.join();
        }
        (self.ready, self.ended, self.is_ending, self.queue_failure) = (0, 0, false, None);
        self.char_device = None;
        self.backend = None;
    }
}

/// The device, if the kernel still knows it and it has a disk.
fn known(control: &mut Control, target: Target) -> Outcome<Option<DeviceInfo>> {
    match control.info(target.id) {
        Ok(info) if info.owner == Owner::ours(target.nonce) && info.state != DiskState::Dead => Ok(Some(info)),
        Ok(_) | Err(Errno::ENODEV) => Ok(None),
        Err(errno) => Err(refused("GET_INFO", errno)),
    }
}

fn refused(command: &str, errno: Errno) -> Failure {
    Failure::new(Class::Failed, format!("{command}: {}", errno.desc()))
}
