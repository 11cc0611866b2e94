//! The control socket as a file: whose it is, who may open it, and that it goes with the daemon.
//!
//! ```text
//!   no readers   0600 root:root      in a directory 0750 root:root
//!   readers      0660 root:GROUP     in a directory 0750 root:GROUP, if that is the state directory
//! ```
//!
//! Who may open it may still only do what [`super::peers`] says.

use std::cell::Cell;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Group, chown};
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
}

impl Socket {
    /// Not there yet. `readers` is a group by number.
    pub fn new(path: PathBuf, state_dir: PathBuf, readers: Option<u32>) -> Self {
        Self { path, state_dir, readers: Cell::new(readers) }
    }

    /// Makes it. For root alone at first: nobody can connect between its making and the change of its mode.
    pub fn listen(&self) -> Outcome<UnixListener> {
        let before = umask(Mode::from_bits_truncate(0o177));
        let listener = self.bind();
        umask(before);
        let listener = listener.or_fail(Class::State, format!("cannot listen on {}", self.path.display()))?;
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

    /// Who may look besides root, by number.
    pub fn readers(&self) -> Option<u32> {
        self.readers.get()
    }

    /// Lets a group look, or no longer.
    pub fn open_to(&self, readers: Option<u32>) -> Outcome<()> {
        let gid = Gid::from_raw(readers.unwrap_or(0));
        let give = |path: &Path| {
            chown(path, None, Some(gid)).or_fail(
                Class::Perm,
                format!("cannot give {} to group {gid} for `control.group` (CAP_CHOWN)", path.display()),
            )
        };
        give(&self.path)?;
        if self.path.parent() == Some(&self.state_dir) {
            give(&self.state_dir)?;
        }
        let mode = if readers.is_some() { 0o660 } else { 0o600 };
        fs::set_permissions(&self.path, Permissions::from_mode(mode))
            .or_fail(Class::State, format!("cannot set the mode of {}", self.path.display()))?;
        self.readers.set(readers);
        Ok(())
    }

    /// Takes it away.
    pub fn remove(&self) {
        let _ = fs::remove_file(&self.path);
    }
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
        place.remove();
    }

    #[test]
    fn a_group_is_found_by_name_and_by_number() {
        assert_eq!(resolve(None), Ok(None));
        assert_eq!(resolve(Some("root")), Ok(Some(0)));
        assert_eq!(resolve(Some("4711")), Ok(Some(4711)));
        assert_eq!(resolve(Some("no-such-group-here")).unwrap_err().class, Class::Config);
    }
}
