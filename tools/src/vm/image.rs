//! Builds an initramfs with all files of a guest: programs, their libraries, and kernel modules.
//!
//! ```text
//!   packages ─ dpkg -L ─┐
//!   paths of the caller ┼─► staging ─ ldd: libraries ─ modprobe: modules ─► cpio        (kept, by a hash of paths, sizes, times)
//!   accounts, dpkg's db ┘                                                    │
//!   the run's own files (command, environment) ─────────────────────────► + cpio        (the kernel unpacks both)
//! ```
//!
//! On the counted clock such a guest is deterministic: no input arrives from outside, so two runs
//! of the same image execute the same instructions. A file of the host would arrive at a different
//! instant of guest time in each run. The guest's output leaves through serial ports (`session`).

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result};

use super::initramfs;
use super::kernel::Kernel;
use super::out;
use crate::lock;
use crate::process;
use crate::workspace;

/// The init program of such a guest.
const INIT: &str = include_str!("image.sh");

/// Debian packages in every image, if the host has them installed: programs for shell scripts,
/// disks and services.
const PACKAGES: [&str; 28] = [
    "bash",
    "bsdextrautils",
    "bsdutils",
    "btrfs-progs",
    "coreutils",
    "dash",
    "diffutils",
    "dmsetup",
    "dpkg",
    "e2fsprogs",
    "fio",
    "findutils",
    "grep",
    "groff-base",
    "gzip",
    "init-system-helpers",
    "kmod",
    "libc-bin",
    "man-db",
    "mount",
    "perl-base",
    "procps",
    "sed",
    "systemd",
    "tar",
    "udev",
    "util-linux",
    "util-linux-extra",
];

/// Folders of those packages that no program reads.
const LEFT_OUT: [&str; 6] = [
    "/usr/share/doc/",
    "/usr/share/locale/",
    "/usr/share/man/",
    "/usr/share/info/",
    "/usr/share/lintian/",
    "/usr/share/bash-completion/",
];

/// Kernel modules that a command in the guest may load.
const MODULES: [&str; 11] = [
    "ublk_drv",
    "null_blk",
    "brd",
    "loop",
    "dm-mod",
    "dm-delay",
    "ext4",
    "btrfs",
    "configfs",
    "nvmet",
    "target_core_iblock",
];

/// Further files of the host: user and group names, the library cache, the database of dpkg.
const FILES: [&str; 8] = [
    "/etc/passwd",
    "/etc/group",
    "/etc/nsswitch.conf",
    "/etc/ld.so.cache",
    "/var/lib/dpkg/status",
    "/var/lib/dpkg/diversions",
    "/var/lib/dpkg/statoverride",
    "/var/lib/dpkg/info/format",
];

/// Empty folders that programs expect.
const FOLDERS: [&str; 13] = [
    "dev",
    "mnt",
    "proc",
    "root",
    "run",
    "srv",
    "sys",
    "tmp",
    "usr/share/man",
    "usr/share/bash-completion/completions",
    "var/lib/dpkg/updates",
    "var/log",
    "var/tmp",
];

/// Builds the image for this kernel with [`PACKAGES`] and `paths`, or returns that of an earlier
/// run if nothing has changed.
pub fn build(kernel: &Kernel, paths: &[PathBuf]) -> Result<PathBuf> {
    let folder = workspace::vm().join("image");
    let _one_at_a_time = lock::acquire(&folder.join("lock"))?;
    let mut staging = Staging::new(folder.join("staging"));
    staging.collect(kernel, paths)?;
    let file = folder.join(format!("{}-{:016x}.cpio", kernel.release, staging.fingerprint(kernel)?));
    sweep(&folder);
    if let Ok(known) = fs::File::open(&file) {
        // `sweep` keeps it for a further day.
        let _ = known.set_modified(SystemTime::now());
    } else {
        staging.fill(kernel).with_context(|| format!("cannot build an image in {}", staging.root.display()))?;
        pack(&staging.root, &file)?;
        let _ = fs::remove_dir_all(&staging.root);
    }
    Ok(file)
}

/// Removes images that no run has used for [`out::KEPT`]: each build of the daemon makes one of 170
/// MB.
fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if out::is_old(&entry) && entry.path().extension().is_some_and(|suffix| suffix == "cpio") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Writes to `into` the image, followed by an archive of the run's own files.
pub fn with_files(image: &Path, files: &[(&str, String)], into: &Path) -> Result<()> {
    let staging = into.with_extension("staging");
    fs::create_dir_all(staging.join("run-files"))?;
    for (name, text) in files {
        fs::write(staging.join("run-files").join(name), text)?;
    }
    fs::copy(image, into).with_context(|| format!("cannot copy the image to {}", into.display()))?;
    // The kernel accepts a further archive at any multiple of 4 bytes; cpio pads archives to 512
    // bytes.
    append(&staging, into)?;
    fs::remove_dir_all(&staging)?;
    Ok(())
}

/// Contents of an image, and the folder that it is built in.
struct Staging {
    root: PathBuf,
    /// Path in the guest → file of the host.
    files: BTreeMap<PathBuf, PathBuf>,
    /// Path in the guest → target of the link.
    links: BTreeMap<PathBuf, PathBuf>,
}

impl Staging {
    fn new(root: PathBuf) -> Self {
        Self { root, files: BTreeMap::new(), links: BTreeMap::new() }
    }

    /// Collects the files of the image.
    fn collect(&mut self, kernel: &Kernel, paths: &[PathBuf]) -> Result<()> {
        for folder in ["/bin", "/sbin", "/lib", "/lib64"] {
            self.add(Path::new(folder))?;
        }
        for name in PACKAGES {
            // A missing package is reported by the command in the guest that needs it.
            let Ok(listing) = process::output(Command::new("dpkg").args(["--listfiles", name])) else { continue };
            for path in listing.lines().filter(|path| !LEFT_OUT.iter().any(|part| path.starts_with(part))) {
                self.add(Path::new(path))?;
            }
        }
        for path in FILES.iter().map(Path::new).filter(|path| path.exists()) {
            self.add(path)?;
        }
        for entry in fs::read_dir("/var/lib/dpkg/info").into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|suffix| suffix == "list") {
                self.add(&entry.path())?;
            }
        }
        for path in paths {
            self.add_all(path)?;
        }
        self.add_libraries()?;
        // The path in `INIT`; on some hosts /bin is a folder, not a link to /usr/bin.
        self.files.insert("/usr/bin/busybox".into(), initramfs::BUSYBOX.into());
        for module in MODULES {
            for file in initramfs::module_files(kernel, module)? {
                let in_guest = Path::new("/usr").join(file.strip_prefix(&kernel.tree)?);
                self.files.insert(in_guest, file);
            }
        }
        Ok(())
    }

    /// Adds a file, or a link and its target. Folders are created on demand.
    fn add(&mut self, path: &Path) -> Result<()> {
        let Ok(kind) = path.symlink_metadata() else { return Ok(()) };
        // On some hosts /bin is a link to usr/bin. The guest gets each file at its canonical path.
        let folder = path.parent().unwrap_or(Path::new("/")).canonicalize()?;
        let place = folder.join(path.file_name().unwrap_or_default());
        if kind.is_file() {
            self.files.insert(place, path.to_owned());
        } else if kind.is_symlink() && !self.links.contains_key(&place) {
            let target = fs::read_link(path)?;
            self.links.insert(place, target.clone());
            self.add(&folder.join(target))?;
        }
        Ok(())
    }

    /// Adds a file, or all files below a folder.
    fn add_all(&mut self, path: &Path) -> Result<()> {
        if !path.is_dir() {
            anyhow::ensure!(path.exists(), "{} does not exist", path.display());
            return self.add(path);
        }
        for entry in fs::read_dir(path).with_context(|| path.display().to_string())? {
            self.add_all(&entry?.path())?;
        }
        Ok(())
    }

    /// Adds the shared libraries that the programs and libraries among the files load.
    fn add_libraries(&mut self) -> Result<()> {
        let programs: Vec<PathBuf> = self.files.values().filter(|path| is_elf(path)).cloned().collect();
        // ldd fails for static programs but lists the libraries of the rest.
        let told = Command::new("ldd").args(&programs).output().context("cannot run ldd")?;
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        let libraries: BTreeSet<&str> = told.lines().filter_map(library).collect();
        libraries.into_iter().try_for_each(|library| self.add(Path::new(library)))
    }

    fn fingerprint(&self, kernel: &Kernel) -> Result<u64> {
        let mut hasher = DefaultHasher::new();
        (INIT, MODULES, FOLDERS, &self.links, &kernel.release).hash(&mut hasher);
        for (place, file) in &self.files {
            let data = file.metadata().with_context(|| file.display().to_string())?;
            (place, data.len(), data.modified()?).hash(&mut hasher);
        }
        Ok(hasher.finish())
    }

    fn fill(&self, kernel: &Kernel) -> Result<()> {
        let _ = fs::remove_dir_all(&self.root);
        for folder in FOLDERS {
            fs::create_dir_all(self.root.join(folder))?;
        }
        for (place, target) in &self.links {
            let link = self.make_folder_of(place)?;
            symlink(target, &link).with_context(|| link.display().to_string())?;
        }
        for (place, file) in &self.files {
            let copy = self.make_folder_of(place)?;
            fs::copy(file, &copy).with_context(|| file.display().to_string())?;
        }
        let tables = kernel.modules();
        for entry in fs::read_dir(&tables)?.flatten().filter(|entry| entry.path().is_file()) {
            let place = Path::new("/usr/lib/modules").join(&kernel.release).join(entry.file_name());
            fs::copy(entry.path(), self.make_folder_of(&place)?)?;
        }
        process::output(
            Command::new("depmod")
                .env("PATH", process::path_with_sbin())
                .arg("-b")
                .arg(&self.root)
                .arg(&kernel.release),
        )?;
        let init = self.root.join("init");
        fs::write(&init, INIT)?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// Staging path of a file of the guest; creates the folder.
    fn make_folder_of(&self, place: &Path) -> Result<PathBuf> {
        let inside: PathBuf = place.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        let path = self.root.join(inside);
        let folder = path.parent().unwrap_or(&self.root);
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        Ok(path)
    }
}

fn is_elf(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0; 4];
    fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF"
}

/// Path in a line of ldd, for example `libaio.so.1 => /lib/x86_64-linux-gnu/libaio.so.1
/// (0x00007f…)` or `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn library(line: &str) -> Option<&str> {
    line.split_whitespace().find(|word| word.starts_with('/') && !word.ends_with(':'))
}

fn pack(staging: &Path, file: &Path) -> Result<()> {
    let part = file.with_extension("part");
    let _ = fs::remove_file(&part);
    append(staging, &part)?;
    fs::rename(&part, file).with_context(|| file.display().to_string())
}

/// Appends an archive of a folder to a file. All entries have the same date and are sorted, so the
/// same content gives the same archive.
fn append(staging: &Path, file: &Path) -> Result<()> {
    let script = format!(
        "find . -exec touch --no-dereference --date=@0 {{}} + && find . | LC_ALL=C sort | \
         cpio --quiet --reproducible -o -H newc -R 0:0 >> {}",
        process::quote(&file.to_string_lossy())
    );
    process::output(Command::new("sh").arg("-c").arg(script).current_dir(staging)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        // For several programs ldd prints a header line each, which ends with a colon and names no
        // library.
        assert_eq!(library("\tlibaio.so.1 => /lib/libaio.so.1 (0x00007f)"), Some("/lib/libaio.so.1"));
        assert_eq!(library("\t/lib64/ld-linux-x86-64.so.2 (0x00007f)"), Some("/lib64/ld-linux-x86-64.so.2"));
        assert_eq!((library("/usr/bin/fio:"), library("\tlinux-vdso.so.1 (0x00007f)")), (None, None));
        assert_eq!(library("\tnot a dynamic executable"), None);
    }

    #[test]
    fn images_without_a_use_for_a_day_are_removed() {
        let folder = std::env::temp_dir().join(format!("xtask-sweep-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let kept = out::KEPT;
        for (name, age) in [("new.cpio", kept / 2), ("old.cpio", kept * 2), ("lock", kept * 2)] {
            fs::File::create(folder.join(name)).unwrap().set_modified(SystemTime::now() - age).unwrap();
        }
        sweep(&folder);
        let left = ["new.cpio", "old.cpio", "lock"].map(|name| folder.join(name).exists());
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(left, [true, false, true]);
    }

    #[test]
    fn same_files_are_the_same_archive() {
        // The archive depends neither on the files' times nor on the order in which the file system
        // lists them.
        let folder = std::env::temp_dir().join(format!("xtask-image-{}", std::process::id()));
        let archive = |name: &str, order: [&str; 2]| {
            let staging = folder.join(name);
            fs::create_dir_all(&staging).unwrap();
            order.iter().for_each(|file| fs::write(staging.join(file), file).unwrap());
            pack(&staging, &folder.join(format!("{name}.cpio"))).unwrap();
            fs::read(folder.join(format!("{name}.cpio"))).unwrap()
        };
        let (one, other) = (archive("one", ["a", "b"]), archive("other", ["b", "a"]));
        fs::remove_dir_all(&folder).unwrap();
        assert!(one == other && one.len() > 200);
    }
}
