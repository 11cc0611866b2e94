//! `qemu-storage-daemon` with a throttle group, the source of our terms.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::nbd::Nbd;
use super::{NULL_SIZE, Peer, Server};
use crate::bench::cgroup::Cgroup;
use crate::process;

/// The storage daemon and the kernel's client.
pub struct Qsd {
    // Dropped first: the kernel disconnects before the server ends.
    disks: Vec<Nbd>,
    server: Server,
    socket: PathBuf,
}

impl Qsd {
    /// Starts a throttle group with the limit `iops` and `devices` null devices, connected to
    /// `/dev/nbdN` with N counted from `first`.
    pub fn start(first: u32, devices: u32, iops: u32) -> Result<Qsd> {
        let socket = PathBuf::from(format!("/run/bench-qsd{first}.sock"));
        let mut qsd = Command::new("qemu-storage-daemon");
        qsd.arg("--object").arg(format!("throttle-group,id=group,x-iops-total={iops}"));
        qsd.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", socket.display()));
        for number in 0..devices {
            qsd.arg("--blockdev").arg(format!("null-co,node-name=null{number},size={NULL_SIZE},read-zeroes=on"));
            qsd.arg("--blockdev")
                .arg(format!("throttle,node-name=throttled{number},throttle-group=group,file=null{number}"));
            qsd.arg("--export")
                .arg(format!("nbd,id=export{number},node-name=throttled{number},name=throttled{number}"));
        }
        // The PID file is written after all exports are ready; the socket appears earlier.
        let pidfile = socket.with_extension("pid");
        qsd.arg("--pidfile").arg(&pidfile);
        let mut server = Server::spawn(&format!("qsd{first}"), &mut qsd)?;
        server.wait_for(&pidfile).with_context(|| process::line(&qsd))?;
        let connect = |number| Nbd::connect(first + number, &socket, &format!("throttled{number}"));
        let disks = (0..devices).map(connect).collect::<Result<_>>()?;
        Ok(Qsd { disks, server, socket })
    }

    /// Nodes of the devices.
    pub fn nodes(&self) -> Vec<PathBuf> {
        self.disks.iter().map(|disk| disk.node().to_owned()).collect()
    }
}

impl Peer for Qsd {
    fn node(&self) -> &Path {
        self.disks[0].node()
    }

    fn server(&self) -> &Cgroup {
        &self.server.cgroup
    }

    fn stop(self: Box<Self>) -> Result<()> {
        let Qsd { disks, server, socket } = *self;
        drop(disks);
        server.end()?;
        let _ = std::fs::remove_file(socket);
        Ok(())
    }
}
