//! System calls that neither std nor nix offers in a safe form, each behind a safe function.

#![allow(unsafe_code, reason = "each function wraps one system call whose arguments it checks or owns")]

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

/// The alignment that `O_DIRECT` demands for a file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectAlignment {
    /// Alignment of the address of a buffer.
    pub memory: u32,
    /// Alignment of offset and length.
    pub offset: u32,
}

/// The alignment that `O_DIRECT` demands for a file. `None` if the file system does not report it
/// (before Linux 6.1, or without `O_DIRECT`).
pub fn direct_alignment(file: BorrowedFd<'_>) -> io::Result<Option<DirectAlignment>> {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    let empty = CString::default();
    // SAFETY: statx(2): the path is a NUL-terminated string, `answer` is a writable statx
    // structure; with AT_EMPTY_PATH the call is about the descriptor, which `file` keeps open.
    let done = unsafe {
        libc::statx(file.as_raw_fd(), empty.as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, answer.as_mut_ptr())
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all bytes were zeroed, which is a valid value of every field, and the kernel then wrote some of them.
    let answer = unsafe { answer.assume_init() };
    let told = answer.stx_mask & libc::STATX_DIOALIGN != 0 && answer.stx_dio_offset_align != 0;
    Ok(told.then_some(DirectAlignment { memory: answer.stx_dio_mem_align, offset: answer.stx_dio_offset_align }))
}

/// The device number of the block device at `path`; `None` for anything but a block device. Does
/// not ask the server of a network file system, so it does not wait for a server that is down.
pub fn block_number(path: &Path) -> Option<u64> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: statx(2): the path is a NUL-terminated string, `answer` is a writable statx structure.
    let done = unsafe {
        libc::statx(libc::AT_FDCWD, path.as_ptr(), libc::AT_STATX_DONT_SYNC, libc::STATX_TYPE, answer.as_mut_ptr())
    };
    if done != 0 {
        return None;
    }
    // SAFETY: all bytes were zeroed, which is a valid value of every field, and the kernel then wrote some of them.
    let answer = unsafe { answer.assume_init() };
    let is_block = libc::mode_t::from(answer.stx_mode) & libc::S_IFMT == libc::S_IFBLK;
    is_block.then(|| libc::makedev(answer.stx_rdev_major, answer.stx_rdev_minor))
}

/// The sizes that a block device reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// The size in bytes.
    pub size: u64,
    /// The logical block in bytes: the smallest unit of a request.
    pub logical: u32,
    /// The physical block in bytes: the unit that the device handles at once.
    pub physical: u32,
    /// Whether it refuses writes.
    pub read_only: bool,
}

mod block_ioctl {
    //! `<linux/fs.h>`
    nix::ioctl_read!(size64, 0x12, 114, u64);
    nix::ioctl_read_bad!(logical, nix::libc::BLKSSZGET, nix::libc::c_int);
    nix::ioctl_read_bad!(physical, nix::request_code_none!(0x12, 123), nix::libc::c_uint);
    nix::ioctl_read_bad!(read_only, nix::request_code_none!(0x12, 94), nix::libc::c_int);
}

/// Asks a block device for its sizes.
pub fn block_sizes(device: BorrowedFd<'_>) -> io::Result<BlockSizes> {
    let fd = device.as_raw_fd();
    let (mut size, mut logical, mut physical, mut read_only) = (0u64, 0, 0, 0);
    // SAFETY: each BLK*GET ioctl writes one value of exactly the type that its wrapper takes, into
    // a local variable; on any file but a block device it fails with ENOTTY.
    unsafe {
        block_ioctl::size64(fd, &mut size)?;
        block_ioctl::logical(fd, &mut logical)?;
        block_ioctl::physical(fd, &mut physical)?;
        block_ioctl::read_only(fd, &mut read_only)?;
    }
    Ok(BlockSizes { size, logical: logical as u32, physical, read_only: read_only != 0 })
}

/// From `<linux/prctl.h>`, since Linux 5.6.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Declares that dirty memory is written back through this process, so that the process does not
/// wait for its own I/O when memory is short. Threads made afterwards inherit it. Needs
/// `CAP_SYS_RESOURCE`.
pub fn become_io_flusher() -> io::Result<()> {
    // SAFETY: PR_SET_IO_FLUSHER takes one integer and no pointer; unused arguments must be 0 (prctl(2)).
    let done = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Locks into memory all current mappings, and future mappings page by page as they are touched: a
/// thread has 2 MiB of stack and touches little of it. The current mappings are the program and its
/// libraries. With `MCL_ONFAULT` for them too, the kernel would read code, such as that of a
/// recovery, from the disk when it first runs.
pub fn lock_memory() -> io::Result<()> {
    for flags in [libc::MCL_CURRENT, libc::MCL_FUTURE | libc::MCL_ONFAULT] {
        // SAFETY: mlockall(2) takes flags only.
        if unsafe { libc::mlockall(flags) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Writes the dirty pages of one file system back.
pub fn sync_filesystem(of: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: syncfs(2) takes a descriptor, which `of` keeps open.
    let done = unsafe { libc::syncfs(of.as_raw_fd()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The groups of the peer of a Unix socket besides its primary one, as of its `connect`.
///
/// The kernel keeps them with the socket. A lookup by user name could wait for a directory server
/// that does not answer.
pub fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<libc::gid_t>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut bytes = size_of_val(groups.as_slice()) as libc::socklen_t;
        // SAFETY: SO_PEERGROUPS (socket(7), Linux 4.13) writes at most `bytes` bytes of group ids
        // to `groups`, which has that size, and sets `bytes` to the bytes written or, with ERANGE,
        // to the bytes needed.
        let done = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &mut bytes,
            )
        };
        let count = bytes as usize / size_of::<libc::gid_t>();
        if done == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let cause = io::Error::last_os_error();
        if cause.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(cause);
        }
        groups.resize(count, 0);
    }
}

/// Gives this thread priority over threads of the fair scheduler, by its nice value and by the
/// length of its time slice, which on Linux 6.12 and newer decides which thread runs next. Threads
/// that it starts do not inherit the priority. A thread that has been given a different policy or
/// nice value keeps it. Needs `RLIMIT_NICE` or `CAP_SYS_NICE`.
pub fn prefer_this_thread(nice: i32, turn: Duration) -> io::Result<()> {
    let mut attr = MaybeUninit::<libc::sched_attr>::zeroed();
    let size = size_of::<libc::sched_attr>() as u32;
    // SAFETY: sched_getattr(2): 0 is the calling thread; at most `size` bytes are written to
    // `attr`, which has that size; flags must be 0.
    let done = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, attr.as_mut_ptr(), size, 0) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all bytes were zeroed, which is a valid value of every field, and the kernel then wrote some of them.
    let mut attr = unsafe { attr.assume_init() };
    if attr.sched_policy != libc::SCHED_OTHER as u32 || attr.sched_nice != 0 {
        return Ok(());
    }
    attr.size = size;
    // Threads that this thread starts get the default policy.
    attr.sched_flags = libc::SCHED_FLAG_RESET_ON_FORK as u64;
    attr.sched_nice = nice;
    attr.sched_runtime = turn.as_nanos() as u64;
    // SAFETY: sched_setattr(2): 0 is the calling thread; `attr` has the size in its field `size`;
    // flags must be 0.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
