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
    // Before the control group, which kills what is in it: the daemon ends by itself when it can.
    daemon: Daemon,
    server: Cgroup,
    folder: PathBuf,
    node: PathBuf,
}

impl Ours {
    /// Starts it; `device` is the one that is measured, `config` the YAML below `version: 1`. Names of devices are unique among
    /// all daemons of the boot that run at the same time.
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

    /// What a command prints that is sent to it.
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
