//! Builds `kublk`, the ublk server of the kernel's self-tests, from Debian's packages, and keeps
//! it.
//!
//! ```text
//!   linux-source ─depends─► linux-source-7.3   tools/testing/selftests/ublk/*.c ─┐
//!   linux-libc-dev                             headers of the same kernel ───────┼─ gcc ─► target/tools/bin/kublk
//!   liburing-dev                               headers, and the library to link ─┘
//! ```
//!
//! All three packages come from the Debian release that the VM's newest kernel is built for, and
//! none is installed. The host's own may be too old: the source needs headers of Linux 7.0 and
//! liburing 2.4, and Debian 12 has 6.1 and 2.3. The libc is the host's, because the guest runs the
//! host's programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::apt::{Apt, dependencies, field};
use crate::install;
use crate::lock;
use crate::process;
use crate::vm;
use crate::workspace;

/// The suite that the newest kernel's suite extends. Only this suite has liburing.
const RELEASE: &str = "http://deb.debian.org/debian trixie main";

/// Folder of ublk's self-tests in the kernel's source.
const SELFTESTS: &str = "tools/testing/selftests/ublk";

/// Path of the built program.
pub fn path() -> PathBuf {
    install::programs().join("kublk")
}

/// Builds the program, unless an earlier run did.
pub fn install() -> Result<()> {
    let folder = workspace::target().join("tools/kublk");
    let _one_at_a_time = lock::acquire(&folder.join("lock"))?;
    let built = folder.join("version");
    if let Ok(version) = fs::read_to_string(&built)
        && path().exists()
    {
        println!("kublk {version} is there from an earlier run");
        return Ok(());
    }
    let staging = folder.join("staging");
    let _ = fs::remove_dir_all(&staging);
    let version = build(&staging).context("cannot build kublk")?;
    fs::write(&built, version).with_context(|| format!("cannot write {}", built.display()))?;
    // Frees 350 MB, most of it the packed source of Linux.
    let _ = fs::remove_dir_all(&staging);
    Ok(())
}

/// Fetches the sources into `staging` and builds the program. Returns the version of the kernel
/// source.
fn build(staging: &Path) -> Result<String> {
    let tree = staging.join("tree");
    let newest = Apt::update(vm::Kernel::Newest.suite(), &staging.join("newest"))?;
    let record = newest.record("linux-source")?;
    let source = source_package(&record).with_context(|| format!("linux-source depends on no source:\n{record}"))?;
    let version = field(&record, "Version").context("the archive gives no version of linux-source")?;
    eprintln!("xtask: fetching {source} {version} (170 MB) to build kublk");
    newest.unpack(&[source, "linux-libc-dev"], &tree)?;
    Apt::update(RELEASE, &staging.join("release"))?.unpack(&["liburing-dev"], &tree)?;

    let mut extract = Command::new("tar");
    extract.arg("--extract").arg("--file").arg(tree.join(format!("usr/src/{source}.tar.xz")));
    extract.arg("--directory").arg(staging).arg(format!("{source}/{SELFTESTS}"));
    process::output(&mut extract)?;
    compile(&staging.join(source).join(SELFTESTS), &tree.join("usr"))?;
    Ok(version.to_owned())
}

/// Calls gcc as the Makefile beside the source does. That Makefile includes further ones from all
/// over the kernel's tree and cannot be used here.
fn compile(source: &Path, usr: &Path) -> Result<()> {
    let mut parts = Vec::new();
    for file in fs::read_dir(source).with_context(|| source.display().to_string())? {
        let file = file?.path();
        // A file that does not include the server's header belongs to a different program.
        if file.extension().is_some_and(|suffix| suffix == "c") && fs::read_to_string(&file)?.contains("\"kublk.h\"") {
            parts.push(file);
        }
    }
    parts.sort();
    ensure!(!parts.is_empty(), "{} has no source of kublk", source.display());

    fs::create_dir_all(install::programs())?;
    // Renamed only when complete, so that a killed run leaves no program that looks usable.
    let part = path().with_extension("part");
    let mut gcc = Command::new("gcc");
    gcc.args(["-O3", "-D_GNU_SOURCE", "-isystem"]).arg(usr.join("include"));
    gcc.arg("-isystem").arg(usr.join("include/x86_64-linux-gnu")).args(&parts);
    // By path: `-luring` could link a shared library, which the host would need at run time.
    gcc.arg(usr.join("lib/x86_64-linux-gnu/liburing.a")).args(["-lpthread", "-lm", "-o"]).arg(&part);
    process::output(&mut gcc)?;
    fs::rename(&part, path()).with_context(|| format!("cannot move the program to {}", path().display()))
}

/// Name of the source package in the record of the metapackage.
fn source_package(record: &str) -> Option<&str> {
    dependencies(record).find(|name| name.starts_with("linux-source-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metapackage_names_the_package_with_the_source() {
        // Only the source package is named, not xz-utils.
        let record = "Package: linux-source\nVersion: 7.3.4-1\nDepends: xz-utils, linux-source-7.3 (= 7.3.4-1)\n";
        assert_eq!(source_package(record), Some("linux-source-7.3"));
        assert_eq!(source_package("Package: linux-source\nDepends: xz-utils\n"), None);
    }
}
