//! The users of a disk: mounts, swap, disks stacked on it, exports of the kernel, processes that
//! have it open.
//!
//! ```text
//!   /sys/block, /sys/fs/btrfs             the disk, its partitions, and the devices above them: see [`crate::stack`]
//!   /proc/PID/mountinfo                   mounts of any of them, in every mount namespace
//!   /proc/swaps                           swap
//!   /sys/kernel/config                    nvmet and LIO, which export disks to remote hosts
//!   /proc/PID/fd, /proc/PID/map_files     open or mapped by a process, under any name
//! ```
//!
//! Runs in a helper process, as root. An exclusive open keeps the disk from being mounted while it
//! is being stopped. As it does not reveal ordinary openers, `/proc` is searched for them, up to
//! three times, because udev opens every new disk for a moment. This search also names the users
//! that keep the id of a removed disk: [`Disk`] has its device numbers from before.
//!
//! A backend asks in the daemon for the lasting users of the disk below it: [`users_of`],
//! [`unclaimed_users_of`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::stack::{Devices, Sysfs, entries, number, unescape};
use crate::sys;

/// Searches that must find an opener before the disk counts as in use. Lasting users count at the
/// first.
pub const LOOKS: u32 = 3;
/// The pause between two looks.
pub const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// A disk with all device numbers by which its users know it.
#[derive(Clone, Debug)]
pub struct Disk {
    id: u32,
    /// Level 0 is the disk with its partitions; the levels above are the devices stacked on it.
    /// Valid even after the disk has gone.
    levels: Vec<Devices>,
}

impl Disk {
    /// `/dev/ublkbN` for `id`.
    pub fn find(id: u32) -> Self {
        Self { id, levels: Sysfs::of_host().levels_above(&format!("ublkb{id}")) }
    }

    /// Opens the disk exclusively if it has no users; the error names them. A forced claim ignores
    /// openers: it fails only if the exclusive open does.
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
        // A disk that refuses writes can be claimed by a reader as well.
        how.clone().write(true).open(&path).or_else(|_| how.open(&path))
    }

    /// Whether a stacked device (dm, md, loop) is above the disk or a partition of it.
    pub fn is_below_another(&self) -> bool {
        self.levels.len() > 1
    }

    /// Writes back dirty data above the disk, from the top of the stack down: the file systems of a
    /// level, in every mount, then the devices of that level, which are below the file systems of
    /// the next one.
    pub fn sync_above(&self) {
        let mut is_all_seen = true;
        let tables = mount_tables();
        for (height, level) in self.levels.iter().enumerate().rev() {
            let mounts = Mounts::of(level);
            for (pid, mountinfo) in &tables {
                for mount in mounts.find(mountinfo) {
                    // By way of a process in the mount's namespace, as the helper may not see the
                    // mount.
                    let path = PathBuf::from(format!("/proc/{pid}/root{}", mount.display()));
                    match File::open(path) {
                        // The kernel reports a write error to the processes that wrote; STOP writes
                        // back once more.
                        Ok(root) => drop(sys::sync_filesystem(root.as_fd())),
                        // A root directory of mode 0700 of another user does not open without
                        // CAP_DAC_READ_SEARCH.
                        Err(_) => is_all_seen = false,
                    }
                }
            }
            // Level 0, the disk itself, is written back by the caller, through its claim.
            for name in level.keys().filter(|_| height > 0) {
                if let Ok(device) = File::open(Path::new("/dev").join(name)) {
                    let _ = device.sync_all();
                }
            }
        }
        // If a mount does not open, or no table names the user (such as a pool of ZFS), sync(2)
        // writes back everything of the host.
        if !is_all_seen || self.lasting_users().is_empty() {
            nix::unistd::sync();
        }
    }

    /// Writes back dirty data of the disk itself, through an open that is not exclusive.
    pub fn sync(&self) {
        if let Ok(disk) = File::open(format!("/dev/ublkb{}", self.id)) {
            // The kernel reports a write error to the processes that wrote.
            let _ = disk.sync_all();
        }
    }

    /// Completed requests and sectors of the disk so far, without those in flight.
    pub fn progress(&self) -> Vec<u64> {
        let stat = std::fs::read_to_string(format!("/sys/block/ublkb{}/stat", self.id)).unwrap_or_default();
        // Fields 1 to 7: requests, merges, sectors and time of reads, then the first three of
        // writes.
        stat.split_whitespace().take(7).filter_map(|number| number.parse().ok()).collect()
    }

    /// The path of a swap on the disk that has pages in use.
    pub fn swap_in_use(&self) -> Option<String> {
        swaps_on(&self.levels).into_iter().find(|(_, used)| *used > 0).map(|(path, _)| path)
    }

    /// Every user, in words.
    pub fn users(&self) -> Vec<String> {
        self.lasting_users().into_iter().chain(self.openers()).collect()
    }

    /// Users that do not end by themselves.
    fn lasting_users(&self) -> BTreeSet<String> {
        lasting_users(&self.levels)
    }

    /// Processes, except this one, that have the disk or a partition open or mapped.
    fn openers(&self) -> Vec<String> {
        let own = std::process::id();
        let numbers: BTreeSet<&String> = self.levels[0].values().collect();
        let is_ours = |link: &Path| sys::block_number(link).is_some_and(|device| numbers.contains(&number(device)));
        let mut mapped = BTreeMap::new();
        let has_open = |pid: u32| {
            let folder = PathBuf::from(format!("/proc/{pid}/fd"));
            entries(&folder).into_iter().any(|entry| is_ours(&folder.join(entry)))
        };
        let name = |pid: u32| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            // A process chooses its own name, and the name goes to logs and terminals.
            name.trim().escape_default().to_string()
        };
        let mut users = Vec::new();
        for pid in processes().into_iter().filter(|pid| *pid != own) {
            if has_open(pid) {
                users.push(format!("open by {} (pid {pid})", name(pid)));
            } else if maps_a_device(pid, &mut mapped, &is_ours) {
                users.push(format!("mapped by {} (pid {pid})", name(pid)));
            }
        }
        users
    }
}

/// The lasting users of the block device with this number, `major:minor`, in words; empty if there is none.
pub fn users_of(number: &str) -> Vec<String> {
    lasting_users(&Sysfs::of_host().levels_above_number(number)).into_iter().collect()
}

/// The lasting users that have the device open without a claim (loop devices, exports): an exclusive
/// open (`O_EXCL`) succeeds beside them.
pub fn unclaimed_users_of(number: &str) -> Vec<String> {
    let levels = Sysfs::of_host().levels_above_number(number);
    holders(&levels).chain(exporters(&levels)).collect()
}

/// Users that do not end by themselves: mounts, swap, stacked disks, exports.
fn lasting_users(levels: &[Devices]) -> BTreeSet<String> {
    let mut users: BTreeSet<String> = holders(levels).chain(exporters(levels)).collect();
    let tables = mount_tables();
    for level in levels {
        let mounts = Mounts::of(level);
        for (_, mountinfo) in &tables {
            users.extend(mounts.find(mountinfo).map(|at| format!("mounted at {}", at.display())));
        }
    }
    users.extend(swaps_on(levels).into_iter().map(|(path, _)| format!("swap on {path}")));
    users
}

/// The swap on any of the devices: path of the block device or file, and the KiB that are in use.
fn swaps_on(levels: &[Devices]) -> Vec<(String, u64)> {
    let is_among = |device: u64| levels.iter().flat_map(Devices::values).any(|own| *own == number(device));
    let is_on = |path: &str| {
        let node = std::fs::metadata(path);
        node.is_ok_and(|node| is_among(if node.file_type().is_block_device() { node.rdev() } else { node.dev() }))
    };
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    swaps_of(&swaps).filter(|(path, _)| is_on(path)).map(|(path, used)| (path.to_owned(), used)).collect()
}

fn holders(levels: &[Devices]) -> impl Iterator<Item = String> {
    levels.iter().skip(1).flat_map(Devices::keys).map(|name| format!("held by /dev/{name}"))
}

fn exporters(levels: &[Devices]) -> impl Iterator<Item = String> {
    let all = exports(Path::new("/sys/kernel/config")).into_iter();
    all.filter(move |(_, path)| is_node(levels, path)).map(|(export, _)| format!("exported by {export}"))
}

/// Whether a path leads to one of these devices.
fn is_node(levels: &[Devices], path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|node| {
        let number = number(node.rdev());
        node.file_type().is_block_device() && levels.iter().flat_map(Devices::values).any(|own| *own == number)
    })
}

/// Whether process `pid` has mapped a device that satisfies `is_it`. `seen` caches the result for
/// each file, as many processes map the same file.
///
/// A line of /proc/PID/maps: `7f0c54000000-7f0c54021000 rw-s 00000000 00:05 1234   /dev/ublkb0`;
/// fields 4 and 5 are the device and the inode of the file. The address range is also the name of a
/// link in map_files.
fn maps_a_device(pid: u32, seen: &mut BTreeMap<String, bool>, is_it: &impl Fn(&Path) -> bool) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    maps.lines().any(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(device), Some(inode)) = (fields.next(), fields.nth(2), fields.next()) else {
            return false;
        };
        inode != "0"
            && *seen
                .entry(format!("{device} {inode}"))
                .or_insert_with(|| is_it(Path::new(&format!("/proc/{pid}/map_files/{range}"))))
    })
}

/// The exports of nvmet and LIO, in words, with the paths of the disks. Both open a disk inside the
/// kernel, where no process has it open.
fn exports(configfs: &Path) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    let mut add = |what: String, file: PathBuf| {
        let path = std::fs::read_to_string(file).unwrap_or_default();
        let path = path.trim_matches(['\n', '\0', ' ']);
        found.extend((!path.is_empty()).then(|| (what, PathBuf::from(path))));
    };
    let subsystems = configfs.join("nvmet/subsystems");
    for subsystem in entries(&subsystems) {
        let namespaces = subsystems.join(&subsystem).join("namespaces");
        for namespace in entries(&namespaces) {
            let folder = namespaces.join(&namespace);
            if std::fs::read_to_string(folder.join("enable")).is_ok_and(|enable| enable.trim() == "1") {
                add(format!("nvmet ({subsystem}, namespace {namespace})"), folder.join("device_path"));
            }
        }
    }
    let core = configfs.join("target/core");
    for hba in entries(&core) {
        for name in entries(&core.join(&hba)) {
            let folder = core.join(&hba).join(&name);
            if std::fs::read_to_string(folder.join("enable")).is_ok_and(|enable| enable.trim() == "1") {
                add(format!("LIO ({hba}/{name})"), folder.join("udev_path"));
            }
        }
    }
    found
}

/// A mountinfo for each mount namespace, with the number of a process in it.
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

/// The device numbers by which mounts of some devices are recognised in a mount table.
struct Mounts {
    numbers: BTreeSet<String>,
    /// `numbers`, and the further devices of the btrfs file systems on them.
    sources: BTreeSet<String>,
}

impl Mounts {
    fn of(devices: &Devices) -> Self {
        let sysfs = Sysfs::of_host();
        let members = sysfs.btrfs_on(devices);
        let members = members.iter().filter_map(|name| sysfs.number_of_node(&Path::new("/dev").join(name)));
        Self {
            numbers: devices.values().cloned().collect(),
            sources: members.chain(devices.values().cloned()).collect(),
        }
    }

    /// The mount points of these devices.
    ///
    /// A line: `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`. Field 3 is the
    /// device, field 5 the mount point, with blanks as `\040`; behind the dash come type and
    /// source. A file system on several devices has a number of its own, with 0 before the colon;
    /// then the source counts.
    fn find<'a>(&'a self, mountinfo: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
        mountinfo.lines().filter_map(|line| {
            let mut fields = line.split(' ');
            let number = fields.nth(2)?;
            let at = fields.nth(1)?;
            let source = || line.split_once(" - ").and_then(|(_, tail)| tail.split(' ').nth(1)).unwrap_or_default();
            let is_theirs = self.numbers.contains(number) || (number.starts_with("0:") && self.has_source(source()));
            is_theirs.then(|| PathBuf::from(unescape(at)))
        })
    }

    /// Whether `source`, one path or several with colons between them, names a device in `sources`.
    fn has_source(&self, source: &str) -> bool {
        let source = unescape(source);
        let nodes = source.split(':').filter(|path| path.starts_with("/dev/"));
        let numbers = nodes.filter_map(|path| Sysfs::of_host().number_of_node(Path::new(path)));
        numbers.into_iter().any(|number| self.sources.contains(&number))
    }
}

/// Path and used KiB of each line of /proc/swaps: columns 1 and 4, without the head line.
fn swaps_of(swaps: &str) -> impl Iterator<Item = (&str, u64)> {
    swaps.lines().skip(1).filter_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        Some((*columns.first()?, columns.get(3)?.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mounts of a disk with the number 259:3.
    fn mounts() -> Mounts {
        Mounts::of(&BTreeMap::from([("ublkb0".to_owned(), "259:3".to_owned())]))
    }

    #[test]
    fn a_mount_is_found_by_the_number_of_its_device() {
        // Two mounts of 259:3, one with a blank in its path and optional fields before the dash;
        // between them a mount of 259:30.
        let table = "21 1 0:20 / /proc rw shared:5 - proc proc rw\n\
                     36 21 259:3 / /srv/data rw,noatime shared:1 master:2 - ext4 /dev/ublkb0 rw\n\
                     37 21 259:30 / /other rw - ext4 /dev/ublkb9 rw\n\
                     38 21 259:3 /sub /srv/two\\040words rw - ext4 /dev/ublkb0 rw\n";
        let found: Vec<PathBuf> = mounts().find(table).collect();
        assert_eq!(found, [PathBuf::from("/srv/data"), PathBuf::from("/srv/two words")]);
    }

    #[test]
    fn a_cut_off_table_is_no_reason_to_stumble() {
        assert_eq!(mounts().find("36 21 259:3 /\n\n36 21\n").count(), 0);
    }

    #[test]
    fn swaps_are_read_from_the_columns_below_the_head() {
        let swaps = "Filename\t\tType\t\tSize\t\tUsed\t\tPriority\n\
                     /dev/ublkb1                    partition\t1024\t\t12\t\t-2\n";
        assert_eq!(swaps_of(swaps).collect::<Vec<_>>(), [("/dev/ublkb1", 12)]);
    }
}
