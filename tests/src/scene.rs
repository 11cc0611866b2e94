//! The scene of a trial: its folder, its daemon and devices, and the check that nothing is left
//! behind.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::command::{self, Outcome, Started};
use crate::daemon::Daemon;
use crate::fio::{Fio, Job};
use crate::needs;
use crate::socket::Client;
use crate::sysfs;
use crate::wait;

/// Limit for a short command: a longer run counts as a hang. The product promises an answer within
/// seconds.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(20);

/// Limit for the end of nodes and helper processes after the daemon's end; the kernel removes nodes
/// with a delay.
const VANISH_LIMIT: Duration = Duration::from_secs(5);

/// A device of a running daemon.
#[derive(Clone, Debug)]
pub struct Device {
    /// The node: `/dev/ublkb3`.
    pub node: PathBuf,
    /// The name below `/sys/block`: `ublkb3`.
    pub disk: String,
    /// The id of the ublk device.
    pub id: u32,
}

impl Device {
    /// The node as text, for a job or a command line.
    pub fn node(&self) -> &str {
        self.node.to_str().expect("a node's path is ASCII")
    }
}

/// The folder of a trial, and the ublk nodes and processes that existed before it.
#[derive(Debug)]
pub struct Scene {
    dir: PathBuf,
    binary: PathBuf,
    nodes_before: BTreeSet<PathBuf>,
    processes_before: BTreeSet<u32>,
    daemons: AtomicU32,
}

impl Scene {
    /// Creates a new, empty folder below the system's temporary folder.
    pub fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = env::temp_dir().join(format!("ublk-throttle-e2e-{}-{number}", std::process::id()));
        fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
        let binary = binary()?;
        let (nodes_before, processes_before) = (sysfs::ublk_nodes(), sysfs::processes_of(&binary));
        Ok(Self { dir, binary, nodes_before, processes_before, daemons: AtomicU32::new(0) })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The program under test.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// The control socket of the scene's daemon.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// The state directory of the scene's daemon.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Writes a file of the scene.
    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// Starts the daemon with a configuration given as text, and waits until it is ready.
    pub fn start(&self, config: &str) -> Result<Daemon> {
        self.start_under(&[], config)
    }

    /// Starts the daemon under a wrapper that changes its environment and then executes it, for
    /// example `["prlimit", "--nofile=64"]`; waits until it is ready.
    pub fn start_under(&self, wrapper: &[&str], config: &str) -> Result<Daemon> {
        let (mut run, path, log) = self.prepare(&self.binary, wrapper, config)?;
        Daemon::start(&mut run, &path, &self.socket(), &log)
    }

    /// Starts a daemon that takes over from the running daemon, and waits until it is ready.
    pub fn take_over(&self, config: &str) -> Result<Daemon> {
        let (mut run, path, log) = self.prepare(&self.binary, &[], config)?;
        Daemon::start(run.arg("--takeover"), &path, &self.socket(), &log)
    }

    /// Starts the daemon without waiting until it is ready.
    pub fn start_without_waiting(&self, config: &str) -> Result<Daemon> {
        self.start_under_without_waiting(&[], config)
    }

    /// Starts the daemon under a wrapper, without waiting until it is ready.
    pub fn start_under_without_waiting(&self, wrapper: &[&str], config: &str) -> Result<Daemon> {
        let (mut run, path, log) = self.prepare(&self.binary, wrapper, config)?;
        Daemon::spawn(&mut run, &path, &self.socket(), &log)
    }

    /// Starts a daemon that is killed at the crash point named in the scene's file `crash`; does
    /// not wait until it is ready.
    pub fn start_crashing(&self, config: &str) -> Result<Daemon> {
        self.start_crashing_with(&[], config)
    }

    /// [`Scene::start_crashing`] with further options of `run`.
    pub fn start_crashing_with(&self, options: &[&str], config: &str) -> Result<Daemon> {
        let (mut run, path, log) = self.prepare(&crashing_binary()?, &[], config)?;
        run.args(options).env("UBLK_THROTTLE_CRASH_FILE", self.dir.join("crash"));
        Daemon::spawn(&mut run, &path, &self.socket(), &log)
    }

    /// The command line of a daemon, a build of the program, with its configuration and its log.
    fn prepare(&self, program: &Path, wrapper: &[&str], config: &str) -> Result<(Command, PathBuf, PathBuf)> {
        let number = self.daemons.fetch_add(1, Ordering::Relaxed);
        let path = self.write(&format!("config-{number}.yaml"), config)?;
        let log = self.dir.join(format!("daemon-{number}.log"));
        let mut run = wrapped(program, wrapper)?;
        run.arg("run").arg(&path).arg("--socket").arg(self.socket()).arg("--state-dir").arg(self.state_dir());
        Ok((run, path, log))
    }

    /// Runs a command that talks to the scene's daemon under a wrapper, as [`Scene::ask`] does
    /// without one.
    pub fn ask_under<S: AsRef<OsStr>>(&self, wrapper: &[&str], words: &[S]) -> Result<Outcome> {
        self.begin_under(wrapper, words)?.finish(COMMAND_LIMIT)?.expect_no_panic()
    }

    /// Starts a command that talks to the scene's daemon under a wrapper.
    pub fn begin_under<S: AsRef<OsStr>>(&self, wrapper: &[&str], words: &[S]) -> Result<Started> {
        let mut command = wrapped(&self.binary, wrapper)?;
        command.args(words).arg("--socket").arg(self.socket()).arg("--state-dir").arg(self.state_dir());
        command::start(&self.dir, &mut command)
    }

    /// A connection to the scene's daemon.
    pub fn connect(&self) -> Result<Client> {
        Client::connect(&self.socket())
    }

    /// Starts a command of the binary under test without waiting: `["check", path]`.
    pub fn begin<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Started> {
        command::start(&self.dir, Command::new(&self.binary).args(words))
    }

    /// Runs a command of the binary under test to its end.
    pub fn run<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Outcome> {
        self.begin(words)?.finish(COMMAND_LIMIT)?.expect_no_panic()
    }

    /// Runs a command that talks to the scene's daemon to its end.
    pub fn ask<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Outcome> {
        self.begin_ask(words)?.finish(COMMAND_LIMIT)?.expect_no_panic()
    }

    /// The output of `list --json`.
    pub fn listing(&self) -> Result<Value> {
        self.ask(&["list", "--json"])?.expect_code(0)?.json()
    }

    /// The devices in the output of `list --json`.
    pub fn devices(&self) -> Result<Vec<Value>> {
        let listing = self.listing()?;
        listing["devices"].as_array().cloned().with_context(|| format!("no devices in {listing}"))
    }

    /// The entry of one device in the output of `list --json`.
    pub fn listed(&self, name: &str) -> Result<Value> {
        let devices = self.devices()?;
        devices
            .iter()
            .find(|device| device["name"] == name)
            .cloned()
            .with_context(|| format!("no {name} in {devices:?}"))
    }

    /// Starts a command that talks to the scene's daemon.
    pub fn begin_ask<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Started> {
        self.begin_under(&[], words)
    }

    /// Runs a tool to its end; an exit code other than 0 is an error.
    pub fn tool(&self, name: &str, words: &[&str]) -> Result<Outcome> {
        self.try_tool(name, words)?.expect_code(0)
    }

    /// Runs a tool to its end, with any exit code.
    pub fn try_tool(&self, name: &str, words: &[&str]) -> Result<Outcome> {
        self.begin_tool(name, words)?.finish(Duration::from_secs(60))
    }

    /// Removes a device of rublk. rublk's own server sends a DEL as well once the device has
    /// stopped, so the command's DEL may come second and fail; the device is gone either way.
    pub fn remove_device_of_rublk(&self, id: &str) -> Result<()> {
        let del = self.try_tool("rublk", &["del", "-n", id])?;
        let node = Path::new("/dev").join(format!("ublkc{id}"));
        wait::until("end of rublk's device", COMMAND_LIMIT, || Ok((!node.exists()).then_some(())))
            .with_context(|| del.to_string())
    }

    /// Starts a tool.
    pub fn begin_tool(&self, name: &str, words: &[&str]) -> Result<Started> {
        let found = if name == "rublk" { needs::rublk() } else { needs::program(name) };
        let program = found.with_context(|| format!("no program {name}"))?;
        command::start(&self.dir, Command::new(program).args(words))
    }

    /// Starts a fio job in the scene's folder.
    pub fn fio(&self, job: Job) -> Result<Fio> {
        Fio::start(&self.dir, job)
    }

    /// Starts several fio jobs of one section each, all at the same instant.
    pub fn fio_together(&self, jobs: &[Job]) -> Result<Fio> {
        Fio::start_together(&self.dir, jobs)
    }

    /// The device that a running daemon made under `name`: the target of its stable name.
    pub fn device(&self, name: &str) -> Result<Device> {
        let link = Path::new("/dev/ublk-throttle").join(name);
        let node = fs::canonicalize(&link).with_context(|| link.display().to_string())?;
        let disk = node.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(id) = disk.strip_prefix("ublkb").and_then(|id| id.parse().ok()) else {
            bail!("{} points to {}, not to a ublk device", link.display(), node.display());
        };
        Ok(Device { node, disk, id })
    }

    /// Fails unless all nodes, stable names and processes of the binary that appeared since the
    /// scene began are gone.
    pub fn expect_nothing_left(&self) -> Result<()> {
        let left = || -> Vec<String> {
            let nodes = sysfs::ublk_nodes();
            let nodes = nodes.difference(&self.nodes_before).map(|path| path.display().to_string());
            nodes.chain(self.processes().iter().map(describe)).collect()
        };
        wait::until("nothing left behind", VANISH_LIMIT, || Ok(left().is_empty().then_some(())))
            .with_context(|| format!("left behind: {}", left().join(", ")))
    }

    /// The processes of the binary under test that did not run when the scene began.
    pub fn processes(&self) -> BTreeSet<u32> {
        sysfs::processes_of(&self.binary).difference(&self.processes_before).copied().collect()
    }

    /// Sends SIGKILL to those processes.
    pub fn kill_processes(&self) {
        for pid in self.processes() {
            let _ = i32::try_from(pid).map(|pid| kill(Pid::from_raw(pid), Signal::SIGKILL));
        }
    }

    /// The logs and reports of the scene, for the message of a failure.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        let mut paths: Vec<_> =
            fs::read_dir(&self.dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let is_log = name.ends_with(".log") && !name.contains("_lat.");
            let Ok(content) = fs::read_to_string(&path) else { continue };
            if is_log && !content.trim().is_empty() {
                let lines: Vec<_> = content.lines().collect();
                let _ = writeln!(text, "--- {name}\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
            }
        }
        text
    }

    /// Removes the devices and the folder of a failed trial, so that the next trial is not
    /// affected.
    pub fn clear(self) {
        self.remove_devices();
        let _ = fs::remove_dir_all(&self.dir);
    }

    /// Removes each device that appeared since the scene began through rublk, and each stable name
    /// without a node.
    pub fn remove_devices(&self) {
        let nodes: Vec<_> = sysfs::ublk_nodes().difference(&self.nodes_before).cloned().collect();
        for node in nodes {
            let name = node.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(id) = name.strip_prefix("ublkc") {
                let _ = self.begin_tool("rublk", &["del", "-n", id]).and_then(|del| del.finish(COMMAND_LIMIT));
            } else if node.is_symlink() && !node.exists() {
                let _ = fs::remove_file(&node);
            }
        }
    }
}

/// The pid and command line of a process.
fn describe(pid: &u32) -> String {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    format!("process {pid} ({})", String::from_utf8_lossy(&command).replace('\0', " ").trim())
}

/// The debug build of the binary under test, which has the crash points.
pub fn crashing_binary() -> Result<PathBuf> {
    let named = env::var_os("UBLK_THROTTLE_CRASHING_BIN");
    let path =
        PathBuf::from(named.context("UBLK_THROTTLE_CRASHING_BIN: `cargo xtask test --only e2e` builds and names it")?);
    fs::canonicalize(&path).with_context(|| path.display().to_string())
}

/// A build of the program, under a wrapper if one is given.
fn wrapped(program: &Path, wrapper: &[&str]) -> Result<Command> {
    let Some((name, words)) = wrapper.split_first() else { return Ok(Command::new(program)) };
    let mut command = Command::new(needs::program(name).with_context(|| format!("no program {name}"))?);
    command.args(words).arg(program);
    Ok(command)
}

/// The binary under test: `UBLK_THROTTLE_BIN`, or the newer of the release and debug builds in the
/// target folder of this program.
fn binary() -> Result<PathBuf> {
    if let Some(named) = env::var_os("UBLK_THROTTLE_BIN") {
        let path = PathBuf::from(named);
        ensure!(path.exists(), "UBLK_THROTTLE_BIN: {} does not exist", path.display());
        return fs::canonicalize(&path).with_context(|| path.display().to_string());
    }
    // This program is TARGET/PROFILE/deps/e2e-HASH.
    let own = env::current_exe()?;
    let target = own.ancestors().nth(3).context("this program is not in a cargo target folder")?;
    let built = ["release", "debug"].map(|profile| target.join(profile).join("ublk-throttle"));
    let newest =
        built.iter().filter(|path| path.exists()).max_by_key(|path| path.metadata().and_then(|m| m.modified()).ok());
    let Some(newest) = newest else {
        bail!("no ublk-throttle in {}: `cargo build -p ublk-target`, or set UBLK_THROTTLE_BIN", target.display());
    };
    fs::canonicalize(newest).with_context(|| newest.display().to_string())
}
