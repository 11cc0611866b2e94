//! Why the open of a backend failed: the path leads to nothing, or to a file that cannot serve.

use nix::errno::Errno;

use crate::error::Failure;

/// A backend that was not opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// For the user.
    pub failure: Failure,
    /// The errno if the path leads to nothing: ENOENT, ENOTDIR, or ENXIO and ENODEV of a node without a device.
    /// `None` if it leads to a file that cannot serve.
    pub missing: Option<Errno>,
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Self { failure, missing: None }
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        refused.failure
    }
}
