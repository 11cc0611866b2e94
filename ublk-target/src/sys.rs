//! System calls that neither std nor nix offers in a safe form, each made safe here.

#![allow(unsafe_code, reason = "each function wraps one system call whose arguments it checks or owns")]

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

/// What `O_DIRECT` demands of a file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectAlignment {
    /// Of the address of a buffer.
    pub memory: u32,
    /// Of offset and length.
    pub offset: u32,
}

/// Asks the file system what `O_DIRECT` demands; `None` where it does not tell (before Linux 6.1, or no `O_DIRECT`).
pub fn direct_alignment(file: BorrowedFd<'_>) -> io::Result<Option<DirectAlignment>> {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    let empty = CString::default();
    // SAFETY: statx(2): the path is a NUL-terminated string, `answer` is a writable statx structure; AT_EMPTY_PATH makes
    // the call about the descriptor, which `file` keeps open.
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

/// The number of the block device that a path leads to; none if it leads to something else. A server of the file behind the
/// path is not asked, so this does not wait for one that is away.
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

/// What a block device says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Bytes in all.
    pub size: u64,
    /// Bytes of the smallest thing it can be asked for.
    pub logical: u32,
    /// Bytes of what it handles at once.
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
    // SAFETY: the BLK*GET ioctls write one value of exactly the type each wrapper takes, into a variable of ours;
    // on something that is no block device they fail with ENOTTY.
    unsafe {
        block_ioctl::size64(fd, &mut size)?;
        block_ioctl::logical(fd, &mut logical)?;
        block_ioctl::physical(fd, &mut physical)?;
        block_ioctl::read_only(fd, &mut read_only)?;
    }
    Ok(BlockSizes { size, logical: logical as u32, physical, read_only: read_only != 0 })
}

/// `<linux/prctl.h>`, since Linux 5.6
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Declares that this process is part of the way memory is written back, so that it does not wait for itself when memory
/// is short. Threads made afterwards inherit it. Needs `CAP_SYS_RESOURCE`.
pub fn become_io_flusher() -> io::Result<()> {
    // SAFETY: PR_SET_IO_FLUSHER takes one integer and no pointer; unused arguments must be 0 (prctl(2)).
    let done = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Locks what is mapped, now and later, into memory, page by page as it is touched.
pub fn lock_memory() -> io::Result<()> {
    // SAFETY: mlockall(2) takes flags only.
    let done = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Writes the dirty pages of one file system back.
pub fn sync_filesystem(of: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: syncfs(2) takes a descriptor, which `of` keeps open.
    let done = unsafe { libc::syncfs(of.as_raw_fd()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The groups of the process at the other end of a Unix socket, as they were when it connected; besides its first one.
///
/// From the kernel, so that nobody has to look a name up in a directory that may not answer.
pub fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<libc::gid_t>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut bytes = size_of_val(groups.as_slice()) as libc::socklen_t;
        // SAFETY: SO_PEERGROUPS (socket(7), Linux 4.13) writes at most `bytes` bytes of group ids to `groups`, which has
        // that many, and sets `bytes` to what it has written or, with ERANGE, to what it would have.
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

/// Prefers this thread, and none that it starts, to others that are scheduled fairly: by its nice value, and by the length of its
/// turns, which on Linux 6.12 and newer decides who is next. Nothing changes where somebody has chosen how it is scheduled. Needs
/// `RLIMIT_NICE` or `CAP_SYS_NICE`.
pub fn prefer_this_thread(nice: i32, turn: Duration) -> io::Result<()> {
    let mut attr = MaybeUninit::<libc::sched_attr>::zeroed();
    let size = size_of::<libc::sched_attr>() as u32;
    // SAFETY: sched_getattr(2): 0 is the calling thread, at most `size` bytes are written to `attr`, which has that many; flags must
    // be 0.
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
    // Threads that it starts are scheduled as if nothing had been asked for.
    attr.sched_flags = libc::SCHED_FLAG_RESET_ON_FORK as u64;
    attr.sched_nice = nice;
    attr.sched_runtime = turn.as_nanos() as u64;
    // SAFETY: sched_setattr(2): 0 is the calling thread, `attr` is a structure of the size that it tells; flags must be 0.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
