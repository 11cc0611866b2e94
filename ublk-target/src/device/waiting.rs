//! Waiting for a backend that is missing when the daemon starts.
//!
//! ```text
//!   looker          open ── missing ──► 1 s ──► open ── … ──► open ── success ─┐ ends
//!   device thread   Starting ─────────► Waiting ───────────────────────────────┴─► Starting ─► Live
//!                                          └─ removal ─► Gone, and the looker ends
//! ```
//!
//! The looker is a thread of its own because an open may hang: on a network file system without its server, or on a
//! disk that stalls. The device thread waits for messages only, so a removal never waits for the path. If the first
//! open takes longer than 4 s, the device waits as for a missing backend.
//!
//! A wrong backend (a directory, no permission, a size of 0) fails a device at its first open. A device in state
//! Waiting goes on waiting instead: a file that is being copied starts with size 0, and udev opens a new disk for a
//! moment.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use nix::errno::Errno;
use ublk_throttle_config::Device as Description;

use super::thread::DeviceThread;
use super::{Message, Notice, State, thread_name};
use crate::backend::{self, Backend, Refused};
use crate::error::{Class, Failure, OrFail, Outcome};
use crate::log;

/// Pause between two opens of a missing backend.
const AGAIN: Duration = Duration::from_secs(1);
/// Time for the first open, until the device is in state Waiting.
const FIRST_LIMIT: Duration = Duration::from_secs(4);

/// Result of an open.
pub(super) type Found = Result<Arc<dyn Backend>, Refused>;

impl DeviceThread {
    /// Returns the open backend of a new device, once it is there. `None` after a request to remove the device.
    pub(super) fn await_backend(&mut self) -> Outcome<Option<Arc<dyn Backend>>> {
        let description = self.shared.description.clone();
        let Some(path) = description.backend.path().filter(|_| self.waits).map(|path| path.display().to_string())
        else {
            return open(&description).map(Some).map_err(Failure::from);
        };
        // The drop of `_looking` ends the looker.
        let _looking = look(description, self.inbox.clone())?;
        if !self.wait(FIRST_LIMIT, |this| this.found.is_some() || this.is_removal_wanted()) {
            self.begin_waiting(format!("{path} has not answered within {FIRST_LIMIT:?}"), None);
        }
        let found = loop {
            if self.is_removal_wanted() {
                break Ok(None);
            }
            match self.found.take() {
                Some(Ok(backend)) => break Ok(Some(backend)),
                Some(Err(refused)) if is_waited_out(&refused, self.has_waited) => {
                    self.begin_waiting(refused.failure.message, refused.missing);
                }
                Some(Err(refused)) => break Err(refused.failure),
                None => {}
            }
            self.refuse_sizes();
            self.receive(None);
        };
        self.shared.standing().waiting_for = None;
        self.shared.set_state(State::Starting);
        found
    }

    /// Enters state Waiting, or changes the reason: in `list`, in the state file, in the log and to the daemon.
    fn begin_waiting(&mut self, why: String, missing: Option<Errno>) {
        let errno = missing.map_or_else(String::new, |errno| format!(" errno={errno:?}"));
        log::warn(
            "W-WAITING",
            format_args!("device={} state=waiting{errno} {why}; served as soon as that is there", self.name()),
        );
        self.shared.standing().waiting_for = Some(why);
        self.shared.set_state(State::Waiting);
        self.has_waited = true;
        self.write_state();
        (self.surroundings.notify)(Notice::Waiting(self.name().to_owned()));
    }

    /// A device without a disk has no size to change.
    fn refuse_sizes(&mut self) {
        for (_, answer) in std::mem::take(&mut self.resizes) {
            let what = format!(
                "device {:?} waits for its backend and has no size yet; change `size` in the file of the configuration, then `reload`",
                self.name()
            );
            answer(Err(Failure::new(Class::Conflict, what)));
        }
    }
}

/// Whether the device waits after this refusal.
const fn is_waited_out(refused: &Refused, has_waited: bool) -> bool {
    has_waited || refused.missing.is_some()
}

fn open(description: &Description) -> Found {
    backend::open(&description.backend, description.read_only, description.block_size).map(Arc::from)
}

/// Starts the looker. The looker sends each refusal that differs from the last one, then the backend, and ends. After
/// a drop of the returned sender, the looker ends at once, or when its open returns.
fn look(description: Description, inbox: Sender<Message>) -> Outcome<Sender<Infallible>> {
    let (looking, ended) = channel();
    let name = thread_name(&description.name, None);
    let work = move || {
        let mut told = None;
        loop {
            let found = open(&description);
            let why = found.as_ref().err().cloned();
            let is_open = why.is_none();
            if is_open || why != told {
                // Fails if the device thread has ended; the drop closes the backend.
                let _ = inbox.send(Message::Looked(found));
            }
            if is_open || ended.recv_timeout(AGAIN) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            told = why;
        }
    };
    std::thread::Builder::new()
        .name(name)
        .spawn(work)
        .or_fail(Class::Resource, "cannot start a thread that opens its backend")?;
    Ok(looking)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f87_a_wrong_backend_fails_a_device_unless_it_has_waited() {
        // At the start, a wrong backend is a mistake in the configuration; later it may be a file that is being copied.
        let wrong = Refused::from(Failure::new(Class::Backing, "/srv/a.img is a directory, not a regular file"));
        let missing = Refused { missing: Some(Errno::ENOENT), ..wrong.clone() };
        assert!(!is_waited_out(&wrong, false));
        assert!(is_waited_out(&wrong, true) && is_waited_out(&missing, false));
    }
}
