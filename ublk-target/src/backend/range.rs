//! Entries for reading and writing ranges of a file, common to `file` and `block`.

use std::fs::File;
use std::os::fd::AsRawFd;

use io_uring::{opcode, types};

use super::Request;
use crate::ublk::queue::Entry;

/// Reads what is left of the request into the rest of its buffer.
pub fn read(file: &File, request: &Request, data: &mut [u8], done: usize) -> Entry {
    let rest = &mut data[done..];
    opcode::Read::new(descriptor(file), rest.as_mut_ptr(), rest.len() as u32)
        .offset(request.offset + done as u64)
        .build()
}

/// Writes what is left of the request from the rest of its buffer.
pub fn write(file: &File, request: &Request, data: &[u8], done: usize) -> Entry {
    let rest = &data[done..];
    opcode::Write::new(descriptor(file), rest.as_ptr(), rest.len() as u32)
        .offset(request.offset + done as u64)
        .rw_flags(if request.is_fua { libc::RWF_DSYNC } else { 0 })
        .build()
}

/// Makes every completed write durable: data and what is needed to find it, no time stamps.
pub fn flush(file: &File) -> Entry {
    opcode::Fsync::new(descriptor(file)).flags(types::FsyncFlags::DATASYNC).build()
}

/// `fallocate` over the request's range, without changing the size.
pub fn fallocate(file: &File, request: &Request, mode: i32) -> Entry {
    opcode::Fallocate::new(descriptor(file), request.length)
        .offset(request.offset)
        .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
        .build()
}

/// The file as an entry names it. Whoever submits the entry keeps it open.
pub fn descriptor(file: &File) -> types::Fd {
    types::Fd(file.as_raw_fd())
}
