//! The command line: every flag, its help, its default. Nothing is done here.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::error::{Class, Failure, OrFail, Outcome};

/// Where daemon and commands meet unless told otherwise.
pub const STATE_DIR: &str = "/run/ublk-throttle";

/// Throttled block devices for Linux hosts.
///
/// `ublk-throttle run CONFIG` turns files, block devices and memory into block devices /dev/ublk-throttle/NAME that keep to
/// the limits of CONFIG: bytes and operations per second, of each device and of groups of devices together. The other
/// commands talk to that daemon.
#[derive(Debug, Parser)]
#[command(name = "ublk-throttle", version, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Flags {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done                                4  no daemon answers
  1  failed at run time                  5  refused: busy or conflict
  2  wrong usage                         6  not permitted
  3  configuration refused               7  timed out; a daemon that lives goes on with it

An error is a line on stderr, `error[E-CLASS]: what; what to do` (of a configuration several, with the places); E-CLASS never
changes its meaning. `warning[W-CODE]: …` stops nothing.";

const TRACE: &str = r#"The trace, an event a line, `t` in nanoseconds:

  {"t":0,"device":"vol1","op":"read","bytes":4096,"count":15}
  {"t":5000000,"set":{"group":"tenant-a","limits":{"iops-total":500}}}
  {"t":6000000,"del":"vol1"}
  {"t":7000000,"add":"vol1"}

op is read, write, flush, discard or write-zeroes; count, 1 if absent, stands for that many lines. Every device of CONFIG is there from t = 0.

set changes a group: {"group":NAME, "limits":{…}, "weight":100, "parent":NAME or null}, or a device: {"device":NAME, "limits":{…}, "weight":100, "group":NAME or null}. Limits have the keys and values of CONFIG ("10MiB/s", "unlimited"); what is not named stays. del removes a device: what it holds goes at once, and is charged to its group as far as that makes the others wait no more than 50 ms longer (one request at least). add brings it back as CONFIG has it.

The result: {"t":900000000,"device":"vol1","op":"read","bytes":4096,"arrived":0,"wait":900000000}

In the summary, percentiles are rounded up by at most 0.4 %; "at the limit" is the time during which something waited."#;

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the devices of CONFIG and serve them until SIGTERM
    ///
    /// Stays in the foreground and logs to stderr, one line for each change of state. Says `ready`, and tells
    /// systemd, once every device can be used; if one of them cannot be made, none is. A device whose file or disk is
    /// missing does not hold up the start: its state is `waiting`, W-WAITING in the log gives the reason, and it is
    /// served as soon as the file or disk is there. With `required: true` the start ends with 3 instead. SIGHUP
    /// reloads CONFIG. SIGTERM and SIGINT remove all devices, also those in use (file systems on them are written
    /// back first), and end with 0; a second one does not wait for requests in flight. A device with `on-stop: keep`
    /// is left to the next daemon instead, as all are (but those with `on-crash: fail`) when the daemon dies:
    /// requests wait until it serves them. Swap on a device is not supported: the
    /// daemon may need a free page to write one out.
    Run {
        /// The configuration, YAML
        config: PathBuf,
        /// Take over from the daemon that runs here: it leaves its devices, and requests wait for a moment
        ///
        /// Refused, and nothing happens, if a device cannot be left: one in memory, or with `on-crash: fail`. Where no
        /// daemon runs, this one just starts.
        #[arg(long)]
        takeover: bool,
        /// Which daemon
        #[command(flatten)]
        place: Place,
    },
    /// Check CONFIG and say in plain words what each group and device will be allowed
    ///
    /// Touches nothing: it does not look whether files exist, and needs neither root nor ublk. 0 if sound, 3 if not.
    Check {
        /// The configuration, YAML
        config: PathBuf,
        /// Print what CONFIG says as JSON, with every default
        #[arg(long)]
        json: bool,
    },
    /// List the devices, their limits, and how much is held back at the moment
    ///
    /// When no daemon answers, lists what the last one wrote down, with the state `unserved`.
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Which daemon
        #[command(flatten)]
        place: Place,
    },
    /// Show what devices and groups have done, and what their limits have left
    ///
    /// Without --interval, once, since each device was made. With it, what was done in each interval, as rates per second,
    /// until interrupted. Percentiles are rounded up, by at most 6.25 %; `wait` is that of requests a limit held back,
    /// `service` the time the backend took, `late` how long after its deadline a queue thread let go what was due (the
    /// fault of the machine, not of a limit). A group has done what the devices that are in it and below it now have done.
    Stats {
        /// Only this device or group
        name: Option<String>,
        /// Rates over this time, again and again
        #[arg(long, value_name = "TIME", value_parser = time)]
        interval: Option<Duration>,
        /// End after so many intervals
        #[arg(long, value_name = "N", requires = "interval")]
        count: Option<u64>,
        /// Print JSON, a line each time
        #[arg(long)]
        json: bool,
        /// Which daemon
        #[command(flatten)]
        place: Place,
    },
    /// Make a device while the others go on
    ///
    /// Prints its node; /dev/ublk-throttle/NAME leads there too. If anything fails, nothing of it is left. The device is in
    /// no file: a reload leaves it alone. It outlives a daemon that is killed, and ends with one that is stopped.
    #[command(group = clap::ArgGroup::new("backend").required(true))]
    Add {
        /// What it is to be called
        name: String,
        /// What it is made of
        #[command(flatten)]
        parts: Box<Parts>,
        /// How long to wait until it is there
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
        timeout: Duration,
        /// Print what `list` would show of it, as JSON
        #[arg(long)]
        json: bool,
        /// Which daemon
        #[command(flatten)]
        place: Place,
    },
    /// Remove a device, or a group that nothing is in, while the others go on
    ///
    /// What is held back goes to the backend at once, requests in flight are finished, then the disk disappears. Refused
    /// with 5 if it is mounted, used as swap, part of another disk, or open; the message says by whom.
    #[command(group = clap::ArgGroup::new("which").required(true))]
    Del {
        /// NAME of the configuration, or /dev/ublkbN
        #[arg(group = "which")]
        device: Option<String>,
        /// Remove a group; refused with 5 if devices or groups are in it
        #[arg(long, value_name = "NAME", group = "which")]
        group: Option<String>,
        /// Remove it although it is in use: its users get I/O errors from then on
        #[arg(long, conflicts_with = "group")]
        force: bool,
        /// How long to wait for the end of it; it goes on afterwards
        #[arg(long, value_name = "TIME", default_value = "4.5s", value_parser = time)]
        timeout: Duration,
        /// Print what has gone as JSON
        #[arg(long)]
        json: bool,
        /// Which daemon
        #[command(flatten)]
        place: Place,
    },
    /// Change limits, weights, places and sizes while I/O runs
    ///
    /// Keys and values are those of CONFIG: iops-total=500 bps-read=10MiB/s iops-total-max=unlimited. All of one command
    /// comes into force at one instant, or nothing; what is not named stays. Prints what is in force afterwards. No file
    /// changes: the next `reload` brings back what CONFIG says.
    Set {
        /// Of what
        #[command(subcommand)]
        what: SetWhat,
    },
    /// Make what is in force what CONFIG says, in one transaction or not at all
    ///
    /// Prints the differences. Devices that do not change see nothing of it. Refused with 3 where something cannot
    /// change while a device runs, a device would become smaller, or the backend of a new device is missing, with 5
    /// where a device that is to go is in use; then nothing was changed. Every key of a device that waits for its
    /// backend can change. What `add` made and CONFIG does not name stays as it is. A device whose size
    /// CONFIG leaves open (a block device, a file without `size`) takes the size that is behind it now, if that is
    /// larger and the kernel can (Linux 6.16); else it keeps its own, with W-SIZE-KEPT. If a device comes into use in
    /// the middle of it, its size cannot be had, or the new backend of a device that waits cannot serve, the rest is in
    /// force and the error says what is left to do. SIGHUP to the daemon does the same with the file of its start.
    Reload {
        /// The configuration, YAML; the one the daemon was started with if absent
        config: Option<PathBuf>,
        /// Print what would change, and change nothing; refused where the change would be
        #[arg(long)]
        dry_run: bool,
        /// Make devices smaller, too, where CONFIG says so or what is behind them got smaller: what is behind the new end is lost
        #[arg(long)]
        allow_shrink: bool,
        /// How long devices may take to come and to go
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
        timeout: Duration,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Which daemon
        #[command(flatten)]
        place: Place,
    },
    /// Show what this kernel's ublk offers, and what of it is used
    Features {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Play a trace against CONFIG in virtual time and print when each request would go
    ///
    /// The daemon's own throttle, exact to the nanosecond, the same on every run, without root and without ublk; nothing of
    /// CONFIG but its limits, groups, weights and charges counts. The backend is instant, and a request is there when its
    /// line says so, however many wait already.
    ///
    /// The result is a JSON line for each request at the time when it is let go: its time `t`, and how long it had to
    /// `wait`, in nanoseconds.
    #[command(after_long_help = TRACE)]
    Simulate {
        /// The configuration, YAML
        config: PathBuf,
        /// The trace, JSON lines in the order of time; - for stdin
        #[arg(long, value_name = "FILE")]
        trace: PathBuf,
        /// Print rates and waits of each device and group instead
        #[arg(long)]
        summary: bool,
        /// Print the summary as JSON
        #[arg(long, requires = "summary")]
        json: bool,
    },
    /// Print the manual page of ublk-throttle, of one of its commands, or of its protocol
    ///
    /// To be read with `man -l`: `ublk-throttle man simulate | man -l -`. `ublk-throttle man protocol` is for programs that
    /// talk to the daemon over its socket.
    Man {
        /// The command, or `protocol`
        command: Option<String>,
    },
    /// Print what makes a shell complete our commands and flags
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Prints the points at which a trial may have the daemon killed
    #[cfg(debug_assertions)]
    #[command(name = "__crash-points", hide = true)]
    CrashPoints,
}

/// What `set` changes.
#[derive(Debug, Subcommand)]
pub enum SetWhat {
    /// Change a group: limits, weight=1..10000, parent=NAME|none
    Group {
        /// Its name
        name: String,
        /// KEY=VALUE, as in CONFIG
        #[arg(value_name = "KEY=VALUE", value_parser = pair)]
        settings: Vec<(String, String)>,
        /// Make it if there is none
        #[arg(long)]
        create: bool,
        /// Print what is in force as JSON
        #[arg(long)]
        json: bool,
        /// Which daemon
        #[command(flatten)]
        place: Place,
    },
    /// Change a device: limits, weight=1..10000, group=NAME|none; or, alone, size=20GiB
    ///
    /// A file grows with its device and never shrinks. A device on a block device takes the size of that one and no other.
    /// Another size needs Linux 6.16, a smaller one also that nobody uses the device.
    Device {
        /// NAME of the configuration, or /dev/ublkbN
        name: String,
        /// KEY=VALUE, as in CONFIG
        #[arg(value_name = "KEY=VALUE", value_parser = pair, required = true)]
        settings: Vec<(String, String)>,
        /// How long to wait for another size
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
        timeout: Duration,
        /// Print what is in force as JSON
        #[arg(long)]
        json: bool,
        /// Which daemon
        #[command(flatten)]
        place: Place,
    },
}

/// What a new device is made of, in the words of the configuration.
#[derive(Debug, Args)]
pub struct Parts {
    /// Backed by a file
    #[arg(long, value_name = "PATH", group = "backend")]
    pub file: Option<PathBuf>,
    /// Backed by another block device
    #[arg(long, value_name = "PATH", group = "backend")]
    pub block: Option<PathBuf>,
    /// Backed by memory of the daemon
    #[arg(long, value_name = "SIZE", group = "backend")]
    pub memory: Option<String>,
    /// Backed by nothing: reads give zeroes, writes vanish
    #[arg(long, value_name = "SIZE", group = "backend")]
    pub null: Option<String>,
    /// The size of a file's device [default: that of the file]
    #[arg(long)]
    pub size: Option<String>,
    /// Make the file, of --size, if there is none
    #[arg(long)]
    pub create: bool,
    /// Go around the page cache (O_DIRECT) [default: of a block device, and of a file where its file system can]
    #[arg(long, conflicts_with = "no_direct")]
    pub direct: bool,
    /// Go through the page cache
    #[arg(long)]
    pub no_direct: bool,
    /// Other devices that say the same may write to it too; a disk that is mounted or used otherwise is refused all the same
    #[arg(long)]
    pub shared: bool,
    /// The N of /dev/ublkbN, or auto
    #[arg(long, value_name = "N")]
    pub id: Option<String>,
    /// Queues, each with a thread
    #[arg(long, value_name = "N")]
    pub queues: Option<String>,
    /// Requests that a queue takes at the same time
    #[arg(long, value_name = "N")]
    pub depth: Option<String>,
    /// The group whose limits it shares
    #[arg(long, value_name = "NAME")]
    pub group: Option<String>,
    /// Its share of what the group allows
    #[arg(long, value_name = "1..10000")]
    pub weight: Option<String>,
    /// The logical block, 512 or 4096
    #[arg(long, value_name = "BYTES")]
    pub block_size: Option<String>,
    /// Whether requests go without a copy between kernel and daemon [default: auto]
    #[arg(long, value_name = "auto|on|off")]
    pub zero_copy: Option<String>,
    /// The CPUs that its queue threads may run on, like 0-3,8 [default: all]
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<String>,
    /// A limit of its own, like iops-total=500; may be given again
    #[arg(long = "limit", value_name = "KEY=VALUE", value_parser = pair)]
    pub limits: Vec<(String, String)>,
    /// Refuse writes
    #[arg(long)]
    pub read_only: bool,
}

impl Parts {
    /// Keys and values for the daemon. Paths become absolute: it is in another directory.
    pub fn settings(self) -> Outcome<Vec<(String, String)>> {
        let path = |path: Option<PathBuf>| path.map(|path| absolute(&path)).transpose();
        let flag = |is: bool, word: &str| is.then(|| word.to_owned());
        let direct = flag(self.direct, "true").or(flag(self.no_direct, "false"));
        let given = [
            ("file", path(self.file)?),
            ("block", path(self.block)?),
            ("memory", self.memory),
            ("null", self.null),
            ("size", self.size),
            ("create", flag(self.create, "true")),
            ("direct", direct),
            ("shared", flag(self.shared, "true")),
            ("id", self.id),
            ("queues", self.queues),
            ("depth", self.depth),
            ("group", self.group),
            ("weight", self.weight),
            ("block-size", self.block_size),
            ("read-only", flag(self.read_only, "true")),
            ("zero-copy", self.zero_copy),
            ("cpus", self.cpus),
        ];
        let given = given.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
        Ok(given.chain(self.limits).collect())
    }
}

/// A path for the daemon, which is in another directory. Requests are JSON, so a path that is not UTF-8 has no place in them.
pub fn absolute(path: &Path) -> Outcome<String> {
    let absolute = std::path::absolute(path).or_fail(Class::Failed, "cannot tell the current directory")?;
    absolute.into_os_string().into_string().map_err(|path| {
        let what = format!("{path:?} is not UTF-8, which paths of devices and configurations must be; rename it");
        Failure::new(Class::Config, what)
    })
}

/// Which daemon.
#[derive(Debug, Args)]
pub struct Place {
    /// The daemon's control socket [default: control.sock in the state directory]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// The daemon's state directory, made with mode 0750 if it is not there
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
}

impl Place {
    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| self.state_dir.join("control.sock"))
    }
}

fn time(text: &str) -> Result<Duration, String> {
    let ns = ublk_throttle_config::quantity::parse_seconds(text).map_err(|refusal| refusal.to_string())?;
    Ok(Duration::from_nanos(ns))
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("KEY=VALUE is wanted, like iops-total=500".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_flags_are_consistent() {
        // clap checks names, defaults and conflicts in debug builds.
        Flags::command().debug_assert();
    }

    #[test]
    fn the_socket_follows_the_state_directory() {
        let flags = Flags::parse_from(["ublk-throttle", "list", "--state-dir", "/tmp/x"]);
        let Command::List { place, .. } = flags.command else { panic!("list") };
        assert_eq!(place.socket(), PathBuf::from("/tmp/x/control.sock"));
    }

    #[test]
    fn a_timeout_takes_the_units_of_the_configuration() {
        let flags = Flags::parse_from(["ublk-throttle", "del", "vol1", "--timeout", "500ms"]);
        let Command::Del { timeout, .. } = flags.command else { panic!("del") };
        assert_eq!(timeout, Duration::from_millis(500));
    }

    #[test]
    fn f85_a_path_that_is_not_utf_8_is_refused_by_its_name() {
        // With a replacement character in it, it would be the path of another file.
        let name = OsStr::from_bytes(b"/srv/vol\xff.img");
        let words = [OsStr::new("ublk-throttle"), OsStr::new("add"), OsStr::new("v"), OsStr::new("--file"), name];
        let Command::Add { parts, .. } = Flags::parse_from(words).command else { panic!("add") };
        let refused = parts.settings().unwrap_err();
        assert_eq!(refused.class, Class::Config);
        assert!(refused.message.contains(r"/srv/vol\xFF.img"), "{}", refused.message);
    }

    #[test]
    fn a_device_is_described_in_the_words_of_the_configuration() {
        let words = "ublk-throttle add v --file a/b --size 1GiB --create --no-direct --zero-copy off --cpus 0-3,8 --limit iops=5 --limit bps=1M";
        let flags = Flags::parse_from(words.split(' '));
        let Command::Add { parts, .. } = flags.command else { panic!("add") };
        let settings = parts.settings().unwrap();
        let text = settings.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ");
        let here = std::env::current_dir().unwrap();
        let wanted = format!(
            "file={}/a/b size=1GiB create=true direct=false zero-copy=off cpus=0-3,8 iops=5 bps=1M",
            here.display()
        );
        assert_eq!(text, wanted);
        assert!(Flags::try_parse_from(["ublk-throttle", "add", "v"]).is_err(), "no backend");
        assert!(Flags::try_parse_from("ublk-throttle add v --null 1M --memory 1M".split(' ')).is_err(), "two");
        assert!(Flags::try_parse_from("ublk-throttle del v --group g".split(' ')).is_err(), "two");
    }
}
