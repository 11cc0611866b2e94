//! Temporary settings of the running kernel.

use std::fs;

use anyhow::{Context, Result};

/// A file of /proc or /sys; the drop restores its old content.
pub struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    /// Writes `value` to the file.
    pub fn set(path: &'static str, value: &str) -> Result<Self> {
        let before = fs::read_to_string(path).context(path)?;
        fs::write(path, value).with_context(|| format!("{value:?} to {path}"))?;
        Ok(Self { path, before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _ = fs::write(self.path, &self.before);
    }
}
