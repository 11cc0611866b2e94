//! Fetches and unpacks packages of a suite of Debian's archive, without installing them.
//!
//! ```text
//!   a sources line ──► apt with its own sources, lists and status ──► .deb ──dpkg -x──► a folder
//! ```
//!
//! The host's own sources are neither used nor changed, so every host gets the same package,
//! whichever release it has.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;

/// Possible paths of the Debian keyring; newer releases changed the suffix.
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];

/// apt with a single suite and none of the host's settings, packages or preferences.
pub struct Apt {
    folder: PathBuf,
}

impl Apt {
    /// Fetches the suite's package lists and keeps apt's files in `folder`. `suite` is a line of a
    /// sources file without type and options: archive, suite, component.
    pub fn update(suite: &str, folder: &Path) -> Result<Apt> {
        for sub in ["sources", "lists/partial", "cache/archives/partial"] {
            let path = folder.join(sub);
            fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        let Some(keyring) = KEYRINGS.iter().find(|path| Path::new(path).exists()) else {
            bail!("no Debian keyring found (looked for {}); install debian-archive-keyring", KEYRINGS.join(", "));
        };
        fs::write(folder.join("sources/debian.list"), format!("deb [arch=amd64 signed-by={keyring}] {suite}\n"))?;
        fs::write(folder.join("status"), "")?;
        let apt = Apt { folder: folder.to_owned() };
        process::output(apt.command("apt-get").args(["-q", "update"]))?;
        Ok(apt)
    }

    /// Record of a package in the archive.
    pub fn record(&self, package: &str) -> Result<String> {
        process::output(self.command("apt-cache").args(["show", "--no-all-versions", package]))
    }

    /// Downloads the packages and unpacks them into `tree`.
    pub fn unpack(&self, packages: &[impl AsRef<str>], tree: &Path) -> Result<()> {
        let debs = self.folder.join("debs");
        let _ = fs::remove_dir_all(&debs);
        for folder in [&debs, tree] {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let mut download = self.command("apt-get");
        download.args(["-q", "download"]).args(packages.iter().map(AsRef::as_ref)).current_dir(&debs);
        process::output(&mut download)?;
        for deb in fs::read_dir(&debs)? {
            process::output(Command::new("dpkg").arg("-x").arg(deb?.path()).arg(tree))?;
        }
        let _ = fs::remove_dir_all(&debs);
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let folder = self.folder.display();
        let mut command = Command::new(program);
        for option in [
            "Dir::Etc::SourceList=/dev/null".to_owned(),
            format!("Dir::Etc::SourceParts={folder}/sources"),
            "Dir::Etc::Preferences=/dev/null".to_owned(),
            "Dir::Etc::PreferencesParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={folder}/lists"),
            // An empty package status: the host's installed packages would affect the choice of the
            // version.
            format!("Dir::State::Status={folder}/status"),
            format!("Dir::Cache={folder}/cache"),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        if nix::unistd::geteuid().is_root() {
            // By default apt downloads as the user _apt, which cannot write below the target
            // directory.
            command.args(["-o", "APT::Sandbox::User=root"]);
        }
        command
    }
}

/// Value of a one-line field in a package record.
pub fn field<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    record.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

/// Names of the packages that a record depends on, in its order.
pub fn dependencies(record: &str) -> impl Iterator<Item = &str> {
    ["Depends", "Pre-Depends"]
        .into_iter()
        .filter_map(|name| field(record, name))
        .flat_map(|list| list.split(','))
        // "a (= 1) | b": the archive itself installs the first alternative.
        .filter_map(|dependency| dependency.split(['|', '(']).next())
        .map(str::trim)
}
