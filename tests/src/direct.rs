//! Reads and writes past the page cache: each call is a request of its own and returns its own
//! result.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::libc;

/// Alignment of buffers, in bytes.
const ALIGNMENT: usize = 4096;

/// A node or file opened with `O_DIRECT`.
#[derive(Debug)]
pub struct Direct {
    file: File,
}

impl Direct {
    /// Opens the path for reading and writing.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
        Ok(Self { file })
    }

    /// Writes `length` bytes of value `byte` at `offset`; returns the kernel's result.
    pub fn write(&self, offset: u64, length: usize, byte: u8) -> io::Result<()> {
        let mut space = vec![byte; length + ALIGNMENT];
        self.file.write_all_at(aligned(&mut space, length), offset)
    }

    /// Reads `length` bytes at `offset`.
    pub fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut space = vec![0; length + ALIGNMENT];
        let buffer = aligned(&mut space, length);
        self.file.read_exact_at(buffer, offset)?;
        Ok(buffer.to_vec())
    }

    /// Whether `length` bytes at `offset` all have the value `byte`.
    pub fn holds(&self, offset: u64, length: usize, byte: u8) -> io::Result<bool> {
        Ok(self.read(offset, length)?.iter().all(|&found| found == byte))
    }

    /// Flushes the device's write cache.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

/// The aligned part of a buffer that is [`ALIGNMENT`] too long.
fn aligned(space: &mut [u8], length: usize) -> &mut [u8] {
    let begin = space.as_ptr().align_offset(ALIGNMENT);
    &mut space[begin..begin + length]
}
