//! Paths of the workspace, of the target directory and of the VM's folder in it.

use std::env;
use std::path::{Path, PathBuf};

/// Root of the workspace: the folder above this package.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in a folder of the workspace")
}

/// Cargo's target directory: `CARGO_TARGET_DIR`, or `target` in the workspace.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        // A relative path starts at cargo's working directory, which is also that of this program.
        Some(path) if !path.is_empty() => std::path::absolute(&path).unwrap_or_else(|_| path.into()),
        _ => root().join("target"),
    }
}

/// Folder of the VM's fetched and built files and of its runs.
pub fn vm() -> PathBuf {
    target().join("vm")
}
