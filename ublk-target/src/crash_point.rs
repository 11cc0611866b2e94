//! Points between two steps, at which a trial kills the daemon, a helper, or both.
//!
//! ```text
//!   a line of $UBLK_THROTTLE_CRASH_FILE  "added"                  the process that reaches the point kills itself
//!                                        "helper-stopped"         a helper there kills its daemon, and itself
//!                                        "helper-stopped/daemon"  only its daemon
//!                                        "helper-stopped/helper"  only itself
//!                                        "helper-stopped/stop"    no process: the helper stops (SIGSTOP)
//!                                        "helper-starting/late"   only its daemon, and goes on once the daemon is gone,
//!                                                                 as a command does that the kernel had begun already
//! ```
//!
//! Each line serves one process and is then removed; the file goes with its last line.
//!
//! Only debug builds contain this; in release builds [`at`] does nothing. A new point is added to
//! [`Point::ALL`], from which the trials take the points. A trial fails if the work that is named
//! for a point does not pass it.

/// The work during which a point is passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A device is being made, by `add` or by a reload.
    Making,
    /// A device is being removed, by `del` or by a reload.
    Removing,
    /// The devices of an earlier daemon are being recovered.
    Recovering,
    /// A configuration is being brought into force.
    Reloading,
    /// A disk gets another size.
    Resizing,
}

macro_rules! points {
    ($($point:ident $name:literal $work:ident $helper:literal)+) => {
        /// A point between two steps.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Point { $(#[doc = $name] $point),+ }

        impl Point {
            /// Every point: its name, its work, and whether it is in a helper process.
            pub const ALL: &[(Self, &'static str, Work, bool)] = &[$((Self::$point, $name, Work::$work, $helper)),+];
        }
    };
}

points! {
    StateBeside "state-beside" Making false
    StateRenamed "state-renamed" Making false
    StateWritten "state-written" Making false
    HelperAdding "helper-adding" Making true
    HelperAdded "helper-added" Making true
    Added "added" Making false
    IdWritten "id-written" Making false
    ParamsSet "params-set" Making false
    QueuesReady "queues-ready" Making false
    HelperStarting "helper-starting" Making true
    HelperStarted "helper-started" Making true
    StartReturned "start-returned" Making false
    Published "published" Making false
    Settled "settled" Making false
    Reopened "reopened" Recovering false
    RecoveryBegun "recovery-begun" Recovering false
    QueueMapped "queue-mapped" Recovering false
    QueueOffered "queue-offered" Recovering false
    RecoveryReady "recovery-ready" Recovering false
    HelperRecovering "helper-recovering" Recovering true
    HelperRecovered "helper-recovered" Recovering true
    RecoveryReturned "recovery-returned" Recovering false
    Recovered "recovered" Recovering false
    Claimed "claimed" Removing false
    Drained "drained" Removing false
    HelperClaiming "helper-claiming" Removing true
    HelperWriting "helper-writing" Removing true
    HelperStopping "helper-stopping" Removing true
    HelperStopped "helper-stopped" Removing true
    Stopped "stopped" Removing false
    Closed "closed" Removing false
    Unlinked "unlinked" Removing false
    HelperDeleting "helper-deleting" Removing true
    HelperDeleted "helper-deleted" Removing true
    Deleted "deleted" Removing false
    ReloadApplied "reload-applied" Reloading false
    HelperResizing "helper-resizing" Resizing true
    HelperResized "helper-resized" Resizing true
}

/// Does nothing in a release build.
#[cfg(not(debug_assertions))]
pub const fn at(_: Point) {}

/// Kills or stops the processes that the line of `point` names, if the file has one.
#[cfg(debug_assertions)]
pub fn at(point: Point) {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::{getpid, getppid};

    let Some((_, name, _, is_helper)) = Point::ALL.iter().find(|(other, ..)| *other == point) else { return };
    let Some(how) = taken(name) else { return };
    let daemon = getppid();
    if how == "stop" {
        let _ = kill(getpid(), Signal::SIGSTOP);
        return;
    }
    if how == "late" {
        let _ = nix::sys::prctl::set_pdeathsig(None);
    }
    if *is_helper && how != "helper" {
        let _ = kill(daemon, Signal::SIGKILL);
    }
    if !*is_helper || how.is_empty() || how == "helper" {
        let _ = kill(getpid(), Signal::SIGKILL);
    }
    while how == "late" && getppid() == daemon {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Removes the line of `point` from the file and returns the part behind its `/` (empty without
/// one); `None` if the file has no such line.
#[cfg(debug_assertions)]
fn taken(point: &str) -> Option<String> {
    let path = std::env::var_os("UBLK_THROTTLE_CRASH_FILE")?;
    let named = |line: &str| line.split_once('/').unwrap_or((line, "")).0 == point;
    if !std::fs::read_to_string(&path).ok()?.lines().any(named) {
        return None;
    }
    // Only one process succeeds in renaming the file, so a line serves once.
    let own = format!("{}.{}", path.display(), std::process::id());
    std::fs::rename(&path, &own).ok()?;
    let wanted = std::fs::read_to_string(&own).ok()?;
    let mut lines: Vec<&str> = wanted.lines().collect();
    let found = lines.iter().position(|line| named(line)).map(|at| lines.remove(at));
    if !lines.is_empty() {
        std::fs::write(&own, lines.join("\n")).ok()?;
        std::fs::rename(&own, &path).ok()?;
    } else {
        std::fs::remove_file(&own).ok()?;
    }
    found.map(|line| line.split_once('/').map_or("", |(_, how)| how).to_owned())
}

/// Prints every point: its name, its work, `helper` or `daemon`.
#[cfg(debug_assertions)]
pub fn list() {
    for (_, name, work, is_helper) in Point::ALL {
        println!("{name} {work:?} {}", if *is_helper { "helper" } else { "daemon" });
    }
}
