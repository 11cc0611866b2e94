//! What cargo builds for the other chores.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process;
use crate::workspace;

/// Cargo, called in the workspace: the one that runs us, so that a `+toolchain` holds for all.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace::root()).env("CARGO_TARGET_DIR", workspace::target());
    cargo
}

/// The daemon's release build.
pub fn daemon() -> Result<()> {
    process::run(&mut daemon_command())
}

/// The cargo call that builds the daemon.
pub fn daemon_command() -> Command {
    let mut build = cargo();
    build.args(["build", "--release", "--package", "ublk-target", "--bin", "ublk-throttle"]);
    build
}

/// The release build of the daemon that can be killed between its steps; where it is. Cargo keeps both builds, and links the
/// one that was asked for last to the same place.
pub fn crashing_daemon() -> Result<PathBuf> {
    process::run(daemon_command().args(["--features", "crash-points"]))?;
    let path = workspace::target().join("release/ublk-throttle-crashing");
    std::fs::copy(daemon_path(), &path).with_context(|| path.display().to_string())?;
    Ok(path)
}

/// Where the daemon's release build is.
pub fn daemon_path() -> PathBuf {
    workspace::target().join("release/ublk-throttle")
}

/// Builds the end-to-end suite; its program.
pub fn e2e() -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["test", "--release", "--package", "ublk-throttle-tests", "--test", "e2e", "--no-run"]);
    // Rendered: cargo prints the compiler's messages for people as well, on its standard error.
    build.arg("--message-format=json-render-diagnostics").stderr(std::process::Stdio::inherit());
    let messages = build.output().with_context(|| format!("cannot run {}", process::line(&build)))?;
    if !messages.status.success() {
        anyhow::bail!("{} ended with {}", process::line(&build), messages.status);
    }
    executable(&String::from_utf8_lossy(&messages.stdout), "e2e").context("cargo built no program for the test `e2e`")
}

/// The program of a test target, from cargo's messages (a JSON object a line).
fn executable(messages: &str, target: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["reason"] == "compiler-artifact" && message["target"]["name"] == target)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_is_found_among_cargos_messages() {
        // Libraries have no program; other lines are not JSON.
        let messages = r#"not json
            {"reason":"compiler-artifact","target":{"name":"libc"},"executable":null}
            {"reason":"compiler-artifact","target":{"name":"e2e"},"executable":"/t/release/deps/e2e-1"}
            {"reason":"build-finished","success":true}"#;
        assert_eq!(executable(messages, "e2e"), Some(PathBuf::from("/t/release/deps/e2e-1")));
        assert_eq!(executable(messages, "libc"), None);
    }
}
