//! Entries for reading and writing ranges of a file, common to `file` and `block`.
//!
//! ```text
//!   buffer of the tag          READ, WRITE               its address, from what is done on
//!   pages of the client        READ_FIXED, WRITE_FIXED   number in the ring's table; the "address" counts from 0 there
//! ```

use std::fs::File;
use std::os::fd::AsRawFd;

use io_uring::{opcode, types};

use super::{Data, Request};
use crate::ublk::queue::Entry;

/// Reads what is left of the request, of which `done` bytes are done, into its data.
pub fn read(file: &File, request: &Request, data: Data<'_>, done: usize) -> Entry {
    let (file, offset) = (descriptor(file), request.offset + done as u64);
    match data {
        Data::Buffer(buffer) => {
            let rest = &mut buffer[done..];
            opcode::Read::new(file, rest.as_mut_ptr(), rest.len() as u32).offset(offset).build()
        }
        Data::Registered(index) => {
            opcode::ReadFixed::new(file, from(done).cast_mut(), rest(request, done), index).offset(offset).build()
        }
    }
}

/// Writes what is left of the request.
pub fn write(file: &File, request: &Request, data: Data<'_>, done: usize) -> Entry {
    let (file, offset) = (descriptor(file), request.offset + done as u64);
    let flags = if request.is_fua { libc::RWF_DSYNC } else { 0 };
    match data {
        Data::Buffer(buffer) => {
            let rest = &buffer[done..];
            opcode::Write::new(file, rest.as_ptr(), rest.len() as u32).offset(offset).rw_flags(flags).build()
        }
        Data::Registered(index) => {
            opcode::WriteFixed::new(file, from(done), rest(request, done), index).offset(offset).rw_flags(flags).build()
        }
    }
}

/// A place in registered pages, which have no address of ours.
const fn from(done: usize) -> *const u8 {
    std::ptr::without_provenance(done)
}

fn rest(request: &Request, done: usize) -> u32 {
    (request.data_length() - done) as u32
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
