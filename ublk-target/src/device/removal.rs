//! How a device lives, and how it goes: by our own removal, or stopped by somebody else.
//!
//! ```text
//!   our removal    in use? ─► drain ─► write back ─► STOP ─► queues end ─┐           one helper, told step by step
//!   somebody else  abort, or its sign while we are busy ─► drain ────────┴─► join ─► leave the throttle ─► close ─► DEL
//! ```
//!
//! | waiting for | is ended by |
//! | --- | --- |
//! | the in-use check | a forced removal that joins: another helper starts without it; a foreign STOP |
//! | the write-back | 3 s, if forced from the start or later, or stopped by others; else only the backend: it would be lost |
//! | STOP, the aborts | the queues, which give up on a backend that does not answer ([`crate::queue::PATIENCE`]); with zero copy only |
//! | | the backend: it has the pages of the clients, and no kernel takes them from it |
//! | DEL | nothing that is ours: somebody else's DEL may keep the driver |
//! | a helper that cannot be made, fails or dies | before STOP: the device lives on, limited as before, and whoever asked is told; or, |
//! | | if nobody may be refused (the daemon ends, a start is undone), another one. After STOP: another one, for 20 s |
//!
//! Whoever asked is answered before that ([`super::thread`]).

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

/// How long a helper may look for who keeps the id of a deleted device.
const DELETE_LIMIT: Duration = Duration::from_secs(2);
/// How long the client that sent STOP may take to send DEL, before we delete the device. rublk and kublk send both within
/// milliseconds; a client on a busy host gets a scheduler's delay on top.
const DEL_OF_OTHER_CLIENT: Duration = Duration::from_secs(1);
/// How long DEL is tried by one helper after the other.
const DEL_LIMIT: Duration = Duration::from_secs(20);
/// How often a device that is busy is looked at for the sign of a foreign STOP.
const LOOK: Duration = Duration::from_millis(50);

impl DeviceThread {
    /// Until the device has been stopped, by us or by somebody else.
    pub(super) fn live(&mut self) {
        let mut fetched = 0;
        loop {
            // First what may have come during the start.
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

    /// While a request is with us, held or at the backend: whether the kernel is taking the disk down behind our back.
    fn watch(&mut self, fetched: &mut u64) -> bool {
        let is_busy = |this: &Self| this.made().queues.iter().any(|queue| queue.is_busy());
        let before = std::mem::replace(fetched, self.fetched());
        if is_busy(self) {
            // A STOP of a disk that outlives its daemon lets nothing new through.
            if before == *fetched && self.shared.description.on_crash == OnCrash::Requeue {
                self.ask_watcher();
            }
            return self.is_taken_down();
        }
        // Between two requests of a stream it stays, or each of them would begin it anew.
        if before == *fetched {
            // First that, then the look: a queue that became busy before saw somebody watching, and said nothing.
            self.is_watched.store(false, Ordering::SeqCst);
            if is_busy(self) {
                self.is_watched.store(true, Ordering::SeqCst);
            }
        }
        false
    }

    /// Somebody who stops a disk that outlives its daemon gives no other sign while requests are with us.
    fn ask_watcher(&self) {
        let Some(target) = self.target else { return };
        // Where the kernel shows it, the question is only asked when it is called for. Other things quiesce a queue, too.
        if traces::is_quiesced(target.id) == Some(false) {
            return;
        }
        let inbox = Mutex::new(self.inbox.clone());
        let tell = move || {
            // A device that has gone meanwhile need not know.
            let _ = inbox.lock().expect("used by one thread").send(Message::Stopped);
        };
        self.surroundings.watcher.ask(target.id, Box::new(tell));
    }

    /// Another ublk client stopped the device: let go of what is held, and serve until the last abort.
    fn follow_foreign_stop(&mut self) {
        self.is_stopped = true;
        self.drain();
        log::warn("W-REMOVED-EXTERNALLY", format_args!("device={} state=draining", self.name()));
        self.shared.set_state(State::Stopping);
        self.hurry();
        let all = self.queues.len();
        self.wait_for_ever("taking it down: another program has stopped it", |this| this.ended == all);
    }

    /// Goes through with a removal as far as STOP; false if it failed (the device is in use, or no helper lived long enough), and the
    /// device lives on.
    pub(super) fn remove(&mut self) -> bool {
        match self.stop(self.is_forced()) {
            Ok(()) => true,
            Err(failure) if self.is_taken_down() => {
                // Somebody else was faster.
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
                    // Nobody is left to be told.
                    log::warn("W-NOT-REMOVED", format_args!("device={} {}", self.name(), failure.message));
                }
                self.late_removal = None;
                self.answer_removals(&Err(failure));
                false
            }
        }
    }

    /// The in-use check, drain, and STOP, until every queue has ended. Fails only with the device as it was.
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

    /// Waits for the write-back and STOP; if there is no STOP, what the helper has said instead.
    fn hear_stopped(&mut self, helper: &mut Helper, is_forced: bool) -> Result<(), Option<Answer>> {
        match self.hear_written(helper, is_forced) {
            Some(Answer::Written) => {}
            Some(Answer::Unwritten) => {
                // In the log as well: a daemon that ends has no client that reads its notes.
                let note = "what was not written back is lost";
                log::warn("W-UNWRITTEN", format_args!("device={} {note}", self.name()));
                self.notes.push(note.to_owned());
            }
            said => return Err(said),
        }
        self.hurry();
        let (what, was_forced) = (self.made().transfer.stop_waits_for(), is_forced || self.is_forced());
        let mut said = self.hear_unless(helper, what, |this| !was_forced && this.is_forced());
        if said.is_none() && !was_forced && self.is_forced() {
            // A disk that is open is stopped all the same from now on.
            helper.tell(Word::Hurry);
            said = self.hear(helper, what);
        }
        match said {
            Some(Answer::Stopped) => Ok(()),
            // Said nothing, and ended well: somebody else was faster.
            None if helper.ended().is_some_and(|status| status.success()) => Ok(()),
            // Said nothing, and died: the kernel had finished the command before it let go of the process.
            None if self.is_taken_down() => Ok(()),
            said => Err(said),
        }
    }

    /// STOP of a device that nobody has been promised: whoever uses it, nothing is written back. By one helper after the other until
    /// its queues have ended; none of them needs more than itself and its worker.
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

    /// A helper that has the disk for itself, or need not care.
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

    /// The failure of a removal that is not forced.
    fn in_use(&self, helper: Helper, target: Target, users: &str) -> Failure {
        helper.kill();
        let (name, node) = (self.name(), traces::node(target.id));
        let what = format!("device {name:?} ({node}) is in use: {users}; unmount or close it first, or use --force");
        Failure::new(Class::Busy, what)
    }

    /// Whether somebody else stops it: its queues have seen an abort, or there is the sign before that.
    fn is_taken_down(&self) -> bool {
        let is_seen = || self.target.is_some_and(|target| self.take_down.is_seen(target.id));
        // A disk that has never been there is missing, too.
        self.is_ending || self.is_stopped || self.has_disk && is_seen()
    }

    /// Waits for the end of the write-back; if it is or becomes a forced one, not for longer than that may take.
    fn hear_written(&mut self, helper: &mut Helper, mut is_forced: bool) -> Option<Answer> {
        const WRITING: &str = "writing back: the backend does not answer";
        if is_forced {
            self.hurry();
        }
        loop {
            // Somebody else's STOP waits for the same requests, and must not.
            // Without queues nobody serves what is being written back.
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

    /// From now on the queues do not wait for a backend that does not answer.
    fn hurry(&self) {
        self.made().queues.iter().for_each(|queue| queue.hurry());
    }

    /// Lets go of everything held, now and from now on.
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

    /// A removal that has failed after [`Self::drain`]: the device is what it was, limited, and may be changed.
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

    /// The queue threads have ended or are about to: takes every other trace away.
    pub(super) fn reap(&mut self) {
        self.shared.set_state(State::Reaping);
        for (id, queue) in (0..).zip(self.queues.drain(..)) {
            // One that waits for the backend has nothing of the device any more, but the backend.
            if !self.stuck.contains(&id) {
                // A panic there has ended the whole process.
                let _ = queue.join();
            }
        }
        let member = self.shared.standing().member.take();
        if let Some(member) = member {
            let left = self.surroundings.throttle.leave(member, clock::now());
            assert!(left.is_ok(), "every queue thread retired its gate before it ended: {left:?}");
        }
        // The last owners of the character device and of what it has registered; DEL waits for the former.
        self.char_device = None;
        self.backend = None;
        crash_point::at(Point::Closed);
        let Some(target) = self.target.take() else { return };
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

    /// A client that stops a device deletes it next. Its DEL fails with ENODEV, and most clients die of that, if the daemon
    /// deletes the device in between. So the daemon waits until the character device is gone, which DEL does first. Its own DEL
    /// follows in any case: a client may want STOP only, and a `del` of ours ends the wait.
    fn wait_for_del_of_other_client(&mut self, target: Target) {
        self.stage = "DEL of the client that sent STOP";
        self.wait(DEL_OF_OTHER_CLIENT, |this| this.is_removal_wanted() || !traces::has_char_device(target.id));
    }

    /// DEL, by the helper that has sent STOP, or by others if that has died. False if the device is left to the next start, which
    /// finds it by its state file.
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
            // The disk itself is gone; only its number may wait for the last close.
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
