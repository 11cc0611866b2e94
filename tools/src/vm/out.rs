//! Folder of a run, `target/vm/out-PID-N`: the guest's input and results.
//!
//! The run holds a lock on the folder. `Ended::report` removes the folder, or leaves it for
//! inspection; [`sweep`] removes it after a day.

use std::fs::{self, DirEntry};
use std::path::{Path, PathBuf};
use std::process;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lock::{self, Lock};
use crate::workspace;

/// Time for which files of a run are kept that no later run has changed.
pub const KEPT: Duration = Duration::from_secs(24 * 3600);

/// Folder of a run.
pub struct Out {
    /// Path of the folder, in the host and in the guest.
    pub path: PathBuf,
    _lock: Lock,
}

impl Out {
    /// Creates an empty folder.
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

    /// Writes a file for the guest to read.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Contents of a file that the guest wrote; empty if the guest wrote none.
    pub fn read(&self, name: &str) -> String {
        fs::read(self.path.join(name)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Exit status of the command, once the guest has written it.
    pub fn status(&self) -> Option<u8> {
        parse_status(&self.read("status"))
    }

    /// Removes the folder.
    pub fn remove(self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The status file has a number and a newline. A file without the newline is incomplete.
fn parse_status(text: &str) -> Option<u8> {
    text.strip_suffix('\n')?.parse().ok()
}

/// Removes the folders of failed runs after a day.
fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if is_old(&entry) && entry.file_name().to_string_lossy().starts_with("out-") {
            // A running run holds its lock: a shell may be open for days.
            if let Ok(Some(_lock)) = lock::try_acquire(&entry.path().join("lock")) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// Whether the last change is longer ago than [`KEPT`].
pub fn is_old(entry: &DirEntry) -> bool {
    let changed = entry.metadata().and_then(|data| data.modified());
    changed.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > KEPT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_counts_only_when_complete() {
        // A missing status is a failure, and an incomplete status is missing: "1" could be the
        // beginning of "137".
        assert_eq!(parse_status("7\n"), Some(7));
        assert_eq!(parse_status("0\n"), Some(0));
        assert_eq!(parse_status("1"), None);
        assert_eq!(parse_status(""), None);
        assert_eq!(parse_status("boom\n"), None);
    }
}
