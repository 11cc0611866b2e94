//! The folder of one run, `target/vm/out-PID-N`: what the guest is told and what it leaves.
//!
//! Locked while the run lives. A run that ended well removes it; others leave it for a day to be looked at.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use crate::lock::{self, Lock};
use crate::workspace;

const KEPT: Duration = Duration::from_secs(24 * 3600);

/// A run's folder.
pub struct Out {
    /// Where it is, in the host and in the guest.
    pub path: PathBuf,
    _lock: Lock,
}

impl Out {
    /// A new, empty one.
    pub fn create() -> Result<Out> {
        sweep(&workspace::vm());
        for number in 0.. {
            let path = workspace::vm().join(format!("out-{}-{number}", process::id()));
            match fs::create_dir(&path) {
                Ok(()) => {
                    let lock = lock::acquire(&path.join("lock"))?;
                    return Ok(Out { path, _lock: lock });
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(|| format!("cannot create {}", path.display())),
            }
        }
        unreachable!("numbers do not end")
    }

    /// Writes a file that the guest reads.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// A file that the guest wrote; empty if it did not.
    pub fn read(&self, name: &str) -> String {
        fs::read(self.path.join(name)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// The exit status of the command, once the guest has written it.
    pub fn status(&self) -> Option<u8> {
        parse_status(&self.read("status"))
    }

    /// Removes it with all that is in it.
    pub fn remove(self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The status file has a number and a line end; anything less was not written to its end.
fn parse_status(text: &str) -> Option<u8> {
    text.strip_suffix('\n')?.parse().ok()
}

/// Removes folders of runs that ended badly long ago.
fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let old = entry.metadata().and_then(|data| data.modified());
        let old = old.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > KEPT));
        if old && entry.file_name().to_string_lossy().starts_with("out-") {
            // A living run holds its lock: a shell may be open for days.
            if let Ok(Some(_lock)) = lock::try_acquire(&entry.path().join("lock")) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_counts_only_when_complete() {
        // No status is a failure, and half a status is none: "1" could have become "137".
        assert_eq!(parse_status("7\n"), Some(7));
        assert_eq!(parse_status("0\n"), Some(0));
        assert_eq!(parse_status("1"), None);
        assert_eq!(parse_status(""), None);
        assert_eq!(parse_status("boom\n"), None);
    }
}
