//! Disks and file systems below a device (its backend) or above it (its user).

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::needs::program;
use crate::wait;

/// A block device in memory, removed on drop.
#[derive(Debug)]
pub struct RamDisk {
    node: PathBuf,
    made: Made,
}

#[derive(Debug)]
enum Made {
    NullBlk { folder: PathBuf },
    Brd,
}

impl RamDisk {
    /// A disk that keeps written data: memory-backed `null_blk`, or `brd` on a kernel without that.
    pub fn new(mebibytes: u64) -> Result<Self> {
        null_blk(mebibytes, &[]).or_else(|null_blk_error| {
            let size = format!("rd_size={}", mebibytes * 1024);
            run("modprobe", &["brd", "rd_nr=1", &size]).with_context(|| format!("{null_blk_error:#}"))?;
            Ok(Self { node: "/dev/ram0".into(), made: Made::Brd })
        })
    }

    /// A disk with a latency of `latency` for each request.
    pub fn slow(mebibytes: u64, latency: Duration) -> Result<Self> {
        let latency_ns = latency.as_nanos().to_string();
        // irqmode 2: a timer completes each request.
        null_blk(mebibytes, &[("irqmode", "2"), ("completion_nsec", &latency_ns)])
    }

    /// A zoned disk: zones of `zone_mebibytes` (a power of two), each written sequentially.
    pub fn zoned(mebibytes: u64, zone_mebibytes: u64) -> Result<Self> {
        let zone = zone_mebibytes.to_string();
        null_blk(mebibytes, &[("zoned", "1"), ("zone_size", &zone)])
    }

    /// The device node.
    pub fn node(&self) -> &Path {
        &self.node
    }
}

impl Drop for RamDisk {
    fn drop(&mut self) {
        match &self.made {
            Made::NullBlk { folder } => drop(fs::remove_dir(folder)),
            Made::Brd => drop(run("modprobe", &["-r", "brd"])),
        }
    }
}

fn null_blk(mebibytes: u64, attributes: &[(&str, &str)]) -> Result<RamDisk> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    run("modprobe", &["null_blk", "nr_devices=0"])?;
    let name = format!("e2e{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    let folder = configfs("nullb")?.join(&name);
    fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
    let size = mebibytes.to_string();
    let fixed = [("size", size.as_str()), ("blocksize", "512"), ("memory_backed", "1"), ("discard", "1")];
    for (attribute, value) in fixed.iter().chain(attributes).chain(&[("power", "1")]) {
        let path = folder.join(attribute);
        fs::write(&path, value).with_context(|| format!("{value:?} to {}", path.display()))?;
    }
    // null_blk names the node after the folder; before Linux 5.19, after its index.
    let by_index = format!("/dev/nullb{}", fs::read_to_string(folder.join("index"))?.trim());
    let nodes = [PathBuf::from("/dev").join(&name), PathBuf::from(by_index)];
    let node = wait::until("node of a null_blk disk", Duration::from_secs(5), || {
        Ok(nodes.iter().find(|node| node.exists()).cloned())
    })?;
    Ok(RamDisk { node, made: Made::NullBlk { folder } })
}

/// The folder of a loaded module in configfs, which is mounted if it was not.
pub(crate) fn configfs(module: &str) -> Result<PathBuf> {
    const CONFIGFS: &str = "/sys/kernel/config";
    let folder = Path::new(CONFIGFS).join(module);
    if !folder.exists() {
        run("mount", &["-t", "configfs", "configfs", CONFIGFS])?;
    }
    Ok(folder)
}

/// A mounted tmpfs of bounded size, unmounted on drop.
#[derive(Debug)]
pub struct Tmpfs {
    mount: Mount,
}

impl Tmpfs {
    /// Mounts an empty tmpfs.
    pub fn new(point: &Path, mebibytes: u64) -> Result<Self> {
        fs::create_dir_all(point)?;
        run("mount", &["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "tmpfs", text(point)?])?;
        Ok(Self { mount: Mount { point: point.to_owned() } })
    }

    /// The mount point.
    pub fn point(&self) -> &Path {
        self.mount.point()
    }

    /// Changes the size of the mounted tmpfs.
    pub fn resize(&self, mebibytes: u64) -> Result<()> {
        run("mount", &["-o", &format!("remount,size={mebibytes}m"), text(self.point())?])
    }
}

/// A loop device, detached on drop.
#[derive(Debug)]
pub struct LoopDisk {
    node: PathBuf,
}

impl LoopDisk {
    /// Attaches `file` to a loop device with logical blocks of `block` bytes.
    pub fn new(file: &Path, block: u32) -> Result<Self> {
        run("modprobe", &["loop"])?;
        let block = format!("--sector-size={block}");
        let node = output("losetup", &["--find", "--show", &block, text(file)?])?;
        Ok(Self { node: node.trim().into() })
    }

    /// Takes the current size of the backing file as the size of the disk.
    pub fn follow_file(&self) -> Result<()> {
        run("losetup", &["--set-capacity", text(&self.node)?])
    }

    /// The device node.
    pub fn node(&self) -> &Path {
        &self.node
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let _ = run("losetup", &["--detach", &self.node.to_string_lossy()]);
    }
}

/// Writes a table of two partitions to a disk or its image: 4 MiB from 1 MiB on, 4 MiB from 5 MiB on.
pub fn partition(disk: &Path) -> Result<()> {
    let mut sector = [0_u8; 512];
    for (number, begin) in [(0, 2048_u32), (1, 10240)] {
        let entry = &mut sector[446 + 16 * number..462 + 16 * number];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&begin.to_le_bytes());
        entry[12..16].copy_from_slice(&8192_u32.to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let disk = File::options().write(true).open(disk)?;
    disk.write_all_at(&sector, 0)?;
    disk.sync_all().context("partition table")
}

/// A kind of file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// The device number of a mount is that of its disk.
    Ext4,
    /// A mount has an anonymous device number.
    Btrfs,
}

impl FileSystem {
    fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Btrfs => "btrfs",
        }
    }
}

/// A mounted file system, unmounted on drop.
#[derive(Debug)]
pub struct Mount {
    point: PathBuf,
}

impl Mount {
    /// Mounts the ext4 file system that is on `node`.
    pub fn existing(node: &Path, point: &Path) -> Result<Self> {
        Self::existing_of(FileSystem::Ext4, node, point)
    }

    /// Mounts the file system that is on `node`.
    pub fn existing_of(kind: FileSystem, node: &Path, point: &Path) -> Result<Self> {
        fs::create_dir_all(point)?;
        run("mount", &["-t", kind.name(), text(node)?, text(point)?])?;
        Ok(Self { point: point.to_owned() })
    }

    /// Makes an ext4 file system on `node` and mounts it.
    pub fn new(node: &Path, point: &Path) -> Result<Self> {
        Self::new_of(FileSystem::Ext4, node, point)
    }

    /// Makes a file system on `node` and mounts it.
    pub fn new_of(kind: FileSystem, node: &Path, point: &Path) -> Result<Self> {
        let words = match kind {
            FileSystem::Ext4 => ["mkfs.ext4", "-q", "-F"],
            FileSystem::Btrfs => ["mkfs.btrfs", "-q", "-f"],
        };
        run(words[0], &[words[1], words[2], text(node)?])?;
        Self::existing_of(kind, node, point)
    }

    /// The mount point.
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// Unmounts the file system, which writes it back; an error if it is busy.
    pub fn unmount(self) -> Result<()> {
        run("umount", &[text(&self.point)?])
    }
}

impl Drop for Mount {
    /// Removes a mount that a failed trial left, so that the next trial is not affected. No-op
    /// after [`Mount::unmount`].
    fn drop(&mut self) {
        let mounted = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        if mounted.lines().any(|line| line.split(' ').nth(1) == self.point.to_str()) {
            let _ = run("umount", &["--lazy", &self.point.to_string_lossy()]);
        }
    }
}

/// Checks an unmounted file system without repairs; an error if it is damaged.
pub fn fsck(node: &Path) -> Result<()> {
    run("fsck.ext4", &["-f", "-n", text(node)?])
}

pub(crate) fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// Runs a short program; an exit code other than 0 is an error that contains the output.
pub(crate) fn run(name: &str, words: &[&str]) -> Result<()> {
    output(name, words).map(drop)
}

/// Runs a short program like [`run`]; returns its standard output.
pub(crate) fn output(name: &str, words: &[&str]) -> Result<String> {
    let Some(path) = program(name) else { bail!("no program {name}") };
    let output = Command::new(path).args(words).output().with_context(|| name.to_owned())?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} {words:?}: {}\n{stdout}{stderr}", output.status);
    Ok(stdout)
}
