//! Recovery of a device that an earlier daemon left behind: its disk exists, and its clients wait.
//!
//! ```text
//!   backend, as large as the disk ─► leftovers ─► START_RECOVERY ─► queues, all ready ─► limits on ─► END_RECOVERY ─► Live
//!   └──────────── any failure: the parts made so far are given back; the next try follows after 1 s ─────────┘
//!                 a removal: STOP of a disk without a server   a device that the kernel lacks: made anew, or forgotten
//! ```
//!
//! Requests that were in flight when the daemon died are delivered again, and are charged then, once. The
//! limits hold from the first request on, because no partition scan precedes it. A recovery creates no
//! file, and the backend must match: the file must have the device and inode number that the state file
//! holds, and the disk must fit in it.

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

/// Pause between two tries of a recovery.
const AGAIN: Duration = Duration::from_secs(1);
/// Delay of the partition scan after a recovery. The kernel still knows the partitions of the disk, and a
/// process per device would take CPU time from devices whose clients still wait for their recovery.
const PARTITIONS_AFTER: Duration = Duration::from_secs(2);
/// Pause before the next START_RECOVERY while the kernel has not finished with the dead daemon.
const BUSY_AGAIN: Duration = Duration::from_millis(20);
/// That pause once the wait was logged. It is longer, because a try sends two control commands
/// (GET_INFO, START_RECOVERY), and each command takes a thread and an io_uring worker.
const BUSY_AGAIN_LATER: Duration = Duration::from_millis(200);
/// Time after which that wait is logged.
const BUSY_TOLD: Duration = Duration::from_secs(1);
/// Limit of that wait. Some kernels need 30 s if every tag of a queue was taken.
const BUSY_LIMIT: Duration = Duration::from_secs(40);

/// The result of the recovery of a device that was left behind.
pub(super) enum TakenUp {
    /// The device serves.
    Live,
    /// A removal has stopped the device; [`DeviceThread::reap`] follows.
    Removed,
    /// The kernel no longer has the device.
    Lost,
}

/// The result of one try.
enum Try {
    Live,
    Lost,
    /// A removal was requested during the try.
    Wanted,
    /// A removal was requested during the try, and has stopped the device.
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
                    // The daemon that made the stable name is dead, and the program that removed the device
                    // does not know that name.
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
        // END_RECOVERY does not scan for partitions.
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
        // Clients have the disk open and need no stable name: they are served even if the name fails.
        if let Err(failure) = self.publish(left.target) {
            log::error(&failure.context(format!("device {:?}", self.name())));
        }
        crash_point::at(Point::Recovered);
        self.tell_obstacle(&mut control, &*backend);
        self.shared.set_state(State::Live);
        if control.features().is_ok_and(must_come_later) {
            // The earlier daemon may have been killed before its partition scan.
            self.partitions_at = Some(Instant::now() + PARTITIONS_AFTER);
        }
        Ok(Try::Live)
    }

    /// Sends END_RECOVERY, by one helper after another. The queues and the backend stay open between two
    /// helpers, so the clients wait only until one helper lives long enough. Fails only if the kernel has
    /// aborted a tag: then the device is not served, and no command that was sent can change that.
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
                // GET_INFO failed, for example without a thread for it: the next round repeats it.
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

    /// Makes the handles of the queues, as many as the kernel has; resets them at a later try.
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

    /// Fails if the file is not the backend that the device had, by device and inode number.
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

    /// Opens the backend. Fails if it is a different file, or if the disk does not fit in it.
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
        // Compare before the open, because the open locks the file; and again after the open, because the
        // file may have been replaced in between.
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
            // `set` fails at a later try, which opens the same file.
            let _ = self.shared.behind.set(behind);
        }
        Ok(backend)
    }

    /// Records or logs why zero copy does not suit the backend. The transfer was fixed at ADD, perhaps by an
    /// older version of the program, or before the disk below the backend changed.
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

    /// Repeats START_RECOVERY until the kernel accepts it, for up to [`BUSY_LIMIT`]. `None` if it was accepted,
    /// otherwise the result of the try.
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
                // The earlier daemon was killed while START made the disk. Some kernels then never notice that
                // the server is gone. The disk has had no request, so no data is lost with it.
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

    /// Gives back the queues, the char device and the backend of a failed try. Only for a device that is not
    /// served: after END_RECOVERY only STOP ends the queues.
    fn give_back(&mut self) {
        assert!(!self.is_start_sent, "given back while it may be served");
        if let Some(made) = self.shared.made.get() {
            made.queues.iter().for_each(|queue| queue.leave());
        }
        let all = self.queues.len();
        self.wait_for_ever("queues", |this| this.ended == all);
        for queue in self.queues.drain(..) {
            // A panic of that thread has ended the whole process.
            let _ = queue.join();
        }
        (self.ready, self.ended, self.is_ending, self.queue_failure) = (0, 0, false, None);
        self.char_device = None;
        self.backend = None;
    }
}

/// The device as the kernel reports it. `None` if the kernel no longer has it, or if it has no disk.
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
