//! The partition scan of a new disk.
//!
//! ```text
//!   Linux 6.19 and newer   the kernel scans after START has returned
//!   older kernels          START scans under the lock of the device; this daemon serves the reads of the scan
//! ```
//!
//! On an older kernel, a daemon that is killed during the scan leaves a read of a disk that outlives it
//! (`on-crash: requeue`) to the next daemon. The next daemon needs the lock before it can serve, START
//! keeps the lock until the read is served, and no signal ends START: only a reboot would remove the
//! device. START of such a disk therefore must not scan. The kernel does not scan the disk of an
//! untrusted server, so the queues offer their tags without `CAP_SYS_ADMIN`. `partx` scans instead, after
//! START has returned. If the daemon is killed then, the read of `partx` waits for the next daemon without
//! a lock that the next daemon needs.
//!
//! The price: on such a disk the kernel refuses to read the partition table again (BLKRRPART: invalid
//! argument), as it does for a loop device; `partx` and `partprobe` still read it.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::thread::DeviceThread;
use super::traces;
use crate::ublk::features::NO_AUTO_PART_SCAN;
use crate::{helper, log};

/// Interval at which the exit of `partx` is polled.
const LOOK: Duration = Duration::from_millis(2);

/// Whether START must not scan a disk that outlives its server, by the features of the driver.
///
/// No feature shows that the kernel scans after START. NO_AUTO_PART_SCAN came later and implies it, so the
/// few kernels between the two are treated like older ones.
pub(super) const fn must_come_later(features: u64) -> bool {
    features & (1 << NO_AUTO_PART_SCAN) == 0
}

impl DeviceThread {
    /// Scans for partitions with `partx`, and waits for its exit at most `limit`.
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
                // The backend does not answer a read of `partx`. A thread of its own reaps it, so that the
                // device thread does not wait.
                helper::leave_to_its_end(child, "partx's end");
                return;
            }
            self.wait(LOOK, |_| false);
        }
    }
}

/// Starts `partx`. Its exit code is ignored, because `partx` also fails for a disk without a partition
/// table, or with partitions that the kernel already knows.
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
