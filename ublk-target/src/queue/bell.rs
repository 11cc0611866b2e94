//! The bell by which a queue thread is woken out of its wait.
//!
//! ```text
//!   any thread   ring: is it silent? ──yes──► write the eventfd ──► the poll in the queue's ring completes
//!                        └──no──► nothing: the queue has a turn ahead in which it takes the ring
//!   queue thread take: clear the bell, THEN poll the gate
//! ```
//!
//! 1. `take` comes before the poll of the gate: a ring in between costs a needless turn, and is
//!    never lost.
//! 2. The eventfd is never read: the poll reports each write by itself (edge-triggered), and 2^64
//!    rings are enough.
//! 3. References to a bell may outlive its queue; a ring then has no effect.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};
use throttle_core::throttle::Doorbell;

use crate::error::{Class, OrFail, Outcome};

/// The bell of one queue.
pub struct Bell {
    event: EventFd,
    is_rung: AtomicBool,
}

impl Bell {
    /// A silent bell.
    pub fn new() -> Outcome<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .or_fail(Class::Resource, "cannot make an eventfd")?;
        Ok(Self { event, is_rung: AtomicBool::new(false) })
    }

    /// The eventfd, for the poll in the queue's ring.
    pub fn descriptor(&self) -> RawFd {
        self.event.as_fd().as_raw_fd()
    }

    /// Whether the bell was rung since the last call; clears it.
    pub fn take(&self) -> bool {
        // Load before swap: a turn without a ring does not write to a cache line that the ringing
        // threads read. Acquire pairs with the release in `ring`: everything before the ring is
        // visible to the poll that follows.
        self.is_rung.load(Ordering::Relaxed) && self.is_rung.swap(false, Ordering::Acquire)
    }
}

impl Doorbell for Bell {
    fn ring(&self) {
        if !self.is_rung.swap(true, Ordering::AcqRel) {
            // Fails only when the counter is full, after 2^64 - 2 rings.
            let _ = self.event.write(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bell_rung_twice_is_one_event() {
        // Under load most rings must not cost a system call.
        let bell = Bell::new().unwrap();
        assert!(!bell.take());
        bell.ring();
        bell.ring();
        assert_eq!(bell.event.read(), Ok(1), "one write only");
        assert!(bell.take());
        assert!(!bell.take());
        bell.ring();
        assert_eq!(bell.event.read(), Ok(1));
    }
}
