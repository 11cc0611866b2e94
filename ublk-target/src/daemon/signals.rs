//! SIGTERM, SIGINT and SIGHUP, blocked in every thread, come as something to read.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;

use crate::error::{Class, OrFail, Outcome};

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// SIGTERM, SIGINT.
    Stop,
    /// SIGHUP.
    Reload,
}

/// Tells `hear` of each signal, for ever.
pub fn hear(hear: impl Fn(Asked) + 'static) -> Outcome<()> {
    let wanted = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    let descriptor = SignalFd::new(&wanted).or_fail(Class::Resource, "cannot make a signalfd")?;
    let descriptor = descriptor.as_fd().try_clone_to_owned().or_fail(Class::Resource, "cannot make a signalfd")?;
    let signals = tokio_uring::fs::File::from_std(descriptor.into());
    tokio_uring::spawn(async move {
        let mut buffer = vec![0; size_of::<libc::signalfd_siginfo>()];
        loop {
            let (result, back) = signals.read_at(buffer, 0).await;
            buffer = back;
            match result {
                Ok(_) => hear(asked(&buffer)),
                // Interrupted by a debugger or the freezer.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    });
    Ok(())
}

/// The number of the signal comes first, as 32 bits (signalfd(2)).
fn asked(siginfo: &[u8]) -> Asked {
    let number = siginfo.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes));
    if number == Some(Signal::SIGHUP as i32) { Asked::Reload } else { Asked::Stop }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sighup_is_no_reason_to_stop() {
        let info = |signal: Signal| (signal as i32).to_ne_bytes().to_vec();
        assert_eq!(asked(&info(Signal::SIGHUP)), Asked::Reload);
        assert_eq!(asked(&info(Signal::SIGTERM)), Asked::Stop);
        assert_eq!(asked(&[]), Asked::Stop);
    }
}
