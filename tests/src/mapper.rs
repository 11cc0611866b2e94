//! Device-mapper disks: above one disk, requests fail, stall or wait on demand; above several,
//! stripes.
//!
//! ```text
//!   Mapped ── table ──► linear   the disk below, unchanged
//!     │                 error    each request fails
//!     │                 delay    each request takes the given time
//!     └─ suspended:     requests wait without a limit, until the resume
//! ```

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::disks::{RamDisk, output, run, text};

/// The treatment of requests to a part of the disk.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// Requests are passed on.
    Linear,
    /// Requests fail.
    Error,
    /// Requests are passed on after this time.
    Delay(Duration),
}

/// A mapped disk, removed on drop.
#[derive(Debug)]
pub struct Mapped {
    name: String,
    node: PathBuf,
    below: PathBuf,
    sectors: u64,
    /// Dropped after `drop` has removed the mapped disk above.
    _ram: Option<RamDisk>,
}

impl Mapped {
    /// Maps a new RAM disk completely, with [`Target::Linear`].
    pub fn on_ram(mebibytes: u64) -> Result<Self> {
        let ram = RamDisk::new(mebibytes)?;
        let below = ram.node().to_owned();
        Self::over(&below, Some(ram))
    }

    /// Maps the disk `below` completely, with [`Target::Linear`].
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

    /// The device node.
    pub fn node(&self) -> &Path {
        &self.node
    }

    /// The device node of the disk below.
    pub fn below(&self) -> &Path {
        &self.below
    }

    /// Size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Changes the target of the whole disk.
    pub fn become_all(&self, target: Target) -> Result<()> {
        self.become_parts(&[(self.sectors, target)])
    }

    /// Changes the targets of the disk: consecutive parts in sectors, each with its target.
    pub fn become_parts(&self, parts: &[(u64, Target)]) -> Result<()> {
        dmsetup(&["load", &self.name, "--table", &self.table(parts)?])?;
        dmsetup(&["suspend", "--nolockfs", "--noflush", &self.name])?;
        self.resume()
    }

    /// Suspends the disk: each new request waits.
    pub fn suspend(&self) -> Result<()> {
        dmsetup(&["suspend", "--nolockfs", "--noflush", &self.name]).map(drop)
    }

    /// Resumes the disk: the waiting requests proceed.
    pub fn resume(&self) -> Result<()> {
        dmsetup(&["resume", &self.name]).map(drop)
    }

    /// The device-mapper table, one line per part: first sector, number of sectors, target.
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
        // Waiting requests must end before the disk can be removed, so it is resumed first.
        let _ = self.resume();
        let _ = dmsetup(&["remove", "--force", "--retry", &self.name]);
    }
}

/// A disk striped over several RAM disks, removed on drop.
#[derive(Debug)]
pub struct Striped {
    name: String,
    node: PathBuf,
    /// Dropped after `drop` has removed the striped disk above.
    _disks: Vec<RamDisk>,
}

impl Striped {
    /// Stripes chunks of `chunk` bytes over `disks` RAM disks of `mebibytes` each.
    pub fn new(disks: u64, mebibytes: u64, chunk: u64) -> Result<Self> {
        let below = (0..disks).map(|_| RamDisk::new(mebibytes)).collect::<Result<Vec<_>>>()?;
        let places = below.iter().map(|disk| Ok(format!("{} 0", text(disk.node())?))).collect::<Result<Vec<_>>>()?;
        let sectors = disks * (mebibytes << 20) / 512;
        let name = new_name();
        let node = create(&name, &format!("0 {sectors} striped {disks} {} {}", chunk / 512, places.join(" ")))?;
        Ok(Self { name, node, _disks: below })
    }

    /// The device node.
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

/// Creates a device-mapper disk; returns its node.
fn create(name: &str, table: &str) -> Result<PathBuf> {
    run("modprobe", &["dm-mod"])?;
    dmsetup(&["create", name, "--table", table])?;
    let minor = dmsetup(&["info", "-c", "--noheadings", "-o", "minor", name])?;
    Ok(format!("/dev/dm-{}", minor.trim()).into())
}

/// Runs dmsetup without udev synchronisation: the guest has no udev, and dmsetup would wait for it.
fn dmsetup(words: &[&str]) -> Result<String> {
    let words: Vec<&str> = ["--noudevsync", "--noudevrules"].iter().chain(words).copied().collect();
    output("dmsetup", &words)
}
