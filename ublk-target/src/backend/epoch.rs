//! Reports a failed write-back to every flush that it concerns.
//!
//! ```text
//!   flush A      ├──────────────── EIO            the kernel reports the error to one of them
//!   FUA write B     ├─────────────────── 0  ─►  EIO   in flight when A failed
//!   flush C                          ├─────── 0       began later: a new epoch
//! ```
//!
//! The kernel records a failed write-back with the file and reports it to the first fsync that
//! asks; to the rest of the flushes in flight it would report that all data is durable. The lost
//! pages are clean by then, so a flush that begins later is right to succeed.
//!
//! A FUA write also asks (it ends with an fsync of the whole file), and may take the report of a
//! plain write of another client. Its own failure says nothing about the ranges of that client.
//! After a failed FUA write the next flush of the lane therefore gets an error as well.

use nix::errno::Errno;
use throttle_core::cost::Operation;

use super::Request;

/// The epochs of one lane.
pub struct Epochs {
    failures: u64,
    /// A FUA write has failed; the first flush that begins later gets an error.
    owes: bool,
    /// For each tag: the value of `failures` when its flush or FUA write began.
    began: Vec<u64>,
}

impl Epochs {
    /// For tags below `depth`.
    pub fn new(depth: u16) -> Self {
        Self { failures: 0, owes: false, began: vec![0; depth.into()] }
    }

    /// To be called when a request goes to the backend.
    pub fn begin(&mut self, tag: u16, request: &Request) {
        if is_durable(request) {
            self.began[usize::from(tag)] = self.failures;
        }
    }

    /// To be called when the backend is done with a request; returns its final outcome.
    pub fn settle(&mut self, tag: u16, request: &Request, outcome: Result<(), Errno>) -> Result<(), Errno> {
        if !is_durable(request) {
            return outcome;
        }
        match outcome {
            Err(_) => {
                self.failures += 1;
                self.owes = request.is_fua;
                outcome
            }
            Ok(()) if self.began[usize::from(tag)] != self.failures => Err(Errno::EIO),
            Ok(()) if request.operation == Operation::Flush && std::mem::take(&mut self.owes) => Err(Errno::EIO),
            Ok(()) => Ok(()),
        }
    }
}

/// Whether success of the request promises that data is durable.
fn is_durable(request: &Request) -> bool {
    request.operation == Operation::Flush || request.is_fua
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLUSH: Request =
        Request { operation: Operation::Flush, offset: 0, length: 0, is_fua: false, keeps_space: false };
    const FUA: Request = Request { operation: Operation::Write, length: 4096, is_fua: true, ..FLUSH };

    #[test]
    fn a_failure_is_told_to_all_that_were_under_way_and_to_none_that_come_later() {
        let mut epochs = Epochs::new(4);
        for (tag, request) in [(0, FLUSH), (1, FUA), (2, Request { is_fua: false, ..FUA })] {
            epochs.begin(tag, &request);
        }
        assert_eq!(epochs.settle(0, &FLUSH, Err(Errno::ENOSPC)), Err(Errno::ENOSPC));
        epochs.begin(3, &FLUSH);
        assert_eq!(epochs.settle(1, &FUA, Ok(())), Err(Errno::EIO));
        assert_eq!(epochs.settle(2, &Request { is_fua: false, ..FUA }, Ok(())), Ok(()), "promises nothing");
        assert_eq!(epochs.settle(3, &FLUSH, Ok(())), Ok(()));
    }

    #[test]
    fn f58_a_fua_write_that_fails_owes_an_error_to_the_next_flush_and_to_one_only() {
        // The FUA write may have taken the report of a plain write of another client.
        let mut epochs = Epochs::new(2);
        epochs.begin(0, &FUA);
        assert_eq!(epochs.settle(0, &FUA, Err(Errno::ENOSPC)), Err(Errno::ENOSPC));
        for expected in [Err(Errno::EIO), Ok(())] {
            epochs.begin(1, &FLUSH);
            assert_eq!(epochs.settle(1, &FLUSH, Ok(())), expected);
        }
    }
}
