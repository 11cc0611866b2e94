//! Opens a path that a configuration names, so that no unprivileged user can redirect it.
//!
//! 1. Links on the path are followed only if they belong to root or to the daemon's user
//!    ([`super::way`]): otherwise a user that may write to a directory could turn root's daemon to
//!    a file of his choice.
//! 2. The file is opened with `O_NONBLOCK`, so that a FIFO does not block the daemon; then it is
//!    checked, and refused if it is not of the kind that the backend needs.
//! 3. Files on a ublk device are refused: a device below a throttle must not wait for that
//!    throttle.
//! 4. The file is locked (OFD lock, over the whole file): one writer, or any number of readers, or
//!    of devices with `shared: true`.
//! 5. A writer of a disk that this host uses is refused ([`expect_unused`]), also with `shared: true`.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use super::{Refused, way};
use crate::error::{Class, Failure, OrFail, Outcome};
use crate::in_use::{self, BETWEEN_LOOKS, LOOKS};
use crate::stack::{self, Sysfs};

/// The access to a backing file.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Writes are refused later on, so opening for reading is enough.
    pub is_read_only: bool,
    /// `O_DIRECT`.
    pub is_direct: bool,
    /// Further flags of open(2).
    pub flags: OFlag,
}

/// Opens `path`, or fails with [`Class::Backing`].
pub fn open(path: &Path, access: Access) -> Result<(File, Metadata), Refused> {
    let told = |cause: &io::Error| refused(path, access, cause);
    let end = way::walk(path, told)?;
    if access.flags.contains(OFlag::O_CREAT) && !end.is_there {
        // Check before the file is created: a refused configuration must not leave a file behind.
        expect_no_ublk_below(path, &end.folder)?;
    }
    let reach = if access.is_read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR };
    let direct = if access.is_direct { OFlag::O_DIRECT } else { OFlag::empty() };
    let how = reach | direct | access.flags | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = end.open(how, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|cause| told(&cause))?;
    let metadata = file.metadata().or_fail(Class::Backing, path.display())?;
    expect_no_ublk_below(path, &file)?;
    Ok((file, metadata))
}

fn expect_no_ublk_below(path: &Path, file: &File) -> Outcome<()> {
    let below = stack::below(file).or_fail(Class::Backing, path.display())?;
    match below.iter().find_map(|number| Sysfs::of_host().ublk_below(number)) {
        Some(chain) => Err(Failure::new(
            Class::Backing,
            format!("{} is on a ublk device ({chain}), and a throttle must not wait for a throttle", path.display()),
        )),
        None => Ok(()),
    }
}

/// Opens the same file once more, with the same access: the kernel reports a failed write-back once
/// to each open file description.
pub fn again(file: &File) -> Outcome<File> {
    let what = "cannot open a backend once more for a queue";
    let flags = fcntl(file.as_fd(), FcntlArg::F_GETFL).or_fail(Class::Resource, what)?;
    // tmpfs never waits except for swapped-out pages, but does not announce that it supports
    // requests without waiting, so a ring hands each request to a kernel thread. On a regular file
    // O_NONBLOCK only means that the ring may try at once; and a write only with O_DIRECT, which
    // tmpfs accepts and ignores. A disk does not ignore O_DIRECT, and its node is on devtmpfs,
    // which reports the magic number of tmpfs; so the file must be a regular one.
    let is_on_tmpfs = fstatfs(file).is_ok_and(|system| system.filesystem_type() == TMPFS_MAGIC);
    let is_regular = file.metadata().is_ok_and(|metadata| metadata.is_file());
    let at_once = if is_on_tmpfs && is_regular { libc::O_NONBLOCK | libc::O_DIRECT } else { 0 };
    let reopened = OpenOptions::new()
        .read(true)
        .write(flags & libc::O_ACCMODE == libc::O_RDWR)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOCTTY | (flags & libc::O_DIRECT) | at_once)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
    match reopened {
        Ok(file) => Ok(file),
        // A descriptor that may be used but not opened, or no /proc: then the queues share one open
        // file description.
        Err(cause) if matches!(cause.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::ENOENT | libc::EROFS)) => {
            file.try_clone().or_fail(Class::Resource, what)
        }
        Err(cause) => Err(cause).or_fail(Class::Resource, what),
    }
}

/// Device and inode number of an open file, which stay the same when its path leads to a different
/// file.
pub fn identity(file: &File) -> Option<(u64, u64)> {
    file.metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The present size in bytes of the file or block device with that identity, `None` if sysfs does
/// not have it; or, in words, that `path` no longer leads to it. May wait for a file server that
/// does not answer.
pub fn size_behind(path: &Path, identity: (u64, u64)) -> Result<Option<u64>, String> {
    match std::fs::metadata(path) {
        Ok(metadata) if (metadata.dev(), metadata.ino()) != identity => {
            Err(format!("{} is another file now; the device goes on with the one it has open", path.display()))
        }
        Ok(metadata) if metadata.file_type().is_block_device() => Ok(Sysfs::of_host().size(metadata.rdev())),
        Ok(metadata) => Ok(Some(metadata.len())),
        Err(cause) => {
            let cause = crate::error::plain(&cause);
            Err(format!("{}: {cause}; the device goes on with the file it has open", path.display()))
        }
    }
}

fn refused(path: &Path, access: Access, cause: &io::Error) -> Refused {
    let missing = missing(path, cause);
    let shown = path.display();
    let text = match cause.raw_os_error() {
        Some(libc::EISDIR) => format!("{shown} is a directory"),
        Some(libc::ENXIO) if missing.is_some() => format!("{shown} is a device without a driver"),
        Some(libc::ENXIO) => format!("{shown} is a FIFO, a socket or a device without a driver"),
        Some(libc::EINVAL) if access.is_direct => {
            format!("{shown}: its file system has no O_DIRECT; say `direct: false`")
        }
        Some(libc::EBUSY) => return used(path, &users(path)).into(),
        Some(libc::ELOOP) => format!("{shown} became a link while it was opened; look who may write its directory"),
        Some(libc::ENOENT) if access.flags.contains(OFlag::O_CREAT) => {
            format!("{shown} cannot be made: its directory is not there; make that first")
        }
        Some(libc::ENOENT) => format!("{shown}: no such file; for a new one say `create` and a `size`"),
        _ => format!("cannot open {shown}: {}", crate::error::plain(cause)),
    };
    Refused { failure: Failure::new(Class::Backing, text), missing }
}

/// The errno of a path that leads to no file or device. ENXIO of a socket is not among them: a socket
/// is a file of the wrong kind.
fn missing(path: &Path, cause: &io::Error) -> Option<Errno> {
    let errno = Errno::from_raw(cause.raw_os_error()?);
    let is_disk = || std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    match errno {
        Errno::ENOENT | Errno::ENOTDIR => Some(errno),
        Errno::ENXIO | Errno::ENODEV => Some(errno).filter(|_| is_disk()),
        _ => None,
    }
}

/// The word for the kind of file that was found.
pub fn kind(metadata: &Metadata) -> &'static str {
    let kind = metadata.file_type();
    if kind.is_file() {
        "a regular file"
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_block_device() {
        "a block device"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "something else"
    }
}

/// Locks the file against different programs and against a second device, unless all of its users
/// share it: because they only read, or because the configuration says so. Held until the file is
/// closed.
pub fn lock(file: &File, path: &Path, is_shared: bool) -> Outcome<()> {
    let lock = libc::flock {
        l_type: if is_shared { libc::F_RDLCK } else { libc::F_WRLCK } as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(()),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Err(Failure::new(
            Class::Backing,
            format!(
                "{} is already in use by another device or program (it holds a lock on it); devices that may write to it \
                 together all have to say `shared: true`",
                path.display()
            ),
        )),
        Err(cause) => Err(cause).or_fail(Class::Backing, format!("cannot lock {}", path.display())),
    }
}

/// Refuses a disk that this host uses: a mounted file system, swap, a stacked disk or an export and
/// the users of the device would overwrite each other's data. The daemon has a disk open with a
/// claim (`O_EXCL`), unless it is `shared` with more devices or hosts; then the claim is tried here.
pub fn expect_unused(disk: &File, path: &Path, is_shared: bool) -> Outcome<()> {
    if is_shared {
        expect_unclaimed(disk, path)?;
    }
    let number = stack::number(disk.metadata().or_fail(Class::Backing, path.display())?.rdev());
    match in_use::unclaimed_users_of(&number) {
        users if users.is_empty() => Ok(()),
        users => Err(used(path, &users)),
    }
}

/// Claims the disk for a moment. udev and devices that share the disk do the same, so a claim
/// without a lasting user counts only if each of [`LOOKS`] attempts meets it.
fn expect_unclaimed(disk: &File, path: &Path) -> Outcome<()> {
    let open = || {
        // For reading: udev probes a disk again when a writer closes it.
        let how = libc::O_EXCL | libc::O_NONBLOCK | libc::O_CLOEXEC;
        OpenOptions::new().read(true).custom_flags(how).open(format!("/proc/self/fd/{}", disk.as_raw_fd()))
    };
    for look in 0..LOOKS {
        if look > 0 {
            std::thread::sleep(BETWEEN_LOOKS);
        }
        match open() {
            Ok(_) => return Ok(()),
            Err(cause) if cause.raw_os_error() != Some(libc::EBUSY) => {
                return Err(cause).or_fail(Class::Backing, format!("cannot claim {}", path.display()));
            }
            Err(_) => {}
        }
        let users = users(path);
        if !users.is_empty() {
            return Err(used(path, &users));
        }
    }
    Err(used(path, &[]))
}

/// The lasting users of the disk that a path leads to.
fn users(path: &Path) -> Vec<String> {
    let disk = std::fs::metadata(path).ok().filter(|node| node.file_type().is_block_device());
    disk.map(|disk| in_use::users_of(&stack::number(disk.rdev()))).unwrap_or_default()
}

fn used(path: &Path, users: &[String]) -> Failure {
    let path = path.display();
    let how = if users.is_empty() {
        "exclusive use by another program".to_owned()
    } else {
        format!("use: {}", users.join("; "))
    };
    let what = format!("{path} is in {how}; end that first, or say `read-only: true`");
    Failure::new(Class::Backing, what)
}

/// Refuses a file that a loop device serves: the loop device and the daemon would cache and reorder
/// each other's writes, and a loop device takes no lock.
pub fn expect_no_loop(path: &Path, metadata: &Metadata) -> Outcome<()> {
    let Some(name) = Sysfs::of_host().loop_over(metadata) else { return Ok(()) };
    let what =
        format!("{} is the backing file of /dev/{name}; detach that first (`losetup -d /dev/{name}`)", path.display());
    Err(Failure::new(Class::Backing, what))
}

/// The logical block of a device on `path`, a file or disk that takes requests in units of `needed`
/// bytes.
pub fn block(path: &Path, needed: u32, wanted: Option<u32>) -> Outcome<u32> {
    match wanted {
        Some(wanted) if wanted < needed => Err(Failure::new(
            Class::Backing,
            format!(
                "{} takes requests in blocks of {needed} bytes, so a device on it cannot have blocks of {wanted}; say \
                 `block-size: {needed}`, or nothing",
                path.display()
            ),
        )),
        wanted => Ok(wanted.unwrap_or(needed)),
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    const READ_ONLY: Access = Access { is_read_only: true, is_direct: false, flags: OFlag::empty() };

    #[test]
    fn a_directory_and_a_character_device_are_told_by_name() {
        // The message must name the kind of file, not just say that it is wrong.
        let (_, metadata) = open(Path::new("/"), READ_ONLY).unwrap();
        assert_eq!(kind(&metadata), "a directory");
        let (_, metadata) = open(Path::new("/dev/null"), READ_ONLY).unwrap();
        assert_eq!(kind(&metadata), "a character device");
    }

    #[test]
    fn a_ring_does_not_wait_for_files_on_tmpfs() {
        // On most file systems the ring knows by itself which requests it can do at once. Device
        // nodes are on devtmpfs, which reports itself as tmpfs: a disk must not be opened with
        // flags that its user has not asked for.
        let memory = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        let elsewhere = File::open(std::env::current_exe().unwrap()).unwrap();
        let (node, _) = open(Path::new("/dev/null"), READ_ONLY).unwrap();
        for (file, is_expected) in [(memory, true), (elsewhere, false), (node, false)] {
            let flags = fcntl(again(&file).unwrap(), FcntlArg::F_GETFL).unwrap();
            let at_once = libc::O_NONBLOCK | libc::O_DIRECT;
            assert_eq!(flags & at_once, if is_expected { at_once } else { 0 });
        }
    }

    #[test]
    fn a_missing_file_is_told_with_the_cure() {
        let failure = open(Path::new("/nonexistent/disk.img"), READ_ONLY).unwrap_err().failure;
        assert_eq!(failure.class, Class::Backing);
        assert!(failure.message.contains("for a new one say `create`"), "{}", failure.message);
        // With `create` the cure is a different one.
        let created = Access { is_read_only: false, flags: OFlag::O_CREAT, ..READ_ONLY };
        let failure = open(Path::new("/nonexistent/disk.img"), created).unwrap_err().failure;
        assert!(failure.message.contains("its directory is not there"), "{}", failure.message);
    }

    #[test]
    fn f87_a_path_that_leads_to_nothing_is_told_from_one_that_leads_to_the_wrong_thing() {
        // A device waits for the first kind only; it would wait for the second kind for ever.
        let folder = std::env::temp_dir().join(format!("ublk-throttle-nothing-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("file"), "x").unwrap();
        std::os::unix::fs::symlink("nothing", folder.join("dangling")).unwrap();
        let socket = std::os::unix::net::UnixListener::bind(folder.join("socket")).unwrap();
        let writes = Access { is_read_only: false, ..READ_ONLY };
        for (name, expected) in [
            ("nothing", Some(Errno::ENOENT)),
            ("no-folder/file", Some(Errno::ENOENT)),
            ("dangling", Some(Errno::ENOENT)),
            ("file/below", Some(Errno::ENOTDIR)),
            ("socket", None),
            (".", None),
        ] {
            assert_eq!(open(&folder.join(name), writes).unwrap_err().missing, expected, "{name}");
        }
        drop(socket);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_file_that_was_replaced_or_removed_is_told() {
        // A backup tool that writes a new file and renames it leaves the device on the old one.
        let path = std::env::temp_dir().join(format!("ublk-throttle-replaced-{}", std::process::id()));
        std::fs::write(&path, "x").unwrap();
        let (file, _) = open(&path, READ_ONLY).unwrap();
        let own = identity(&file).unwrap();
        assert_eq!(identity(&again(&file).unwrap()), Some(own));
        assert_eq!(size_behind(&path, own), Ok(Some(1)));
        std::fs::remove_file(&path).unwrap();
        assert!(size_behind(&path, own).unwrap_err().contains("no such file"));
        std::fs::write(&path, "y").unwrap();
        let told = size_behind(&path, own);
        std::fs::remove_file(&path).unwrap();
        assert!(told.unwrap_err().contains("another file"));
    }

    #[test]
    fn a_place_is_locked_against_a_second_writer() {
        // Two devices on one file would cache and reorder each other's writes.
        let path = std::env::temp_dir().join(format!("ublk-throttle-lock-{}", std::process::id()));
        std::fs::write(&path, "x").unwrap();
        let access = Access { is_read_only: false, ..READ_ONLY };
        let (first, _) = open(&path, access).unwrap();
        let (second, _) = open(&path, access).unwrap();
        lock(&first, &path, false).unwrap();
        let refused = lock(&second, &path, false).unwrap_err();
        drop(first);
        let later = lock(&second, &path, false);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(refused.class, Class::Backing);
        assert_eq!(later, Ok(()));
    }

    #[test]
    fn a_block_that_is_too_small_is_refused_with_both_numbers() {
        let path = Path::new("/srv/disk");
        assert_eq!(block(path, 512, Some(4096)), Ok(4096));
        assert_eq!(block(path, 4096, None), Ok(4096));
        let refused = block(path, 4096, Some(512)).unwrap_err();
        assert_eq!(refused.class, Class::Backing);
        assert!(refused.message.contains("4096") && refused.message.contains("512"), "{}", refused.message);
    }

    #[test]
    fn a_place_that_is_shared_is_shared_only_with_those_that_say_so() {
        let path = std::env::temp_dir().join(format!("ublk-throttle-shared-{}", std::process::id()));
        std::fs::write(&path, "x").unwrap();
        let access = Access { is_read_only: false, ..READ_ONLY };
        let files = [(); 3].map(|()| open(&path, access).unwrap().0);
        lock(&files[0], &path, true).unwrap();
        lock(&files[1], &path, true).unwrap();
        let refused = lock(&files[2], &path, false);
        std::fs::remove_file(&path).unwrap();
        assert!(refused.unwrap_err().message.contains("shared: true"));
    }
}
