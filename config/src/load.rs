//! Reading a configuration from the file system.
//!
//! For any path, this ends soon and with little memory: it does not wait for a FIFO, does not read
//! `/dev/zero`, and reads no more of a file than a configuration may have.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::fault::{Errors, Fault, Warning};
use crate::model::Config;

/// The largest file that is read: some 10,000 devices.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// Reads and checks the configuration at a path.
pub fn load(path: &Path) -> Result<(Config, Vec<Warning>), Errors> {
    let refuse = |fault| Errors::new(path, vec![fault], None);
    let text = read(path).map_err(refuse)?;
    let absolute = std::path::absolute(path).map_err(|error| refuse(cannot("resolve", &error)))?;
    crate::parse_in(path, absolute.parent().unwrap_or(Path::new("/")), &text)
}

fn read(path: &Path) -> Result<Vec<u8>, Fault> {
    // Without O_NONBLOCK, opening a FIFO waits for a writer. For regular files the flag has no
    // effect.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = file.map_err(|error| cannot("open", &error))?;
    let kind = file.metadata().map_err(|error| cannot("look at", &error))?.file_type();
    if !kind.is_file() {
        let kind = match () {
            () if kind.is_dir() => "a directory",
            () if kind.is_fifo() => "a FIFO",
            () if kind.is_char_device() => "a character device",
            () if kind.is_block_device() => "a block device",
            () => "no regular file",
        };
        return Err(Fault::of_file(format!("is {kind}"), "a configuration is a regular file; name one"));
    }
    let mut text = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut text).map_err(|error| cannot("read", &error))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(crate::too_large());
    }
    Ok(text)
}

fn cannot(what: &str, error: &io::Error) -> Fault {
    let cure = match error.kind() {
        io::ErrorKind::NotFound => "check the path",
        io::ErrorKind::PermissionDenied => "give this user the right to read it, or run as another",
        _ => "name a regular file that can be read",
    };
    // Drop Rust's " (os error 2)".
    let error = error.to_string();
    let error = error.split(" (os error ").next().unwrap_or_default().to_lowercase();
    Fault::of_file(format!("cannot {what} it: {error}"), cure)
}
