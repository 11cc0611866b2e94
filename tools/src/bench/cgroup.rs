//! Control groups: processor time by group, and the kernel's own throttle.
//!
//! A control group accounts CPU time in microseconds, includes children and threads that have
//! ended, and needs no controller. `/proc/PID/stat` counts in hundredths of a second, and the sum
//! over `/proc/PID/task` lacks threads that have ended.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};

const ROOT: &str = "/sys/fs/cgroup";

/// A control group, created empty and removed when dropped.
pub struct Cgroup {
    path: PathBuf,
}

/// Mounts the cgroup2 hierarchy unless it is mounted, and enables the controller `io` for its
/// children.
pub fn prepare() -> Result<()> {
    let controllers = Path::new(ROOT).join("cgroup.controllers");
    if !controllers.exists() {
        mount(Some("cgroup2"), ROOT, Some("cgroup2"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount cgroup2 at {ROOT}"))?;
    }
    let control = Path::new(ROOT).join("cgroup.subtree_control");
    fs::write(&control, "+io").with_context(|| format!("cannot enable the controller io in {}", control.display()))
}

impl Cgroup {
    /// Creates the group `bench-NAME`.
    pub fn create(name: &str) -> Result<Cgroup> {
        let path = Path::new(ROOT).join(format!("bench-{name}"));
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Cgroup { path })
    }

    /// Moves a process with all its threads into the group. Its later children start in the group.
    pub fn add(&self, pid: u32) -> Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// Writes a control file of the group.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::write(&path, text).with_context(|| format!("cannot write {text:?} to {}", path.display()))
    }

    /// Processor time that the group has used.
    pub fn usage(&self) -> Result<Duration> {
        let path = self.path.join("cpu.stat");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        usage(&text).with_context(|| format!("{} has no usage_usec", path.display()))
    }

    /// Freezes or thaws all processes of the group, and waits until that is done.
    pub fn freeze(&self, is_frozen: bool, limit: Duration) -> Result<()> {
        self.write("cgroup.freeze", if is_frozen { "1" } else { "0" })?;
        let (path, until) = (self.path.join("cgroup.events"), Instant::now() + limit);
        loop {
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            if text.lines().any(|line| line == if is_frozen { "frozen 1" } else { "frozen 0" }) {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("{} is not frozen or thawed within {} s", self.path.display(), limit.as_secs());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Processes of the group.
    pub fn pids(&self) -> Result<Vec<u32>> {
        let path = self.path.join("cgroup.procs");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Resident memory of the group's processes, in bytes. A page shared by two processes counts
    /// twice.
    pub fn resident(&self) -> Result<u64> {
        let mut total = 0;
        for pid in self.pids()? {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            total += resident(&status).unwrap_or(0);
        }
        Ok(total)
    }

    /// Waits until the group has no process.
    pub fn wait_until_empty(&self, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        loop {
            let pids = self.pids()?;
            if pids.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("processes {pids:?} of {} did not end within {} s", self.path.display(), limit.as_secs());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
        let _ = self.wait_until_empty(Duration::from_secs(5));
        let _ = fs::remove_dir(&self.path);
    }
}

fn usage(cpu_stat: &str) -> Option<Duration> {
    let line = cpu_stat.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
    line.trim().parse().ok().map(Duration::from_micros)
}

fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_of_the_kernel_are_read() {
        // Lines in the format of the files. `VmHWM` has the same form as `VmRSS`.
        assert_eq!(usage("usage_usec 1234\nuser_usec 1000\n"), Some(Duration::from_micros(1234)));
        assert_eq!(resident("VmHWM:\t    900 kB\nVmRSS:\t    800 kB\n"), Some(800 * 1024));
    }
}
