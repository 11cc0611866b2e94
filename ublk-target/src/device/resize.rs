//! Resizes a device that is in use.
//!
//! ```text
//!   grow     backend first ─► UPDATE_SIZE (helper)          the disk never ends behind the backend
//!   shrink   in use? ─► UPDATE_SIZE (helper)                the backend keeps its length
//! ```

use std::time::Duration;

use super::thread::DeviceThread;
use super::traces;
use crate::error::{Class, Failure, Outcome};
use crate::helper::{Answer, Errand, Helper};
use crate::log;
use crate::ublk::control::Control;
use crate::ublk::features;

/// Limit for the in-use check and UPDATE_SIZE together.
const RESIZE_LIMIT: Duration = Duration::from_secs(4);

impl DeviceThread {
    /// Resizes the device to `size` bytes, cut to whole blocks. Returns the new size.
    pub(super) fn resize(&mut self, size: u64) -> Outcome<u64> {
        let target = self.target.expect("only a live device is resized");
        let backend = self.backend.clone().expect("a live device has a backend");
        let geometry = crate::ublk::params::Geometry { size, ..backend.geometry() };
        let wanted = geometry.usable_size();
        // The kernel has the last word: an UPDATE_SIZE whose helper was killed may have ended later.
        let in_kernel = traces::size(target.id).filter(|size| *size > 0);
        let before = in_kernel.or(self.shared.standing().size).unwrap_or_default();
        if wanted == 0 {
            let what =
                format!("device {:?}: {size} bytes are less than a block of {}", self.name(), geometry.logical_block);
            return Err(Failure::new(Class::Config, what));
        }
        if Control::open_aside()?.features().unwrap_or(0) & 1 << features::UPDATE_SIZE == 0 {
            let what = format!(
                "device {:?}: this kernel cannot resize a live ublk device (Linux 6.16 or newer can); remove the device and \
                 add it again",
                self.name()
            );
            return Err(Failure::new(Class::Unsupported, what));
        }
        if wanted == before {
            self.record_size(wanted);
            return Ok(wanted);
        }
        backend.resize(wanted).map_err(|failure| failure.context(format!("device {:?}", self.name())))?;
        let errand = Errand::Resize { size: wanted, is_shrinking: wanted < before };
        let mut helper = Helper::spawn(target, errand)?;
        let mut said = None;
        let mut status = None;
        self.stage = "UPDATE_SIZE";
        self.wait(RESIZE_LIMIT, |_| {
            said = said.take().or_else(|| helper.heard());
            status = helper.ended();
            status.is_some()
        });
        match (status, said.or_else(|| helper.heard())) {
            (Some(status), _) if status.success() => {}
            // The helper died or hung after the command: the size of the disk decides.
            (None, _) | (Some(_), None) if traces::size(target.id) == Some(wanted) => {
                if status.is_none() {
                    helper.kill();
                }
            }
            (None, _) => {
                helper.kill();
                let what =
                    format!("device {:?}: the kernel has not changed its size within {RESIZE_LIMIT:?}", self.name());
                return Err(Failure::new(Class::Timeout, what));
            }
            (Some(_), Some(Answer::Busy(users))) => {
                let (name, node) = (self.name(), traces::node(target.id));
                let what = format!("device {name:?} ({node}) is in use: {users}; close it before it is made smaller");
                return Err(Failure::new(Class::Busy, what));
            }
            (Some(_), said) => {
                return Err(self.disappointed(helper, "cannot resize the device", said));
            }
        }
        self.record_size(wanted);
        log::info(format_args!("device={} state=resized size={wanted} before={before}", self.name()));
        Ok(wanted)
    }

    /// Stores the size of the disk for `list` and in the state file.
    fn record_size(&self, size: u64) {
        if self.shared.standing().size.replace(size) != Some(size) {
            self.write_state();
        }
    }
}
