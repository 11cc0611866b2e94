//! Who looks for partitions on a new disk, and when.
//!
//! ```text
//!   Linux 6.19 and newer   START returns, and the kernel looks by itself afterwards
//!   before                 START looks, holding the lock of the device; its reads come to us
//! ```
//!
//! There a daemon that is killed while START looks leaves the read to its successor, where the disk outlives it
//! (`on-crash: requeue`). The successor needs the lock to serve, START keeps it until the read is served, and no signal ends that:
//! a device that nothing but a reboot removes. So START of such a disk is kept from looking, as the kernel does with a server that it
//! does not trust: queues are offered without `CAP_SYS_ADMIN`. `partx` looks instead, when START has returned. Killed then, its read
//! waits for the successor with no lock that anybody needs.
//!
//! The price: the kernel refuses to read the table of such a disk again by itself (BLKRRPART: invalid argument), as it does with a
//! loop device; `partx` and `partprobe` do it.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::thread::DeviceThread;
use super::traces;
use crate::ublk::features::NO_AUTO_PART_SCAN;
use crate::{helper, log};

/// How often it is asked whether `partx` has ended.
const LOOK: Duration = Duration::from_millis(2);

/// Whether START of a disk that outlives its server must not look for partitions, by what the driver can do. The kernels that look
/// after START came before the one that can be told not to; that one can be recognized.
pub(super) const fn must_come_later(features: u64) -> bool {
    features & (1 << NO_AUTO_PART_SCAN) == 0
}

impl DeviceThread {
    /// Looks for partitions, and waits no longer than `limit` for that.
    pub(super) fn look_for_partitions(&mut self, limit: Duration) {
        let node = traces::node(self.made().id);
        let mut child = match spawn(&node) {
            Ok(child) => child,
            Err(cause) => {
                let name = self.name();
                let cause = crate::error::plain(&cause);
                log::warn(
                    "W-PARTITIONS",
                    format_args!("device={name} partx (of util-linux): {cause}; partitions of {node} do not appear"),
                );
                return;
            }
        };
        let has_ended = |child: &mut Child| !matches!(child.try_wait(), Ok(None));
        let began = Instant::now();
        while !has_ended(&mut child) {
            if began.elapsed() >= limit {
                // It reads from a backend that does not answer; somebody has to wait for it, but not we.
                helper::leave_to_its_end(child, "partx's end");
                return;
            }
            self.wait(LOOK, |_| false);
        }
    }
}

/// A disk without a table, or whose partitions are known, makes it fail; that is nothing to tell.
fn spawn(node: &str) -> std::io::Result<Child> {
    Command::new("partx")
        .args(["--add", node])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .current_dir("/")
        .spawn()
}
