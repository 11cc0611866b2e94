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
    use super::*;

    #[test]
    fn own_holdings_grow_with_what_is_taken() {
        // A file more, 8 MiB more.
        let before = Holdings::of(std::process::id()).unwrap();
        let taken = (fs::File::open("/dev/null").unwrap(), vec![1_u8; 8 << 20]);
        let after = Holdings::of(std::process::id()).unwrap();
        assert!(after.descriptors > before.descriptors, "{before:?} {after:?}");
        assert!(after.rss_kib >= before.rss_kib + 7 * 1024, "{before:?} {after:?}");
        drop(taken);
    }
}
