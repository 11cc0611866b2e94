//! Resources of a process: memory, descriptors, threads, CPU time.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::gettid;

/// Resources of a process at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Anonymous resident memory in KiB (without files).
    pub rss_kib: u64,
    /// Open descriptors.
    pub descriptors: usize,
    /// Number of threads.
    pub threads: u64,
}

impl Holdings {
    /// Reads the resources of a process.
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

/// A part of a program or library that a process has mapped to be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code {
    /// The file.
    pub path: String,
    /// In KiB.
    pub kib: u64,
    /// How much of it is in memory, in KiB.
    pub resident_kib: u64,
}

impl Code {
    /// All that a process has mapped.
    pub fn all_of(pid: u32) -> Result<Vec<Self>> {
        let path = format!("/proc/{pid}/smaps");
        Self::read(&fs::read_to_string(&path).with_context(|| path.clone())?)
    }

    /// A mapping is a line `55d0c3a00000-55d0c3b00000 r-xp 00042000 00:02 1234   /usr/bin/program`, and a line for each of its
    /// numbers: `Size: 1024 kB`.
    fn read(smaps: &str) -> Result<Vec<Self>> {
        let mut found: Vec<Option<Self>> = Vec::new();
        for line in smaps.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                [range, rights, _, _, _, ..] if range.contains('-') => found.push(
                    words.get(5).filter(|path| rights.contains('x') && path.starts_with('/')).map(|path| Self {
                        path: (*path).to_owned(),
                        kib: 0,
                        resident_kib: 0,
                    }),
                ),
                ["Size:", kib, "kB"] => {
                    if let Some(Some(code)) = found.last_mut() {
                        code.kib = kib.parse()?;
                    }
                }
                ["Rss:", kib, "kB"] => {
                    if let Some(Some(code)) = found.last_mut() {
                        code.resident_kib = kib.parse()?;
                    }
                }
                _ => {}
            }
        }
        Ok(found.into_iter().flatten().collect())
    }
}

/// A thread of a process at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Name of the thread, at most 15 characters.
    pub name: String,
    /// CPUs on which the thread may run.
    pub cpus: BTreeSet<u32>,
    /// Nice value: the scheduler prefers lower values.
    pub nice: i32,
}

impl Thread {
    /// All threads of a process. A thread that ends during the call is left out.
    pub fn all_of(pid: u32) -> Result<Vec<Self>> {
        let path = format!("/proc/{pid}/task");
        let tasks = fs::read_dir(&path).with_context(|| path.clone())?.flatten();
        let read = |task: &fs::DirEntry, file: &str| fs::read_to_string(task.path().join(file)).ok();
        tasks
            .filter_map(|task| read(&task, "status").zip(read(&task, "stat")))
            .map(|(status, stat)| {
                let value = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).context("no such line");
                let name = value("Name:")?.trim().to_owned();
                // The name is in parentheses and may contain any character. Field 3 of `stat`
                // follows the last `)`, so index 16 is field 19, the nice value.
                let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
                let nice = fields.and_then(|fields| fields.split_whitespace().nth(16)).context("no nice value")?;
                Ok(Self { name, cpus: cpu_list(value("Cpus_allowed_list:")?)?, nice: nice.parse()? })
            })
            .collect()
    }
}

/// Raises the priority of this thread to nice -5, the value of the daemon's control thread. A
/// measured time is then that of the answer, without this thread's own wait for a CPU.
pub fn prefer_this_thread() -> Result<()> {
    let thread = gettid().to_string();
    let status = Command::new("renice").args(["-n", "-5", "-p", &thread]).stdout(Stdio::null()).status();
    ensure!(status.context("renice (of bsdutils)")?.success(), "renice failed");
    Ok(())
}

/// CPU time of a thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ran {
    /// Nanoseconds on a CPU. In a virtual machine they include time that the host withheld (steal
    /// time).
    pub ns: u64,
    /// Number of times that the scheduler ran the thread.
    pub times: u64,
}

/// CPU time of each thread of a process, with the thread's id and name. A thread that ends during
/// the call is left out.
pub fn ran(pid: u32) -> Result<Vec<(String, Ran)>> {
    let path = format!("/proc/{pid}/task");
    let mut all = Vec::new();
    for task in fs::read_dir(&path).with_context(|| path.clone())?.flatten() {
        let read = |file: &str| fs::read_to_string(task.path().join(file));
        let (Ok(name), Ok(schedstat)) = (read("comm"), read("schedstat")) else { continue };
        // schedstat: ns on a CPU, ns in a run queue, number of runs.
        let numbers = schedstat.split_whitespace().map(str::parse).collect::<Result<Vec<u64>, _>>();
        let [ns, _, times] = numbers?[..] else { bail!("schedstat: {schedstat:?}") };
        let number = task.file_name().to_string_lossy().into_owned();
        all.push((format!("{number} {}", name.trim()), Ran { ns, times }));
    }
    Ok(all)
}

/// Resident memory of a process in KiB, including files.
pub fn resident_kib(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    line.split_whitespace().next().context("no number")?.parse().with_context(|| format!("VmRSS:{line}"))
}

/// Parses a list of CPUs in the kernel's format: `0-3,8`.
pub fn cpu_list(text: &str) -> Result<BTreeSet<u32>> {
    let mut cpus = BTreeSet::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.trim().parse::<u32>().with_context(|| format!("{text:?} in {part:?}"));
        cpus.extend(number(first)?..=number(last)?);
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::wait;

    #[test]
    fn a_list_of_cpus_is_read_as_the_kernel_writes_it() {
        assert_eq!(cpu_list("0-2,8\n").unwrap(), BTreeSet::from([0, 1, 2, 8]));
        assert_eq!(cpu_list(" 5").unwrap(), BTreeSet::from([5]));
        assert!(cpu_list("0-x").is_err());
        let own = Thread::all_of(std::process::id()).unwrap();
        assert!(own.iter().any(|thread| !thread.cpus.is_empty()), "{own:?}");
    }

    #[test]
    fn a_process_that_sleeps_holds_its_streams_and_one_thread() {
        // Measured on a separate process: tests that run beside this one open and close files of
        // their own.
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let held = wait::until("start of sleep", Duration::from_secs(5), || {
            // Before its exec, the child is a copy of this process.
            let name = fs::read_to_string(format!("/proc/{}/comm", child.id()))?;
            Ok(if name == "sleep\n" { Some(Holdings::of(child.id())?) } else { None })
        });
        wait::kill(&mut child);
        let held = held.unwrap();
        assert!(held.descriptors >= 3 && held.threads == 1, "{held:?}");
        assert!((1..100_000).contains(&held.rss_kib), "{held:?}");
    }
}
