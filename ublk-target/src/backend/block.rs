//! Another block device, whole.
//!
//! As a file, except that sizes come from the device, a writable one is opened exclusively (refused while mounted), and
//! discard is the device's own, where it has one.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use io_uring::opcode;
use throttle_core::cost::Operation;

use super::place::{self, Access};
use super::{Backend, FIXED_FILE, Lane, Request, Step, range};
use crate::error::{Class, Failure, OrFail, Outcome};
use crate::sys;
use crate::ublk::params::{Discard, Geometry, LOGICAL_BLOCKS};

/// `BLOCK_URING_CMD_DISCARD` of `<linux/blkdev.h>`, since Linux 6.12: `_IO(0x12, 0)`.
const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;

/// An open block device.
pub struct BlockBackend {
    device: File,
    geometry: Geometry,
}

/// Opens, checks and locks the device.
pub fn open(path: &Path, is_direct: bool, is_read_only: bool) -> Outcome<BlockBackend> {
    let flags = if is_read_only { 0 } else { libc::O_EXCL };
    let (device, metadata) = place::open(path, Access { is_read_only, is_direct, flags })?;
    if !metadata.file_type().is_block_device() {
        let kind = place::kind(&metadata);
        return Err(Failure::new(Class::Backing, format!("{} is {kind}, not a block device", path.display())));
    }
    place::lock(&device, path, is_read_only)?;
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
        ));
    }
    if sizes.read_only && !is_read_only {
        return Err(Failure::new(Class::Backing, format!("{} is read-only; say `read-only: true`", path.display())));
    }
    let limits = Limits::of(metadata.rdev());
    let geometry = Geometry {
        size: sizes.size,
        logical_block: sizes.logical,
        physical_block: sizes.physical.max(sizes.logical),
        is_read_only,
        has_volatile_cache: true,
        discard: limits.discard,
        write_zeroes_bytes_max: limits.write_zeroes_bytes_max,
    };
    Ok(BlockBackend { device, geometry })
}

/// What sysfs says about a block device's queue.
#[derive(Debug, PartialEq, Eq)]
struct Limits {
    discard: Option<Discard>,
    write_zeroes_bytes_max: u64,
}

impl Limits {
    fn of(device: u64) -> Self {
        let base = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
        let number = |name: &str| {
            // A partition has the queue of its disk, one directory up.
            let text = std::fs::read_to_string(format!("{base}/queue/{name}"))
                .or_else(|_| std::fs::read_to_string(format!("{base}/../queue/{name}")));
            text.ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        Self::new(number("discard_granularity"), number("discard_max_bytes"), number("write_zeroes_max_bytes"))
    }

    fn new(granularity: u64, discard_bytes_max: u64, write_zeroes_bytes_max: u64) -> Self {
        let granularity = u32::try_from(granularity).ok().filter(|bytes| bytes.is_power_of_two());
        let discard = granularity
            .filter(|_| discard_bytes_max > 0)
            .map(|granularity| Discard { granularity, bytes_max: discard_bytes_max });
        Self { discard, write_zeroes_bytes_max }
    }
}

impl Backend for BlockBackend {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn files(&self) -> Vec<RawFd> {
        vec![self.device.as_raw_fd()]
    }

    fn lane(&self, _depth: u16) -> Box<dyn Lane> {
        Box::new(BlockLane)
    }
}

struct BlockLane;

impl Lane for BlockLane {
    fn issue(&mut self, _tag: u16, request: &Request, data: &mut [u8], done: usize) -> Step {
        Step::Submit(match request.operation {
            Operation::Read => range::read(request, data, done),
            Operation::Write => range::write(request, data, done),
            Operation::Flush => range::flush(),
            Operation::Discard => {
                // The range: start in the entry's address, length in the first 8 bytes of the command.
                let mut length = [0; 16];
                length[..8].copy_from_slice(&request.length.to_ne_bytes());
                opcode::UringCmd16::new(FIXED_FILE, BLOCK_URING_CMD_DISCARD)
                    .addr(Some(request.offset))
                    .cmd(length)
                    .build()
            }
            Operation::WriteZeroes { .. } if request.keeps_space => {
                range::fallocate(request, libc::FALLOC_FL_ZERO_RANGE)
            }
            Operation::WriteZeroes { .. } => range::fallocate(request, libc::FALLOC_FL_PUNCH_HOLE),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_discard_offers_none() {
        // A granularity is told by many devices that cannot discard; the limit decides.
        assert_eq!(Limits::new(512, 0, 0).discard, None);
        assert_eq!(Limits::new(4096, 1 << 20, 0).discard, Some(Discard { granularity: 4096, bytes_max: 1 << 20 }));
    }

    #[test]
    fn a_granularity_that_is_no_power_of_two_is_not_passed_on() {
        // Thin provisioning with chunks of 192 KiB: the block layer above us could not work with it.
        assert_eq!(Limits::new(196_608, 1 << 20, 0).discard, None);
    }

    #[test]
    fn a_character_device_is_refused() {
        let refused = open(Path::new("/dev/null"), false, true).err().unwrap();
        assert!(refused.message.contains("a character device"), "{}", refused.message);
    }
}
