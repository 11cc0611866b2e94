//! Builds the programs that the chores need, with cargo.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process;
use crate::workspace;

/// Cargo in the workspace. `CARGO` is the cargo that runs this program, so a `+toolchain` holds for
/// all calls.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace::root()).env("CARGO_TARGET_DIR", workspace::target());
    cargo
}

/// Builds the daemon's release build.
pub fn daemon() -> Result<()> {
    process::run(&mut daemon_command())
}

/// Cargo command that builds the daemon's release build.
pub fn daemon_command() -> Command {
    let mut build = cargo();
    build.args(["build", "--release", "--package", "ublk-target", "--bin", "ublk-throttle"]);
    build
}

/// Path of the daemon's build of this profile, `release` or `debug`.
pub fn daemon_path(profile: &str) -> PathBuf {
    workspace::target().join(profile).join("ublk-throttle")
}

/// Cargo command that builds the daemon with crash points. It does not ship, so it is not
/// optimized.
pub fn crashing_daemon_command() -> Command {
    let mut build = cargo();
    build.args(["build", "--package", "ublk-target", "--bin", "ublk-throttle", "--features", "crash-points"]);
    build
}

/// Builds the daemon with crash points and returns the path of a copy. Cargo also keeps the debug
/// build without that feature, and links the last requested of both to the same path.
pub fn crashing_daemon() -> Result<PathBuf> {
    process::run(&mut crashing_daemon_command())?;
    let path = workspace::target().join("debug/ublk-throttle-crashing");
    // Renamed into place, because a step that runs beside may be reading the file.
    let fresh = path.with_extension(format!("{:?}", std::thread::current().id()));
    std::fs::copy(daemon_path("debug"), &fresh)
        .and_then(|_| std::fs::rename(&fresh, &path))
        .with_context(|| path.display().to_string())?;
    Ok(path)
}

/// Cargo command that builds the end-to-end suite.
pub fn e2e_command() -> Command {
    let mut build = cargo();
    build.args(["test", "--package", "ublk-throttle-tests", "--test", "e2e", "--no-run"]);
    build
}

/// Builds the end-to-end suite and returns its program.
pub fn e2e() -> Result<PathBuf> {
    let mut build = e2e_command();
    // Rendered: cargo also prints the compiler's messages in readable form on standard error.
    build.arg("--message-format=json-render-diagnostics").stderr(std::process::Stdio::inherit());
    let messages = build.output().with_context(|| format!("cannot run {}", process::line(&build)))?;
    if !messages.status.success() {
        anyhow::bail!("{} ended with {}", process::line(&build), messages.status);
    }
    executable(&String::from_utf8_lossy(&messages.stdout), "e2e").context("cargo built no program for the test `e2e`")
}

/// Program of a test target, from cargo's messages (a JSON object in each line).
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
        // Libraries have no program; lines that are not JSON are skipped.
        let messages = r#"not json
            {"reason":"compiler-artifact","target":{"name":"libc"},"executable":null}
            {"reason":"compiler-artifact","target":{"name":"e2e"},"executable":"/t/release/deps/e2e-1"}
            {"reason":"build-finished","success":true}"#;
        assert_eq!(executable(messages, "e2e"), Some(PathBuf::from("/t/release/deps/e2e-1")));
        assert_eq!(executable(messages, "libc"), None);
    }
}
