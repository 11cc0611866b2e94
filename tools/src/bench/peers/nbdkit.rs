//! `nbdkit` with its filter `rate`, which limits bits a second only.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::nbd::Nbd;
use super::{NULL_SIZE, Peer, Server};
use crate::bench::cgroup::Cgroup;
use crate::process;

/// nbdkit and the kernel's client.
pub struct Nbdkit {
    // Dropped first: the kernel disconnects before the server ends.
    disk: Nbd,
    server: Server,
    socket: PathBuf,
}

impl Nbdkit {
    /// Starts with a limit in bits a second that equals `iops` requests of `block` bytes a second.
    pub fn start(number: u32, iops: u32, block: u32) -> Result<Nbdkit> {
        let socket = PathBuf::from(format!("/run/bench-nbdkit{number}.sock"));
        let mut nbdkit = Command::new("nbdkit");
        nbdkit.args(["--foreground", "--exit-with-parent", "--filter=rate", "--unix"]).arg(&socket);
        nbdkit.arg("null").arg(format!("size={NULL_SIZE}"));
        nbdkit.arg(format!("rate={}", u64::from(iops) * u64::from(block) * 8));
        let mut server = Server::spawn(&format!("nbdkit{number}"), &mut nbdkit)?;
        server.wait_for(&socket).with_context(|| process::line(&nbdkit))?;
        let disk = Nbd::connect(number, &socket, "")?;
        Ok(Nbdkit { disk, server, socket })
    }
}

impl Peer for Nbdkit {
    fn node(&self) -> &Path {
        self.disk.node()
    }

    fn server(&self) -> &Cgroup {
        &self.server.cgroup
    }

    fn stop(self: Box<Self>) -> Result<()> {
        let Nbdkit { disk, server, socket } = *self;
        drop(disk);
        server.end()?;
        let _ = std::fs::remove_file(socket);
        Ok(())
    }
}
