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

/// Cargo command that builds the debug programs that run in the VM: the end-to-end suite, and the
/// daemon, whose debug build has crash points. It does not ship, so it is not optimized.
///
/// The command names the whole workspace and tests, as the unit tests do: for a single package,
/// cargo chooses fewer features of the shared crates and builds these crates again. `simulate` is a
/// test of the daemon's package, and cargo builds a package's programs for its tests.
pub fn debug_command() -> Command {
    let mut build = cargo();
    build.args(["test", "--workspace", "--test", "e2e", "--test", "simulate", "--no-run"]);
    build
}

/// Builds the debug programs and returns the end-to-end suite and the daemon.
pub fn debug() -> Result<[PathBuf; 2]> {
    let mut build = debug_command();
    // Rendered: cargo also prints the compiler's messages in readable form on standard error.
    build.arg("--message-format=json-render-diagnostics").stderr(std::process::Stdio::inherit());
    let messages = build.output().with_context(|| format!("cannot run {}", process::line(&build)))?;
    if !messages.status.success() {
        anyhow::bail!("{} ended with {}", process::line(&build), messages.status);
    }
    let messages = String::from_utf8_lossy(&messages.stdout);
    let program = |name| executable(&messages, name).with_context(|| format!("cargo built no program `{name}`"));
    Ok([program("e2e")?, program("ublk-throttle")?])
}

/// Program of a target, from cargo's messages (a JSON object in each line).
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
