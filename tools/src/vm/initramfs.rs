//! Builds the initramfs of a guest with this host's files: a static busybox, the modules for 9p,
//! and `init.sh`.
//!
//! It has only the modules needed before `/lib/modules` is mounted; the host's modprobe loads the
//! rest. The build takes about 1 s and is kept under a name with a hash of its inputs.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::kernel::Kernel;
use crate::lock;
use crate::process;
use crate::workspace;

const INIT: &str = include_str!("init.sh");
/// A static program, because the initramfs has no libraries.
pub const BUSYBOX: &str = "/bin/busybox";

/// Modules of the initramfs. Some kernels have them built in; modprobe reports which.
const MODULES: [&str; 5] = ["virtio_pci", "virtio_console", "9p", "9pnet_virtio", "overlay"];

/// Builds the initramfs for this kernel, or returns that of an earlier run if nothing has changed.
pub fn build(kernel: &Kernel) -> Result<PathBuf> {
    let folder = workspace::vm().join("initramfs");
    let _one_at_a_time = lock::acquire(&folder.join("lock"))?;
    let file = folder.join(format!("{}-{:016x}.cpio", kernel.release, fingerprint(kernel)?));
    if file.exists() {
        return Ok(file);
    }
    let staging = folder.join("staging");
    let _ = fs::remove_dir_all(&staging);
    fill(&staging, kernel).with_context(|| format!("cannot build the initramfs in {}", staging.display()))?;
    // Uncompressed: under emulation, unpacking takes longer than reading 3 MB.
    let part = file.with_extension("part");
    let archive = format!("find . | cpio --quiet -o -H newc -R 0:0 > {}", process::quote(&part.to_string_lossy()));
    process::output(Command::new("sh").arg("-c").arg(archive).current_dir(&staging))?;
    fs::rename(&part, &file)?;
    let _ = fs::remove_dir_all(&staging);
    Ok(file)
}

fn fingerprint(kernel: &Kernel) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    let stamp = |path: &Path| -> Result<(u64, std::time::SystemTime)> {
        let data = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok((data.len(), data.modified()?))
    };
    (INIT, MODULES, stamp(Path::new(BUSYBOX))?, stamp(&kernel.modules().join("modules.dep"))?).hash(&mut hasher);
    Ok(hasher.finish())
}

fn fill(staging: &Path, kernel: &Kernel) -> Result<()> {
    for folder in ["bin", "modules", "proc", "sys", "dev", "host", "upper", "out", "root"] {
        fs::create_dir_all(staging.join(folder))?;
    }
    fs::copy(BUSYBOX, staging.join("bin/busybox"))?;
    let init = staging.join("init");
    fs::write(&init, INIT)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    for (number, module) in modules_in_order(kernel)?.iter().enumerate() {
        let bytes = unpacked(module)?;
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        let plain = name.split(".ko").next().unwrap_or(&name);
        fs::write(staging.join(format!("modules/{number:02}-{plain}.ko")), bytes)?;
    }
    Ok(())
}

/// Files of [`MODULES`] and their dependencies, each once, in the load order for `insmod`.
fn modules_in_order(kernel: &Kernel) -> Result<Vec<PathBuf>> {
    let mut ordered: Vec<PathBuf> = Vec::new();
    for module in MODULES {
        for file in module_files(kernel, module)? {
            if !ordered.contains(&file) {
                ordered.push(file);
            }
        }
    }
    Ok(ordered)
}

/// Files of a module and its dependencies, in the load order for `insmod`; empty for a built-in
/// module.
pub fn module_files(kernel: &Kernel, module: &str) -> Result<Vec<PathBuf>> {
    let mut modprobe = Command::new("modprobe");
    modprobe.env("PATH", process::path_with_sbin()).arg("-d").arg(&kernel.tree);
    modprobe.args(["-S", &kernel.release, "--show-depends", module]);
    Ok(process::output(&mut modprobe)?.lines().filter_map(insmod_file).collect())
}

/// Path in a line `insmod PATH PARAMETERS` of `modprobe --show-depends`; the remaining lines are
/// `builtin NAME`.
fn insmod_file(line: &str) -> Option<PathBuf> {
    line.strip_prefix("insmod ")?.split_whitespace().next().map(PathBuf::from)
}

fn unpacked(module: &Path) -> Result<Vec<u8>> {
    let program = match module.extension().and_then(|suffix| suffix.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(module).with_context(|| format!("cannot read {}", module.display())),
    };
    let output = Command::new(program).args(["-q", "-dc"]).arg(module).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!("{program} cannot unpack {}: {}", module.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_read_from_modprobe_and_builtins_are_not() {
        // Both kinds of line end with a space; parameters may follow the path.
        assert_eq!(insmod_file("insmod /k/9p.ko.xz msize=1 "), Some(PathBuf::from("/k/9p.ko.xz")));
        assert_eq!(insmod_file("builtin virtio_pci"), None);
    }
}
