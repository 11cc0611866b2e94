//! Stacked block devices, read from sysfs. A removal needs the devices above a ublk disk, as their
//! users would lose data; a backend needs the devices below it, as it must not stand on a ublk
//! disk.
//!
//! ```text
//!   above   ublkb0 ─ holders/ ─► dm-0 ─ holders/ ─► md127         loop3/loop/backing_file ─► /dev/ublkb0p1
//!   below   dm-0 ─ slaves/ ─► loop3 ─ loop/backing_file ─► /srv/a.img ─ its file system ─► ublkb0
//! ```
//!
//! Device mapper (LVM, LUKS, multipath), md and bcache have `holders` and `slaves`. A loop device
//! has neither, so its backing file is looked up. btrfs has devices below `/sys/fs/btrfs`, and
//! device numbers of its own in the mount table.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A bound on the height of a stack, as the tree may change while it is read.
const LEVELS_MAX: usize = 64;

/// A sysfs tree: the host's `/sys`, or one made by a test.
#[derive(Clone, Debug)]
pub struct Sysfs {
    root: PathBuf,
}

/// Block devices by name (`dm-0`), with their numbers (`253:0`).
pub type Devices = BTreeMap<String, String>;

impl Sysfs {
    /// The host's tree.
    pub fn of_host() -> Self {
        Self { root: "/sys".into() }
    }

    /// A disk and its partitions, or a partition.
    pub fn disk(&self, name: &str) -> Devices {
        let disk = self.device(name);
        let number = |path: &Path| Some(fs::read_to_string(path.join("dev")).ok()?.trim().to_owned());
        let partitions = entries(&disk).into_iter().filter(|entry| entry.starts_with(name));
        let all = std::iter::once((name.to_owned(), disk.clone()))
            .chain(partitions.map(|partition| (partition.clone(), disk.join(partition))));
        all.filter_map(|(name, path)| Some((name, number(&path)?))).collect()
    }

    /// The devices stacked on a disk, level by level: the disk with its partitions, the devices
    /// that hold those, and so on. A device is in one level, above every device that it holds.
    pub fn levels_above(&self, name: &str) -> Vec<Devices> {
        self.levels(self.disk(name))
    }

    /// The devices stacked on the block device with this number, `major:minor`. For a partition, its
    /// disk is in the first level: a user of the whole disk uses the partition.
    pub fn levels_above_number(&self, number: &str) -> Vec<Devices> {
        let Some(name) = self.name(number) else { return Vec::new() };
        let mut lowest = self.disk(&name);
        let whole = self.whole(&name);
        lowest.extend(self.number(&whole).map(|number| (whole, number)));
        self.levels(lowest)
    }

    fn levels(&self, lowest: Devices) -> Vec<Devices> {
        let mut levels = vec![lowest];
        let loops = self.loops();
        while levels.len() <= LEVELS_MAX {
            let below = &levels[levels.len() - 1];
            let mut next = BTreeSet::new();
            for name in below.keys() {
                next.extend(entries(&self.device(name).join("holders")));
            }
            let numbers: BTreeSet<&String> = below.values().collect();
            next.extend(
                loops.iter().filter(|(_, backing)| backing.is_on(&numbers, below)).map(|(name, _)| name.clone()),
            );
            let level: Devices = next.into_iter().flat_map(|name| self.disk(&name)).collect();
            if level.is_empty() {
                break;
            }
            // A device that holds one of this level as well as one further down belongs here.
            levels[1..].iter_mut().for_each(|lower| lower.retain(|name, _| !level.contains_key(name)));
            levels.push(level);
        }
        levels
    }

    /// The bytes of the block device with this number, a disk or a partition.
    pub fn size(&self, device: u64) -> Option<u64> {
        let path = self.root.join("dev/block").join(number(device)).join("size");
        // In units of 512 bytes, for any block size of the device.
        fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()?.checked_mul(512)
    }

    /// The names of all devices of each btrfs file system that has one of `devices`.
    pub fn btrfs_on(&self, devices: &Devices) -> BTreeSet<String> {
        let systems = self.root.join("fs/btrfs");
        let members = entries(&systems).into_iter().map(|system| entries(&systems.join(system).join("devices")));
        members.filter(|members| members.iter().any(|name| devices.contains_key(name))).flatten().collect()
    }

    /// The loop device with this backing file, if one exists.
    pub fn loop_over(&self, file: &fs::Metadata) -> Option<String> {
        let is_same = |backing: &Backing| {
            fs::metadata(&backing.path).is_ok_and(|other| (other.dev(), other.ino()) == (file.dev(), file.ino()))
        };
        self.loops().into_iter().find(|(_, backing)| is_same(backing)).map(|(name, _)| name)
    }

    /// The ublk disk below the block device with this number, or below the file system with it: the
    /// chain down to the disk, in words.
    pub fn ublk_below(&self, number: &str) -> Option<String> {
        let mut pending = vec![(number.to_owned(), Vec::new())];
        let mut known = BTreeSet::new();
        while let Some((number, chain)) = pending.pop() {
            let Some(name) = self.name(&number) else { continue };
            if !known.insert(number) {
                continue;
            }
            let chain: Vec<String> = chain.into_iter().chain([name.clone()]).collect();
            if name.starts_with("ublkb") {
                return Some(chain.join(" on "));
            }
            for lower in entries(&self.device(&name).join("slaves")) {
                pending.extend(self.number(&lower).map(|number| (number, chain.clone())));
            }
            // A partition has neither slaves nor a backing file; its disk may have.
            let disk = self.whole(&name);
            if disk != name {
                pending.extend(self.number(&disk).map(|number| (number, chain.clone())));
            }
            if let Some(backing) = self.backing(&name) {
                let below = below_of(&backing.path);
                pending.extend(below.into_iter().map(|number| (number, chain.clone())));
            }
        }
        None
    }

    /// The number of the device that a name in a mount table means: by the node `path`, or by its
    /// file name.
    pub fn number_of_node(&self, path: &Path) -> Option<String> {
        let by_node = fs::metadata(path).ok().filter(|node| node.file_type().is_block_device());
        by_node.map(|node| number(node.rdev())).or_else(|| self.number(path.file_name()?.to_str()?))
    }

    /// Loop devices that have a backing file.
    fn loops(&self) -> Vec<(String, Backing)> {
        let names = entries(&self.root.join("block")).into_iter().filter(|name| name.starts_with("loop"));
        names.filter_map(|name| Some((name.clone(), self.backing(&name)?))).collect()
    }

    fn backing(&self, name: &str) -> Option<Backing> {
        let path = fs::read_to_string(self.block(name).join("loop/backing_file")).ok()?;
        Some(Backing { path: PathBuf::from(path.trim_end_matches('\n').trim_end_matches(" (deleted)")) })
    }

    fn block(&self, name: &str) -> PathBuf {
        self.root.join("block").join(name)
    }

    /// The folder of a disk or a partition.
    fn device(&self, name: &str) -> PathBuf {
        let disk = self.whole(name);
        if disk == name { self.block(name) } else { self.block(&disk).join(name) }
    }

    /// The disk itself, or the disk of a partition.
    fn whole(&self, name: &str) -> String {
        if self.block(name).exists() {
            return name.to_owned();
        }
        let disks = entries(&self.root.join("block"));
        let disk =
            disks.into_iter().find(|disk| name.starts_with(disk.as_str()) && self.block(disk).join(name).exists());
        disk.unwrap_or_else(|| name.to_owned())
    }

    fn number(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.device(name).join("dev")).ok().map(|number| number.trim().to_owned())
    }

    fn name(&self, number: &str) -> Option<String> {
        let link = fs::read_link(self.root.join("dev/block").join(number)).ok()?;
        Some(link.file_name()?.to_str()?.to_owned())
    }
}

/// The backing file of a loop device.
#[derive(Debug)]
struct Backing {
    path: PathBuf,
}

impl Backing {
    /// Whether the backing file is one of these devices, or a file on one.
    fn is_on(&self, numbers: &BTreeSet<&String>, devices: &Devices) -> bool {
        match fs::metadata(&self.path) {
            Ok(file) if file.file_type().is_block_device() => numbers.contains(&number(file.rdev())),
            Ok(file) => numbers.contains(&number(file.dev())),
            // The node may be in a different mount namespace, or gone with its disk.
            Err(_) => {
                self.path.file_name().and_then(|name| name.to_str()).is_some_and(|name| devices.contains_key(name))
            }
        }
    }
}

/// The numbers of the devices below an open file. For a block device, its own number; for a regular
/// file, those of its file system.
pub fn below(file: &fs::File) -> io::Result<Vec<String>> {
    use std::os::fd::AsRawFd;
    let metadata = file.metadata()?;
    if metadata.file_type().is_block_device() {
        return Ok(vec![number(metadata.rdev())]);
    }
    let mut numbers = vec![number(metadata.dev())];
    // btrfs, bcachefs and overlayfs have device numbers of their own; the mount table names the
    // devices.
    if libc::major(metadata.dev()) == 0 {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim);
        let table = fs::read_to_string("/proc/self/mountinfo")?;
        let sources = mount.map(|mount| sources(&table, mount)).unwrap_or_default();
        let sysfs = Sysfs::of_host();
        for number in sources.iter().flat_map(|path| below_of(path)) {
            // The mount table names one device of a btrfs on several.
            let device: Devices = sysfs.name(&number).map(|name| (name, number.clone())).into_iter().collect();
            numbers.extend(sysfs.btrfs_on(&device).iter().filter_map(|name| sysfs.number(name)));
            numbers.push(number);
        }
    }
    Ok(numbers)
}

/// The number of the only disk, or partition, below the file system of a file; `None` for several,
/// or for an unknown one (a network file system, memory).
pub fn disk_below(file: &fs::File) -> Option<String> {
    let mut disks = disks_below(file);
    disks.pop().filter(|_| disks.is_empty())
}

/// The numbers of all disks, and partitions, that the file system of a file is on, as far as they are known.
pub fn disks_below(file: &fs::File) -> Vec<String> {
    disks(below(file).unwrap_or_default())
}

fn disks(numbers: Vec<String>) -> Vec<String> {
    // Major 0: the number of a file system itself.
    let disks: BTreeSet<String> = numbers.into_iter().filter(|number| !number.starts_with("0:")).collect();
    disks.into_iter().collect()
}

fn below_of(path: &Path) -> Vec<String> {
    let node = fs::metadata(path).ok().filter(|node| node.file_type().is_block_device());
    match node {
        Some(node) => vec![number(node.rdev())],
        None => fs::File::open(path).and_then(|file| below(&file)).unwrap_or_default(),
    }
}

/// The devices below the mount with this id, or the folders of an overlay.
fn sources(mountinfo: &str, id: &str) -> Vec<PathBuf> {
    let Some(line) = mountinfo.lines().find(|line| line.split(' ').next() == Some(id)) else { return Vec::new() };
    let Some((_, tail)) = line.split_once(" - ") else { return Vec::new() };
    let mut fields = tail.split(' ');
    let (Some(kind), Some(source), options) = (fields.next(), fields.next(), fields.next().unwrap_or_default()) else {
        return Vec::new();
    };
    if kind == "overlay" {
        let folders = options
            .split(',')
            .filter_map(|option| option.strip_prefix("upperdir=").or_else(|| option.strip_prefix("lowerdir=")));
        return folders.flat_map(|folders| folders.split(':')).map(|folder| PathBuf::from(unescape(folder))).collect();
    }
    let source = unescape(source);
    // A remote share also has a colon.
    let devices = source.split(':').filter(|_| source.starts_with('/'));
    devices.filter(|path| path.starts_with('/')).map(PathBuf::from).collect()
}

/// "major:minor", as the kernel writes it.
pub fn number(device: u64) -> String {
    format!("{}:{}", libc::major(device), libc::minor(device))
}

/// Undoes the kernel's octal escapes of blank, tab, newline and backslash.
pub fn unescape(text: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(text.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
}

/// The names in a directory; empty if it cannot be read.
pub fn entries(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A sysfs tree in a temporary folder of its own.
    struct Fake(Sysfs);

    impl Fake {
        fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("ublk-throttle-sysfs-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&root);
            fs::create_dir_all(root.join("dev/block")).unwrap();
            Self(Sysfs { root })
        }

        /// A disk, or a partition (`sda/sda1`).
        fn with(self, device: &str, number: &str) -> Self {
            let path = self.0.root.join("block").join(device);
            fs::create_dir_all(path.join("holders")).unwrap();
            fs::create_dir_all(path.join("slaves")).unwrap();
            fs::write(path.join("dev"), format!("{number}\n")).unwrap();
            symlink(format!("../../block/{device}"), self.0.root.join("dev/block").join(number)).unwrap();
            self
        }

        fn on(self, upper: &str, lower: &str) -> Self {
            let block = self.0.root.join("block");
            let name = |path: &str| path.rsplit('/').next().unwrap().to_owned();
            fs::create_dir_all(block.join(lower).join("holders").join(name(upper))).unwrap();
            fs::create_dir_all(block.join(upper).join("slaves").join(name(lower))).unwrap();
            self
        }

        fn backed(self, name: &str, by: &Path) -> Self {
            let folder = self.0.root.join("block").join(name).join("loop");
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("backing_file"), format!("{}\n", by.display())).unwrap();
            self
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0.root);
        }
    }

    fn names(levels: &[Devices]) -> Vec<Vec<&str>> {
        levels.iter().map(|level| level.keys().map(String::as_str).collect()).collect()
    }

    #[test]
    fn f60_a_device_is_in_a_level_above_all_that_it_holds() {
        // LVM on a partition; md on the LVM volume and on the second partition. Write-back goes
        // from the last level to the first: md127 comes before dm-0.
        let fake = Fake::new("levels")
            .with("ublkb0", "259:0")
            .with("ublkb0/ublkb0p1", "259:1")
            .with("ublkb0/ublkb0p2", "259:2")
            .with("dm-0", "253:0")
            .with("md127", "9:127")
            .on("dm-0", "ublkb0/ublkb0p1")
            .on("md127", "dm-0")
            .on("md127", "ublkb0/ublkb0p2");
        let levels = fake.0.levels_above("ublkb0");
        assert_eq!(names(&levels), [vec!["ublkb0", "ublkb0p1", "ublkb0p2"], vec!["dm-0"], vec!["md127"]]);
        assert_eq!(levels[1]["dm-0"], "253:0");
    }

    #[test]
    fn a_partition_is_used_by_what_has_its_disk_open_and_not_by_what_has_another_partition_open() {
        let fake = Fake::new("partition")
            .with("sda", "8:0")
            .with("sda/sda1", "8:1")
            .with("sda/sda2", "8:2")
            .with("dm-0", "253:0")
            .with("dm-1", "253:1")
            .with("dm-2", "253:2")
            .on("dm-0", "sda/sda1")
            .on("dm-1", "sda/sda2")
            .on("dm-2", "sda");
        let first = fake.0.levels_above_number("8:1");
        assert_eq!(names(&first), [vec!["sda", "sda1"], vec!["dm-0", "dm-2"]]);
        let whole = fake.0.levels_above_number("8:0");
        assert_eq!(names(&whole), [vec!["sda", "sda1", "sda2"], vec!["dm-0", "dm-1", "dm-2"]]);
        assert!(fake.0.levels_above_number("0:45").is_empty());
    }

    #[test]
    fn a_loop_device_over_a_node_that_is_gone_is_found_by_the_name() {
        let fake = Fake::new("loop")
            .with("ublkb7", "259:7")
            .with("loop0", "7:0")
            .with("loop1", "7:1")
            .backed("loop0", Path::new("/nowhere/ublkb7"))
            .backed("loop1", Path::new("/nowhere/ublkb71"));
        assert_eq!(names(&fake.0.levels_above("ublkb7")), [vec!["ublkb7"], vec!["loop0"]]);
    }

    #[test]
    fn a_loop_device_over_a_file_stands_on_what_the_file_is_on() {
        let path = std::env::temp_dir().join(format!("ublk-throttle-backing-{}", std::process::id()));
        fs::write(&path, "x").unwrap();
        let on = number(fs::metadata(&path).unwrap().dev());
        let fake = Fake::new("file").with("ublkb0", &on).with("loop0", "7:0").backed("loop0", &path);
        assert_eq!(names(&fake.0.levels_above("ublkb0")), [vec!["ublkb0"], vec!["loop0"]]);
        assert_eq!(fake.0.ublk_below("7:0").as_deref(), Some("loop0 on ublkb0"));
        assert_eq!(fake.0.loop_over(&fs::metadata(&path).unwrap()).as_deref(), Some("loop0"));
        fs::remove_file(&path).unwrap();
        assert_eq!(fake.0.ublk_below("7:0"), None);
    }

    #[test]
    fn the_ublk_disk_below_a_stack_is_told_with_the_chain() {
        let fake = Fake::new("below")
            .with("sda", "8:0")
            .with("ublkb3", "259:3")
            .with("ublkb3/ublkb3p1", "259:4")
            .with("dm-0", "253:0")
            .with("dm-1", "253:1")
            .on("dm-0", "ublkb3/ublkb3p1")
            .on("dm-1", "dm-0")
            .on("dm-1", "sda");
        assert_eq!(fake.0.ublk_below("253:1").as_deref(), Some("dm-1 on dm-0 on ublkb3p1"));
        assert_eq!([fake.0.ublk_below("8:0"), fake.0.ublk_below("0:45")], [None, None]);
    }

    #[test]
    fn a_btrfs_of_several_devices_is_found_by_any_of_them() {
        let fake = Fake::new("btrfs").with("ublkb0", "259:0").with("sda", "8:0");
        fs::create_dir_all(fake.0.root.join("fs/btrfs/5f1e/devices/ublkb0")).unwrap();
        fs::create_dir_all(fake.0.root.join("fs/btrfs/5f1e/devices/sda")).unwrap();
        fs::create_dir_all(fake.0.root.join("fs/btrfs/77aa/devices/sdb")).unwrap();
        let found = fake.0.btrfs_on(&fake.0.disk("ublkb0"));
        assert_eq!(found, ["sda", "ublkb0"].map(str::to_owned).into());
    }

    #[test]
    fn a_file_system_is_on_each_of_its_disks_once() {
        let on = |numbers: &[&str]| disks(numbers.iter().map(|&number| number.to_owned()).collect());
        assert_eq!(on(&["8:1"]), ["8:1"]);
        // btrfs: its own number, and its device from both tables.
        assert_eq!(on(&["0:45", "8:1", "8:1"]), ["8:1"]);
        assert_eq!(on(&["0:45", "8:17", "8:1"]), ["8:1", "8:17"]);
        assert!(on(&["0:45"]).is_empty() && on(&[]).is_empty());
    }

    #[test]
    fn a_mount_tells_its_devices_or_the_folders_of_an_overlay() {
        let table = "30 1 0:45 / /srv rw - btrfs /dev/sda1 rw,space_cache\n\
                     31 1 0:46 / /two rw shared:7 - bcachefs /dev/sdb:/dev/sdc rw\n\
                     32 1 0:47 / /merged rw - overlay overlay rw,lowerdir=/low:/lower\\040two,upperdir=/up,workdir=/work\n\
                     33 1 0:48 / /net rw - nfs4 host:/share rw\n";
        let paths = |id| sources(table, id).into_iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
        assert_eq!(paths("30"), ["/dev/sda1"]);
        assert_eq!(paths("31"), ["/dev/sdb", "/dev/sdc"]);
        assert_eq!(paths("32"), ["/low", "/lower two", "/up"]);
        assert!(paths("33").is_empty() && paths("99").is_empty());
    }
}
