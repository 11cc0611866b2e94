//! The kernel's NBD client: connects a unix socket to `/dev/nbdN`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::process;

/// A connected device, disconnected when dropped.
pub struct Nbd {
    node: PathBuf,
}

impl Nbd {
    /// Connects `/dev/nbdN` to an export.
    pub fn connect(number: u32, socket: &Path, export: &str) -> Result<Nbd> {
        process::output(Command::new("modprobe").arg("nbd"))?;
        let node = PathBuf::from(format!("/dev/nbd{number}"));
        let mut client = Command::new("nbd-client");
        client.arg("-unix").arg(socket).arg(&node).args(["-name", export, "-block-size", "512"]);
        process::output(&mut client)?;
        Ok(Nbd { node })
    }

    /// The block device.
    pub fn node(&self) -> &Path {
        &self.node
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let _ = process::output(Command::new("nbd-client").arg("-d").arg(&self.node));
    }
}
