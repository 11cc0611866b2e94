//! Disks that fail, stall or wait on demand: the device mapper over another disk. And stripes over several.
//!
//! ```text
//!   Mapped ── table ──► linear   the disk below, as it is
//!     │                 error    every request fails
//!     │                 delay    every request takes that long
//!     └─ suspended:     requests wait until it is resumed, for ever if need be
//! ```

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::disks::{RamDisk, output, run, text};

/// What the mapper does with requests to a part of the disk.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// Passes them on.
    Linear,
    /// Fails them.
    Error,
    /// Passes them on after a while.
    Delay(Duration),
}

/// A mapped disk, gone when dropped.
#[derive(Debug)]
pub struct Mapped {
    name: String,
    node: PathBuf,
    below: PathBuf,
    sectors: u64,
    /// Dropped after `drop` has removed the disk above it.
    _ram: Option<RamDisk>,
}

impl Mapped {
    /// All of a RAM disk of its own, passed on.
    pub fn on_ram(mebibytes: u64) -> Result<Self> {
        let ram = RamDisk::new(mebibytes)?;
        let below = ram.node().to_owned();
        Self::over(&below, Some(ram))
    }

    /// All of a disk, passed on.
    pub fn new(below: &Path) -> Result<Self> {
        Self::over(below, None)
    }

    fn over(below: &Path, ram: Option<RamDisk>) -> Result<Self> {
        run("modprobe", &["dm-delay"])?;
        let name = new_name();
        let sectors = output("blockdev", &["--getsz", text(below)?])?.trim().parse().context("blockdev --getsz")?;
        let mut mapped = Self { name, node: PathBuf::new(), below: below.to_owned(), sectors, _ram: ram };
        mapped.node = create(&mapped.name, &mapped.table(&[(sectors, Target::Linear)])?)?;
        Ok(mapped)
    }

    /// Its node.
    pub fn node(&self) -> &Path {
        &self.node
    }

    /// Its size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Does something else from now on, with all of the disk.
    pub fn become_all(&self, target: Target) -> Result<()> {
        self.become_parts(&[(self.sectors, target)])
    }

    /// Does something else from now on, part by part: how many sectors, and what.
    pub fn become_parts(&self, parts: &[(u64, Target)]) -> Result<()> {
        dmsetup(&["load", &self.name, "--table", &self.table(parts)?])?;
        dmsetup(&["suspend", "--nolockfs", "--noflush", &self.name])?;
        self.resume()
    }

    /// Lets every request wait.
    pub fn suspend(&self) -> Result<()> {
        dmsetup(&["suspend", "--nolockfs", "--noflush", &self.name]).map(drop)
    }

    /// Lets them go.
    pub fn resume(&self) -> Result<()> {
        dmsetup(&["resume", &self.name]).map(drop)
    }

    /// A line a part: where it begins, how long it is, what it does.
    fn table(&self, parts: &[(u64, Target)]) -> Result<String> {
        let below = text(&self.below)?;
        let mut begin = 0;
        let mut lines = Vec::new();
        for &(sectors, target) in parts {
            let what = match target {
                Target::Linear => format!("linear {below} {begin}"),
                Target::Error => "error".to_owned(),
                Target::Delay(time) => format!("delay {below} {begin} {}", time.as_millis()),
            };
            lines.push(format!("{begin} {sectors} {what}"));
            begin += sectors;
        }
        Ok(lines.join("\n"))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // What waits must go first.
        let _ = self.resume();
        let _ = dmsetup(&["remove", "--force", "--retry", &self.name]);
    }
}

/// Chunks that lie on several RAM disks in turn, gone when dropped.
#[derive(Debug)]
pub struct Striped {
    name: String,
    node: PathBuf,
    /// Dropped after `drop` has removed the disk above them.
    _disks: Vec<RamDisk>,
}

impl Striped {
    /// Chunks of `chunk` bytes over `disks` disks of so many mebibytes each.
    pub fn new(disks: u64, mebibytes: u64, chunk: u64) -> Result<Self> {
        let below = (0..disks).map(|_| RamDisk::new(mebibytes)).collect::<Result<Vec<_>>>()?;
        let places = below.iter().map(|disk| Ok(format!("{} 0", text(disk.node())?))).collect::<Result<Vec<_>>>()?;
        let sectors = disks * (mebibytes << 20) / 512;
        let name = new_name();
        let node = create(&name, &format!("0 {sectors} striped {disks} {} {}", chunk / 512, places.join(" ")))?;
        Ok(Self { name, node, _disks: below })
    }

    /// Its node.
    pub fn node(&self) -> &Path {
        &self.node
    }
}

impl Drop for Striped {
    fn drop(&mut self) {
        let _ = dmsetup(&["remove", "--force", "--retry", &self.name]);
    }
}

fn new_name() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    format!("e2e-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed))
}

/// Makes a disk of the mapper; its node.
fn create(name: &str, table: &str) -> Result<PathBuf> {
    run("modprobe", &["dm-mod"])?;
    dmsetup(&["create", name, "--table", table])?;
    let minor = dmsetup(&["info", "-c", "--noheadings", "-o", "minor", name])?;
    Ok(format!("/dev/dm-{}", minor.trim()).into())
}

/// Without udev, which the guest lacks: otherwise it waits for that to answer.
fn dmsetup(words: &[&str]) -> Result<String> {
    let words: Vec<&str> = ["--noudevsync", "--noudevrules"].iter().chain(words).copied().collect();
    output("dmsetup", &words)
}
