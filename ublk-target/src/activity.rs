//! Whether a request or a command has come since the daemon last read the limits. The task that
//! stores their levels sleeps until then.
//!
//! ```text
//!   queue threads    see, at the end of each turn with a request ──┐   the first `see` after a `forget`
//!   clients          see, with each command ───────────────────────┤   wakes the daemon; until the next
//!   daemon           forget ─► read the limits ─► wait for the flag ◄┘   `forget` the flag stays up
//! ```
//!
//! A queue thread charges a request before it calls `see`, and the daemon calls `forget` before it
//! reads the limits. Therefore either the read finds the charge, or `see` finds the flag down and
//! raises it.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// A flag that goes up at the first event after [`Self::forget`].
#[derive(Default)]
pub struct Activity {
    is_up: AtomicBool,
    raised: Notify,
}

impl Activity {
    /// Reports an event. While the flag is up, this is one load.
    pub fn see(&self) {
        // The load may be relaxed: the throttle's lock orders the charge before it and the daemon's
        // read of the limits.
        if !self.is_up.load(Ordering::Relaxed) && !self.is_up.swap(true, Ordering::AcqRel) {
            self.raised.notify_one();
        }
    }

    /// Lowers the flag; to be called right before the limits are read.
    pub fn forget(&self) {
        self.is_up.store(false, Ordering::Release);
    }

    /// Waits until an event has raised the flag after [`Self::forget`].
    pub async fn seen(&self) {
        while !self.is_up.load(Ordering::Acquire) {
            // `Notify` stores a permit, so an event before this call ends the wait at once.
            self.raised.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// Whether `seen` returns within 50 ms.
    fn is_seen(activity: &Activity) -> bool {
        tokio_uring::start(async { tokio::time::timeout(Duration::from_millis(50), activity.seen()).await.is_ok() })
    }

    #[test]
    fn what_happened_before_the_wait_is_not_missed() {
        // An event is remembered until `forget`, and not longer.
        let activity = Activity::default();
        activity.see();
        activity.see();
        assert!(is_seen(&activity));
        activity.forget();
        assert!(!is_seen(&activity));
    }

    #[test]
    fn another_thread_wakes_who_waits() {
        let activity = Arc::new(Activity::default());
        let other = Arc::clone(&activity);
        let thread = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            other.see();
        });
        tokio_uring::start(activity.seen());
        thread.join().unwrap();
    }
}
