//! Builds the Debian package: `cargo xtask dist`.
//!
//! ```text
//!   cargo build ──► ublk-throttle ──┬─ man, completions ──► release/package/share ─┐
//!                                   ├─────────────────────────────────────────────┼─ cargo-deb ─► ublk-throttle_*.deb
//!   ublk-target/packaging ──────────┴─ unit, configuration, maintainer scripts ────┘
//! ```
//!
//! `ublk-target/Cargo.toml` lists the files and their places. The package to distribute comes from
//! a build of its own that contains no path of this machine. The tests use a package of the release
//! build that they need anyway.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::build;
use crate::install;
use crate::process;
use crate::workspace;

const PROGRAM: &str = "ublk-throttle";

/// Maximum exposure of the unit. systemd-analyze rates a service from 0 (locked in) to 100.
/// `capset`, with which queue threads drop CAP_SYS_ADMIN, counts 1, and CAP_DAC_READ_SEARCH counts
/// 2.
const EXPOSURE_MAX: &str = "19";

/// The command `cargo xtask dist`.
pub fn main() -> Result<u8> {
    install::packages(&[install::BUILD, install::PACKAGE])?;
    let folder = workspace::target().join("dist");
    let target = folder.join("build");
    let hidden = hidden_paths(&target)?;
    let mut compile = build::daemon_command();
    compile.env("CARGO_TARGET_DIR", &target).env("CARGO_ENCODED_RUSTFLAGS", remapping(&hidden));
    process::run(&mut compile)?;
    install::CARGO_DEB.install(process::run)?;
    let package = package(&target, &folder)?;
    expect_no_paths(&package, &hidden)?;
    println!("{}", package.display());
    Ok(0)
}

/// Builds the package of the release build that the tests run. `run` runs the build commands.
pub fn of_release(mut run: impl FnMut(&mut Command) -> Result<()>) -> Result<PathBuf> {
    run(&mut build::daemon_command())?;
    install::CARGO_DEB.install(run)?;
    let folder = release_folder();
    let _ = fs::remove_dir_all(&folder);
    package(&workspace::target(), &folder)
}

/// Package of the current release build, if it was built after that.
pub fn of_this_release() -> Option<PathBuf> {
    let package =
        fs::read_dir(release_folder()).ok()?.flatten().map(|entry| entry.path()).find(|path| is_package(path))?;
    let made = |path: &Path| path.metadata()?.modified();
    (made(&package).ok()? >= made(&build::daemon_path("release")).ok()?).then_some(package)
}

/// Fails if the unit's exposure is above [`EXPOSURE_MAX`]. Returns the line with the score.
pub fn expect_sandbox() -> Result<String> {
    let unit = workspace::root().join("ublk-target/packaging").join(format!("{PROGRAM}.service"));
    let mut analyze = Command::new("systemd-analyze");
    analyze.args(["security", "--no-pager", "--offline=true", "--threshold", EXPOSURE_MAX]).arg(&unit);
    let said = process::output(&mut analyze)?;
    Ok(process::last_lines(said.trim_end(), 1))
}

fn release_folder() -> PathBuf {
    workspace::target().join("dist/release")
}

fn is_package(path: &Path) -> bool {
    path.extension().is_some_and(|suffix| suffix == "deb")
}

/// Packs the program built in `target`.
fn package(target: &Path, into: &Path) -> Result<PathBuf> {
    let release = target.join("release");
    write_shared(&release.join(PROGRAM), &release.join("package/share"))?;
    fs::create_dir_all(into).with_context(|| into.display().to_string())?;
    let mut pack = Command::new(install::CARGO_DEB.path());
    pack.args(["--package", "ublk-target", "--no-build", "--strip", "--output"]).arg(into);
    pack.current_dir(workspace::root()).env("CARGO_TARGET_DIR", target);
    // Timestamp of the packed files, so that the same commit gives the same package.
    if let Ok(time) =
        process::output(Command::new("git").args(["log", "-1", "--format=%ct"]).current_dir(workspace::root()))
    {
        pack.env("SOURCE_DATE_EPOCH", time.trim());
    }
    let said = process::output(&mut pack)?;
    let path = PathBuf::from(process::last_lines(said.trim_end(), 1));
    ensure!(is_package(&path) && path.exists(), "cargo-deb ended well without naming a package:\n{said}");
    Ok(path)
}

/// Writes the files for /usr/share: manual pages and completions that the program prints, and the
/// manual pages written by hand.
fn write_shared(program: &Path, share: &Path) -> Result<()> {
    // Otherwise pages of removed commands would be packed too.
    let _ = fs::remove_dir_all(share);
    let overview = process::output(Command::new(program).arg("man"))?;
    for command in commands(&overview) {
        let page = process::output(Command::new(program).args(["man", command]))?;
        write(&share.join(format!("man/man1/{PROGRAM}-{command}.1")), &page)?;
    }
    write(&share.join(format!("man/man1/{PROGRAM}.1")), &overview)?;
    for page in pages_by_hand()? {
        let section = page.extension().context("a page without a section")?.to_string_lossy().into_owned();
        let name = page.file_name().unwrap_or_default();
        write(&share.join(format!("man/man{section}")).join(name), &fs::read_to_string(&page)?)?;
    }
    compress(&share.join("man"))?;
    let completions = [
        ("bash", format!("bash-completion/completions/{PROGRAM}")),
        ("zsh", format!("zsh/vendor-completions/_{PROGRAM}")),
        ("fish", format!("fish/vendor_completions.d/{PROGRAM}.fish")),
    ];
    for (shell, path) in completions {
        write(&share.join(path), &process::output(Command::new(program).args(["completions", shell]))?)?;
    }
    Ok(())
}

/// Commands in the overview page, each in the form `ublk\-throttle\-list(1)`.
fn commands(overview: &str) -> impl Iterator<Item = &str> {
    overview
        .lines()
        .filter_map(|line| line.strip_prefix(r"ublk\-throttle\-")?.strip_suffix("(1)"))
        .filter(|name| *name != "help")
}

fn pages_by_hand() -> Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(workspace::root().join("ublk-target/man")) else { return Ok(Vec::new()) };
    entries.map(|entry| Ok(entry?.path())).collect()
}

fn compress(folder: &Path) -> Result<()> {
    // Without name and time in the archive, so that the same page gives the same file.
    process::output(Command::new("gzip").args(["--best", "--no-name", "--recursive"]).arg(folder)).map(drop)
}

fn write(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().context("a path in a folder")?;
    fs::create_dir_all(folder).and_then(|()| fs::write(path, text)).with_context(|| path.display().to_string())
}

/// Folders of this machine, each with its replacement in the program. The longest path is last,
/// because rustc takes the last match.
fn hidden_paths(target: &Path) -> Result<Vec<(String, &'static str)>> {
    let home = std::env::var("HOME").unwrap_or_default();
    let cargo_home = std::env::var("CARGO_HOME").unwrap_or_else(|_| format!("{home}/.cargo"));
    let text = |path: &Path| path.to_str().map(str::to_owned).with_context(|| format!("not UTF-8: {}", path.display()));
    let mut hidden = vec![(text(workspace::root())?, "."), (text(target)?, "target"), (cargo_home, "cargo")];
    if !matches!(home.as_str(), "" | "/") {
        hidden.push((home, "home"));
    }
    hidden.sort_by_key(|(path, _)| path.len());
    Ok(hidden)
}

/// Flags for rustc, separated as cargo expects them in CARGO_ENCODED_RUSTFLAGS.
fn remapping(hidden: &[(String, &str)]) -> String {
    let flags: Vec<_> = hidden.iter().map(|(path, name)| format!("--remap-path-prefix={path}={name}")).collect();
    flags.join("\x1f")
}

fn expect_no_paths(package: &Path, hidden: &[(String, &str)]) -> Result<()> {
    let unpacked = package.with_extension("unpacked");
    let _ = fs::remove_dir_all(&unpacked);
    process::output(Command::new("dpkg-deb").arg("--extract").arg(package).arg(&unpacked))?;
    let program = fs::read(unpacked.join("usr/bin").join(PROGRAM))?;
    fs::remove_dir_all(&unpacked)?;
    for (path, _) in hidden {
        if contains(&program, format!("{path}/").as_bytes()) {
            bail!("{}: the program names {path}, a folder of this machine", package.display());
        }
    }
    Ok(())
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_from_the_overview() {
        // `help` has no page; a command named in running text is not an entry.
        let page = ".SH SUBCOMMANDS\n.TP\nublk\\-throttle\\-run(1)\nMake\n.TP\nublk\\-throttle\\-help(1)\nsee ublk\\-throttle\\-x(1)\n";
        assert_eq!(commands(page).collect::<Vec<_>>(), ["run"]);
    }

    #[test]
    fn the_longest_path_is_remapped_last() {
        // rustc takes the last match: with the home folder last, a path in the workspace would show
        // below `home`.
        let hidden = hidden_paths(Path::new("/a/target")).unwrap();
        assert!(hidden.is_sorted_by_key(|(path, _)| path.len()), "{hidden:?}");
        let flags = remapping(&[("/a b".to_owned(), "."), ("/a b/target".to_owned(), "target")]);
        assert_eq!(flags, "--remap-path-prefix=/a b=.\x1f--remap-path-prefix=/a b/target=target");
    }

    #[test]
    fn a_path_is_found_in_a_program() {
        // The match may be at the very end.
        assert!(contains(b"\x00/root/x", b"/root/"));
        assert!(contains(b"a/root/", b"/root/"));
        assert!(!contains(b"/roo", b"/root/"));
    }
}
