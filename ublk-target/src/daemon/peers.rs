//! Who may ask for what, decided by who connected, before a byte is read.
//!
//! | who | may |
//! | --- | --- |
//! | root, and the user of the daemon | everything |
//! | members of the group that the configuration names (`control: { group: … }`) | what only reads |
//! | everybody else | nothing |
//!
//! The kernel says who it is (SO_PEERCRED, SO_PEERGROUPS): the process that connected, whoever uses the socket later. Never
//! by pid, which may be somebody else's by now.

use std::os::fd::AsFd;

use tokio::net::UnixStream;

use crate::sys;

/// What a client may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// Only what changes nothing.
    Read,
    /// Everything.
    Change,
}

/// Who connected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    /// The first, and all others.
    pub gids: Vec<u32>,
}

impl Peer {
    /// Whoever is at the other end; nobody if the kernel does not tell.
    pub fn of(stream: &UnixStream) -> Option<Self> {
        let credentials = stream.peer_cred().ok()?;
        let mut gids = vec![credentials.gid()];
        // A kernel that does not tell them lets them have no right.
        gids.extend(sys::peer_groups(stream.as_fd()).unwrap_or_default());
        Some(Self { uid: credentials.uid(), gids })
    }

    /// What it may ask of a daemon of user `own`, whose configuration lets the group `readers` look.
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
        // Supplementary groups count as the first one does.
        let peer = |uid, gids: &[u32]| Peer { uid, gids: gids.to_vec() };
        assert_eq!(peer(0, &[0]).right(0, None), Some(Right::Change));
        assert_eq!(peer(500, &[500]).right(500, None), Some(Right::Change));
        assert_eq!(peer(0, &[0]).right(500, None), Some(Right::Change));
        assert_eq!(peer(1000, &[1000, 27]).right(0, Some(27)), Some(Right::Read));
        assert_eq!(peer(1000, &[27]).right(0, Some(27)), Some(Right::Read));
        assert_eq!(peer(1000, &[1000]).right(0, Some(27)), None);
        // Without a named group, not even root's group.
        assert_eq!(peer(1000, &[0]).right(0, None), None);
    }
}
