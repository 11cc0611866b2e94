//! The backend `block`: a whole block device.
//!
//! Differences to the backend `file`: all sizes come from the device; a writer is refused while the host
//! uses the disk itself (mounted, swap, below a stacked disk); discard is that of the device, if the
//! device can discard.
//!
//! A reader is not refused: on a mounted disk it may read old data, or half of a change.

use std::cmp::Ordering;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use io_uring::opcode;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use throttle_core::cost::Operation;

use super::epoch::Epochs;
use super::limits::Limits;
use super::place::{self, Access};
use super::{Backend, Data, Lane, Refused, Request, Step, range};
use crate::error::{Class, Failure, OrFail, Outcome};
use crate::ublk::params::{Geometry, LOGICAL_BLOCKS};
use crate::{stack, sys};

/// `BLOCK_URING_CMD_DISCARD` of `<linux/blkdev.h>`, since Linux 6.12: `_IO(0x12, 0)`.
const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;

/// An open block device.
pub struct BlockBackend {
    device: Arc<File>,
    path: PathBuf,
    geometry: Geometry,
    is_direct: bool,
    /// See [`Backend::needs_stable_pages`].
    stable_pages: Option<String>,
}

/// The settings of the configuration besides the path.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// `O_DIRECT`.
    pub is_direct: bool,
    /// The device refuses writes.
    pub is_read_only: bool,
    /// Further devices and hosts that share the disk may have it open as well.
    pub is_shared: bool,
    /// The logical block in bytes; `None` for the block of the device.
    pub block: Option<u32>,
}

/// Opens, checks and locks the device.
pub fn open(path: &Path, wanted: &Wanted) -> Result<BlockBackend, Refused> {
    let &Wanted { is_direct, is_read_only, is_shared, block } = wanted;
    let flags = if is_read_only || is_shared { OFlag::empty() } else { OFlag::O_EXCL };
    let (device, metadata) = place::open(path, Access { is_read_only, is_direct, flags })?;
    if !metadata.file_type().is_block_device() {
        let kind = place::kind(&metadata);
        return Err(Failure::new(Class::Backing, format!("{} is {kind}, not a block device", path.display())).into());
    }
    place::lock(&device, path, is_read_only || is_shared)?;
    if !is_read_only {
        place::expect_unused(&device, path, is_shared)?;
    }
    let sizes = sys::block_sizes(device.as_fd()).or_fail(Class::Backing, path.display())?;
    if !LOGICAL_BLOCKS.contains(&sizes.logical) || sizes.size < sizes.logical.into() {
        return Err(Failure::new(
            Class::Backing,
            format!(
                "{} has {} bytes in blocks of {}, which no ublk disk can have",
                path.display(),
                sizes.size,
                sizes.logical
            ),
        )
        .into());
    }
    if sizes.read_only && !is_read_only {
        let what = format!("{} is read-only; say `read-only: true`", path.display());
        return Err(Failure::new(Class::Backing, what).into());
    }
    let limits = Limits::of(&stack::number(metadata.rdev()));
    if let Some(model) = limits.zones {
        return Err(Failure::new(
            Class::Backing,
            format!(
                "{} is a zoned disk ({model}), which takes writes at the write pointers of its zones only, and a device on it would                  take them anywhere; use a disk without zones, or a file in a file system with support for zones (btrfs, f2fs, xfs)",
                path.display()
            ),
        )
        .into());
    }
    let logical_block = place::block(path, sizes.logical, block)?;
    let geometry = Geometry {
        size: sizes.size,
        logical_block,
        physical_block: sizes.physical.max(logical_block),
        memory_alignment: if is_direct { limits.memory_alignment } else { 1 },
        is_read_only,
        has_volatile_cache: true,
        discard: limits.discard,
        write_zeroes_bytes_max: limits.write_zeroes_bytes_max,
        hints: limits.hints,
    };
    // The page cache keeps a copy.
    let stable_pages = (is_direct && limits.needs_stable_pages)
        .then(|| format!("{} needs stable pages (queue/stable_writes is 1)", path.display()));
    Ok(BlockBackend { device: device.into(), path: path.to_owned(), geometry, is_direct, stable_pages })
}

impl Backend for BlockBackend {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn lane(&self, depth: u16) -> Outcome<Box<dyn Lane>> {
        let claimed = Arc::clone(&self.device);
        Ok(Box::new(BlockLane { device: place::again(&self.device)?, claimed, epochs: Epochs::new(depth) }))
    }

    fn resize(&self, size: u64) -> Outcome<()> {
        let now = sys::block_sizes(self.device.as_fd()).or_fail(Class::Backing, self.path.display())?.size;
        let geometry = Geometry { size: now, ..self.geometry };
        let (path, whole) = (self.path.display(), geometry.usable_size());
        let what = match size.cmp(&whole) {
            Ordering::Equal => return Ok(()),
            Ordering::Greater => format!("{path} has {now} bytes, less than {size}; extend it first"),
            Ordering::Less => {
                format!("{path} has {now} bytes and is served whole; the size that it can have is {whole}")
            }
        };
        Err(Failure::new(Class::Backing, what))
    }

    fn takes_registered(&self) -> bool {
        true
    }

    fn needs_stable_pages(&self) -> Option<&str> {
        self.stable_pages.as_deref()
    }

    fn is_direct(&self) -> Option<bool> {
        Some(self.is_direct)
    }

    fn identity(&self) -> Option<(u64, u64)> {
        place::identity(&self.device)
    }
}

struct BlockLane {
    device: File,
    /// The descriptor from [`open`], with the exclusive claim unless the disk is shared or read-only.
    /// Over dirty pages, fallocate(2) claims the device for a moment unless its descriptor has the claim:
    /// through `device` it would meet the claim of this descriptor and fail with EBUSY. fallocate(2)
    /// reports no failed write-back, so all lanes can use one descriptor for it.
    claimed: Arc<File>,
    epochs: Epochs,
}

impl Lane for BlockLane {
    fn begin(&mut self, tag: u16, request: &Request) {
        self.epochs.begin(tag, request);
    }

    fn issue(&mut self, _tag: u16, request: &Request, data: Data<'_>, done: usize) -> Step {
        let device = &self.device;
        Step::Submit(match request.operation {
            Operation::Read => range::read(device, request, data, done),
            Operation::Write => range::write(device, request, data, done),
            Operation::Flush => range::flush(device),
            Operation::Discard => {
                // The range: start in the address of the SQE, length in the first 8 bytes of its command.
                let mut length = [0; 16];
                length[..8].copy_from_slice(&request.length.to_ne_bytes());
                opcode::UringCmd16::new(range::descriptor(device), BLOCK_URING_CMD_DISCARD)
                    .addr(Some(request.offset))
                    .cmd(length)
                    .build()
            }
            Operation::WriteZeroes { .. } if request.keeps_space => {
                range::fallocate(&self.claimed, request, libc::FALLOC_FL_ZERO_RANGE)
            }
            Operation::WriteZeroes { .. } => range::fallocate(&self.claimed, request, libc::FALLOC_FL_PUNCH_HOLE),
        })
    }
    fn settle(&mut self, tag: u16, request: &Request, outcome: Result<(), Errno>) -> Result<(), Errno> {
        self.epochs.settle(tag, request, outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_device_is_refused() {
        let wanted = Wanted { is_direct: false, is_read_only: true, is_shared: false, block: None };
        let refused = open(Path::new("/dev/null"), &wanted).err().unwrap().failure;
        assert!(refused.message.contains("a character device"), "{}", refused.message);
    }
}
