//! Failures, in one form for the command line, the socket and the log.
//!
//! ```text
//!   error[E-BUSY]: device "vol1" (/dev/ublkb0) is mounted at /srv; unmount it first, or use --force
//!         │        │                                                └ the cure
//!         │        └ the problem, and its place
//!         └ class: stable, decides the exit code, the same in the JSON answer
//! ```
//!
//! A class is for scripts, which can act on it; the rest is text for a human.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use serde::{Deserialize, Serialize};

/// The kind of a failure; decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A failure at run time that no better class fits.
    Failed,
    /// The configuration is refused.
    Config,
    /// The trace of a simulation is refused.
    Trace,
    /// The backing of a device is missing or unsuitable.
    Backing,
    /// The kernel has no ublk driver loaded.
    NoKernel,
    /// The kernel refuses io_uring.
    NoUring,
    /// The caller lacks a right.
    Perm,
    /// Another daemon works with the same state directory.
    Locked,
    /// The device number belongs to a foreign device.
    IdTaken,
    /// The kernel has no room for more devices.
    KernelLimit,
    /// The device node did not appear.
    Node,
    /// A resource limit of this process was reached.
    Resource,
    /// A file of the state directory, or the control socket, cannot be made, read or written.
    State,
    /// A path that the daemon is to use is under the control of a different user.
    UnsafePath,
    /// The device is mounted, open or claimed.
    Busy,
    /// Another command works on the same device or group, or the daemon is starting or stopping.
    Conflict,
    /// The name is taken already.
    Exists,
    /// Devices or groups are in the group.
    GroupInUse,
    /// No daemon answers on the socket.
    NoDaemon,
    /// No device has that name.
    NoDevice,
    /// No group has that name.
    NoGroup,
    /// This kernel does not support the request.
    Unsupported,
    /// Not finished within the time limit; the daemon goes on with it.
    Timeout,
    /// A line from the socket is not a request.
    Protocol,
    /// A request line longer than the protocol allows.
    TooBig,
}

impl Class {
    /// Every class, for finding one by its name.
    pub const ALL: [Self; 25] = [
        Self::Failed,
        Self::Config,
        Self::Trace,
        Self::Backing,
        Self::NoKernel,
        Self::NoUring,
        Self::Perm,
        Self::Locked,
        Self::IdTaken,
        Self::KernelLimit,
        Self::Node,
        Self::Resource,
        Self::State,
        Self::UnsafePath,
        Self::Busy,
        Self::Conflict,
        Self::Exists,
        Self::GroupInUse,
        Self::NoDaemon,
        Self::NoDevice,
        Self::NoGroup,
        Self::Unsupported,
        Self::Timeout,
        Self::Protocol,
        Self::TooBig,
    ];

    /// The stable name that users and scripts see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Failed => "E-FAILED",
            Self::Config => "E-CONFIG",
            Self::Trace => "E-TRACE",
            Self::Backing => "E-BACKING",
            Self::NoKernel => "E-NOKERNEL",
            Self::NoUring => "E-NOURING",
            Self::Perm => "E-PERM",
            Self::Locked => "E-LOCKED",
            Self::IdTaken => "E-ID-TAKEN",
            Self::KernelLimit => "E-KERNEL-LIMIT",
            Self::Node => "E-NODE",
            Self::Resource => "E-RESOURCE",
            Self::State => "E-STATE",
            Self::UnsafePath => "E-UNSAFE-PATH",
            Self::Busy => "E-BUSY",
            Self::Conflict => "E-CONFLICT",
            Self::Exists => "E-EXISTS",
            Self::GroupInUse => "E-GROUP-IN-USE",
            Self::NoDaemon => "E-NODAEMON",
            Self::NoDevice => "E-NODEVICE",
            Self::NoGroup => "E-NOGROUP",
            Self::Unsupported => "E-UNSUPPORTED",
            Self::Timeout => "E-TIMEOUT",
            Self::Protocol => "E-PROTOCOL",
            Self::TooBig => "E-TOOBIG",
        }
    }

    /// The exit code of a command that ends with this class.
    pub const fn exit(self) -> u8 {
        match self {
            Self::Failed | Self::NoKernel | Self::NoUring | Self::KernelLimit | Self::Node => 1,
            Self::Resource | Self::State | Self::NoDevice | Self::NoGroup | Self::Protocol | Self::TooBig => 1,
            Self::Config | Self::Trace | Self::Backing | Self::Unsupported => 3,
            Self::NoDaemon => 4,
            Self::Locked | Self::IdTaken | Self::Busy | Self::Conflict | Self::Exists | Self::GroupInUse => 5,
            Self::Perm | Self::UnsafePath => 6,
            Self::Timeout => 7,
        }
    }

    /// The class of that name; [`Class::Failed`] for one that a newer daemon may know.
    pub fn from_name(name: &str) -> Self {
        Self::ALL.into_iter().find(|class| class.name() == name).unwrap_or(Self::Failed)
    }
}

/// A failure on its way to the user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// [`Class`] of the failure.
    pub class: Class,
    /// Problem, place, value found, and cure.
    pub message: String,
}

/// Short for a result with a failure for the user.
pub type Outcome<T> = Result<T, Failure>;

impl Failure {
    /// A failure of `class`.
    pub fn new(class: Class, message: impl fmt::Display) -> Self {
        Self { class, message: message.to_string() }
    }

    /// The line, or lines, for stderr.
    pub fn render(&self) -> String {
        format!("error[{}]: {}", self.class.name(), self.message)
    }

    /// Puts `what` in front of the message, for callers that know more than the place of the
    /// failure.
    #[must_use]
    pub fn context(self, what: impl fmt::Display) -> Self {
        Self { class: self.class, message: format!("{what}: {}", self.message) }
    }
}

/// A failure as it travels over the socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireFailure {
    /// [`Class::name`].
    pub class: String,
    /// [`Failure::message`].
    pub message: String,
    /// [`Class::exit`], so that a client in another language needs no table.
    pub exit: u8,
}

impl From<&Failure> for WireFailure {
    fn from(failure: &Failure) -> Self {
        Self { class: failure.class.name().to_owned(), message: failure.message.clone(), exit: failure.class.exit() }
    }
}

impl From<WireFailure> for Failure {
    fn from(wire: WireFailure) -> Self {
        Self { class: Class::from_name(&wire.class), message: wire.message }
    }
}

/// Gives an I/O error its class and its place.
pub trait OrFail<T> {
    /// `what` names the action that failed and its object; the cause follows it.
    fn or_fail(self, class: Class, what: impl fmt::Display) -> Outcome<T>;
}

impl<T, E: Into<io::Error>> OrFail<T> for Result<T, E> {
    fn or_fail(self, class: Class, what: impl fmt::Display) -> Outcome<T> {
        self.map_err(|cause| {
            let cause: io::Error = cause.into();
            let class = match cause.raw_os_error() {
                // These errors mean a lack of resources, in any place.
                Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN) => Class::Resource,
                _ => class,
            };
            let text = match cause.raw_os_error() {
                // The meaning of "temporarily unavailable" from fork(2) and clone(2).
                Some(libc::EAGAIN) => "no process or thread is left".to_owned(),
                _ => plain(&cause),
            };
            Failure::new(class, format!("{what}: {text}{}", limit_in_words(&cause)))
        })
    }
}

/// The limit of this process that may have been reached, in words; empty for unrelated errors.
fn limit_in_words(cause: &io::Error) -> String {
    let (resource, name) = match cause.raw_os_error() {
        Some(libc::EMFILE) => (Resource::RLIMIT_NOFILE, "RLIMIT_NOFILE"),
        Some(libc::ENOMEM) => (Resource::RLIMIT_MEMLOCK, "RLIMIT_MEMLOCK"),
        Some(libc::ENFILE) => return "; raise the sysctl fs.file-max".to_owned(),
        Some(libc::EAGAIN) => return process_limit(),
        _ => return String::new(),
    };
    match getrlimit(resource) {
        Ok((soft, _)) if soft == RLIM_INFINITY => String::new(),
        Ok((soft, _)) => format!("; {name} is {soft}, raise it"),
        Err(_) => String::new(),
    }
}

/// The limit of processes that was reached: of a control group above this process, of its user, or
/// of the host.
fn process_limit() -> String {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let own = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let mounts = read(Path::new("/proc/self/mountinfo")).unwrap_or_default();
    let full = cgroups(&own, &mounts).into_iter().find_map(|folder| {
        let number = |file: &str| read(&folder.join(file))?.trim().parse::<u64>().ok();
        let most = number("pids.max")?;
        // A command also takes a thread and a kernel worker, and both have ended by now.
        (number("pids.current")? + 2 >= most).then(|| format!("pids.max of {} is {most}", folder.display()))
    });
    let of_user = || match getrlimit(Resource::RLIMIT_NPROC) {
        Ok((soft, _)) if soft != RLIM_INFINITY => format!("RLIMIT_NPROC is {soft}, pids.max is not reached now"),
        _ => "pids.max (TasksMax) or the sysctl kernel.threads-max was reached".to_owned(),
    };
    match full {
        Some(full) => format!("; {full}, raise it (systemd: TasksMax)"),
        None => format!("; {}", of_user()),
    }
}

/// The control groups that may limit the processes of this one, its own first, from
/// `/proc/self/cgroup` and the mount table.
fn cgroups(own: &str, mountinfo: &str) -> Vec<PathBuf> {
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::")) else { return Vec::new() };
    // 30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw
    let Some((root, point)) = mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        kind.starts_with("cgroup2 ").then(|| Some((fields.next()?, fields.next()?)))?
    }) else {
        return Vec::new();
    };
    let below = Path::new(path).strip_prefix(root).unwrap_or(Path::new("")).to_owned();
    below.ancestors().map(|folder| Path::new(point).join(folder)).collect()
}

/// An I/O error without Rust's " (os error 2)".
pub fn plain(cause: &io::Error) -> String {
    let text = cause.to_string();
    match (cause.raw_os_error(), text.rfind(" (os error ")) {
        (Some(_), Some(end)) => {
            let mut text = text[..end].to_owned();
            if let Some(first) = text.get(..1).map(str::to_lowercase) {
                text.replace_range(..1, &first);
            }
            text
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_is_found_again_by_its_name() {
        // The client derives the exit code from the name that travelled over the socket.
        for class in Class::ALL {
            assert_eq!(Class::from_name(class.name()), class);
        }
        assert_eq!(Class::from_name("E-FROM-THE-FUTURE"), Class::Failed);
    }

    #[test]
    fn a_failure_is_rendered_with_its_class_in_brackets() {
        // The form is a contract: scripts match on it.
        let failure = Failure::new(Class::Busy, "device \"vol1\" is mounted at /srv").context("del");
        assert_eq!(failure.render(), "error[E-BUSY]: del: device \"vol1\" is mounted at /srv");
    }

    #[test]
    fn an_os_error_is_told_in_plain_words() {
        // "(os error 2)" helps no user; the resource class is recognised by the errno.
        let missing = io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(plain(&missing), "no such file or directory");
        let full: Outcome<()> = Err(io::Error::from_raw_os_error(libc::EMFILE)).or_fail(Class::Failed, "open x");
        let full = full.unwrap_err();
        assert_eq!(full.class, Class::Resource);
        assert!(full.message.contains("RLIMIT_NOFILE is "), "{}", full.message);
    }

    #[test]
    fn f74_a_lack_of_processes_is_told_with_its_limit() {
        // "Resource temporarily unavailable" does not lead a user to the control group that is
        // full.
        let full: Outcome<()> = Err(io::Error::from_raw_os_error(libc::EAGAIN)).or_fail(Class::Failed, "cannot start");
        let full = full.unwrap_err();
        assert_eq!(full.class, Class::Resource);
        assert!(full.message.starts_with("cannot start: no process or thread is left; "), "{}", full.message);
        assert!(full.message.contains("pids.max"), "{}", full.message);
        let mountinfo =
            "24 1 0:22 / /proc rw - proc proc rw\n30 24 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n";
        let found = cgroups("1:name=systemd:/x\n0::/system.slice/ublk.service\n", mountinfo);
        let folders = ["system.slice/ublk.service", "system.slice", ""].map(|f| Path::new("/sys/fs/cgroup").join(f));
        assert_eq!(found, folders);
        // In a container the root of the mount is the control group of the container.
        let inside = "30 24 0:26 /box /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroups("0::/box/a\n", inside)[0], Path::new("/sys/fs/cgroup/a"));
        assert!(cgroups("", mountinfo).is_empty() && cgroups("0::/a\n", "").is_empty());
    }
}
