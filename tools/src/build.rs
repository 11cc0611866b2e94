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

/// Where the daemon's build of this profile is: `release` or `debug`.
pub fn daemon_path(profile: &str) -> PathBuf {
    workspace::target().join(profile).join("ublk-throttle")
}

/// The cargo call that builds the daemon that can be killed between its steps. Not what ships, so not optimized as that is.
pub fn crashing_daemon_command() -> Command {
    let mut build = cargo();
    build.args(["build", "--package", "ublk-target", "--bin", "ublk-throttle", "--features", "crash-points"]);
    build
}

/// Builds the daemon that can be killed between its steps; where it is. Cargo keeps the build without that feature as well, and links
/// the one that was asked for last to the same place.
pub fn crashing_daemon() -> Result<PathBuf> {
    process::run(&mut crashing_daemon_command())?;
    let path = workspace::target().join("debug/ublk-throttle-crashing");
    // Renamed into place: another step may be reading it.
    let fresh = path.with_extension(format!("{:?}", std::thread::current().id()));
    std::fs::copy(daemon_path("debug"), &fresh)
        .and_then(|_| std::fs::rename(&fresh, &path))
        .with_context(|| path.display().to_string())?;
    Ok(path)
}

/// The cargo call that builds the end-to-end suite.
pub fn e2e_command() -> Command {
    let mut build = cargo();
    build.args(["test", "--package", "ublk-throttle-tests", "--test", "e2e", "--no-run"]);
    build
}

/// Builds the end-to-end suite; its program.
pub fn e2e() -> Result<PathBuf> {
    let mut build = e2e_command();
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
