//! The kernel's own throttle, `io.max`, over a null device of rublk.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Peer, Rublk};
use crate::bench::cgroup::Cgroup;
use crate::bench::load;

/// A null device of rublk, and a control group with a limit on it.
pub struct IoMax {
    device: Rublk,
    client: Cgroup,
}

impl IoMax {
    /// Starts with a limit of `iops` reads a second.
    pub fn start(id: u32, queues: u32, iops: u32) -> Result<IoMax> {
        let device = Rublk::null(id, queues)?;
        let client = Cgroup::create(&format!("client{id}"))?;
        let disk = load::quiet(device.node())?;
        let number = fs::read_to_string(Path::new("/sys/block").join(&disk).join("dev"));
        let number = number.with_context(|| format!("{disk} has no number"))?;
        client.write("io.max", &format!("{} riops={iops}", number.trim()))?;
        Ok(IoMax { device, client })
    }
}

impl Peer for IoMax {
    fn node(&self) -> &Path {
        self.device.node()
    }

    fn server(&self) -> &Cgroup {
        self.device.server()
    }

    fn client(&self) -> Option<&Cgroup> {
        Some(&self.client)
    }

    fn stop(self: Box<Self>) -> Result<()> {
        Box::new(self.device).stop()
    }
}
