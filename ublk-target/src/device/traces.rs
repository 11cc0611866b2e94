//! The traces of a device outside the daemon, and their removal: node, link, and the sign of a
//! foreign STOP.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use crate::error::{Class, Failure, OrFail, Outcome};

/// The directory of the stable names.
const LINKS: &str = "/dev/ublk-throttle";
/// Attempts to make a link while removals of other devices take the directory away. Each failed
/// attempt means that a device was removed in the meantime.
const ATTEMPTS: u32 = 100;

/// The device node of disk `id`.
pub fn node(id: u32) -> String {
    format!("/dev/ublkb{id}")
}

/// The stable name of device `name`.
pub fn link(name: &str) -> String {
    format!("{LINKS}/{name}")
}

/// Whether the node exists; devtmpfs or udev makes it.
pub fn has_node(id: u32) -> bool {
    fs::metadata(node(id)).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// Whether the driver has the character device of disk `id`. DEL removes it before it waits for the
/// last close.
pub fn has_char_device(id: u32) -> bool {
    Path::new(&format!("/sys/class/ublk-char/ublkc{id}")).exists()
}

/// The disk that the stable name `name` leads to; `None` without such a link.
pub fn linked(name: &str) -> Option<u32> {
    fs::read_link(link(name)).ok()?.file_name()?.to_str()?.strip_prefix("ublkb")?.parse().ok()
}

/// The failure of a device whose stable name leads to disk `id`, which waits for a server.
pub fn waits_for_a_server(name: &str, id: u32) -> Failure {
    let what = format!(
        "{} leads to /dev/ublkb{id}, whose users wait for a server, and no state file here tells of it; serve it with a \
         daemon of its state directory, or remove it (`rublk del -n {id}`), then `reload`",
        link(name)
    );
    Failure::new(Class::Conflict, what)
}

/// Makes the stable name, in place of a link that an earlier daemon left.
pub fn make_link(name: &str, id: u32) -> Outcome<()> {
    let at = PathBuf::from(link(name));
    let fresh = PathBuf::from(format!("{LINKS}/.{name}.new"));
    within(Path::new(LINKS), || {
        if fs::symlink_metadata(&at).is_ok_and(|old| !old.is_symlink()) {
            let what = format!("{} is in the way: it is not a link of ours; remove it", at.display());
            return Ok(Err(Failure::new(Class::UnsafePath, what)));
        }
        // The rename leaves no moment without a name.
        let _ = fs::remove_file(&fresh);
        symlink(format!("../ublkb{id}"), &fresh)?;
        fs::rename(&fresh, &at).map(Ok)
    })?
}

/// Runs `act` in `directory`, which is made if it is missing. A different device, or a different
/// daemon, may remove the directory with its own last link at any time; `act` is run again then.
fn within<T>(directory: &Path, mut act: impl FnMut() -> io::Result<T>) -> Outcome<T> {
    let mut attempt = 1;
    loop {
        make_directory(directory)?;
        match act() {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound && attempt < ATTEMPTS => attempt += 1,
            done => return done.or_fail(Class::Failed, format!("cannot make a link in {}", directory.display())),
        }
    }
}

fn make_directory(directory: &Path) -> Outcome<()> {
    match fs::DirBuilder::new().mode(0o755).create(directory) {
        Ok(()) => return Ok(()),
        Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {}
        Err(cause) => return Err(cause).or_fail(Class::Failed, format!("cannot make {}", directory.display())),
    }
    let metadata = match fs::symlink_metadata(directory) {
        Ok(metadata) => metadata,
        // Removed in between.
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(cause).or_fail(Class::Failed, directory.display()),
    };
    if !metadata.is_dir() || metadata.uid() != nix::unistd::geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
        let what = format!("{} must be a directory of ours that nobody else may write; remove it", directory.display());
        return Err(Failure::new(Class::UnsafePath, what));
    }
    Ok(())
}

/// Removes the stable name if it leads to this device, and the directory after the last name.
pub fn remove_link(name: &str, id: u32) {
    let at = link(name);
    if fs::read_link(&at).is_ok_and(|to| to == Path::new(&format!("../ublkb{id}"))) {
        let _ = fs::remove_file(at);
        let _ = fs::remove_dir(LINKS);
    }
}

/// The sign that the kernel is taking a disk down: the `size` attribute is gone, or on some kernels
/// reads 0. While requests are held it is the only sign, as no abort comes before the last commit.
/// A recoverable disk does not even show this sign then ([`crate::watcher`]).
///
/// The check is made twenty times a second while a device is busy. The file stays open, so a check
/// is one system call.
#[derive(Debug, Default)]
pub struct TakeDown(RefCell<Option<(u32, File)>>);

impl TakeDown {
    /// Whether disk `id` shows the sign.
    pub fn is_seen(&self, id: u32) -> bool {
        is_going(self.size(id)).unwrap_or(false)
    }

    fn size(&self, id: u32) -> io::Result<String> {
        let mut kept = self.0.borrow_mut();
        let file = match &mut *kept {
            Some((of, file)) if *of == id => file,
            other => &mut other.insert((id, File::open(format!("/sys/block/ublkb{id}/size"))?)).1,
        };
        // The largest number has 20 digits, and a line feed follows.
        let mut text = [0; 24];
        let length = file.read_at(&mut text, 0)?;
        Ok(String::from_utf8_lossy(&text[..length]).into_owned())
    }
}

/// Whether a disk is going, by its number of sectors or the error of the read; `None` if the error
/// says neither.
fn is_going(sectors: io::Result<String>) -> Option<bool> {
    match sectors {
        Ok(sectors) => Some(sectors.trim() == "0"),
        Err(cause) => [libc::ENOENT, libc::ENODEV].contains(&cause.raw_os_error()?).then_some(true),
    }
}

/// The size of disk `id` in bytes, according to the kernel.
pub fn size(id: u32) -> Option<u64> {
    let sectors: u64 = fs::read_to_string(format!("/sys/block/ublkb{id}/size")).ok()?.trim().parse().ok()?;
    sectors.checked_mul(512)
}

/// Whether disk `id` has never had a request, completed or in flight.
pub fn is_unused(id: u32) -> bool {
    fs::read_to_string(format!("/sys/block/ublkb{id}/stat")).is_ok_and(|stat| is_all_zero(&stat))
}

fn is_all_zero(stat: &str) -> bool {
    let mut counters = stat.split_ascii_whitespace().peekable();
    counters.peek().is_some() && counters.all(|counter| counter == "0")
}

/// Whether the kernel lets no new request of disk `id` through at the moment; `None` if debugfs
/// does not show it.
pub fn is_quiesced(id: u32) -> Option<bool> {
    let state = fs::read_to_string(format!("/sys/kernel/debug/block/ublkb{id}/state")).ok()?;
    Some(state.split('|').any(|flag| flag.trim() == "QUIESCED"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_goes_when_its_size_is_0_or_gone() {
        // EACCES and EINTR say nothing about the disk; the next check will.
        let failed = |errno| Err(io::Error::from_raw_os_error(errno));
        assert_eq!(is_going(Ok("0\n".to_owned())), Some(true));
        assert_eq!(is_going(Ok("2097152\n".to_owned())), Some(false));
        assert_eq!([is_going(failed(libc::ENOENT)), is_going(failed(libc::ENODEV))], [Some(true); 2]);
        assert_eq!([is_going(failed(libc::EACCES)), is_going(failed(libc::EINTR))], [None; 2]);
    }

    #[test]
    fn a_disk_that_is_not_there_is_going_and_another_is_looked_at_anew() {
        // No driver gives such a large id away. The open file of one disk must not be read for a
        // second one.
        let down = TakeDown::default();
        assert!(down.is_seen(u32::MAX));
        down.0.replace(Some((5, File::open("/dev/zero").unwrap())));
        assert!(!down.is_seen(5), "24 zeros are no number");
        assert!(down.is_seen(u32::MAX));
    }

    #[test]
    fn a_link_is_made_although_the_last_other_takes_the_directory_along() {
        // The end of a device removes the directory if it is empty, possibly between the check of
        // the directory and the new link.
        let directory = std::env::temp_dir().join(format!("ublk-throttle-links-{}", std::process::id()));
        let at = directory.join("vol");
        let mut removals = 2;
        let made = within(&directory, || {
            if removals > 0 {
                removals -= 1;
                fs::remove_dir(&directory)?;
            }
            symlink("../ublkb7", &at)
        });
        assert!(made.is_ok(), "{made:?}");
        assert_eq!(fs::read_link(&at).unwrap(), Path::new("../ublkb7"));
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn one_request_under_way_is_use() {
        assert!(is_all_zero("       0        0        0        0        0        0        0        0\n"));
        assert!(!is_all_zero(
            "       0        0        0        0        0        0        0        0        1        0        0\n"
        ));
        assert!(!is_all_zero(""));
    }

    #[test]
    fn a_directory_that_does_not_stay_is_given_up() {
        let directory = std::env::temp_dir().join(format!("ublk-throttle-no-links-{}", std::process::id()));
        let failure =
            within(&directory, || fs::remove_dir(&directory).and_then(|()| symlink("x", directory.join("y"))));
        assert_eq!(failure.unwrap_err().class, Class::Failed);
    }
}
