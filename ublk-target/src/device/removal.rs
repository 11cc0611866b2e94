//! How a device lives, and how it goes: by our own removal, or stopped by somebody else.
//!
//! ```text
//!   our removal    in use? ─► drain ─► STOP (helper) ─► queues end ─┐
//!   somebody else  abort, or its sign while we hold ─► drain ───────┴─► join ─► leave the throttle ─► close ─► DEL (helper)
//! ```

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::thread::DeviceThread;
use super::{State, traces};
use crate::clock;
use crate::error::{Class, Failure, Outcome};
use crate::helper::{self, Answer, Errand, Helper, Target};
use crate::log;

/// How long DEL may wait for those who still have the disk open, before the id is left to them: enough for udev, which looks
/// at a disk that changes, and not so long that a forced removal seems to hang.
const DELETE_LIMIT: Duration = Duration::from_millis(500);
/// How often a device that holds requests is looked at for the sign of a foreign STOP.
const LOOK: Duration = Duration::from_millis(250);
/// A request held no longer than this is no reason to look.
const HELD_LONG: Duration = Duration::from_millis(100);

impl DeviceThread {
    /// Until the device has been stopped, by us or by somebody else.
    pub(super) fn live(&mut self) {
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
        let member = self.member();
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
    pub(super) fn stop(&mut self, is_forced: bool) -> Outcome<()> {
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
    pub(super) fn drain(&mut self) {
        if self.shared.is_live() {
            self.shared.set_state(State::Draining);
        }
        let member = self.member();
        if let Some(member) = member {
            self.surroundings.throttle.drain(member, clock::now());
        }
    }

    /// The queue threads have ended or are about to: takes every other trace away.
    pub(super) fn reap(&mut self) {
        self.shared.set_state(State::Reaping);
        for queue in self.queues.drain(..) {
            // A panic there has ended the whole process.
            let _ = queue.join();
        }
        let member = self.shared.standing().member.take();
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
}
