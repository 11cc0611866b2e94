//! The control socket as a file: its owner, its mode, and its removal at the end of the daemon.
//!
//! ```text
//!   no readers   0600 root:root      in a directory 0750 root:root
//!   readers      0660 root:GROUP     in a directory 0750 root:GROUP, if that is the state directory
//! ```
//!
//! [`super::peers`] decides which commands a client that has opened the socket may send.
//!
//! Group and mode are changed through a descriptor of the socket, not by its path. A user with
//! write permission on the directory of `--socket` could put a link there, and the daemon, as root,
//! would change a file of that user's choice.

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

/// Clients that wait to be accepted. A new client waits for all clients before it; with the
/// kernel's own bound (4096), a flood would make that wait seconds long. A client beyond the
/// backlog waits in `connect`.
const BACKLOG: u32 = 64;

/// The control socket.
pub struct Socket {
    path: PathBuf,
    state_dir: PathBuf,
    readers: Cell<Option<u32>>,
    /// A descriptor (`O_PATH`) of the socket, once it is bound.
    file: OnceCell<File>,
}

impl Socket {
    /// A socket that is not bound yet. `readers` is a group id.
    pub fn new(path: PathBuf, state_dir: PathBuf, readers: Option<u32>) -> Self {
        Self { path, state_dir, readers: Cell::new(readers), file: OnceCell::new() }
    }

    /// Binds the socket and listens. The mode is 0600 from the start, so that no other user can
    /// connect before the group and the mode for the readers are set.
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

    /// Opens the bound socket. A file that a user with write permission on the directory has put in
    /// its place is refused and left alone.
    fn hold(&self) -> Outcome<()> {
        let file = ours(&self.path, |metadata| metadata.file_type().is_socket() && metadata.nlink() == 1)?;
        assert!(self.file.set(file).is_ok(), "listens once");
        Ok(())
    }

    /// The id of the group that may read besides root.
    pub fn readers(&self) -> Option<u32> {
        self.readers.get()
    }

    /// Lets a group read; `None` ends the permission.
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
        // Before Linux 6.6, this path is the only way to change a mode through an `O_PATH`
        // descriptor.
        fs::set_permissions(format!("/proc/self/fd/{}", socket.as_raw_fd()), Permissions::from_mode(mode))
            .or_fail(Class::State, format!("cannot set the mode of {}", self.path.display()))?;
        self.readers.set(readers);
        Ok(())
    }

    /// Removes the socket, unless a different file is in its place.
    pub fn remove(&self) {
        let number = |metadata: Metadata| (metadata.dev(), metadata.ino());
        let made = self.file.get().and_then(|file| file.metadata().ok()).map(number);
        if made.is_some() && made == fs::symlink_metadata(&self.path).ok().map(number) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A descriptor (`O_PATH`) of the file at `path`. Fails if that file is a link, belongs to a
/// different user, or fails `is_kind`.
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

/// The id of a group given by name or by number. May wait for the name service of the system.
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
            // The kernel compares the backlog with the clients that wait already, so one more gets
            // in.
            let waiting: Vec<_> = (0..=BACKLOG).map(|_| connect().unwrap()).collect();
            assert_eq!(connect().unwrap_err(), nix::errno::Errno::EAGAIN);
            drop(waiting);
        });
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn f85_a_link_in_place_of_the_socket_is_not_followed() {
        // A user with write permission on the directory moves the socket away and puts a link to a
        // file of root in its place.
        let folder = std::env::temp_dir().join(format!("ublk-throttle-exchanged-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        let [path, away, precious] = ["socket", "away", "precious"].map(|name| folder.join(name));
        fs::write(&precious, "precious").unwrap();
        fs::set_permissions(&precious, Permissions::from_mode(0o640)).unwrap();
        let mode = |path: &Path| fs::symlink_metadata(path).unwrap().mode() & 0o777;
        let group = |path: &Path| fs::symlink_metadata(path).unwrap().gid();
        let own = nix::unistd::getegid().as_raw();
        // Only root can give a file to any group.
        let gid = if nix::unistd::geteuid().is_root() { 4711 } else { own };
        let place = Socket::new(path.clone(), PathBuf::new(), None);
        tokio_uring::start(async {
            // `bind` alone: the umask of `listen` would hold for all tests of the process.
            let _listener = place.bind().unwrap();
            place.hold().unwrap();
            fs::rename(&path, &away).unwrap();
            std::os::unix::fs::symlink(&precious, &path).unwrap();
            place.open_to(Some(gid)).unwrap();
            assert_eq!((mode(&away), mode(&precious)), (0o660, 0o640));
            assert_eq!((group(&away), group(&precious)), (gid, own));
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
