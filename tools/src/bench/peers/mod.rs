//! What is measured, ours and others: each starts, names its node and its processes, stops and leaves nothing behind.
//!
//! ```text
//!   ours     ublk-throttle                    null, file, with any configuration
//!   kublk    kublk (Linux's self-tests)       null, loop: the kernel's own server without a throttle, so the bound for all
//!   rublk    rublk (crates.io)                null, loop: another without a throttle
//!   io.max   the kernel's, over a rublk null  the client is in a control group with a limit
//!   qsd      qemu-storage-daemon              throttle group over null-co ── NBD, unix socket ── kernel's nbd
//!   nbdkit   nbdkit's filter `rate`           over its null ───────────────── NBD, unix socket ── kernel's nbd
//! ```
//!
//! The last two reach their block device through a socket: what they cost a request includes that, as it does for their users.

mod io_max;
mod kublk;
mod nbd;
mod nbdkit;
mod ours;
mod qsd;
mod rublk;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cgroup::Cgroup;
use crate::process;

pub use io_max::IoMax;
pub use kublk::{Commands, Kublk};
pub use nbdkit::Nbdkit;
pub use ours::Ours;
pub use qsd::Qsd;
pub use rublk::Rublk;

/// What any of them may take to start or to end under emulation.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes of a null device.
pub const NULL_SIZE: u64 = 1 << 30;

/// Something with a block device.
pub trait Peer {
    /// The device.
    fn node(&self) -> &Path;

    /// Where its processes are.
    fn server(&self) -> &Cgroup;

    /// Where the client has to be for its limit to count.
    fn client(&self) -> Option<&Cgroup> {
        None
    }

    /// Ends it; nothing of it is left.
    fn stop(self: Box<Self>) -> Result<()>;
}

/// A process in a control group of its own; killed when dropped.
struct Server {
    child: Child,
    cgroup: Cgroup,
}

impl Server {
    /// Starts it.
    fn spawn(name: &str, command: &mut Command) -> Result<Server> {
        let cgroup = Cgroup::create(name)?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let child = child.with_context(|| format!("cannot run {}", process::line(command)))?;
        let server = Server { child, cgroup };
        server.cgroup.add(server.child.id())?;
        Ok(server)
    }

    /// Waits for a file that it makes.
    fn wait_for(&mut self, path: &Path) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !path.exists() {
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended with {status} before it made {}", path.display());
            }
            if Instant::now() > until {
                bail!("it did not make {} within {} s", path.display(), PATIENCE.as_secs());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Asks it to end, and waits for that.
    fn end(self) -> Result<()> {
        kill(Pid::from_raw(self.child.id().try_into()?), Signal::SIGTERM)?;
        self.wait()
    }

    /// Waits for its end, which somebody has asked for.
    fn wait(mut self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > until {
                bail!("process {} did not end within {} s", self.child.id(), PATIENCE.as_secs());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
