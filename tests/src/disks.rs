//! Disks and file systems that stand below a device (its backend) or above it (its user).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::needs::program;
use crate::wait;

/// Where null_blk devices are made.
const NULLB: &str = "/sys/kernel/config/nullb";

/// A block device in memory, gone when dropped.
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
    /// A disk that keeps what is written to it: `null_blk` with memory, or `brd` where there is none.
    pub fn new(mebibytes: u64) -> Result<Self> {
        null_blk(mebibytes, &[]).or_else(|null_blk_error| {
            let size = format!("rd_size={}", mebibytes * 1024);
            run("modprobe", &["brd", "rd_nr=1", &size]).with_context(|| format!("{null_blk_error:#}"))?;
            Ok(Self { node: "/dev/ram0".into(), made: Made::Brd })
        })
    }

    /// A disk whose every request takes `latency`.
    pub fn slow(mebibytes: u64, latency: Duration) -> Result<Self> {
        let latency_ns = latency.as_nanos().to_string();
        // irqmode 2: completed by a timer.
        null_blk(mebibytes, &[("irqmode", "2"), ("completion_nsec", &latency_ns)])
    }

    /// A disk of zones of `zone_mebibytes` each, a power of two, which are written in order only.
    pub fn zoned(mebibytes: u64, zone_mebibytes: u64) -> Result<Self> {
        let zone = zone_mebibytes.to_string();
        null_blk(mebibytes, &[("zoned", "1"), ("zone_size", &zone)])
    }

    /// Its node.
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
    if !Path::new(NULLB).exists() {
        run("mount", &["-t", "configfs", "configfs", "/sys/kernel/config"])?;
    }
    let name = format!("e2e{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    let folder = Path::new(NULLB).join(&name);
    fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
    let size = mebibytes.to_string();
    let fixed = [("size", size.as_str()), ("blocksize", "512"), ("memory_backed", "1"), ("discard", "1")];
    for (attribute, value) in fixed.iter().chain(attributes).chain(&[("power", "1")]) {
        let path = folder.join(attribute);
        fs::write(&path, value).with_context(|| format!("{value:?} to {}", path.display()))?;
    }
    // Named after its folder; by number on kernels before 5.19.
    let by_index = format!("/dev/nullb{}", fs::read_to_string(folder.join("index"))?.trim());
    let nodes = [PathBuf::from("/dev").join(&name), PathBuf::from(by_index)];
    let node = wait::until("node of a null_blk disk", Duration::from_secs(5), || {
        Ok(nodes.iter().find(|node| node.exists()).cloned())
    })?;
    Ok(RamDisk { node, made: Made::NullBlk { folder } })
}

/// A file system in memory of a bounded size, mounted until dropped.
#[derive(Debug)]
pub struct Tmpfs {
    mount: Mount,
}

impl Tmpfs {
    /// Mounts an empty one.
    pub fn new(point: &Path, mebibytes: u64) -> Result<Self> {
        fs::create_dir_all(point)?;
        run("mount", &["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "tmpfs", text(point)?])?;
        Ok(Self { mount: Mount { point: point.to_owned() } })
    }

    /// Where it is mounted.
    pub fn point(&self) -> &Path {
        self.mount.point()
    }

    /// Gives it another size.
    pub fn resize(&self, mebibytes: u64) -> Result<()> {
        run("mount", &["-o", &format!("remount,size={mebibytes}m"), text(self.point())?])
    }
}

/// A file served as a disk by the kernel, gone when dropped.
#[derive(Debug)]
pub struct LoopDisk {
    node: PathBuf,
}

impl LoopDisk {
    /// The file as a disk of blocks of `block` bytes.
    pub fn new(file: &Path, block: u32) -> Result<Self> {
        run("modprobe", &["loop"])?;
        let block = format!("--sector-size={block}");
        let node = output("losetup", &["--find", "--show", &block, text(file)?])?;
        Ok(Self { node: node.trim().into() })
    }

    /// Takes on the size that its file has now.
    pub fn follow_file(&self) -> Result<()> {
        run("losetup", &["--set-capacity", text(&self.node)?])
    }

    /// Its node.
    pub fn node(&self) -> &Path {
        &self.node
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let _ = run("losetup", &["--detach", &self.node.to_string_lossy()]);
    }
}

/// A kind of file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// Its mounts have the number of its disk.
    Ext4,
    /// Its mounts have a number of their own.
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

/// A mounted file system, until dropped.
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

    /// Where it is mounted.
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// Unmounts it, which writes everything back; an error if it is busy.
    pub fn unmount(self) -> Result<()> {
        run("umount", &[text(&self.point)?])
    }
}

impl Drop for Mount {
    /// After a failure: out of the way of the next trial. Does nothing where it was unmounted already.
    fn drop(&mut self) {
        let mounted = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        if mounted.lines().any(|line| line.split(' ').nth(1) == self.point.to_str()) {
            let _ = run("umount", &["--lazy", &self.point.to_string_lossy()]);
        }
    }
}

/// Checks a file system that is not mounted, changing nothing; an error if anything is wrong with it.
pub fn fsck(node: &Path) -> Result<()> {
    run("fsck.ext4", &["-f", "-n", text(node)?])
}

pub(crate) fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// Runs a program that ends soon; anything but exit code 0 is an error with what it printed.
pub(crate) fn run(name: &str, words: &[&str]) -> Result<()> {
    output(name, words).map(drop)
}

/// The same, for what it prints.
pub(crate) fn output(name: &str, words: &[&str]) -> Result<String> {
    let Some(path) = program(name) else { bail!("no program {name}") };
    let output = Command::new(path).args(words).output().with_context(|| name.to_owned())?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} {words:?}: {}\n{stdout}{stderr}", output.status);
    Ok(stdout)
}
