//! `rublk`: a ublk server without a throttle.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Peer, Server};
use crate::bench::cgroup::Cgroup;
use crate::{install, process};

/// A device of rublk.
pub struct Rublk {
    server: Server,
    id: u32,
    node: PathBuf,
}

impl Rublk {
    /// Starts the null target.
    pub fn null(id: u32, queues: u32) -> Result<Rublk> {
        Rublk::start(id, queues, "null", &[])
    }

    /// Starts the loop target, which uses the page cache as ours does by default.
    pub fn file(id: u32, queues: u32, file: &Path) -> Result<Rublk> {
        Rublk::start(id, queues, "loop", &["--buffered-io".as_ref(), "--file".as_ref(), file.as_os_str()])
    }

    fn start(id: u32, queues: u32, target: &str, more: &[&std::ffi::OsStr]) -> Result<Rublk> {
        let mut add = Command::new(install::RUBLK_OPTIMIZED.path());
        add.args(["add", target, "--foreground", "--quiet", "--depth", "128"]);
        add.args(["--number", &id.to_string(), "--queue", &queues.to_string()]).args(more);
        let mut server = Server::spawn(&format!("rublk{id}"), &mut add)?;
        let node = PathBuf::from(format!("/dev/ublkb{id}"));
        server.wait_for(&node).with_context(|| process::line(&add))?;
        Ok(Rublk { server, id, node })
    }
}

impl Peer for Rublk {
    fn node(&self) -> &Path {
        &self.node
    }

    fn server(&self) -> &Cgroup {
        &self.server.cgroup
    }

    /// Ends the server and deletes the device. Both `rublk del` and the server that it ends delete
    /// the device, so the later delete fails. The failure is ignored if the device is gone.
    fn stop(self: Box<Self>) -> Result<()> {
        let mut del = Command::new(install::RUBLK_OPTIMIZED.path());
        let deleted = process::output(del.args(["del", "--number", &self.id.to_string()]).env("RUST_BACKTRACE", "0"));
        self.server.wait()?;
        if self.node.exists() { deleted.map(drop) } else { Ok(()) }
    }
}
