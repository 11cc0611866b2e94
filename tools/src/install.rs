//! What a new machine lacks: Debian packages, installed as root, else named with the line that installs them; and programs
//! that come as crates, built once below the target directory.
//!
//! Asking dpkg instead of looking for programs: `busybox` on the path may be the dynamic one, which is of no use in an
//! initramfs.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build::cargo;
use crate::lock;
use crate::process;
use crate::workspace;

/// For building: libublk's bindings are made by bindgen, which loads libclang; the rest is what any Rust build needs.
pub const BUILD: &[&str] = &["libclang-dev", "gcc", "libc6-dev"];

/// For the VM: the emulator, what makes an initramfs, and the keys that sign Debian's kernels.
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

/// For measuring.
pub const MEASURE: &[&str] = &["fio", "kmod"];

/// Other throttles, to measure ours against; the kernel's NBD client reaches them.
pub const PEERS: &[&str] = &["nbdkit", "nbd-client", "qemu-system-common"];

/// For the end-to-end tests besides.
pub const TEST: &[&str] = &["btrfs-progs", "e2fsprogs", "util-linux", "dmsetup"];

/// For packaging, and for looking at the package: what it depends on, a smaller program, pages, the unit's sandbox.
pub const PACKAGE: &[&str] = &["dpkg-dev", "binutils", "gzip", "man-db", "systemd"];

/// A program that comes as a crate. Pinned: its command line is relied on.
pub struct Program {
    /// Of the crate, and of the program.
    pub name: &'static str,
    /// Of the crate.
    pub version: &'static str,
    /// Whether it is used for longer than it takes to optimize it.
    pub optimized: bool,
}

/// The foreign control client: another program that removes our devices.
pub const RUBLK: Program = Program { name: "rublk", version: "0.2.15", optimized: false };

/// rublk as the peer of a measurement.
pub const RUBLK_OPTIMIZED: Program = Program { optimized: true, ..RUBLK };

/// Makes Debian packages.
pub const CARGO_DEB: Program = Program { name: "cargo-deb", version: "3.7.0", optimized: false };

impl Program {
    /// Where it is, once it is there.
    pub fn path(&self) -> PathBuf {
        self.root().join("bin").join(self.name)
    }

    fn root(&self) -> PathBuf {
        if self.optimized { tools().join("optimized") } else { tools() }
    }

    /// Builds it, unless an earlier run did; `run` runs what builds.
    pub fn install(&self, run: impl FnOnce(&mut Command) -> Result<()>) -> Result<()> {
        let Self { name, version, optimized } = self;
        let root = self.root();
        let installed = fs::read_to_string(root.join(".crates.toml")).unwrap_or_default();
        if installed.contains(&format!("\"{name} {version} ")) && self.path().exists() {
            return Ok(());
        }
        let mut install = cargo();
        install.args(["install", name, "--version", version, "--root"]).arg(root);
        // Crates that the workspace's debug build has, too, are built once: same directory, same profile.
        install.arg("--target-dir").arg(workspace::target());
        install.args((!optimized).then_some("--debug")).env("CARGO_PROFILE_DEV_DEBUG", "line-tables-only");
        run(&mut install)
    }
}

/// The folder that cargo installs programs to.
fn tools() -> PathBuf {
    workspace::target().join("tools")
}

/// The folder of programs that one run builds and later runs use.
pub fn programs() -> PathBuf {
    tools().join("bin")
}

/// Makes sure all of them are installed; says what it installs.
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
    // The output is only of interest when it fails; the lock may be held by the machine's own updates.
    process::output(
        Command::new("apt-get")
            .args(["-q", "-o", "DPkg::Lock::Timeout=120"])
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
    .map(drop)
}

fn missing<'a>(wanted: &[&'a str]) -> Result<Vec<&'a str>> {
    // dpkg-query ends with 1 when one of the names is unknown: that is an answer, not a failure.
    let listing = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\\n"])
        .args(wanted)
        .output()
        .context("cannot run dpkg-query: this chore knows Debian and its relatives only (packages needed elsewhere: qemu-system-x86_64, a static busybox, cpio, kmod, xz, fio, libclang)")?;
    Ok(absent(wanted, &String::from_utf8_lossy(&listing.stdout)))
}

/// Those of `wanted` that dpkg-query's listing does not show as installed, each once.
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
        // A package that left its configuration behind is listed, yet not installed.
        let listing = "fio installed\ncpio config-files\n";
        assert_eq!(absent(&["fio", "cpio", "kmod", "kmod"], listing), ["cpio", "kmod"]);
    }
}
