//! Whether anything has happened since somebody last asked, so that who writes down what happens can sleep while nothing does.
//!
//! ```text
//!   queue threads    see, at the end of each turn with a request ──┐       the first after a look wakes the daemon,
//!   clients          see, with each command ───────────────────────┤       the others find that it was told
//!   daemon           forget ─► look at the limits ─► wait until seen ◄─┘
//! ```
//!
//! A request is charged first and seen afterwards, and the daemon forgets first and looks afterwards: either the look finds the
//! charge, or the request finds the flag down.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// A flag that is up once something has happened.
#[derive(Default)]
pub struct Activity {
    is_up: AtomicBool,
    raised: Notify,
}

impl Activity {
    /// Something has happened. While the flag is up this is one load.
    pub fn see(&self) {
        // Relaxed for the load: the charge before it and the look are ordered by the lock of the limits.
        if !self.is_up.load(Ordering::Relaxed) && !self.is_up.swap(true, Ordering::AcqRel) {
            self.raised.notify_one();
        }
    }

    /// What has happened until now is about to be looked at.
    pub fn forget(&self) {
        self.is_up.store(false, Ordering::Release);
    }

    /// Waits until something has happened since [`Self::forget`].
    pub async fn seen(&self) {
        while !self.is_up.load(Ordering::Acquire) {
            // What was raised before this is remembered by it.
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

    /// Whether something is seen within a moment.
    fn is_seen(activity: &Activity) -> bool {
        tokio_uring::start(async { tokio::time::timeout(Duration::from_millis(50), activity.seen()).await.is_ok() })
    }

    #[test]
    fn what_happened_before_the_wait_is_not_missed() {
        // And not remembered longer than until it was looked at.
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
