//! The rights of a client, decided from its user and groups before a byte is read.
//!
//! | user of the client | commands |
//! | --- | --- |
//! | root, and the user of the daemon | all |
//! | member of the group that the configuration names (`control: { group: … }`) | commands that only read |
//! | any user besides | none |
//!
//! The kernel reports the credentials of the process that called connect(2) (SO_PEERCRED,
//! SO_PEERGROUPS); a process that inherits the socket later does not change them. The pid of the
//! client is not used, because the kernel may have reused it for a different process.

use std::os::fd::AsFd;

use tokio::net::UnixStream;

use crate::sys;

/// The commands that a client may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// Only commands that change nothing.
    Read,
    /// All commands.
    Change,
}

/// The user and the groups of a client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    /// The primary group, then the supplementary groups.
    pub gids: Vec<u32>,
}

impl Peer {
    /// The credentials of the client of `stream`; `None` if the kernel does not report them.
    pub fn of(stream: &UnixStream) -> Option<Self> {
        let credentials = stream.peer_cred().ok()?;
        let mut gids = vec![credentials.gid()];
        // On a kernel without SO_PEERGROUPS, supplementary groups give no right.
        gids.extend(sys::peer_groups(stream.as_fd()).unwrap_or_default());
        Some(Self { uid: credentials.uid(), gids })
    }

    /// The right of the client on a daemon of user `own`. `readers` is the group that the
    /// configuration allows to read. `None`: the client may send no command.
    pub fn right(&self, own: u32, readers: Option<u32>) -> Option<Right> {
        if self.uid == 0 || self.uid == own {
            return Some(Right::Change);
        }
        readers.is_some_and(|readers| self.gids.contains(&readers)).then_some(Right::Read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f54_root_changes_the_named_group_reads_and_nobody_else_is_heard() {
        // A supplementary group gives the same right as the primary group.
        let peer = |uid, gids: &[u32]| Peer { uid, gids: gids.to_vec() };
        assert_eq!(peer(0, &[0]).right(0, None), Some(Right::Change));
        assert_eq!(peer(500, &[500]).right(500, None), Some(Right::Change));
        assert_eq!(peer(0, &[0]).right(500, None), Some(Right::Change));
        assert_eq!(peer(1000, &[1000, 27]).right(0, Some(27)), Some(Right::Read));
        assert_eq!(peer(1000, &[27]).right(0, Some(27)), Some(Right::Read));
        assert_eq!(peer(1000, &[1000]).right(0, Some(27)), None);
        // If the configuration names no group, no group has a right, not even root's.
        assert_eq!(peer(1000, &[0]).right(0, None), None);
    }
}
