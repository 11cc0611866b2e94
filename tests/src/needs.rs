//! What a trial needs of the machine, and what happens where it is missing.

use std::env;
use std::path::{Path, PathBuf};
use std::thread;

use crate::mode;

/// Set to 1 (as CI does): whatever is missing fails the trial instead of skipping it.
pub const REQUIRE_ALL: &str = "UBLK_THROTTLE_REQUIRE_ALL";

/// Set to 1 (as `cargo xtask test` does in the VM): the machine is there for the tests alone, and may lose its driver for a
/// moment, or its time.
pub const OWN_MACHINE: &str = "UBLK_THROTTLE_OWN_MACHINE";

/// The Debian package under test (as `cargo xtask test` sets it).
pub const PACKAGE: &str = "UBLK_THROTTLE_DEB";

/// The service manager's own program, which can be the first of a PID namespace.
pub const SYSTEMD: &str = "/lib/systemd/systemd";

/// One prerequisite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A machine on which nobody else is hurt by settings that hold for all of it.
    OwnMachine,
    /// The Debian package under test, and the program `dpkg`.
    Package,
    /// The program `man`.
    Man,
    /// systemd, not necessarily running.
    Systemd,
    /// Two CPUs at the same instant.
    TwoCpus,
    /// The ublk driver, and the right to use it.
    Ublk,
    /// The program `fio`.
    Fio,
    /// The programs `mkfs.ext4` and `fsck.ext4`.
    Ext4,
    /// The program `mkfs.btrfs`, and the kernel's btrfs.
    Btrfs,
    /// The programs `blkdiscard` and `blockdev` of util-linux.
    UtilLinux,
    /// The program `rublk`, another client of the ublk driver.
    Rublk,
    /// A RAM disk module: `brd` or `null_blk`.
    RamDisk,
    /// The program `dmsetup`, and the kernel's device mapper: a disk that fails, stalls or waits on demand.
    Mapper,
    /// The kernel's loop devices, and the program `losetup`.
    Loop,
    /// `null_blk` with a latency of its own, for a backend that answers late.
    NullBlk,
}

impl Need {
    /// Why it is not met here; `None` if it is.
    pub fn missing(self) -> Option<String> {
        match self {
            Self::OwnMachine => (!mode::is_set(OWN_MACHINE))
                .then(|| format!("{OWN_MACHINE}=1 is not set: this changes settings of the whole machine")),
            Self::TwoCpus => thread::available_parallelism()
                .is_ok_and(|cpus| cpus.get() < 2)
                .then(|| "one CPU: this needs two at the same instant".into()),
            Self::Ublk if !nix::unistd::geteuid().is_root() => Some("not root".into()),
            Self::Ublk => (!Path::new("/dev/ublk-control").exists())
                .then(|| "no /dev/ublk-control: `modprobe ublk_drv`, or run the suite by `cargo xtask test`".into()),
            Self::Package => package()
                .is_none()
                .then(|| format!("no package of this build ({PACKAGE}): `cargo xtask test --only dist --only e2e`"))
                .or_else(|| missing_program("dpkg")),
            Self::Man => missing_program("man"),
            Self::Systemd => (!Path::new(SYSTEMD).exists()).then(|| format!("no {SYSTEMD}")),
            Self::Fio => missing_program("fio"),
            Self::Ext4 => missing_program("mkfs.ext4").or_else(|| missing_program("fsck.ext4")),
            Self::Btrfs => missing_program("mkfs.btrfs").or_else(|| missing_module("btrfs")),
            Self::UtilLinux => missing_program("blkdiscard").or_else(|| missing_program("blockdev")),
            Self::Rublk => rublk().is_none().then(|| "no rublk: `cargo install rublk`".into()),
            Self::RamDisk => (missing_module("brd").is_some() && missing_module("null_blk").is_some())
                .then(|| "neither brd nor null_blk among the kernel's modules".into()),
            Self::Mapper => {
                missing_program("dmsetup").or_else(|| missing_program("blockdev")).or_else(|| missing_module("dm-mod"))
            }
            Self::Loop => missing_program("losetup").or_else(|| missing_module("loop")),
            Self::NullBlk => missing_module("null_blk"),
        }
    }
}

/// The Debian package under test.
pub fn package() -> Option<PathBuf> {
    env::var_os(PACKAGE).map(PathBuf::from).filter(|path| path.exists())
}

/// Where `rublk` is: named by `RUBLK`, on the `PATH`, or where `cargo install` puts it.
pub fn rublk() -> Option<PathBuf> {
    if let Some(named) = env::var_os("RUBLK") {
        return Some(named.into());
    }
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    program("rublk").or_else(|| home.map(|home| home.join("bin/rublk")).filter(|path| path.exists()))
}

/// The path of a program, looked for where root's programs are as well.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
}

fn missing_program(name: &str) -> Option<String> {
    program(name).is_none().then(|| format!("no program {name}"))
}

/// Whether a module is neither loaded nor loadable (`modprobe --dry-run`, which loads nothing).
fn missing_module(name: &str) -> Option<String> {
    if Path::new("/sys/module").join(name.replace('-', "_")).exists() {
        return None;
    }
    let loadable = program("modprobe").is_some_and(|modprobe| {
        std::process::Command::new(modprobe)
            .args(["--dry-run", "--quiet", name])
            .status()
            .is_ok_and(|status| status.success())
    });
    (!loadable).then(|| format!("no kernel module {name}"))
}
