//! The Debian package and its systemd unit, used as an administrator uses them.
//!
//! ```text
//!   dpkg ─► program, pages, completions, configuration ─► upgrade ─► purge         no file of the package is left
//!   unit ─► systemd as the first process of a PID namespace ─► daemon in its sandbox ─► /dev/ublk-throttle/…
//! ```
//!
//! The trials run in a guest: all installed files vanish with it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use ublk_throttle_tests::command::{self, Outcome, Started};
use ublk_throttle_tests::daemon::Daemon;
use ublk_throttle_tests::fio::Job;
use ublk_throttle_tests::needs::{self, Need};
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::{sysfs, wait};

use crate::measure::expect_near;
use crate::{Case, VERIFIED, cases, load};

const PROGRAM: &str = "/usr/bin/ublk-throttle";
const CONFIG: &str = "/etc/ublk-throttle.yaml";
const UNIT: &str = "/usr/lib/systemd/system/ublk-throttle.service";
const BASH: &str = "/usr/share/bash-completion/completions/ublk-throttle";

/// Limit for dpkg, which reads its list of packages through 9p in some guests.
const DPKG_LIMIT: Duration = Duration::from_secs(90);
/// Limit for systemd and its commands: an emulated guest must make a mount namespace of some hundred mounts.
const SYSTEMD_LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn cases() -> Vec<Case> {
    let package = cases![[Need::OwnMachine, Need::Ublk, Need::Package, Need::Man];
        package_is_installed_upgraded_beneath_a_running_daemon_and_purged_without_a_trace,
    ];
    let unit = cases![[Need::OwnMachine, Need::Ublk, Need::Fio, Need::Package, Need::Systemd];
        unit_serves_reloads_and_comes_back_in_its_sandbox,
    ];
    let mount = cases![[Need::OwnMachine, Need::Ublk, Need::Package, Need::Systemd];
        f57_the_service_does_not_start_while_srv_waits_for_its_file_system,
    ];
    let ext4 = cases![[Need::OwnMachine, Need::Ublk, Need::Ext4, Need::Package, Need::Systemd];
        f86_unit_writes_back_a_mount_that_only_its_owner_may_enter,
    ];
    package.into_iter().chain(unit).chain(mount).chain(ext4).collect()
}

fn package_is_installed_upgraded_beneath_a_running_daemon_and_purged_without_a_trace(scene: &Scene) -> Result<()> {
    // The installed files work. An edited configuration and a running daemon outlive an upgrade. A purge
    // leaves nothing.
    let before = traces();
    dpkg(scene, &["--install", deb()?.as_str()])?;
    for path in [PROGRAM, CONFIG, UNIT, BASH] {
        ensure!(Path::new(path).exists(), "the package brought no {path}");
    }
    let installed = |words: &[&str]| scene.tool(PROGRAM, words);
    installed(&["check", CONFIG])?;
    pages_render(scene)?;
    // Completes as readline does: calls the function that is registered for the program.
    let completed = "source \"$1\"; COMP_WORDS=(ublk-throttle li); COMP_CWORD=1; set -- $(complete -p ublk-throttle); \
                     while [ \"$1\" != -F ]; do shift; done; \"$2\" ublk-throttle li ublk-throttle; echo ${COMPREPLY[@]}";
    let completed = scene.tool("bash", &["-c", completed, "bash", BASH])?;
    ensure!(completed.stdout.trim() == "list", "`ublk-throttle li` is completed to {:?}", completed.stdout);

    let config = scene.write("by-hand.yaml", "version: 1\ndevices:\n  d: { backend: { memory: 16MiB } }\n")?;
    let socket = scene.socket();
    let mut run = Command::new(PROGRAM);
    run.arg("run").arg(&config).arg("--socket").arg(&socket).arg("--state-dir").arg(scene.state_dir());
    let daemon = Daemon::start(&mut run, &config, &socket, &scene.dir().join("by-hand.log"))?;
    let edited = fs::read_to_string(CONFIG)? + "# mine\n";
    fs::write(CONFIG, &edited)?;
    dpkg(scene, &["--install", deb()?.as_str()])?;
    ensure!(fs::read_to_string(CONFIG)? == edited, "the upgrade changed {CONFIG}");
    // The helpers of the daemon run its own program, which the upgrade has replaced on disk.
    let socket = socket.to_str().context("a path of ASCII")?;
    installed(&["del", "d", "--socket", socket])?;
    daemon.stop()?;

    dpkg(scene, &["--purge", "ublk-throttle"])?;
    let left: Vec<_> = traces().difference(&before).cloned().collect();
    ensure!(left.is_empty(), "purged, and there is still {left:?}");
    Ok(())
}

fn unit_serves_reloads_and_comes_back_in_its_sandbox(scene: &Scene) -> Result<()> {
    // With the rights of the unit alone, the daemon does all of its work. After SIGKILL or a hang, systemd
    // starts it again at once.
    let _unpacked = Unpacked::new(scene)?;
    fs::create_dir_all("/srv")?;
    configure(200)?;
    let late = Path::new("/srv/ublk-throttle-late.img");
    let _ = fs::remove_file(late);
    let with_late = fs::read_to_string(CONFIG)? + &format!("  late: {{ backend: {{ file: {} }} }}\n", late.display());
    fs::write(CONFIG, with_late)?;
    let machine = Machine::boot(scene)?;
    machine.systemctl(&["start", "ublk-throttle"])?;
    let first = machine.daemon()?;

    // A backend that comes after the start.
    ensure!(machine.device("late")?["state"] == "waiting", "{}", machine.device("late")?);
    fs::write(late, [0x5a; 1 << 20])?;
    wait::until("late served", SYSTEMD_LIMIT, || Ok((machine.device("late")?["state"] == "live").then_some(())))?;
    ensure!(fs::read("/dev/ublk-throttle/late")? == fs::read(late)?, "late has something else");

    // fio runs for 8 s, more than two timeouts of the watchdog (3 s).
    let node = scene.device("mem")?;
    let job = Job::new("iops-limit-is-met-to-one-percent").set("DEVICE", node.node()).set("RW", "randwrite");
    let report = scene.fio(job.set("BLOCK", 4096).set("DEPTH", 8).set("SECONDS", 8))?.finish(Duration::from_secs(9))?;
    expect_near("operations a second in the sandbox", report.only()?.iops(4096), 200.0, 0.01)?;
    scene.tool("dd", &["if=/dev/zero", "of=/dev/ublk-throttle/img", "bs=1M", "count=8", "oflag=direct"])?;
    ensure!(machine.daemon()? == first, "the watchdog ended a daemon that works");
    let log = fs::read_to_string(scene.dir().join("unit.log"))?;
    ensure!(!log.contains("W-PARTITIONS"), "the sandbox does not let it look for partitions:\n{log}");
    ensure!(!log.contains("W-NICE"), "the sandbox does not let it prefer its control thread:\n{log}");
    ensure!(machine.show("WatchdogTimestampMonotonic")? != "0", "the daemon does not tell the watchdog that it lives");

    // Without `late`.
    configure(400)?;
    machine.systemctl(&["reload", "ublk-throttle"])?;
    ensure!(machine.daemon()? == first, "a reload is no restart");
    fs::remove_file(late)?;
    ensure!(machine.limit("mem")? == 400, "the reload did not change the limit");

    // The opener is a process with more rights than the daemon has.
    let opener = machine.begin("sh", &["-c", "exec sleep 60 < /dev/ublk-throttle/mem"])?;
    wait::until("an opener of the disk", Duration::from_secs(10), || {
        is_open(&node.node).map(|open| open.then_some(()))
    })?;
    let refused = machine.run(PROGRAM, &["del", "mem"])?.expect_code(5)?;
    refused.expect_stderr(&["open by sleep"])?;
    drop(opener);

    // SIGKILL to the unit's main process alone, as the OOM killer would send it. The load on the device with
    // a file behind it sees no error.
    let load = load(scene, VERIFIED, &scene.device("img")?)?;
    machine.systemctl(&["kill", "--kill-who=main", "--signal=KILL", "ublk-throttle"])?;
    let second = machine.daemon_after(first)?;
    machine.run(PROGRAM, &["list"])?.expect_code(0)?;
    // A stopped process (SIGSTOP) neither exits nor serves: only the watchdog detects it.
    machine.run("kill", &["-STOP", &second.to_string()])?.expect_code(0)?;
    let third = machine.daemon_after(second)?;
    ensure!(machine.limit("mem")? == 400 && third != second, "the daemon after the watchdog serves something else");
    load.stop().context("the load over both")?;

    machine.systemctl(&["stop", "ublk-throttle"])?;
    machine.expect_stopped()?;
    group_of_readers_gets_the_socket(&machine)
}

fn f57_the_service_does_not_start_while_srv_waits_for_its_file_system(scene: &Scene) -> Result<()> {
    // A start would make a new empty image (`create: true`) below the mount point, and the file system would hide it.
    let _unpacked = Unpacked::new(scene)?;
    fs::create_dir_all("/srv")?;
    configure(200)?;
    let machine = Machine::boot(scene)?;
    let mount = machine.units.join("srv.mount");
    fs::write(&mount, "[Mount]\nWhat=none\nWhere=/srv\nType=no-such-file-system\n")?;
    machine.systemctl(&["daemon-reload"])?;
    let start = machine.run("systemctl", &["start", "ublk-throttle"])?;
    ensure!(start.code != Some(0) && start.stderr.contains("dependency"), "it starts without /srv\n{start}");
    ensure!(!Path::new(IMAGE).exists(), "{IMAGE} was made in a folder that waits for its file system");
    fs::remove_file(&mount)?;
    machine.systemctl(&["daemon-reload"])?;
    machine.systemctl(&["start", "ublk-throttle"])?;
    machine.systemctl(&["stop", "ublk-throttle"])?;
    machine.expect_stopped()
}

fn f86_unit_writes_back_a_mount_that_only_its_owner_may_enter(scene: &Scene) -> Result<()> {
    // The mount point belongs to an unprivileged user and has mode 0700. A daemon that cannot open it would
    // have to write back all file systems of the host: the forced removal would wait for 16 MiB of a second
    // disk at 100 KiB/s, give up after 3 s, and lose the new file.
    let _unpacked = Unpacked::new(scene)?;
    fs::create_dir_all("/srv")?;
    configure(1_000_000)?;
    let machine = Machine::boot(scene)?;
    machine.systemctl(&["start", "ublk-throttle"])?;
    let must = |program: &str, words: &[&str]| machine.run(program, words)?.expect_code(0);
    let mount = |device: &str| -> Result<String> {
        let point = scene.dir().join(device);
        fs::create_dir_all(&point)?;
        let point = point.to_str().context("a path of ASCII")?.to_owned();
        must("mount", &[&format!("/dev/ublk-throttle/{device}"), &point])?;
        Ok(point)
    };
    for device in ["mem", "img"] {
        must("mkfs.ext4", &["-q", "-F", &format!("/dev/ublk-throttle/{device}")])?;
    }
    // A write-back of the host begins with the file system that was mounted first, here `mem`.
    let (other, private) = (mount("mem")?, mount("img")?);
    must("chown", &["65534", &private])?;
    must("chmod", &["0700", &private])?;
    must("sync", &[])?;
    must(PROGRAM, &["set", "device", "mem", "bps-write=100KiB"])?;
    must("dd", &["if=/dev/zero", &format!("of={other}/file"), "bs=1M", "count=16"])?;
    let written: Vec<u8> = (0..4 << 20).map(|at: u32| (at / 4096 % 251) as u8).collect();
    let source = scene.dir().join("source");
    fs::write(&source, written)?;
    let (source, file) = (source.to_str().context("a path of ASCII")?, format!("{private}/file"));
    must("cp", &[source, &file])?;

    let removed = must(PROGRAM, &["del", "img", "--force", "--timeout", "20s"])?;
    ensure!(!removed.stderr.contains("lost"), "{removed}");
    must(PROGRAM, &["set", "device", "mem", "bps-write=unlimited"])?;
    must("umount", &[&private])?;
    must(PROGRAM, &["add", "img", "--file", IMAGE])?;
    must("mount", &["/dev/ublk-throttle/img", &private])?;
    must("cmp", &[source, &file])?;
    must("umount", &[&private])?;
    must("umount", &[&other])?;
    machine.systemctl(&["stop", "ublk-throttle"])?;
    machine.expect_stopped()
}

/// Checks the group and the mode of the socket with `control: { group: adm }`, and with the two lines of an
/// override that the head of the configuration names.
fn group_of_readers_gets_the_socket(machine: &Machine<'_>) -> Result<()> {
    let config = fs::read_to_string(CONFIG)? + "control: { group: adm }\n";
    fs::write(CONFIG, config)?;
    machine.override_unit("readers", "SupplementaryGroups=adm\nSystemCallFilter=@chown\n")?;
    machine.systemctl(&["start", "ublk-throttle"])?;
    let told = machine.run("stat", &["--format=%G %a", "/run/ublk-throttle/control.sock"])?.expect_code(0)?;
    ensure!(told.stdout.trim() == "adm 660", "the socket is of {:?}", told.stdout);
    machine.systemctl(&["stop", "ublk-throttle"])?;
    machine.expect_stopped()
}

fn configure(iops: u32) -> Result<()> {
    let text = format!(
        "version: 1\n\
         devices:\n  \
           mem: {{ backend: {{ memory: 64MiB }}, limits: {{ iops-total: {iops} }} }}\n  \
           img: {{ backend: {{ file: {IMAGE}, size: 64MiB, create: true }} }}\n"
    );
    fs::write(CONFIG, text).context(CONFIG)
}

/// A backing file in a folder that the unit lets the daemon write to.
const IMAGE: &str = "/srv/ublk-throttle-trial.img";

fn deb() -> Result<String> {
    let path = needs::package().context("no package")?;
    path.into_os_string().into_string().ok().context("a path of UTF-8")
}

fn dpkg(scene: &Scene, words: &[&str]) -> Result<Outcome> {
    // Skip man-db's trigger: a new index of all manual pages of the host takes minutes through 9p.
    let mut all = vec!["--no-triggers", "--force-unsafe-io"];
    all.extend(words);
    scene.begin_tool("dpkg", &all)?.finish(DPKG_LIMIT)?.expect_code(0)
}

fn pages_render(scene: &Scene) -> Result<()> {
    let pages = |section: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(Path::new("/usr/share/man").join(section)).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains("/ublk-throttle")).collect()
    };
    let mut paths = pages("man1");
    paths.extend(pages("man7"));
    ensure!(paths.len() >= 8, "only {} pages: {paths:?}", paths.len());
    let mut words = vec!["--local-file"];
    words.extend(paths.iter().filter_map(|path| path.to_str()));
    let shown = scene.tool("man", &words)?;
    let heads = shown.stdout.lines().filter(|line| *line == "NAME").count();
    ensure!(heads == paths.len(), "{heads} of {} pages begin with a name\n{shown}", paths.len());
    ensure!(shown.stderr.is_empty(), "man complains\n{shown}");
    Ok(())
}

/// All paths with `ublk-throttle` in their names, in the folders where packages and services leave files.
fn traces() -> BTreeSet<PathBuf> {
    let folders = [
        "/etc",
        "/etc/systemd/system",
        "/etc/systemd/system/multi-user.target.wants",
        "/run",
        "/usr/bin",
        "/usr/lib/systemd/system",
        "/usr/share/doc",
        "/usr/share/man/man1",
        "/usr/share/man/man7",
        "/usr/share/bash-completion/completions",
        "/usr/share/zsh/vendor-completions",
        "/usr/share/fish/vendor_completions.d",
        "/var/lib",
        "/var/lib/dpkg/info",
        "/var/lib/systemd/deb-systemd-helper-enabled",
        "/var/lib/systemd/deb-systemd-helper-masked",
    ];
    let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains("ublk-throttle")).collect()
}

fn is_open(node: &Path) -> Result<bool> {
    let processes = fs::read_dir("/proc")?.flatten().map(|entry| entry.path().join("fd/0"));
    let mut inputs = processes.filter_map(|input| fs::read_link(input).ok());
    Ok(inputs.any(|input| input == node))
}

/// The files of the package in their places, without an entry in dpkg's list of packages; removed on drop.
struct Unpacked(Vec<PathBuf>);

impl Unpacked {
    fn new(scene: &Scene) -> Result<Self> {
        let deb = deb()?;
        // Names of folders end with a slash. Only files are kept.
        let listing = scene.tool("dpkg-deb", &["--contents", &deb])?.stdout;
        let names = listing.lines().filter_map(|line| line.split(" ./").nth(1)).filter(|name| !name.ends_with('/'));
        let unpacked = Self(names.map(|name| Path::new("/").join(name)).collect());
        scene.tool("dpkg-deb", &["--extract", &deb, "/"])?;
        Ok(unpacked)
    }
}

impl Drop for Unpacked {
    fn drop(&mut self) {
        for path in self.0.iter().map(PathBuf::as_path).chain([Path::new(IMAGE)]) {
            let _ = fs::remove_file(path);
        }
        let _ = fs::remove_dir("/var/lib/ublk-throttle");
    }
}

/// systemd in namespaces of its own, with the package's unit and the units that it needs; killed on drop.
struct Machine<'a> {
    scene: &'a Scene,
    unshare: Child,
    units: PathBuf,
    /// The pid of systemd outside of its namespace.
    pid: u32,
}

/// The units that every service depends on.
const UNITS: [&str; 7] = [
    "sysinit.target",
    "basic.target",
    "local-fs.target",
    "remote-fs-pre.target",
    "shutdown.target",
    "umount.target",
    "modprobe@.service",
];

impl<'a> Machine<'a> {
    fn boot(scene: &'a Scene) -> Result<Self> {
        let units = scene.dir().join("units");
        fs::create_dir(&units)?;
        for unit in UNITS {
            symlink(Path::new("/lib/systemd/system").join(unit), units.join(unit))?;
        }
        symlink(UNIT, units.join("ublk-throttle.service"))?;
        // A watchdog timeout of 3 s instead of 30 s keeps the trial short; the log goes to a file, because no
        // journal runs.
        let log = scene.dir().join("unit.log");
        let settings = format!("WatchdogSec=3\nStandardOutput=append:{0}\nStandardError=append:{0}\n", log.display());
        override_unit(&units, "trial", &settings)?;
        let start = "mount -t tmpfs -o mode=755 run /run && { mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 \
                     /sys/fs/cgroup; } && exec \"$0\" --system --unit=basic.target --log-target=console --show-status=no";
        let unshare = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "sh", "-c", start, needs::SYSTEMD])
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("container", "trial")
            .env("SYSTEMD_UNIT_PATH", &units)
            .stdin(Stdio::null())
            .stdout(fs::File::create(scene.dir().join("systemd.log"))?)
            .stderr(fs::File::create(scene.dir().join("systemd-errors.log"))?)
            .spawn()
            .context("unshare")?;
        let mut machine = Self { scene, pid: 0, unshare, units };
        machine.wait_until_up()?;
        Ok(machine)
    }

    fn wait_until_up(&mut self) -> Result<()> {
        let parent = self.unshare.id();
        let children = format!("/proc/{parent}/task/{parent}/children");
        self.pid = wait::until("systemd", SYSTEMD_LIMIT, || Ok(fs::read_to_string(&children)?.trim().parse().ok()))?;
        wait::until("systemd to be up", SYSTEMD_LIMIT, || {
            let state = self.run("systemctl", &["is-active", "basic.target"])?;
            Ok((state.stdout.trim() == "active").then_some(()))
        })
    }

    /// Starts a program in the namespaces of systemd.
    fn begin(&self, program: &str, words: &[&str]) -> Result<Started> {
        let mut inside = Command::new("nsenter");
        inside.args(["--target", &self.pid.to_string(), "--mount", "--pid", program]).args(words);
        command::start(self.scene.dir(), &mut inside)
    }

    fn run(&self, program: &str, words: &[&str]) -> Result<Outcome> {
        self.begin(program, words)?.finish(SYSTEMD_LIMIT)
    }

    fn systemctl(&self, words: &[&str]) -> Result<()> {
        self.run("systemctl", words)?.expect_code(0).map(drop)
    }

    fn show(&self, property: &str) -> Result<String> {
        let shown =
            self.run("systemctl", &["show", "--value", "--property", property, "ublk-throttle"])?.expect_code(0)?;
        Ok(shown.stdout.trim().to_owned())
    }

    /// The pid of the daemon in the namespace.
    fn daemon(&self) -> Result<u32> {
        let pid = self.show("MainPID")?;
        pid.parse().with_context(|| pid)
    }

    /// The daemon that follows one that has ended, once it is ready. Both properties are read in one call: between two,
    /// systemd may notice the end of the old daemon, and a new one that is not ready would pass for ready.
    fn daemon_after(&self, before: u32) -> Result<u32> {
        let words = ["show", "--property=ActiveState", "--property=MainPID", "ublk-throttle"];
        wait::until("a new daemon", Duration::from_secs(20), || {
            let shown = self.run("systemctl", &words)?.expect_code(0)?.stdout;
            let value = |name: &str| shown.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            let pid = value("MainPID").context("no MainPID")?.parse()?;
            Ok((value("ActiveState") == Some("active") && pid != 0 && pid != before).then_some(pid))
        })
    }

    fn device(&self, name: &str) -> Result<Value> {
        let listing = self.run(PROGRAM, &["list", "--json"])?.expect_code(0)?.json()?;
        let devices = listing["devices"].as_array().context("no devices")?;
        devices.iter().find(|found| found["name"] == name).cloned().with_context(|| format!("no {name}"))
    }

    fn limit(&self, device: &str) -> Result<u64> {
        let found = self.device(device)?;
        found["limits"]["iops-total"].as_u64().with_context(|| format!("{found}"))
    }

    fn override_unit(&self, name: &str, settings: &str) -> Result<()> {
        override_unit(&self.units, name, settings)?;
        self.systemctl(&["daemon-reload"])
    }

    /// Fails unless the service has ended with success and left no more than the levels, from which the next
    /// start continues, and the lock file.
    fn expect_stopped(&self) -> Result<()> {
        let (state, result) = (self.show("ActiveState")?, self.show("Result")?);
        ensure!((state.as_str(), result.as_str()) == ("inactive", "success"), "{state}, {result}");
        let left = self.run("ls", &["/run/ublk-throttle"])?.expect_code(0)?;
        ensure!(left.stdout == "levels.json\nlock\n", "{left}");
        wait::until("no device left", Duration::from_secs(5), || Ok(sysfs::ublk_nodes().is_empty().then_some(())))
    }
}

fn override_unit(units: &Path, name: &str, settings: &str) -> Result<()> {
    let folder = units.join("ublk-throttle.service.d");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join(format!("{name}.conf")), format!("[Service]\n{settings}")).context("an override")
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        // The death of unshare kills its child systemd (`--kill-child`), and with systemd, the first process of
        // the namespace, every process in it.
        wait::kill(&mut self.unshare);
    }
}
