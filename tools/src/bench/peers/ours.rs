//! `ublk-throttle`, with a configuration for the case.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Peer;
use crate::bench::cgroup::Cgroup;
use crate::build;
use crate::daemon::{Daemon, Log};

/// A daemon of ours with its own state directory.
pub struct Ours {
    // Dropped before the control group, which kills its processes: the daemon gets SIGTERM first.
    daemon: Daemon,
    server: Cgroup,
    folder: PathBuf,
    node: PathBuf,
}

impl Ours {
    /// Starts the daemon. `device` is the measured device; `config` is the YAML below `version: 1`.
    /// Device names must be unique among all daemons that run at the same time.
    pub fn start(device: &str, config: &str) -> Result<Ours> {
        let folder = PathBuf::from("/run/bench").join(device);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let file = folder.join("config.yaml");
        fs::write(&file, format!("version: 1\n{config}")).with_context(|| file.display().to_string())?;
        let server = Cgroup::create(device)?;
        let daemon = Daemon::spawn(&build::daemon_path("release"), &file, &folder, Log::Kept)?;
        server.add(daemon.pid())?;
        daemon.wait_until_ready()?;
        Ok(Ours { daemon, server, folder, node: Path::new("/dev/ublk-throttle").join(device) })
    }

    /// Sends a command to the daemon and returns its output.
    pub fn ask(&self, words: &[&str]) -> Result<String> {
        self.daemon.ask(words)
    }
}

impl Peer for Ours {
    fn node(&self) -> &Path {
        &self.node
    }

    fn server(&self) -> &Cgroup {
        &self.server
    }

    fn stop(self: Box<Self>) -> Result<()> {
        let Ours { daemon, server, folder, .. } = *self;
        daemon.stop()?;
        server.wait_until_empty(super::PATIENCE)?;
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))
    }
}
