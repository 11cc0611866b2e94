//! A lock between runs of this program: two VMs that start at the same time fetch a kernel once.
//!
//! `flock` on a file that is never removed: after a removal a third run could lock a new file of
//! the same name while the second run still holds the old one. The kernel releases the lock when
//! the process ends, so a killed run leaves none.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};

/// A held lock, released when dropped.
pub struct Lock {
    _file: File,
}

/// Waits for the lock of the file at `path`, which is created if absent.
pub fn acquire(path: &Path) -> Result<Lock> {
    let file = open(path)?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(Lock { _file: file })
}

/// The lock, or `None` if a different run holds it.
pub fn try_acquire(path: &Path) -> Result<Option<Lock>> {
    try_lock(open(path)?, path)
}

/// The lock of a file or folder that exists, or `None` if it is held.
pub fn of_existing(path: &Path) -> Result<Option<Lock>> {
    try_lock(File::open(path).with_context(|| format!("cannot open {}", path.display()))?, path)
}

fn try_lock(file: File, path: &Path) -> Result<Option<Lock>> {
    match file.try_lock() {
        Ok(()) => Ok(Some(Lock { _file: file })),
        Err(fs::TryLockError::WouldBlock) => Ok(None),
        Err(fs::TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

fn open(path: &Path) -> Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open the lock file {}", path.display()))
}
