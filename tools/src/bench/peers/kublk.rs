//! `kublk`: ublk without a throttle, as the kernel's own tests serve it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Peer, Server};
use crate::bench::cgroup::Cgroup;
use crate::{kublk, process};

/// The driver's commands that fetch and commit requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commands {
    /// One for each tag.
    EachTag,
    /// One for all requests of a turn (`-b`, `UBLK_F_BATCH_IO`). A driver that does not know the flag clears it and adds the
    /// device, which kublk then serves with a command for each tag, without an error. So look for the feature first.
    Batched,
}

/// A device of kublk's.
pub struct Kublk {
    // Before the device, which goes once its server has ended.
    server: Server,
    device: Device,
}

impl Kublk {
    /// Its null target.
    pub fn null(id: u32, queues: u32, commands: Commands) -> Result<Kublk> {
        Kublk::start(id, queues, commands, "null", None)
    }

    /// Its loop target. It opens the file with `O_DIRECT` and cannot do otherwise.
    pub fn file(id: u32, queues: u32, commands: Commands, file: &Path) -> Result<Kublk> {
        Kublk::start(id, queues, commands, "loop", Some(file.as_os_str()))
    }

    fn start(id: u32, queues: u32, commands: Commands, target: &str, file: Option<&OsStr>) -> Result<Kublk> {
        let mut add = Command::new(kublk::path());
        // By default it forks twice, and the process started here would end before the control group has the server.
        add.args(["add", "--type", target, "--foreground", "--quiet", "--depth", "128"]);
        add.args(["--number", &id.to_string(), "--queues", &queues.to_string()]);
        add.args((commands == Commands::Batched).then_some("--batch")).args(file);
        let device = Device { id, node: PathBuf::from(format!("/dev/ublkb{id}")) };
        let mut server = Server::spawn(&format!("kublk{id}"), &mut add)?;
        server.wait_for(&device.node).with_context(|| process::line(&add))?;
        Ok(Kublk { server, device })
    }
}

impl Peer for Kublk {
    fn node(&self) -> &Path {
        &self.device.node
    }

    fn server(&self) -> &Cgroup {
        &self.server.cgroup
    }

    /// In steps. `del` alone does all of it, but waits 10 s for the end of a server that ended before `del` began to watch.
    fn stop(self: Box<Self>) -> Result<()> {
        let Kublk { server, device } = *self;
        device.ask("stop")?;
        server.wait()?;
        device.ask("del")
    }
}

/// A device in the driver, deleted when dropped: its server does not do so when it ends.
struct Device {
    id: u32,
    node: PathBuf,
}

impl Device {
    fn ask(&self, command: &str) -> Result<()> {
        process::output(Command::new(kublk::path()).args([command, "--number", &self.id.to_string()])).map(drop)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Fails after `stop`, which has deleted it.
        let _ = self.ask("del");
    }
}
