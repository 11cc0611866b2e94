//! The command line: every flag, its help, its default. Nothing is done here.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

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
  1  failed at run time                  5  refused: busy or conflict, nothing changed
  2  wrong usage                         6  not permitted
  3  configuration refused               7  timed out, the daemon still works on it

An error is one line on stderr, `error[E-CLASS]: what; what to do`; E-CLASS never changes its meaning.";

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
    /// Stays in the foreground and logs to stderr, one line for each change of state. Prints `ready`, and tells systemd,
    /// once every device can be used; if one of them cannot be made, none is. SIGTERM and SIGINT remove all devices, also
    /// those in use (file systems on them are written back first), and end with 0. A second signal does not wait.
    Run {
        /// The configuration, YAML
        config: PathBuf,
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
        /// Print the devices and groups as JSON
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
    /// Remove a device while the others go on
    ///
    /// What is held back goes to the backend at once, requests in flight are finished, then the disk disappears. Refused
    /// with 5 if it is mounted, used as swap, part of another disk, or open; the message says by whom.
    Del {
        /// NAME of the configuration, or /dev/ublkbN
        device: String,
        /// Remove it although it is in use: its users get I/O errors from then on
        #[arg(long)]
        force: bool,
        /// How long to wait for the end of it
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
        timeout: Duration,
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
    /// Print the manual page of ublk-throttle or of one of its commands
    ///
    /// To be read with `man -l`: `ublk-throttle man simulate | man -l -`.
    Man {
        /// The command
        command: Option<String>,
    },
    /// Print what makes a shell complete our commands and flags
    Completions {
        /// The shell
        shell: Shell,
    },
    /// START in a process of its own
    #[command(name = "__start", hide = true)]
    HelpStart {
        /// The N of /dev/ublkbN
        id: u32,
        /// What ADD stored
        nonce: u32,
        /// The process that serves it
        server: u32,
    },
    /// A removal in a process of its own
    #[command(name = "__stop", hide = true)]
    HelpStop {
        /// The N of /dev/ublkbN
        id: u32,
        /// What ADD stored
        nonce: u32,
        /// Also if in use
        #[arg(long)]
        force: bool,
    },
    /// UPDATE_SIZE in a process of its own
    #[command(name = "__resize", hide = true)]
    HelpResize {
        /// The N of /dev/ublkbN
        id: u32,
        /// What ADD stored
        nonce: u32,
        /// Bytes
        size: u64,
        /// Only if nobody uses it
        #[arg(long)]
        shrink: bool,
    },
    /// DEL in a process of its own
    #[command(name = "__del", hide = true)]
    HelpDel {
        /// The N of /dev/ublkbN
        id: u32,
        /// What ADD stored
        nonce: u32,
    },
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

#[cfg(test)]
mod tests {
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
}
