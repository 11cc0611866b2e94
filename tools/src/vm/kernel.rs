//! The guest's kernel: Debian's, fetched and unpacked without being installed.
//!
//! ```text
//!   metapackage ──depends──► linux-image-VERSION ──(newer kernels)──► linux-{base,binary,modules}-VERSION
//!   apt with its own sources and lists ──► .deb ──dpkg -x──► target/vm/kernel/6.12/VERSION/{boot,lib/modules,…}
//! ```
//!
//! Versions come and go in the archive, so the metapackage is resolved (again after a week), never pinned.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::apt::{Apt, dependencies, field};
use crate::lock;
use crate::process;
use crate::workspace;

/// Time for which a resolved version is used before the archive is queried again.
const FRESH: Duration = Duration::from_secs(7 * 24 * 3600);

/// Name prefixes of packages that hold a part of a kernel.
const PARTS: [&str; 4] = ["linux-base-", "linux-binary-", "linux-image-", "linux-modules-"];

/// Which kernel to boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Wanted {
    /// Debian 12's optional kernel: the oldest that the product supports.
    #[value(name = "6.12")]
    Lts,
    /// The newest one that Debian has built.
    #[value(name = "newest")]
    Newest,
}

impl Wanted {
    /// Name of the kernel on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Wanted::Lts => "6.12",
            Wanted::Newest => "newest",
        }
    }

    /// Suite of the kernel, as [`Apt::update`] takes it.
    pub fn suite(self) -> &'static str {
        match self {
            Wanted::Lts => "http://deb.debian.org/debian-security bookworm-security main",
            Wanted::Newest => "http://deb.debian.org/debian trixie-backports main",
        }
    }

    /// Metapackage that depends on the current version of the kernel.
    fn metapackage(self) -> &'static str {
        match self {
            Wanted::Lts => "linux-image-6.12-amd64",
            Wanted::Newest => "linux-image-amd64",
        }
    }
}

/// An unpacked kernel.
pub struct Kernel {
    /// The release, as `uname -r` prints it.
    pub release: String,
    /// The image to boot.
    pub image: PathBuf,
    /// The folder that has `lib/modules/RELEASE`.
    pub tree: PathBuf,
}

impl Kernel {
    /// `/lib/modules/RELEASE` of this kernel.
    pub fn modules(&self) -> PathBuf {
        self.tree.join("lib/modules").join(&self.release)
    }
}

/// Returns the wanted kernel, from the archive or from an earlier run.
pub fn fetch(wanted: Wanted) -> Result<Kernel> {
    if cfg!(not(target_arch = "x86_64")) {
        bail!("the VM needs an x86_64 host: its kernel and its programs are the host's kind");
    }
    let folder = workspace::vm().join("kernel").join(wanted.name());
    let _one_at_a_time = lock::acquire(&folder.join("lock"))?;
    let current = folder.join("current");
    let known = fs::read_to_string(&current).ok().map(|version| folder.join(version.trim()));
    let known = known.and_then(|tree| open(&tree).ok());
    match known {
        Some(kernel) if is_fresh(&current) => Ok(kernel),
        known => match refresh(wanted, &folder) {
            Ok(version) => {
                let kernel = open(&folder.join(&version))?;
                fs::write(&current, version).with_context(|| format!("cannot write {}", current.display()))?;
                Ok(kernel)
            }
            Err(error) => match known {
                Some(kernel) => {
                    eprintln!("xtask: using kernel {}: no newer one could be fetched: {error:#}", kernel.release);
                    Ok(kernel)
                }
                None => Err(error.context(format!("cannot fetch the kernel {:?}", wanted.name()))),
            },
        },
    }
}

fn is_fresh(file: &Path) -> bool {
    let written = fs::metadata(file).and_then(|data| data.modified());
    written.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age < FRESH))
}

/// Queries the archive; downloads and unpacks a new version. Returns the version, which names the
/// folder.
fn refresh(wanted: Wanted, folder: &Path) -> Result<String> {
    let apt = Apt::update(wanted.suite(), &folder.join("apt"))?;
    let (version, packages) = resolve(wanted.metapackage(), |name| apt.record(name))?;
    let tree = folder.join(&version);
    if open(&tree).is_ok() {
        return Ok(version);
    }
    eprintln!("xtask: fetching kernel {version}: {}", packages.join(" "));
    let staging = folder.join("staging");
    let _ = fs::remove_dir_all(&staging);
    let unpacked = staging.join("tree");
    apt.unpack(&packages, &unpacked)?;
    let release = release(&unpacked)?;
    // From 7.2 on the packages have only usr/lib; depmod and modprobe look below lib.
    if !unpacked.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", unpacked.join("lib"))?;
    }
    process::output(
        Command::new("depmod").env("PATH", process::path_with_sbin()).arg("-b").arg(&unpacked).arg(&release),
    )?;
    // Renamed only when complete, so that a killed run leaves no tree that looks usable.
    let _ = fs::remove_dir_all(&tree);
    fs::rename(&unpacked, &tree).with_context(|| format!("cannot move the kernel to {}", tree.display()))?;
    let _ = fs::remove_dir_all(&staging);
    Ok(version)
}

/// The version of the metapackage, and every package that holds a part of the kernel it stands for.
///
/// `show` returns the archive's record of a package.
fn resolve(metapackage: &str, mut show: impl FnMut(&str) -> Result<String>) -> Result<(String, Vec<String>)> {
    let record = show(metapackage)?;
    let version = field(&record, "Version").with_context(|| format!("{metapackage}: the archive gives no version"))?;
    let mut packages = Vec::new();
    let mut unread = kernel_parts(&record);
    while let Some(name) = unread.pop() {
        if !packages.contains(&name) {
            unread.extend(kernel_parts(&show(&name)?));
            packages.push(name);
        }
    }
    if packages.is_empty() {
        bail!("{metapackage} {version} depends on no kernel image; its record says:\n{record}");
    }
    packages.sort();
    Ok((version.to_owned(), packages))
}

/// Dependencies that hold a part of a kernel. `linux-base-…` (unlike `linux-base`) lists the
/// built-in modules.
fn kernel_parts(record: &str) -> Vec<String> {
    let holds_a_part = |name: &&str| PARTS.iter().any(|part| name.starts_with(part));
    dependencies(record).filter(holds_a_part).map(str::to_owned).collect()
}

/// The kernel in an unpacked tree; an error if a part is missing.
fn open(tree: &Path) -> Result<Kernel> {
    let release = release(tree)?;
    let places = [
        tree.join(format!("boot/vmlinuz-{release}")),
        tree.join(format!("usr/lib/modules/{release}/vmlinuz")),
        tree.join(format!("lib/modules/{release}/vmlinuz")),
    ];
    let image = places.into_iter().find(|path| path.exists());
    let image = image.with_context(|| format!("no vmlinuz of {release} in {}", tree.display()))?;
    let kernel = Kernel { release, image, tree: tree.to_owned() };
    let index = kernel.modules().join("modules.dep");
    if !index.exists() {
        bail!("{} is missing", index.display());
    }
    Ok(kernel)
}

fn release(tree: &Path) -> Result<String> {
    let folder = ["lib/modules", "usr/lib/modules"].iter().map(|sub| tree.join(sub)).find(|path| path.is_dir());
    let folder = folder.with_context(|| format!("no lib/modules in {}", tree.display()))?;
    let first = fs::read_dir(&folder)?.next().with_context(|| format!("{} is empty", folder.display()))??;
    Ok(first.file_name().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(metapackage: &str, archive: &[(&str, &str)]) -> Result<(String, Vec<String>)> {
        resolve(metapackage, |name| {
            let found = archive.iter().find(|(package, _)| *package == name);
            found.map(|(_, record)| (*record).to_owned()).with_context(|| format!("no package {name}"))
        })
    }

    #[test]
    fn metapackage_of_an_old_kernel_leads_to_one_image() {
        // The image's remaining dependencies (kmod, an initramfs generator) are not part of the
        // kernel.
        let archive = [
            ("linux-image-6.12-amd64", "Version: 6.12.9-1\nDepends: linux-image-6.12.9-amd64 (= 6.12.9-1)\n"),
            ("linux-image-6.12.9-amd64", "Depends: kmod, linux-base, initramfs-tools (>= 1) | linux-initramfs-tool\n"),
        ];
        let (version, packages) = resolved("linux-image-6.12-amd64", &archive).unwrap();
        assert_eq!((version.as_str(), packages), ("6.12.9-1", vec!["linux-image-6.12.9-amd64".to_owned()]));
    }

    #[test]
    fn metapackage_of_a_new_kernel_leads_to_binary_and_modules_too() {
        // The image package of a new kernel is empty. The modules are reached twice: directly, and
        // by a second metapackage.
        let archive = [
            ("linux-image-amd64", "Version: 7.3\nDepends: linux-image-7.3 (= 7.3), linux-modules-amd64 (= 7.3)"),
            ("linux-image-7.3", "Depends: linux-binary-7.3 (= 7.3), linux-modules-7.3 (= 7.3)\n"),
            ("linux-modules-amd64", "Depends: linux-modules-7.3 (= 7.3)\n"),
            ("linux-base-7.3", "Package: linux-base-7.3\n"),
            ("linux-binary-7.3", "Pre-Depends: linux-base (>= 4.17~)\nDepends: linux-base-7.3 (= 7.3)\n"),
            ("linux-modules-7.3", "Package: linux-modules-7.3\n"),
        ];
        let (_, packages) = resolved("linux-image-amd64", &archive).unwrap();
        assert_eq!(
            packages,
            ["linux-base-7.3", "linux-binary-7.3", "linux-image-7.3", "linux-modules-7.3", "linux-modules-amd64"]
        );
    }

    #[test]
    fn metapackage_without_a_kernel_is_an_error_that_shows_the_record() {
        // A renamed package in the archive must not end in an empty tree.
        let error = resolved("linux-image-amd64", &[("linux-image-amd64", "Version: 8\nDepends: kernel-8\n")]);
        assert!(error.unwrap_err().to_string().contains("kernel-8"));
    }
}
