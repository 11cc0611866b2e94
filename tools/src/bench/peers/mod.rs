//! The measured servers: ours and its peers. Each starts, gives its device node and its control
//! group, and stops without leaving anything behind.
//!
//! ```text
//!   ours     ublk-throttle                    null, file, with any configuration
//!   kublk    kublk (Linux's self-tests)       null, loop: the kernel's own server without a throttle, so the bound for all
//!   rublk    rublk (crates.io)                null, loop: a second server without a throttle
//!   io.max   the kernel's, over a rublk null  the client is in a control group with a limit
//!   qsd      qemu-storage-daemon              throttle group over null-co ── NBD, unix socket ── kernel's nbd
//!   nbdkit   nbdkit's filter `rate`           over its null ───────────────── NBD, unix socket ── kernel's nbd
//! ```
//!
//! qsd and nbdkit reach their block device through a socket. Their cost a request includes the
//! socket, as it does for their users.

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

/// Time limit for a peer to start or to end under emulation.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Size of a null device in bytes.
pub const NULL_SIZE: u64 = 1 << 30;

/// A server with a block device.
pub trait Peer {
    /// Node of the block device.
    fn node(&self) -> &Path;

    /// Control group of the server's processes.
    fn server(&self) -> &Cgroup;

    /// Control group that limits the client; `None` if the limit does not depend on the client's
    /// group.
    fn client(&self) -> Option<&Cgroup> {
        None
    }

    /// Ends the server and removes its device.
    fn stop(self: Box<Self>) -> Result<()>;
}

/// A server process in a control group of its own, killed when dropped.
struct Server {
    child: Child,
    cgroup: Cgroup,
}

impl Server {
    /// Starts the process and moves it into its control group.
    fn spawn(name: &str, command: &mut Command) -> Result<Server> {
        let cgroup = Cgroup::create(name)?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let child = child.with_context(|| format!("cannot run {}", process::line(command)))?;
        let server = Server { child, cgroup };
        server.cgroup.add(server.child.id())?;
        Ok(server)
    }

    /// Waits until the process has created the file `path`.
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

    /// Sends SIGTERM and waits for the end.
    fn end(self) -> Result<()> {
        kill(Pid::from_raw(self.child.id().try_into()?), Signal::SIGTERM)?;
        self.wait()
    }

    /// Waits for the end of a process that has been asked to end.
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
