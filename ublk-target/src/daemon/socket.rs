//! The control socket as a file: whose it is, who may open it, and that it goes with the daemon.
//!
//! ```text
//!   no readers   0600 root:root      in a directory 0750 root:root
//!   readers      0660 root:GROUP     in a directory 0750 root:GROUP, if that is the state directory
//! ```
//!
//! A client that may open it may still only do what [`super::peers`] says.
//!
//! Group and mode are changed through a descriptor of the socket, not by its path: a user that may write the directory of `--socket`
//! could put a link there, and root's daemon would change another file.

use std::cell::{Cell, OnceCell};
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Group, fchownat};
use tokio::net::{UnixListener, UnixSocket};

use crate::error::{Class, Failure, OrFail, Outcome};

/// Clients that wait to be accepted. A new one waits for all that are before it, and with the kernel's own bound (4096) a flood
/// of them would make that seconds; one that finds no place waits for it in `connect`.
const BACKLOG: u32 = 64;

/// The socket.
pub struct Socket {
    path: PathBuf,
    state_dir: PathBuf,
    readers: Cell<Option<u32>>,
    /// The socket in the file system, once it is there.
    file: OnceCell<File>,
}

impl Socket {
    /// Not there yet. `readers` is a group by number.
    pub fn new(path: PathBuf, state_dir: PathBuf, readers: Option<u32>) -> Self {
        Self { path, state_dir, readers: Cell::new(readers), file: OnceCell::new() }
    }

    /// Makes it. For root alone at first: nobody can connect between its making and the change of its mode.
    pub fn listen(&self) -> Outcome<UnixListener> {
        let before = umask(Mode::from_bits_truncate(0o177));
        let listener = self.bind();
        umask(before);
        let listener = listener.or_fail(Class::State, format!("cannot listen on {}", self.path.display()))?;
        self.hold()?;
        if self.readers.get().is_some() {
            self.open_to(self.readers.get()).inspect_err(|_| self.remove())?;
        }
        Ok(listener)
    }

    fn bind(&self) -> io::Result<UnixListener> {
        let socket = UnixSocket::new_stream()?;
        socket.bind(&self.path)?;
        socket.listen(BACKLOG)
    }

    /// Opens what was bound. One that a user who may write its directory has exchanged already is refused, and left alone.
    fn hold(&self) -> Outcome<()> {
        let file = ours(&self.path, |metadata| metadata.file_type().is_socket() && metadata.nlink() == 1)?;
        assert!(self.file.set(file).is_ok(), "listens once");
        Ok(())
    }

    /// Who may look besides root, by number.
    pub fn readers(&self) -> Option<u32> {
        self.readers.get()
    }

    /// Lets a group look, or no longer.
    pub fn open_to(&self, readers: Option<u32>) -> Outcome<()> {
        let Some(socket) = self.file.get() else { return Ok(()) };
        let gid = Gid::from_raw(readers.unwrap_or(0));
        let give = |file: &File, path: &Path| {
            fchownat(file, c"", None, Some(gid), AtFlags::AT_EMPTY_PATH).or_fail(
                Class::Perm,
                format!("cannot give {} to group {gid} for `control.group` (CAP_CHOWN)", path.display()),
            )
        };
        give(socket, &self.path)?;
        if self.path.parent() == Some(&self.state_dir) {
            give(&ours(&self.state_dir, Metadata::is_dir)?, &self.state_dir)?;
        }
        let mode = if readers.is_some() { 0o660 } else { 0o600 };
        // The only way to a mode through a descriptor of this kind before Linux 6.6.
        fs::set_permissions(format!("/proc/self/fd/{}", socket.as_raw_fd()), Permissions::from_mode(mode))
            .or_fail(Class::State, format!("cannot set the mode of {}", self.path.display()))?;
        self.readers.set(readers);
        Ok(())
    }

    /// Takes it away, if it is still there.
    pub fn remove(&self) {
        let number = |metadata: Metadata| (metadata.dev(), metadata.ino());
        let made = self.file.get().and_then(|file| file.metadata().ok()).map(number);
        if made.is_some() && made == fs::symlink_metadata(&self.path).ok().map(number) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A descriptor (`O_PATH`) of what is at `path`, which must be of this user and of a kind, and no link.
fn ours(path: &Path, is_kind: impl Fn(&Metadata) -> bool) -> Outcome<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path);
    let file = file.or_fail(Class::UnsafePath, path.display())?;
    let metadata = file.metadata().or_fail(Class::UnsafePath, path.display())?;
    if is_kind(&metadata) && metadata.uid() == nix::unistd::geteuid().as_raw() {
        return Ok(file);
    }
    let what = format!(
        "{} was exchanged for something that is not ours; its directory may be written by others: choose another one",
        path.display()
    );
    Err(Failure::new(Class::UnsafePath, what))
}

/// The number of a group that a configuration names, or numbers. Asks the system, which may take a while.
pub fn resolve(group: Option<&str>) -> Outcome<Option<u32>> {
    let Some(name) = group else { return Ok(None) };
    if let Ok(number) = name.parse() {
        return Ok(Some(number));
    }
    let found = Group::from_name(name).or_fail(Class::Config, format!("control.group: cannot look up {name:?}"))?;
    let gid = found.map(|group| group.gid.as_raw());
    let missing = || {
        let what = format!("control.group: there is no Unix group {name:?}; make it (`groupadd -r {name}`)");
        Failure::new(Class::Config, what)
    };
    gid.ok_or_else(missing).map(Some)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};

    use super::*;

    #[test]
    fn f32_a_flood_waits_in_connect_and_not_in_a_queue_of_thousands() {
        let path = std::env::temp_dir().join(format!("ublk-throttle-socket-{}", std::process::id()));
        let place = Socket::new(path.clone(), PathBuf::new(), None);
        tokio_uring::start(async {
            let _listener = place.bind().unwrap();
            let address = UnixAddr::new(&path).unwrap();
            let connect = || {
                let client = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
                nix::sys::socket::connect(client.as_raw_fd(), &address).map(|()| client)
            };
            // The kernel's bound is on those already there.
            let waiting: Vec<_> = (0..=BACKLOG).map(|_| connect().unwrap()).collect();
            assert_eq!(connect().unwrap_err(), nix::errno::Errno::EAGAIN);
            drop(waiting);
        });
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn f85_a_link_in_place_of_the_socket_is_not_followed() {
        // A user that may write the directory moves the socket away and puts a link to root's file there.
        let folder = std::env::temp_dir().join(format!("ublk-throttle-exchanged-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        let [path, away, precious] = ["socket", "away", "precious"].map(|name| folder.join(name));
        fs::write(&precious, "precious").unwrap();
        fs::set_permissions(&precious, Permissions::from_mode(0o640)).unwrap();
        let mode = |path: &Path| fs::symlink_metadata(path).unwrap().mode() & 0o777;
        let gid = nix::unistd::getegid().as_raw();
        let place = Socket::new(path.clone(), PathBuf::new(), None);
        tokio_uring::start(async {
            // Without the change of umask, which holds for every test of the process.
            let _listener = place.bind().unwrap();
            place.hold().unwrap();
            fs::rename(&path, &away).unwrap();
            std::os::unix::fs::symlink(&precious, &path).unwrap();
            place.open_to(Some(gid)).unwrap();
            assert_eq!((mode(&away), mode(&precious)), (0o660, 0o640));
            place.remove();
            assert!(path.is_symlink() && precious.exists());
            assert_eq!(ours(&path, Metadata::is_file).unwrap_err().class, Class::UnsafePath);
            fs::rename(&away, &path).unwrap();
            place.remove();
            assert!(fs::symlink_metadata(&path).is_err());
        });
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_group_is_found_by_name_and_by_number() {
        assert_eq!(resolve(None), Ok(None));
        assert_eq!(resolve(Some("root")), Ok(Some(0)));
        assert_eq!(resolve(Some("4711")), Ok(Some(4711)));
        assert_eq!(resolve(Some("no-such-group-here")).unwrap_err().class, Class::Config);
    }
}
