//! Where things are: the workspace, the target directory, and what the VM keeps there.

use std::env;
use std::path::{Path, PathBuf};

/// The workspace's root: the folder above this package.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in a folder of the workspace")
}

/// Cargo's target directory: `CARGO_TARGET_DIR`, or `target` in the workspace.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        // A relative one is relative to where cargo was called, which is where this program runs.
        Some(path) if !path.is_empty() => std::path::absolute(&path).unwrap_or_else(|_| path.into()),
        _ => root().join("target"),
    }
}

/// What the VM fetches, builds and leaves behind.
pub fn vm() -> PathBuf {
    target().join("vm")
}
