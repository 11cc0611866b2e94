//! SQEs that read and write ranges of a file, common to the backends `file` and `block`.
//!
//! ```text
//!   data                       opcode                    address in the SQE
//!   buffer of the tag          READ, WRITE               of the buffer, plus the bytes already done
//!   pages of the client        READ_FIXED, WRITE_FIXED   offset into the pages, plus their index in the ring's table
//! ```

use std::fs::File;
use std::os::fd::AsRawFd;

use io_uring::{opcode, types};

use super::{Data, Request};
use crate::ublk::queue::Entry;

/// Reads the rest of a request, of which `done` bytes are done, into its data.
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

/// Writes the rest of a request, of which `done` bytes are done. A FUA write has `RWF_DSYNC`.
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

/// The offset `done` into registered pages, as a pointer: the pages are not mapped in this process.
const fn from(done: usize) -> *const u8 {
    std::ptr::without_provenance(done)
}

fn rest(request: &Request, done: usize) -> u32 {
    (request.data_length() - done) as u32
}

/// Makes every completed write durable (fdatasync): the data and the metadata that finds it, without time
/// stamps.
pub fn flush(file: &File) -> Entry {
    opcode::Fsync::new(descriptor(file)).flags(types::FsyncFlags::DATASYNC).build()
}

/// `fallocate` over the range of the request; the size of the file stays.
pub fn fallocate(file: &File, request: &Request, mode: i32) -> Entry {
    opcode::Fallocate::new(descriptor(file), request.length)
        .offset(request.offset)
        .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
        .build()
}

/// The descriptor of `file` for an SQE. The lane that issues the SQE keeps the file open.
pub fn descriptor(file: &File) -> types::Fd {
    types::Fd(file.as_raw_fd())
}
