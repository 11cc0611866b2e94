//! The directory of a daemon: its lock, its socket, a file for each of its devices.
//!
//! ```text
//!   /run/ublk-throttle/        0750, ours
//!     lock                     flock held as long as the daemon lives; holds its pid
//!     control.sock             0600, or 0660 for who may look (`control.group`)
//!     NAME.device.json         what `list` shows when the daemon does not answer
//! ```
//!
//! No link is followed, nothing is removed that is not ours. A file is written beside its place, made durable, and renamed.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::device::Status;
use crate::error::{Class, Failure, OrFail, Outcome};

const SUFFIX: &str = ".device.json";

/// A state directory, locked by this process.
pub struct StateDir {
    path: PathBuf,
    _lock: Flock<File>,
}

impl StateDir {
    /// Makes the directory if need be, and locks it.
    pub fn lock(path: &Path) -> Outcome<Self> {
        match DirBuilder::new().mode(0o750).create(path) {
            Ok(()) => {}
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => check_directory(path)?,
            Err(cause) => return Err(cause).or_fail(Class::State, format!("cannot make {}", path.display())),
        }
        let lock_path = path.join("lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(&lock_path)
            .map_err(|cause| unsafe_or(&lock_path, cause))?;
        check_file(&file, &lock_path)?;
        let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(mut file, errno)| {
            if errno != nix::errno::Errno::EWOULDBLOCK {
                return Err::<(), _>(errno)
                    .or_fail(Class::State, format!("cannot lock {}", lock_path.display()))
                    .unwrap_err();
            }
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            Failure::new(
                Class::Locked,
                format!(
                    "pid {} already serves {}; stop it, or give this one its own --state-dir",
                    pid.trim(),
                    path.display()
                ),
            )
        })?;
        lock.set_len(0)
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .or_fail(Class::State, format!("cannot write {}", lock_path.display()))?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Writes the state file of a device.
    pub fn write(&self, status: &Status) -> Outcome<()> {
        let at = self.file(&status.name);
        let fresh = self.path.join(format!(".{}{SUFFIX}.new", status.name));
        let write = || -> io::Result<()> {
            let _ = fs::remove_file(&fresh);
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o640).open(&fresh)?;
            serde_json::to_writer(&mut file, status)?;
            file.sync_all()?;
            fs::rename(&fresh, &at)?;
            File::open(&self.path)?.sync_all()
        };
        write().or_fail(Class::State, format!("cannot write {}", at.display()))
    }

    /// Removes the state file of a device that has gone.
    pub fn forget(&self, name: &str) {
        let _ = fs::remove_file(self.file(name));
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}{SUFFIX}"))
    }
}

/// What the state files say, for a reader that found no daemon. `None` if there is no such directory.
pub fn read(path: &Path) -> Outcome<Option<Vec<Status>>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(cause) if cause.kind() == io::ErrorKind::PermissionDenied => {
            return Err(cause).or_fail(Class::Perm, path.display());
        }
        Err(cause) => return Err(cause).or_fail(Class::State, path.display()),
    };
    let mut found = Vec::new();
    for entry in entries.filter_map(Result::ok) {
        let file = entry.path();
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') || !name.ends_with(SUFFIX) {
            continue;
        }
        let text = fs::read(&file).or_fail(Class::State, file.display())?;
        let mut status: Status = serde_json::from_slice(&text).map_err(|cause| {
            let what = format!("{} is not a state file of this version ({cause}); move it away", file.display());
            Failure::new(Class::State, what)
        })?;
        // Whoever wrote it does not answer, so what it said about its work no longer holds.
        status.state = "unserved".to_owned();
        status.held = 0;
        found.push(status);
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(Some(found))
}

/// Makes room for a socket at `path`: a stale one of ours goes, anything else is left and refused. Only to be called with the
/// lock held, so that a stale one of this directory is really stale.
pub fn clear_socket(path: &Path) -> Outcome<()> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(cause).or_fail(Class::UnsafePath, path.display()),
    };
    if !metadata.file_type().is_socket() || metadata.uid() != nix::unistd::geteuid().as_raw() {
        return Err(Failure::new(
            Class::UnsafePath,
            format!("{} is in the way: it is not a socket of ours; choose another --socket", path.display()),
        ));
    }
    // A daemon with another state directory may be behind it.
    if UnixStream::connect(path).is_ok() {
        return Err(Failure::new(
            Class::Locked,
            format!("another daemon answers on {}; choose another --socket", path.display()),
        ));
    }
    fs::remove_file(path).or_fail(Class::State, format!("cannot remove the stale {}", path.display()))
}

fn check_directory(path: &Path) -> Outcome<()> {
    let metadata = fs::symlink_metadata(path).or_fail(Class::State, path.display())?;
    let refuse = |why: &str| Err(Failure::new(Class::UnsafePath, format!("{} {why}", path.display())));
    if !metadata.is_dir() {
        return refuse("is not a directory; choose another --state-dir");
    }
    if metadata.uid() != nix::unistd::geteuid().as_raw() {
        return refuse("belongs to another user; choose another --state-dir");
    }
    if metadata.mode() & 0o022 != 0 {
        return refuse("may be written by others; `chmod 0750` it, or choose another --state-dir");
    }
    Ok(())
}

fn check_file(file: &File, path: &Path) -> Outcome<()> {
    let metadata = file.metadata().or_fail(Class::State, path.display())?;
    if !metadata.is_file() || metadata.uid() != nix::unistd::geteuid().as_raw() || metadata.nlink() != 1 {
        return Err(Failure::new(Class::UnsafePath, format!("{} is not a file of ours; remove it", path.display())));
    }
    Ok(())
}

fn unsafe_or(path: &Path, cause: io::Error) -> Failure {
    match cause.raw_os_error() {
        Some(libc::ELOOP | libc::ENXIO | libc::EISDIR) => {
            Failure::new(Class::UnsafePath, format!("{} is not a file of ours; remove it", path.display()))
        }
        _ => Err::<(), _>(cause).or_fail(Class::State, format!("cannot open {}", path.display())).unwrap_err(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("ublk-throttle-state-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn a_second_daemon_is_told_the_pid_of_the_first() {
        // The flock decides, not the file: it goes with the process, however that ends.
        let path = scratch("lock");
        let first = StateDir::lock(&path).unwrap();
        let refused = StateDir::lock(&path).err().unwrap();
        assert_eq!(refused.class, Class::Locked);
        assert!(refused.message.contains(&format!("pid {}", std::process::id())), "{}", refused.message);
        drop(first);
        assert!(StateDir::lock(&path).is_ok());
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn a_directory_that_others_may_write_is_refused() {
        let path = scratch("open");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(StateDir::lock(&path).err().unwrap().class, Class::UnsafePath);
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn a_link_in_place_of_the_lock_is_not_followed() {
        let path = scratch("link");
        drop(StateDir::lock(&path).unwrap());
        let victim = path.join("victim");
        fs::write(&victim, "precious").unwrap();
        fs::remove_file(path.join("lock")).unwrap();
        symlink(&victim, path.join("lock")).unwrap();
        assert_eq!(StateDir::lock(&path).err().unwrap().class, Class::UnsafePath);
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn a_file_in_place_of_the_socket_is_left_alone() {
        let path = scratch("socket");
        fs::write(&path, "precious").unwrap();
        assert_eq!(clear_socket(&path).unwrap_err().class, Class::UnsafePath);
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
    }
}
