//! What a device leaves outside the daemon, and how it goes again: node, link, the sign of a foreign STOP.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use crate::error::{Class, Failure, OrFail, Outcome};

/// Where the stable names are.
const LINKS: &str = "/dev/ublk-throttle";

/// The device node of disk `id`.
pub fn node(id: u32) -> String {
    format!("/dev/ublkb{id}")
}

/// The stable name of device `name`.
pub fn link(name: &str) -> String {
    format!("{LINKS}/{name}")
}

/// Whether the node is there, made by devtmpfs or udev.
pub fn has_node(id: u32) -> bool {
    fs::metadata(node(id)).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// Publishes the stable name, in place of one that an earlier daemon left.
pub fn make_link(name: &str, id: u32) -> Outcome<()> {
    let at = PathBuf::from(link(name));
    make_links_directory()?;
    if let Ok(old) = fs::symlink_metadata(&at)
        && !old.is_symlink()
    {
        return Err(Failure::new(
            Class::UnsafePath,
            format!("{} is in the way: it is not a link of ours; remove it", at.display()),
        ));
    }
    // Renamed into place, so that the name never points nowhere for a moment.
    let fresh = PathBuf::from(format!("{LINKS}/.{name}.new"));
    let _ = fs::remove_file(&fresh);
    symlink(format!("../ublkb{id}"), &fresh)
        .and_then(|()| fs::rename(&fresh, &at))
        .or_fail(Class::Failed, format!("cannot make the link {}", at.display()))
}

fn make_links_directory() -> Outcome<()> {
    match fs::DirBuilder::new().mode(0o755).create(LINKS) {
        Ok(()) => return Ok(()),
        Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {}
        Err(cause) => return Err(cause).or_fail(Class::Failed, format!("cannot make {LINKS}")),
    }
    let metadata = fs::symlink_metadata(LINKS).or_fail(Class::Failed, LINKS)?;
    if !metadata.is_dir() || metadata.uid() != nix::unistd::geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
        return Err(Failure::new(
            Class::UnsafePath,
            format!("{LINKS} must be a directory of ours that nobody else may write; remove it"),
        ));
    }
    Ok(())
}

/// Takes the stable name away, if it is still this device's. The directory goes with the last one.
pub fn remove_link(name: &str, id: u32) {
    let at = link(name);
    if fs::read_link(&at).is_ok_and(|to| to == Path::new(&format!("../ublkb{id}"))) {
        let _ = fs::remove_file(at);
        let _ = fs::remove_dir(LINKS);
    }
}

/// Whether the kernel is taking the disk down. While requests are held this is the only sign: no abort comes before the
/// last commit. On some kernels the directory is gone by then, on others the size reads 0.
pub fn disk_is_going(id: u32) -> bool {
    match fs::read_to_string(format!("/sys/block/ublkb{id}/size")) {
        Ok(sectors) => sectors.trim() == "0",
        Err(cause) => cause.kind() == io::ErrorKind::NotFound || cause.raw_os_error() == Some(libc::ENODEV),
    }
}
