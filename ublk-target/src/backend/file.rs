//! A regular file.
//!
//! ```text
//!   read, write   READ, WRITE; FUA = RWF_DSYNC      flush          FSYNC, data only
//!   discard       fallocate PUNCH_HOLE              write-zeroes   PUNCH_HOLE, or ZERO_RANGE to keep the space
//! ```
//!
//! The file is never mapped: if another program truncates it, a request fails, instead of a signal
//! that ends the daemon.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, TMPFS_MAGIC, fstatfs};
use throttle_core::cost::Operation;
use ublk_throttle_config::Direct;

use super::epoch::Epochs;
use super::limits::Limits;
use super::place::{self, Access};
use super::{Backend, Data, Lane, Refused, Remark, Request, Step, range};
use crate::error::{Class, Failure, OrFail, Outcome};
use crate::stack;
use crate::sys::{self, DirectAlignment};
use crate::ublk::params::{Discard, Geometry, Hints, LOGICAL_BLOCKS};

/// The settings of the configuration besides the path.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// The size of the device; if not given, that of the file.
    pub size: Option<u64>,
    /// Create a missing file, and extend one that is too short.
    pub create: bool,
    /// The use of `O_DIRECT`.
    pub direct: Direct,
    /// Refuse writes.
    pub is_read_only: bool,
    /// Share the file with all users that also set this.
    pub is_shared: bool,
    /// The logical block of the device; if not given, that of the file.
    pub block: Option<u32>,
}

/// An open file.
pub struct FileBackend {
    file: File,
    path: PathBuf,
    geometry: Geometry,
    remarks: Vec<Remark>,
    is_direct: bool,
    /// See [`Backend::needs_stable_pages`].
    stable_pages: Option<String>,
}

/// A page of the page cache: the best unit for a buffered file.
const PAGE: u32 = 4096;

/// Opens, checks and locks the file at `path`.
pub fn open(path: &Path, wanted: &Wanted) -> Result<FileBackend, Refused> {
    let creates = wanted.create && !wanted.is_read_only;
    let access = Access {
        is_read_only: wanted.is_read_only,
        is_direct: wanted.direct == Direct::On,
        flags: if creates { OFlag::O_CREAT } else { OFlag::empty() },
    };
    let is_new = creates && !path.exists();
    let (file, metadata) = place::open(path, access)?;
    if !metadata.is_file() {
        let kind = place::kind(&metadata);
        return Err(Failure::new(Class::Backing, format!("{} is {kind}, not a regular file", path.display())).into());
    }
    place::lock(&file, path, wanted.is_read_only || wanted.is_shared)?;
    if !wanted.is_read_only {
        place::expect_no_loop(path, &metadata)?;
    }
    let size = settle_size(&file, path, metadata.len(), wanted, creates)?;
    let is_direct = match wanted.direct {
        Direct::Auto => go_direct(&file, wanted.block),
        direct => direct == Direct::On,
    };
    let needed = needed(&file, path, is_direct)?;
    let logical_block = place::block(path, needed.offset, wanted.block)?;
    let holes = Holes::probe(&file, path, wanted.is_read_only);
    let geometry = Geometry {
        size,
        logical_block,
        physical_block: PAGE.max(logical_block),
        memory_alignment: needed.memory,
        is_read_only: wanted.is_read_only,
        has_volatile_cache: true,
        discard: holes.punch.then_some(Discard { granularity: PAGE.max(logical_block), bytes_max: u64::MAX }),
        write_zeroes_bytes_max: if holes.punch && holes.zero { u64::MAX } else { 0 },
        hints: stack::disk_below(&file).map_or(Hints::NONE, |disk| Limits::of(&disk).hints),
    };
    if geometry.usable_size() == 0 {
        return Err(Failure::new(
            Class::Backing,
            format!("{} has {size} bytes, less than one block of {logical_block}", path.display()),
        )
        .into());
    }
    let remarks = remarks(path, metadata.len(), is_new, size);
    // The page cache keeps a copy.
    let stable_pages = if is_direct { stable_pages(&file, path) } else { None };
    Ok(FileBackend { file, path: path.to_owned(), geometry, remarks, is_direct, stable_pages })
}

/// Why the pages of a direct write to the file must stay as they are: its file system keeps checksums, or a disk below needs it.
fn stable_pages(file: &File, path: &Path) -> Option<String> {
    const ZFS: FsType = FsType(0x2fc1_2fc1);
    let path = path.display();
    let kind = fstatfs(file).map(|system| system.filesystem_type());
    if kind.is_ok_and(|kind| [BTRFS_SUPER_MAGIC, ZFS].contains(&kind)) {
        return Some(format!("{path} is on a file system with checksums, which needs stable pages"));
    }
    let disks = stack::disks_below(file);
    let needs = disks.iter().any(|disk| Limits::of(disk).needs_stable_pages);
    needs.then(|| format!("a disk below {path} needs stable pages (queue/stable_writes is 1)"))
}

/// The operations of the file system on a range besides reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holes {
    punch: bool,
    zero: bool,
}

impl Holes {
    const NONE: Self = Self { punch: false, zero: false };

    /// Tries both on an unnamed file in the same folder: opening a backend must not write to its
    /// file, not even behind the end of the device, where the file may go on. An operation that the
    /// device offers and the file system refuses would make the kernel log errors before it falls
    /// back to writes.
    fn probe(file: &File, path: &Path, is_read_only: bool) -> Self {
        if is_read_only {
            return Self::NONE;
        }
        let Some(scratch) = scratch_beside(file, path) else { return Self::of_kind(file) };
        let can = |mode: FallocateFlags| {
            let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            // A full file system fails with a different error, and supports the call all the same.
            fallocate(&scratch, mode, 0, PAGE.into()) != Err(Errno::EOPNOTSUPP)
        };
        Self { zero: can(FallocateFlags::FALLOC_FL_ZERO_RANGE), punch: can(FallocateFlags::FALLOC_FL_PUNCH_HOLE) }
    }

    /// The operations by file system type, if no file can be made: as in a folder that is read-only
    /// to the daemon.
    fn of_kind(file: &File) -> Self {
        const XFS: FsType = FsType(0x5846_5342);
        let kind = fstatfs(file).map(|system| system.filesystem_type());
        let has_both = kind.is_ok_and(|kind| [EXT4_SUPER_MAGIC, XFS, BTRFS_SUPER_MAGIC, TMPFS_MAGIC].contains(&kind));
        Self { punch: has_both, zero: has_both }
    }
}

/// An unnamed file on the file system of `file`. `None` if the folder is on a different one, as
/// with a bind mount of a file.
fn scratch_beside(file: &File, path: &Path) -> Option<File> {
    let folder = std::fs::canonicalize(path).ok()?.parent()?.to_owned();
    let mut open = OpenOptions::new();
    let scratch = open.read(true).write(true).custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC).open(folder).ok()?;
    let is_beside = scratch.metadata().ok()?.dev() == file.metadata().ok()?.dev();
    is_beside.then_some(scratch)
}

/// Formats by their first bytes. A device shows such a file as it is, with its header before the
/// data.
const FORMATS: [(&[u8], &str); 11] = [
    (b"QFI\xfb", "a qcow2 image"),
    (b"KDMV", "a VMDK image"),
    (b"# Disk DescriptorFile", "a VMDK descriptor"),
    (b"conectix", "a VHD image"),
    (b"vhdxfile", "a VHDX image"),
    (b"LUKS\xba\xbe", "a LUKS container"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\x04\x22\x4d\x18", "an lz4 archive"),
];

/// The format of a file by its first bytes, if it is not a raw image.
fn format_of(path: &Path) -> Option<&'static str> {
    let mut head = Vec::new();
    // Opened once more, because `O_DIRECT` reads whole blocks only.
    File::open(path).ok()?.take(32).read_to_end(&mut head).ok()?;
    FORMATS.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, name)| *name)
}

/// The properties that the user may not have intended.
fn remarks(path: &Path, before: u64, is_new: bool, size: u64) -> Vec<Remark> {
    let path_text = path.display();
    let mut remarks = Vec::new();
    if is_new {
        remarks.push(Remark {
            code: "W-CREATED",
            text: format!("{path_text} was not there and is made, {size} bytes of zeros"),
        });
    } else if before < size {
        let text = format!("{path_text} had {before} bytes and is extended with zeros to {size}");
        remarks.push(Remark { code: "W-EXTENDED", text });
    } else if before > size {
        let text = format!(
            "{path_text} has {before} bytes, the device {size}: what is behind them is kept and cannot be reached"
        );
        remarks.push(Remark { code: "W-SIZE", text });
    }
    if let Some(format) = format_of(path) {
        let text = format!("{path_text} is {format}, and the device shows the file as it is, its head included");
        remarks.push(Remark { code: "W-FORMAT", text });
    }
    remarks
}

/// Extends the file if necessary. Returns the size of the device.
fn settle_size(file: &File, path: &Path, length: u64, wanted: &Wanted, creates: bool) -> Outcome<u64> {
    let Some(size) = wanted.size else { return Ok(length) };
    if length < size {
        if !creates {
            return Err(Failure::new(
                Class::Backing,
                format!(
                    "{} has {length} bytes, less than the size of {size}; say `create` to have it extended",
                    path.display()
                ),
            ));
        }
        file.set_len(size).or_fail(Class::Backing, format!("cannot extend {} to {size} bytes", path.display()))?;
    }
    Ok(size)
}

/// Turns `O_DIRECT` on if the file system supports it in units that fit blocks of `block` bytes, or
/// of 512 bytes if not given: `auto` must not restrict the device more than the page cache would.
/// Returns whether it is on.
///
/// A file system that reports no units (tmpfs, FUSE, NFS) keeps its page cache: a request that does
/// not fit would show only when it fails.
fn go_direct(file: &File, block: Option<u32>) -> bool {
    let block = block.unwrap_or(*LOGICAL_BLOCKS.start());
    let Ok(Some(told)) = sys::direct_alignment(file.as_fd()) else { return false };
    if !fits(told, block) {
        return false;
    }
    let flags = fcntl(file.as_fd(), FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
    flags.is_ok_and(|flags| fcntl(file.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_DIRECT)).is_ok())
}

/// Whether `O_DIRECT` takes every request of a device with blocks of `block` bytes. The block layer
/// aligns their memory to 512 bytes at least.
const fn fits(told: DirectAlignment, block: u32) -> bool {
    told.offset.is_power_of_two() && told.offset <= block && told.memory <= *LOGICAL_BLOCKS.start()
}

/// The alignment that the file needs: of offset and length, and of memory.
fn needed(file: &File, path: &Path, is_direct: bool) -> Outcome<DirectAlignment> {
    if !is_direct {
        return Ok(DirectAlignment { memory: 1, offset: *LOGICAL_BLOCKS.start() });
    }
    let told = sys::direct_alignment(file.as_fd()).or_fail(Class::Backing, path.display())?;
    // Without a report from the file system, a page is a safe unit for both.
    let told = told.unwrap_or(DirectAlignment { memory: PAGE, offset: PAGE });
    let block = told.offset.max(*LOGICAL_BLOCKS.start());
    if !block.is_power_of_two() || block > *LOGICAL_BLOCKS.end() {
        return Err(Failure::new(
            Class::Backing,
            format!(
                "{} needs blocks of {block} bytes for O_DIRECT, more than the {} of a ublk disk; say `direct: false`",
                path.display(),
                LOGICAL_BLOCKS.end()
            ),
        ));
    }
    Ok(DirectAlignment { memory: told.memory.min(PAGE), offset: block })
}

impl Backend for FileBackend {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn lane(&self, depth: u16) -> Outcome<Box<dyn Lane>> {
        Ok(Box::new(FileLane { file: place::again(&self.file)?, epochs: Epochs::new(depth) }))
    }

    fn resize(&self, size: u64) -> Outcome<()> {
        let length = self.file.metadata().or_fail(Class::Backing, self.path.display())?.len();
        if size <= length {
            return Ok(());
        }
        let what = || format!("cannot extend {} to {size} bytes", self.path.display());
        self.file.set_len(size).or_fail(Class::Backing, what())
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
        place::identity(&self.file)
    }

    fn remarks(&self) -> &[Remark] {
        &self.remarks
    }
}

struct FileLane {
    file: File,
    epochs: Epochs,
}

impl Lane for FileLane {
    fn begin(&mut self, tag: u16, request: &Request) {
        self.epochs.begin(tag, request);
    }

    fn issue(&mut self, _tag: u16, request: &Request, data: Data<'_>, done: usize) -> Step {
        let file = &self.file;
        Step::Submit(match request.operation {
            Operation::Read => range::read(file, request, data, done),
            Operation::Write => range::write(file, request, data, done),
            Operation::Flush => range::flush(file),
            Operation::Discard => range::fallocate(file, request, libc::FALLOC_FL_PUNCH_HOLE),
            Operation::WriteZeroes { .. } if request.keeps_space => {
                range::fallocate(file, request, libc::FALLOC_FL_ZERO_RANGE)
            }
            Operation::WriteZeroes { .. } => range::fallocate(file, request, libc::FALLOC_FL_PUNCH_HOLE),
        })
    }
    fn settle(&mut self, tag: u16, request: &Request, outcome: Result<(), Errno>) -> Result<(), Errno> {
        self.epochs.settle(tag, request, outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted = Wanted {
        size: Some(1 << 20),
        create: true,
        direct: Direct::Off,
        is_read_only: false,
        is_shared: false,
        block: None,
    };

    fn scratch(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("ublk-throttle-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    #[test]
    fn a_file_is_made_sparse_and_of_the_size_asked_for() {
        let path = scratch("create");
        let backend = open(&path, &WANTED).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(metadata.len(), 1 << 20);
        assert_eq!(backend.geometry().usable_size(), 1 << 20);
    }

    #[test]
    fn a_file_that_is_too_short_is_refused_with_both_numbers() {
        let path = scratch("short");
        std::fs::write(&path, [0; 1000]).unwrap();
        let refused = open(&path, &Wanted { create: false, ..WANTED }).err();
        std::fs::remove_file(&path).unwrap();
        let message = refused.unwrap().failure.message;
        assert!(message.contains("1000 bytes") && message.contains("1048576"), "{message}");
    }

    #[test]
    fn f56_opening_a_file_that_is_longer_than_its_device_changes_no_byte_of_it() {
        // A probe for holes once punched the page behind the end of the device.
        let path = scratch("longer");
        let before: Vec<u8> = (0..64 << 10).map(|place| (place % 251) as u8 + 1).collect();
        std::fs::write(&path, &before).unwrap();
        let wanted = Wanted { size: Some(32 << 10), ..WANTED };
        let backend = open(&path, &wanted).unwrap();
        let after = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(
            before == after,
            "the first byte that differs: {:?}",
            (0..before.len()).find(|at| before[*at] != after[*at])
        );
        assert_eq!(backend.remarks().iter().map(|remark| remark.code).collect::<Vec<_>>(), ["W-SIZE"]);
    }

    #[test]
    fn a_hole_can_be_punched_where_the_file_system_has_holes() {
        // Assumes that the temporary folder is on a file system with holes. There the probe agrees
        // with the list of types, even if no unnamed file can be made.
        let path = scratch("holes");
        std::fs::write(&path, "x").unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let found = [Holes::probe(&file, &path, false), Holes::of_kind(&file), Holes::probe(&file, &path, true)];
        std::fs::remove_file(&path).unwrap();
        assert_eq!(found[0], found[1]);
        assert_eq!(found[2], Holes::NONE);
    }

    #[test]
    fn f57_a_file_that_is_made_extended_or_no_raw_image_is_told() {
        let path = scratch("told");
        let codes = |wanted: &Wanted| {
            let backend = open(&path, wanted).unwrap();
            backend.remarks().iter().map(|remark| remark.code).collect::<Vec<_>>()
        };
        let found = [codes(&WANTED), codes(&WANTED), codes(&Wanted { size: Some(2 << 20), ..WANTED })];
        std::fs::write(&path, b"QFI\xfb\x00\x00\x00\x03".repeat(1 << 17)).unwrap();
        let qcow2 = codes(&WANTED);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(found, [vec!["W-CREATED"], vec![], vec!["W-EXTENDED"]]);
        assert_eq!(qcow2, ["W-FORMAT"]);
    }

    #[test]
    fn f68_a_file_is_direct_where_that_takes_nothing_away() {
        // A device of 512-byte blocks stays one: on a file system that needs 4096, the page cache
        // is used, unless the blocks of the device are as large.
        let told = |offset, memory| DirectAlignment { offset, memory };
        assert!(fits(told(512, 512), 512) && fits(told(512, 4), 4096) && fits(told(4096, 512), 4096));
        assert!(!fits(told(4096, 512), 512) && !fits(told(512, 4096), 512) && !fits(told(1536, 512), 4096));
    }

    #[test]
    fn f68_a_file_opened_by_default_has_the_blocks_of_a_buffered_one() {
        // Holds for any file system of the temporary folder; `is_direct` reports the choice.
        let path = scratch("auto");
        for (block, expected) in [(None, 512), (Some(4096), 4096)] {
            let backend = open(&path, &Wanted { direct: Direct::Auto, block, ..WANTED }).unwrap();
            let flags = OFlag::from_bits_retain(fcntl(backend.file.as_fd(), FcntlArg::F_GETFL).unwrap());
            assert_eq!(backend.geometry().logical_block, expected);
            assert_eq!(backend.is_direct(), Some(flags.contains(OFlag::O_DIRECT)));
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn f68_a_file_system_without_direct_io_keeps_its_page_cache() {
        // procfs has no direct I/O. tmpfs, which accepts O_DIRECT but reports no units, is buffered
        // as well.
        let file = File::open("/proc/self/status").unwrap();
        assert!(!go_direct(&file, None));
        let unnamed = OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open("/dev/shm").unwrap();
        assert!(!go_direct(&unnamed, None));
    }

    #[test]
    fn a_directory_is_refused() {
        let refused = open(Path::new("/tmp"), &Wanted { is_read_only: true, ..WANTED }).err().unwrap().failure;
        assert_eq!(refused.class, Class::Backing);
        assert!(refused.message.contains("a directory"), "{}", refused.message);
    }

    #[test]
    fn an_empty_file_is_refused() {
        let path = scratch("empty");
        std::fs::write(&path, []).unwrap();
        let refused = open(&path, &Wanted { size: None, create: false, ..WANTED }).err();
        std::fs::remove_file(&path).unwrap();
        assert!(refused.unwrap().failure.message.contains("0 bytes"));
    }
}
