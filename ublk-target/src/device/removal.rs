//! Watches a live device, and removes it: at our own request, or after another program has stopped
//! it.
//!
//! ```text
//!   our removal    in use? ─► drain ─► write-back ─► STOP ─► queues end ─┐      one helper, a word for each step
//!   foreign STOP   abort, or its sign while a queue is busy ─► drain ────┴─► join ─► leave ─► close ─► DEL
//! ```
//!
//! `leave` is that of the member from the throttle, `close` that of the character device.
//!
//! | a wait for | ends |
//! | --- | --- |
//! | the in-use check | when a forced removal joins (a new helper skips the check), or at a foreign STOP |
//! | the write-back | after 3 s if the removal is or becomes forced, or a foreign STOP is seen; for a |
//! | | recoverable disk after 3 s without progress, or about 60 s in all. Otherwise only with |
//! | | the backend: the data would be lost |
//! | STOP, the aborts | when the queues give up on a backend that does not answer |
//! | | ([`crate::queue::PATIENCE`]); with zero copy only with the backend: no kernel takes the |
//! | | pages of the clients from it |
//! | DEL | only with the kernel: a foreign DEL may keep the driver busy |
//!
//! A helper that cannot be spawned, fails or dies before STOP leaves the device live and limited,
//! and the client of the removal gets the failure. If the removal is final (the daemon ends), or a
//! start is undone, another helper follows instead. After STOP another helper follows as well, for
//! 20 s.
//!
//! Each client gets an answer within the patience of its removal, even if these waits last longer
//! ([`super::thread`]).

use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ublk_throttle_config::OnCrash;

use super::thread::{DeviceThread, HELPER_END};
use super::{Message, State, traces};
use crate::clock;
use crate::crash_point::{self, Point};
use crate::error::{Class, Failure, Outcome};
use crate::helper::{Answer, Errand, Helper, Target, Word};
use crate::log;

/// Limit for the search of a helper for the users that keep the id of a deleted device.
const DELETE_LIMIT: Duration = Duration::from_secs(2);
/// Limit for the client that sent STOP to send DEL, before the daemon deletes the device. rublk and
/// kublk send both within milliseconds; on a busy host, the delay of the scheduler comes on top.
const DEL_OF_OTHER_CLIENT: Duration = Duration::from_secs(1);
/// Time for which DEL is repeated, by one helper after another.
const DEL_LIMIT: Duration = Duration::from_secs(20);
/// Interval at which a busy device is checked for the signs of a foreign STOP.
const LOOK: Duration = Duration::from_millis(50);

impl DeviceThread {
    /// Watches a live device until it has been stopped, by a removal or by another program.
    pub(super) fn live(&mut self) {
        let mut fetched = 0;
        loop {
            // A removal may have come during the start.
            if self.is_removal_wanted() {
                if self.remove() {
                    return;
                }
                if self.must_go {
                    continue;
                }
            }
            let is_watching = self.is_watched.load(Ordering::Acquire);
            if self.is_ending || self.is_stopped || (is_watching && self.watch(&mut fetched)) {
                return self.follow_foreign_stop();
            }
            if let Some((size, answer)) = self.resizes.pop_front() {
                answer(self.resize(size));
                continue;
            }
            if self.partitions_at.take_if(|at| *at <= Instant::now()).is_some() {
                self.look_for_partitions(Duration::ZERO);
                continue;
            }
            let until_partitions = self.partitions_at.map(|at| at.saturating_duration_since(Instant::now()));
            self.receive(until_partitions.into_iter().chain(is_watching.then_some(LOOK)).min());
        }
    }

    /// Checks for a foreign STOP while requests are held or with the backend. True if the kernel
    /// takes the disk down.
    fn watch(&mut self, fetched: &mut u64) -> bool {
        let is_busy = |this: &Self| this.made().queues.iter().any(|queue| queue.is_busy());
        let before = std::mem::replace(fetched, self.fetched());
        if is_busy(self) {
            // A STOP of a recoverable disk lets no new request through: no request was fetched
            // since the last check.
            if before == *fetched && self.shared.description.on_crash == OnCrash::Requeue {
                self.ask_watcher();
            }
            return self.is_taken_down();
        }
        // Stop watching only if no request was fetched since the last check. Otherwise each request
        // of a sparse stream would start the watch anew.
        if before == *fetched {
            // Clear `is_watched` before reading `is_busy`: a queue that became busy before the
            // store has seen `true` and reports nothing. Pairs with `publish` of the queue.
            self.is_watched.store(false, Ordering::SeqCst);
            if is_busy(self) {
                self.is_watched.store(true, Ordering::SeqCst);
            }
        }
        false
    }

    /// Asks the watcher for a foreign STOP of a recoverable disk. Such a STOP shows no sign but its
    /// lock while requests are in flight.
    fn ask_watcher(&self) {
        let Some(target) = self.target else { return };
        // If debugfs shows the state of the queue, ask only when the queue is quiesced. STOP is not
        // the only cause of that.
        if traces::is_quiesced(target.id) == Some(false) {
            return;
        }
        let inbox = Mutex::new(self.inbox.clone());
        let tell = move || {
            // The send fails if the device has gone; the report is not needed then.
            let _ = inbox.lock().expect("used by one thread").send(Message::Stopped);
        };
        self.surroundings.watcher.ask(target.id, Box::new(tell));
    }

    /// Another ublk client has stopped the device: dispatches the held requests, and serves until
    /// the last abort.
    fn follow_foreign_stop(&mut self) {
        self.is_stopped = true;
        self.drain();
        log::warn("W-REMOVED-EXTERNALLY", format_args!("device={} state=draining", self.name()));
        self.shared.set_state(State::Stopping);
        self.hurry();
        let all = self.queues.len();
        self.wait_for_ever("taking it down: another program has stopped it", |this| this.ended == all);
    }

    /// Carries a removal out up to STOP and the end of the queues. False if it failed (the device
    /// is in use, or no helper lived long enough) and the device lives on.
    pub(super) fn remove(&mut self) -> bool {
        match self.stop(self.is_forced()) {
            Ok(()) => true,
            Err(failure) if self.is_taken_down() => {
                // The STOP of another program came first.
                log::warn("W-REMOVED-EXTERNALLY", format_args!("device={} {}", self.name(), failure.message));
                self.follow_foreign_stop();
                true
            }
            Err(failure) if self.must_go => {
                self.try_again(&failure, |this| this.is_taken_down());
                false
            }
            Err(failure) => {
                if self.removals.is_empty() {
                    // All clients of the removal have had their answer: E-TIMEOUT.
                    log::warn("W-NOT-REMOVED", format_args!("device={} {}", self.name(), failure.message));
                }
                self.late_removal = None;
                self.answer_removals(&Err(failure));
                false
            }
        }
    }

    /// The in-use check, drain, write-back and STOP, until every queue has ended. After a failure
    /// the device is as it was before.
    pub(super) fn stop(&mut self, is_forced: bool) -> Outcome<()> {
        let target = self.target.expect("only a device that was added is stopped");
        let mut helper = self.claim(target, is_forced)?;
        crash_point::at(Point::Claimed);
        let before = self.shared.state();
        self.drain();
        crash_point::at(Point::Drained);
        log::info(format_args!("device={} state=stopping forced={}", self.name(), is_forced || self.is_forced()));
        self.shared.set_state(State::Stopping);
        helper.tell(Word::Go);
        if let Err(said) = self.hear_stopped(&mut helper, is_forced) {
            let failure = match said {
                Some(Answer::Busy(users)) => self.in_use(helper, target, &users),
                said => self.disappointed(helper, "cannot stop the device", said),
            };
            self.end_drain(before);
            return Err(failure);
        }
        crash_point::at(Point::Stopped);
        let all = self.queues.len();
        self.wait_for_ever("the queues: the kernel aborts their tags", |this| this.ended == all);
        self.helper = Some(helper);
        Ok(())
    }

    /// Waits for the write-back and STOP. The error is the answer that the helper gave instead, or
    /// `None` if it gave none.
    fn hear_stopped(&mut self, helper: &mut Helper, is_forced: bool) -> Result<(), Option<Answer>> {
        match self.hear_written(helper, is_forced) {
            Some(Answer::Written) => {}
            Some(Answer::Unwritten(note)) => {
                // Also in the log: at the end of a daemon, no client reads the notes.
                log::warn("W-UNWRITTEN", format_args!("device={} {note}", self.name()));
                self.notes.push(note);
            }
            said => return Err(said),
        }
        self.hurry();
        let (what, was_forced) = (self.made().transfer.stop_waits_for(), is_forced || self.is_forced());
        let mut said = self.hear_unless(helper, what, |this| !was_forced && this.is_forced());
        if said.is_none() && !was_forced && self.is_forced() {
            // From now on STOP also takes a disk that is open.
            helper.tell(Word::Hurry);
            said = self.hear(helper, what);
        }
        match said {
            Some(Answer::Stopped) => Ok(()),
            // No answer, and exit status 0: the device was gone before.
            None if helper.ended().is_some_and(|status| status.success()) => Ok(()),
            // No answer, and death: the kernel finished the command before it ended the process.
            None if self.is_taken_down() => Ok(()),
            said => Err(said),
        }
    }

    /// STOP and DEL for a device that was never announced, without in-use check and write-back.
    /// Sends one helper after another until the queues have ended; a helper needs no more than its
    /// process and one io_uring worker.
    pub(super) fn stop_in_any_case(&mut self) {
        let target = self.target.expect("only a device that was added is stopped");
        self.drain();
        self.shared.set_state(State::Stopping);
        self.hurry();
        let (all, what) = (self.queues.len(), self.made().transfer.stop_waits_for());
        while self.ended < all {
            let failure = match self.send(target, Errand::Delete) {
                Ok(mut helper) => {
                    self.wait_for_ever(what, |this| this.ended == all || helper.ended().is_some());
                    if self.wait(HELPER_END, |this| this.ended == all) {
                        self.helper = Some(helper);
                        return;
                    }
                    let said = helper.heard();
                    self.disappointed(helper, "STOP", said)
                }
                Err(failure) => failure,
            };
            self.try_again(&failure, |this| this.ended == all);
        }
    }

    /// Starts a helper that has claimed the disk, or need not claim it.
    fn claim(&mut self, target: Target, mut is_forced: bool) -> Outcome<Helper> {
        const CHECK: &str = "the in-use check: the disk does not open";
        loop {
            let mut helper = self.send(target, Errand::Stop { is_forced })?;
            let is_moot = |this: &Self| !is_forced && (this.is_forced() || this.is_taken_down());
            match self.hear_unless(&mut helper, CHECK, is_moot) {
                Some(Answer::Claimed) => return Ok(helper),
                _ if self.is_forced() && !is_forced => {
                    is_forced = true;
                    helper.kill();
                }
                Some(Answer::Busy(users)) => return Err(self.in_use(helper, target, &users)),
                None if self.is_taken_down() => {
                    helper.kill();
                    let what = format!("device {:?}: another program is stopping it", self.name());
                    return Err(Failure::new(Class::Conflict, what));
                }
                said => return Err(self.disappointed(helper, "cannot stop the device", said)),
            }
        }
    }

    /// Kills the helper and returns the failure of a removal that is not forced.
    fn in_use(&self, helper: Helper, target: Target, users: &str) -> Failure {
        helper.kill();
        let (name, node) = (self.name(), traces::node(target.id));
        let what = format!("device {name:?} ({node}) is in use: {users}; unmount or close it first, or use --force");
        Failure::new(Class::Busy, what)
    }

    /// Whether another program is stopping the device: a queue has seen an abort, or the disk shows
    /// the sign that comes earlier ([`traces::TakeDown`]).
    fn is_taken_down(&self) -> bool {
        let is_seen = || self.target.is_some_and(|target| self.take_down.is_seen(target.id));
        // Before START there is no disk, which would look like the sign.
        self.is_ending || self.is_stopped || self.has_disk && is_seen()
    }

    /// Waits for the end of the write-back. If the removal is forced, or becomes forced or urgent
    /// during the wait, the helper limits the write-back.
    fn hear_written(&mut self, helper: &mut Helper, mut is_forced: bool) -> Option<Answer> {
        const WRITING: &str = "writing back: the backend does not answer";
        if is_forced {
            self.hurry();
        }
        loop {
            // Urgent: a foreign STOP waits for the requests of the write-back, and must not be held
            // up. Without queues, no thread serves these requests.
            let is_urgent = |this: &Self| this.is_forced() || this.is_taken_down() || this.queues.is_empty();
            let said = self.hear_unless(helper, WRITING, |this| !is_forced && is_urgent(this));
            if said.is_some() || is_forced || !is_urgent(self) {
                return said;
            }
            is_forced = true;
            helper.tell(Word::Hurry);
            self.hurry();
        }
    }

    /// From now on the queues answer with EIO for a backend that does not answer in time.
    fn hurry(&self) {
        self.made().queues.iter().for_each(|queue| queue.hurry());
    }

    /// Starts the drain: held requests and later ones are dispatched at once. Refuses resizes.
    pub(super) fn drain(&mut self) {
        self.is_going = true;
        self.refuse_resizes();
        if self.shared.is_live() {
            self.shared.set_state(State::Draining);
        }
        let member = self.member();
        if let Some(member) = member {
            self.surroundings.throttle.drain(member, clock::now());
        }
    }

    /// Undoes [`Self::drain`] after a failed removal: the device is limited again and may be
    /// changed.
    fn end_drain(&mut self, before: State) {
        if self.is_taken_down() {
            return;
        }
        self.is_going = false;
        self.notes.clear();
        let member = self.member();
        if let Some(member) = member {
            self.surroundings.throttle.end_drain(member);
        }
        self.made().queues.iter().for_each(|queue| queue.take_time());
        self.shared.set_state(before);
        log::info(format_args!("device={} state={}", self.name(), before.name()));
    }

    /// Removes all further traces of the device. Its queue threads have ended or are about to end.
    pub(super) fn reap(&mut self) {
        self.shared.set_state(State::Reaping);
        for (id, queue) in (0..).zip(self.queues.drain(..)) {
            // A stuck queue thread keeps the backend and nothing of the device, so it is not
            // joined.
            if !self.stuck.contains(&id) {
                // A panic of the thread has ended the whole process.
                let _ = queue.join();
            }
        }
        let member = self.shared.standing().member.take();
        if let Some(member) = member {
            let left = self.surroundings.throttle.leave(member, clock::now());
            assert!(left.is_ok(), "every queue thread retired its gate before it ended: {left:?}");
        }
        // The last references of this thread to the character device and the backend. DEL waits for
        // the character device to close.
        self.char_device = None;
        self.backend = None;
        crash_point::at(Point::Closed);
        let has_waited = std::mem::take(&mut self.has_waited);
        let Some(target) = self.target.take() else {
            if has_waited {
                self.surroundings.state_dir.forget(self.name());
            }
            return;
        };
        traces::remove_link(self.name(), target.id);
        crash_point::at(Point::Unlinked);
        if self.is_stopped && self.helper.is_none() {
            self.wait_for_del_of_other_client(target);
        }
        let is_deleted = self.delete(target);
        crash_point::at(Point::Deleted);
        if is_deleted {
            self.surroundings.state_dir.forget(self.name());
        }
    }

    /// Waits for the DEL of the client that sent STOP. If the daemon deleted the device in between,
    /// that DEL would fail with ENODEV, and most clients die of this error. The wait ends when the
    /// character device is gone, which DEL removes first, or at a `del` of our own. The daemon's
    /// own DEL follows in any case, as a client may want STOP only.
    fn wait_for_del_of_other_client(&mut self, target: Target) {
        self.stage = "DEL of the client that sent STOP";
        self.wait(DEL_OF_OTHER_CLIENT, |this| this.is_removal_wanted() || !traces::has_char_device(target.id));
    }

    /// DEL, by the helper that has sent STOP, or by new helpers if that one has died. False if the
    /// device is left to the next daemon, which finds it by its state file.
    fn delete(&mut self, target: Target) -> bool {
        let began = Instant::now();
        loop {
            let Err(failure) = self.try_to_delete(target) else { return true };
            if began.elapsed() >= DEL_LIMIT {
                log::error(&failure.context(format!(
                    "device {:?}: id {} is left to the next start of the daemon",
                    self.name(),
                    target.id
                )));
                return false;
            }
            self.try_again(&failure, |_| false);
        }
    }

    fn try_to_delete(&mut self, target: Target) -> Outcome<()> {
        let mut helper = match self.helper.take() {
            Some(helper) => helper,
            None => self.send(target, Errand::Delete)?,
        };
        helper.tell(Word::Delete);
        let mut said = self.hear(&mut helper, "DEL: the kernel, or somebody else's DEL");
        if said == Some(Answer::Deleted) {
            // The disk is gone. Only its id may wait for a last close.
            said = None;
            self.wait(DELETE_LIMIT, |_| {
                said = helper.heard();
                said.is_some() || helper.ended().is_some()
            });
            said = said.or_else(|| helper.heard());
            if said.is_none() && helper.ended().is_none() {
                said = Some(Answer::Reserved("nobody can say by whom".to_owned()));
            }
            if said.is_none() {
                return Ok(());
            }
        }
        match said {
            Some(Answer::Reserved(users)) => {
                let note = format!("id {} stays reserved until it is closed: {users}", target.id);
                log::warn("W-ID-RESERVED", format_args!("device={} {note}", self.name()));
                self.notes.push(note);
                helper.kill();
                Ok(())
            }
            None if helper.ended().is_some_and(|status| status.success()) => Ok(()),
            said => Err(self.disappointed(helper, "DEL", said)),
        }
    }
}
