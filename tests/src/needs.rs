//! Prerequisites of trials on the machine, and the reasons for skipping a trial.

use std::env;
use std::path::{Path, PathBuf};
use std::thread;

use crate::mode;

/// Set to 1 (as CI does): a missing prerequisite fails the trial instead of skipping it.
pub const REQUIRE_ALL: &str = "UBLK_THROTTLE_REQUIRE_ALL";

/// Set to 1 (as `cargo xtask test` does in the VM): the machine serves the tests alone, so a trial
/// may unload the driver for a moment or set the clock.
pub const OWN_MACHINE: &str = "UBLK_THROTTLE_OWN_MACHINE";

/// The path of the Debian package under test (set by `cargo xtask test`).
pub const PACKAGE: &str = "UBLK_THROTTLE_DEB";

/// The program of systemd, which can run as process 1 of a PID namespace.
pub const SYSTEMD: &str = "/lib/systemd/systemd";

/// A prerequisite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A machine without other users: a trial may change settings of the whole machine.
    OwnMachine,
    /// The Debian package under test, and the program `dpkg`.
    Package,
    /// The program `man`.
    Man,
    /// The program of systemd; it need not run.
    Systemd,
    /// Two CPUs that run at the same time.
    TwoCpus,
    /// The ublk driver, and permission to use it.
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
    /// `null_blk` with its own latency, for a slow backend.
    NullBlk,
    /// The kernel's exports of disks: nvmet and LIO.
    Exports,
}

impl Need {
    /// The reason for a missing prerequisite; `None` if it is met.
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
            Self::Exports => missing_module("nvmet").or_else(|| missing_module("target_core_iblock")),
        }
    }
}

/// The Debian package under test.
pub fn package() -> Option<PathBuf> {
    env::var_os(PACKAGE).map(PathBuf::from).filter(|path| path.exists())
}

/// The path of `rublk`: named by `RUBLK`, found in `PATH`, or in the folder of `cargo install`.
pub fn rublk() -> Option<PathBuf> {
    if let Some(named) = env::var_os("RUBLK") {
        return Some(named.into());
    }
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    program("rublk").or_else(|| home.map(|home| home.join("bin/rublk")).filter(|path| path.exists()))
}

/// The path of a program in `PATH`, `/usr/sbin` or `/sbin`.
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

/// The reason if a module is neither loaded nor loadable. `modprobe --dry-run` loads nothing.
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
