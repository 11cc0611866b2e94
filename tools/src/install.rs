//! Installs the requirements of a new machine: Debian packages (as root; otherwise prints the line
//! that installs them), and programs from crates, built once below the target directory.
//!
//! Packages are looked up with dpkg, not by program: a `busybox` on the path may be the dynamic
//! one, which does not run in an initramfs.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build::cargo;
use crate::lock;
use crate::process;
use crate::workspace;

/// Packages for building: bindgen makes libublk's bindings and loads libclang; the rest is needed
/// by any Rust build.
pub const BUILD: &[&str] = &["libclang-dev", "gcc", "libc6-dev"];

/// Packages for the VM: the emulator, tools to build an initramfs, and the keys of Debian's
/// archive.
pub const VM: &[&str] = &[
    "qemu-system-x86",
    "busybox-static",
    "cpio",
    "kmod",
    "xz-utils",
    "zstd",
    "debian-archive-keyring",
    "ca-certificates",
];

/// Packages for measuring.
pub const MEASURE: &[&str] = &["fio", "kmod"];

/// Packages of the peers, throttles to measure ours against; the kernel's NBD client connects to
/// them.
pub const PEERS: &[&str] = &["nbdkit", "nbd-client", "qemu-system-common"];

/// Further packages for the end-to-end tests.
pub const TEST: &[&str] = &["btrfs-progs", "e2fsprogs", "util-linux", "dmsetup"];

/// Packages for packaging and for checks of the package: its dependencies, a stripped program,
/// manual pages, the unit's sandbox.
pub const PACKAGE: &[&str] = &["dpkg-dev", "binutils", "gzip", "man-db", "systemd"];

/// A program from a crate. The version is pinned, because the chores rely on its command line.
pub struct Program {
    /// Name of the crate and of the program.
    pub name: &'static str,
    /// Version of the crate.
    pub version: &'static str,
    /// Whether to optimize the program: worth it only if the program runs for longer than its
    /// optimization takes.
    pub optimized: bool,
}

/// The foreign control client: a different program that removes our devices.
pub const RUBLK: Program = Program { name: "rublk", version: "0.2.15", optimized: false };

/// rublk as the peer of a measurement.
pub const RUBLK_OPTIMIZED: Program = Program { optimized: true, ..RUBLK };

/// Builds Debian packages.
pub const CARGO_DEB: Program = Program { name: "cargo-deb", version: "3.7.0", optimized: false };

impl Program {
    /// Path of the built program.
    pub fn path(&self) -> PathBuf {
        self.root().join("bin").join(self.name)
    }

    fn root(&self) -> PathBuf {
        if self.optimized { tools().join("optimized") } else { tools() }
    }

    /// Builds the program, unless an earlier run did. `run` runs the build command.
    pub fn install(&self, run: impl FnOnce(&mut Command) -> Result<()>) -> Result<()> {
        let Self { name, version, optimized } = self;
        let root = self.root();
        let installed = fs::read_to_string(root.join(".crates.toml")).unwrap_or_default();
        if installed.contains(&format!("\"{name} {version} ")) && self.path().exists() {
            return Ok(());
        }
        let mut install = cargo();
        install.args(["install", name, "--version", version, "--root"]).arg(root);
        // The workspace's directory, and its profile for dependencies: crates that its debug build
        // has too are built once.
        install.arg("--target-dir").arg(workspace::target()).args((!optimized).then_some("--debug"));
        install.envs(["CARGO_PROFILE_DEV_DEBUG", "CARGO_PROFILE_DEV_BUILD_OVERRIDE_DEBUG"].map(|name| (name, "false")));
        run(&mut install)
    }
}

/// Folder that cargo installs programs to.
fn tools() -> PathBuf {
    workspace::target().join("tools")
}

/// Folder of programs that a run builds and later runs use.
pub fn programs() -> PathBuf {
    tools().join("bin")
}

/// Makes sure that all packages are installed, and prints those that it installs.
pub fn packages(wanted: &[&[&str]]) -> Result<()> {
    let _one_at_a_time = lock::acquire(&workspace::vm().join("install.lock"))?;
    let wanted: Vec<&str> = wanted.iter().flat_map(|list| list.iter().copied()).collect();
    let missing = missing(&wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "packages missing: {names}\n  install them with: sudo apt-get install --yes --no-install-recommends {names}\n  \
             then run this again"
        );
    }
    eprintln!("xtask: installing {names}");
    apt(&["update"])?;
    let mut install = vec!["install", "--yes", "--no-install-recommends"];
    install.extend(&missing);
    apt(&install)
}

fn apt(arguments: &[&str]) -> Result<()> {
    // The output is shown only on failure. The machine's own updates may hold the lock: wait up to
    // 120 s.
    process::output(
        Command::new("apt-get")
            .args(["-q", "-o", "DPkg::Lock::Timeout=120"])
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
    .map(drop)
}

fn missing<'a>(wanted: &[&'a str]) -> Result<Vec<&'a str>> {
    // dpkg-query ends with 1 if a name is unknown: that is an answer, not a failure.
    let listing = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\\n"])
        .args(wanted)
        .output()
        .context("cannot run dpkg-query: this chore knows Debian and its relatives only (packages needed elsewhere: qemu-system-x86_64, a static busybox, cpio, kmod, xz, fio, libclang)")?;
    Ok(absent(wanted, &String::from_utf8_lossy(&listing.stdout)))
}

/// Names in `wanted` that dpkg-query's listing does not show as installed, each once.
fn absent<'a>(wanted: &[&'a str], listing: &str) -> Vec<&'a str> {
    let mut absent = Vec::new();
    for &name in wanted {
        let installed = listing.lines().any(|line| line.split_once(' ') == Some((name, "installed")));
        if !installed && !absent.contains(&name) {
            absent.push(name);
        }
    }
    absent
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_and_unknown_packages_are_absent_and_named_once() {
        // A removed package with configuration files left is listed, but not as installed.
        let listing = "fio installed\ncpio config-files\n";
        assert_eq!(absent(&["fio", "cpio", "kmod", "kmod"], listing), ["cpio", "kmod"]);
    }
}
