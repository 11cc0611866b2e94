//! What a process holds: memory, descriptors, threads.

use std::fs;

use anyhow::{Context, Result};

/// What a process holds at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Resident memory that is its own (not of files), in KiB.
    pub rss_kib: u64,
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: u64,
}

impl Holdings {
    /// Those of a process.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/status");
        let status = fs::read_to_string(&path).with_context(|| path.clone())?;
        let number = |key: &str| -> Result<u64> {
            let line =
                status.lines().find_map(|line| line.strip_prefix(key)).with_context(|| format!("{path}: {key}"))?;
            line.split_whitespace().next().context("no number")?.parse().with_context(|| format!("{path}: {key}"))
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        Ok(Self { rss_kib: number("RssAnon:")?, descriptors, threads: number("Threads:")? })
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;
    use crate::wait;

    #[test]
    fn a_process_that_sleeps_holds_its_streams_and_one_thread() {
        // Of another process: the tests beside this one open and close files as they like.
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let held = wait::until("start of sleep", Duration::from_secs(5), || {
            // Before the exec it is a copy of this process.
            let name = fs::read_to_string(format!("/proc/{}/comm", child.id()))?;
            Ok(if name == "sleep\n" { Some(Holdings::of(child.id())?) } else { None })
        });
        wait::kill(&mut child);
        let held = held.unwrap();
        assert!(held.descriptors >= 3 && held.threads == 1, "{held:?}");
        assert!((1..100_000).contains(&held.rss_kib), "{held:?}");
    }
}
