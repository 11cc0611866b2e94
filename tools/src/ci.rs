//! Runs `.ci/run` as the CI service does: with its input closed and its time limited.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::workspace;

/// The CI service ends a run after 90 minutes.
const LIMIT_SECONDS: u32 = 90 * 60;

/// The command `cargo xtask ci`.
pub fn main() -> Result<u8> {
    let script = workspace::root().join(".ci/run");
    // timeout(1) gives the script a process group of its own and can thus end its children. The
    // terminal's ^C then reaches only this process, so PDEATHSIG passes its end on to timeout(1).
    let status = Command::new("setpriv")
        .args(["--pdeathsig", "TERM", "--", "timeout", "--kill-after=10"])
        .arg(LIMIT_SECONDS.to_string())
        .arg(&script)
        .current_dir(workspace::root())
        .env("CI", "true")
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}", script.display()))?;
    match status.code() {
        Some(124) => bail!("{} took longer than {} minutes", script.display(), LIMIT_SECONDS / 60),
        Some(code) => Ok(u8::try_from(code).unwrap_or(1)),
        None => bail!("{} ended with {status}", script.display()),
    }
}
