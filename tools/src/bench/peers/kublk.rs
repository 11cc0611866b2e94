//! `kublk`: the ublk server of the kernel's self-tests, without a throttle.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Peer, Server};
use crate::bench::cgroup::Cgroup;
use crate::{kublk, process};

/// Commands of the driver that fetch and commit requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commands {
    /// A command for each tag.
    EachTag,
    /// A command for all requests of a turn (`-b`, `UBLK_F_BATCH_IO`). A driver without that
    /// feature clears the flag and adds the device, and kublk then serves it with a command for
    /// each tag, without an error. Callers must check the feature first.
    Batched,
}

/// A device of kublk.
pub struct Kublk {
    // Dropped before the device, which can be deleted once its server has ended.
    server: Server,
    device: Device,
}

impl Kublk {
    /// Starts the null target.
    pub fn null(id: u32, queues: u32, commands: Commands) -> Result<Kublk> {
        Kublk::start(id, queues, commands, "null", None)
    }

    /// Starts the loop target, which always opens its file with `O_DIRECT`.
    pub fn file(id: u32, queues: u32, commands: Commands, file: &Path) -> Result<Kublk> {
        Kublk::start(id, queues, commands, "loop", Some(file.as_os_str()))
    }

    fn start(id: u32, queues: u32, commands: Commands, target: &str, file: Option<&OsStr>) -> Result<Kublk> {
        let mut add = Command::new(kublk::path());
        // `--foreground`: by default kublk forks twice, and the process started here would end
        // before the server is in the control group.
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

    /// Stops the device, waits for the server, then deletes the device. `del` alone does all of it,
    /// but waits 10 s for a server that ended before `del` began to watch.
    fn stop(self: Box<Self>) -> Result<()> {
        let Kublk { server, device } = *self;
        device.ask("stop")?;
        server.wait()?;
        device.ask("del")
    }
}

/// A device in the driver, deleted when dropped, because its server does not delete it.
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
        // After `Peer::stop` the device is gone and `del` fails.
        let _ = self.ask("del");
    }
}
