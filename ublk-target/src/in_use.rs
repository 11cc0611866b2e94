//! Who uses a disk: mounts, swap, other disks on top of it, processes that have it open.
//!
//! ```text
//!   /sys/block/ublkbN/dev, ublkbN/*/dev   the numbers of the disk and its partitions
//!   /proc/PID/mountinfo                   mounts of any of them, in every mount namespace
//!   /proc/swaps                           swap
//!   /sys/block/ublkbN/holders, …          device mapper, md, …
//!   /proc/PID/fd                          open by a process
//! ```
//!
//! Runs in a helper process, as root. An exclusive open keeps the disk from being mounted while it is being stopped; it
//! does not tell about ordinary openers, so those are looked for; they are looked for again, because udev opens every new disk
//! shortly. Who it is that keeps the id of a removed disk is told by the same look: the numbers are known from before.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::sys;

/// How often a user must be seen to count as one.
const LOOKS: u32 = 3;
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// A disk, by everything that users know it by.
#[derive(Clone, Debug)]
pub struct Disk {
    id: u32,
    /// Of the disk and its partitions, as they are known even after the disk has gone.
    numbers: BTreeSet<String>,
}

impl Disk {
    /// `/dev/ublkbN` for `id`.
    pub fn find(id: u32) -> Self {
        Self { id, numbers: numbers(id) }
    }

    /// Opens the disk exclusively if nobody uses it; else tells who does. Forced, it does not matter who has it open, only
    /// whether it can be had exclusively.
    pub fn claim(&self, is_forced: bool) -> Result<File, String> {
        if is_forced {
            return self.open_exclusively().map_err(|cause| crate::error::plain(&cause));
        }
        let mut found = String::new();
        for look in 0..LOOKS {
            if look > 0 {
                std::thread::sleep(BETWEEN_LOOKS);
            }
            let claim = self.open_exclusively();
            let (lasting, openers) = (self.lasting_users(), self.openers());
            match claim {
                Ok(claim) if lasting.is_empty() && openers.is_empty() => return Ok(claim),
                Err(cause) if lasting.is_empty() && openers.is_empty() => {
                    found = format!("held by the kernel ({})", crate::error::plain(&cause));
                }
                _ => found = lasting.iter().chain(&openers).map(String::as_str).collect::<Vec<_>>().join("; "),
            }
            if !lasting.is_empty() {
                break;
            }
        }
        Err(found)
    }

    fn open_exclusively(&self) -> io::Result<File> {
        let path = format!("/dev/ublkb{}", self.id);
        let mut how = OpenOptions::new();
        how.read(true).custom_flags(libc::O_EXCL);
        // A disk that refuses writes is claimed as well by a reader.
        how.clone().write(true).open(&path).or_else(|_| how.open(&path))
    }

    /// Writes back every file system on the disk, wherever it is mounted.
    pub fn sync_mounts(&self) {
        for (pid, mountinfo) in mount_tables() {
            for mount in mounts_of(&mountinfo, &self.numbers) {
                // Through the process, because the mount may not be visible to us.
                let path = PathBuf::from(format!("/proc/{pid}/root{}", mount.display()));
                if let Ok(root) = File::open(path) {
                    // A failure was reported to those who wrote; STOP tries once more.
                    let _ = sys::sync_filesystem(root.as_fd());
                }
            }
        }
    }

    /// Writes back what is dirty of the disk itself, without being its only user.
    pub fn sync(&self) {
        if let Ok(disk) = File::open(format!("/dev/ublkb{}", self.id)) {
            // As above.
            let _ = disk.sync_all();
        }
    }

    /// What was done on the disk so far: requests and sectors, but not what is in flight.
    pub fn progress(&self) -> Vec<u64> {
        let stat = std::fs::read_to_string(format!("/sys/block/ublkb{}/stat", self.id)).unwrap_or_default();
        // Requests, merges, sectors and time of reads, then of writes.
        stat.split_whitespace().take(7).filter_map(|number| number.parse().ok()).collect()
    }

    /// Every user, in words; empty if there is none.
    pub fn users(&self) -> Vec<String> {
        self.lasting_users().into_iter().chain(self.openers()).collect()
    }

    /// Those who do not go by themselves: mounts, swap, other disks.
    fn lasting_users(&self) -> BTreeSet<String> {
        let mut users = BTreeSet::new();
        for (_, mountinfo) in mount_tables() {
            users.extend(mounts_of(&mountinfo, &self.numbers).map(|at| format!("mounted at {}", at.display())));
        }
        let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
        for path in swap_paths(&swaps) {
            if std::fs::metadata(path).is_ok_and(|metadata| self.numbers.contains(&number(metadata.rdev()))) {
                users.insert(format!("swap on {path}"));
            }
        }
        users.extend(holders(self.id).into_iter().map(|name| format!("held by /dev/{name}")));
        users
    }

    /// Processes other than this one that have the disk or a partition open.
    fn openers(&self) -> Vec<String> {
        let own = std::process::id();
        let has_open = |pid: &u32| {
            entries(Path::new(&format!("/proc/{pid}/fd"))).into_iter().any(|fd| {
                let link = PathBuf::from(format!("/proc/{pid}/fd/{fd}"));
                // By name first: looking at the file behind a link may mean a round trip to a server.
                let is_named = std::fs::read_link(&link).is_ok_and(|to| to.to_string_lossy().contains("ublkb"));
                let is_ours = |file: std::fs::Metadata| {
                    file.file_type().is_block_device() && self.numbers.contains(&number(file.rdev()))
                };
                is_named && std::fs::metadata(&link).is_ok_and(is_ours)
            })
        };
        let named = |pid: u32| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("open by {} (pid {pid})", name.trim())
        };
        processes().into_iter().filter(|pid| *pid != own).filter(has_open).map(named).collect()
    }
}

/// "major:minor", as the kernel writes it.
fn number(device: u64) -> String {
    format!("{}:{}", libc::major(device), libc::minor(device))
}

/// The numbers of the disk and its partitions.
fn numbers(id: u32) -> BTreeSet<String> {
    let disk = PathBuf::from(format!("/sys/block/ublkb{id}"));
    let parts = entries(&disk).into_iter().map(|name| disk.join(name));
    std::iter::once(disk.clone())
        .chain(parts)
        .filter_map(|part| std::fs::read_to_string(part.join("dev")).ok())
        .map(|number| number.trim().to_owned())
        .collect()
}

/// The names in a directory; none if it cannot be read.
fn entries(directory: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

/// One mountinfo for each mount namespace, with a process that lives in it.
fn mount_tables() -> Vec<(u32, String)> {
    let mut namespaces = BTreeMap::new();
    for pid in processes() {
        if let Ok(namespace) = std::fs::read_link(format!("/proc/{pid}/ns/mnt")) {
            namespaces.entry(namespace).or_insert(pid);
        }
    }
    let read = |pid: u32| Some((pid, std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?));
    namespaces.into_values().filter_map(read).collect()
}

fn processes() -> Vec<u32> {
    entries(Path::new("/proc")).iter().filter_map(|name| name.parse().ok()).collect()
}

/// The mount points of devices with one of these numbers.
///
/// A line: `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`; the third field is the device, the fifth the
/// mount point, with blanks as `\040`.
fn mounts_of<'a>(mountinfo: &'a str, numbers: &'a BTreeSet<String>) -> impl Iterator<Item = PathBuf> + 'a {
    mountinfo.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let number = fields.nth(2)?;
        let at = fields.nth(1)?;
        numbers.contains(number).then(|| PathBuf::from(unescape(at)))
    })
}

/// Undoes the kernel's octal escapes of blank, tab, newline and backslash.
fn unescape(text: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(text.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
}

/// The first column of /proc/swaps, below its head.
fn swap_paths(swaps: &str) -> impl Iterator<Item = &str> {
    swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next())
}

/// Disks on top of this one or of its partitions.
fn holders(id: u32) -> Vec<String> {
    let disk = PathBuf::from(format!("/sys/block/ublkb{id}"));
    let parts: Vec<PathBuf> = entries(&disk).into_iter().map(|name| disk.join(name)).collect();
    std::iter::once(disk).chain(parts).flat_map(|part| entries(&part.join("holders"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_found_by_the_number_of_its_device() {
        // Two mounts of 259:3, one with a blank in its path and optional fields before the dash; another device's between.
        let table = "21 1 0:20 / /proc rw shared:5 - proc proc rw\n\
                     36 21 259:3 / /srv/data rw,noatime shared:1 master:2 - ext4 /dev/ublkb0 rw\n\
                     37 21 259:30 / /other rw - ext4 /dev/ublkb9 rw\n\
                     38 21 259:3 /sub /srv/two\\040words rw - ext4 /dev/ublkb0 rw\n";
        let numbers = BTreeSet::from(["259:3".to_owned()]);
        let found: Vec<PathBuf> = mounts_of(table, &numbers).collect();
        assert_eq!(found, [PathBuf::from("/srv/data"), PathBuf::from("/srv/two words")]);
    }

    #[test]
    fn a_cut_off_table_is_no_reason_to_stumble() {
        let numbers = BTreeSet::from(["259:3".to_owned()]);
        assert_eq!(mounts_of("36 21 259:3 /\n\n36 21\n", &numbers).count(), 0);
    }

    #[test]
    fn swap_paths_are_the_first_column_below_the_head() {
        let swaps = "Filename\t\t\tType\t\tSize\n/dev/ublkb1                    partition\t1024\n";
        assert_eq!(swap_paths(swaps).collect::<Vec<_>>(), ["/dev/ublkb1"]);
    }
}
