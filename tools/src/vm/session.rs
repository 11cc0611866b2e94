//! Runs one boot: writes the guest's input, passes its output on and waits for its end.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::image;
use super::kernel::Kernel;
use super::kernel_log;
use super::machine::{self, Accelerator, Boot};
use super::out::Out;
use super::placement::{Placed, Placement};
use super::{Files, Options};
use crate::process::{last_lines, quote};
use crate::workspace;

/// Task of the guest.
pub enum Command {
    /// A shell on the serial console.
    Shell,
    /// A program and its arguments.
    Run(Vec<String>),
}

/// Environment variables of this process that the guest's command gets, by name or by prefix.
const ENVIRONMENT: [&str; 8] = ["PATH", "HOME", "LANG", "CI", "TERM", "USER", "CARGO_TARGET_DIR", "NO_COLOR"];
const ENVIRONMENT_PREFIXES: [&str; 5] = ["UBLK_THROTTLE_", "RUBLK", "RUST_", "PROPTEST_", "XTASK_"];

/// Time limit for the guest to end after it has written the status.
const LAST_MOMENT: Duration = Duration::from_secs(5);

/// Result of a run.
pub struct Ended {
    out: Out,
    /// Exit status of the command, if the guest reported it.
    status: Option<u8>,
    timed_out: bool,
}

/// Boots the guest, runs `command` and waits for the end.
pub fn run(
    options: &Options,
    command: &Command,
    kernel: &Kernel,
    initramfs: &Path,
    accelerator: Accelerator,
) -> Result<Ended> {
    let out = Out::create()?;
    let cpus = options.cpus.unwrap_or(accelerator.cpus());
    let placement = match (accelerator, &options.files) {
        (Accelerator::TcgClock, Files::Image { .. }) => Placement::in_turns(),
        // Not deterministic, for the host's files: no reason to take a CPU from others.
        (Accelerator::TcgClock, Files::Host { .. }) => Placement::Anywhere,
        _ => Placement::Spread(cpus),
    };
    let boot = |initramfs, seed| {
        let extra = "";
        machine::qemu(&Boot { accelerator, kernel, initramfs, cpus, memory: &options.memory, extra, seed })
    };
    let timed_out = match &options.files {
        Files::Host { share } => {
            if matches!(command, Command::Shell) {
                eprintln!("xtask: kernel {}, {accelerator:?}; `exit` ends the VM", kernel.release);
            }
            let shares = shares(share)?;
            tell(&out, command, kernel, accelerator, &shares)?;
            run_on_host_files(&out, command, boot(initramfs, None), &shares, |child| {
                wait(child, &out, options.timeout, &placement)
            })?
        }
        Files::Image { seed, .. } => {
            let image = out.path.join("image");
            image::with_files(initramfs, &run_files(command, accelerator)?, &image)?;
            run_in_memory(&out, boot(&image, Some(*seed)), |child| wait(child, &out, options.timeout, &placement))?
        }
    };
    Ok(Ended { status: out.status(), out, timed_out })
}

/// Runs a guest with this host's files. Its output comes through virtio ports.
fn run_on_host_files(
    out: &Out,
    command: &Command,
    mut qemu: Process,
    shares: &[PathBuf],
    wait: impl FnOnce(&mut Child) -> Result<bool>,
) -> Result<bool> {
    machine::virtfs(&mut qemu, Path::new("/"), "host", true);
    machine::virtfs(&mut qemu, &out.path, "out", false);
    for (number, folder) in shares.iter().enumerate() {
        machine::virtfs(&mut qemu, folder, &format!("share{number}"), false);
    }
    let mut child;
    let mut copies = Vec::new();
    match command {
        Command::Shell => {
            // signal=off: the guest's shell gets ^C.
            qemu.args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]);
            child = machine::spawn(&mut qemu)?;
        }
        Command::Run(_) => {
            qemu.args(["-serial", &format!("file:{}", machine::comma(&out.path.join("console")))]);
            qemu.args(["-device", "virtio-serial-pci"]);
            for (name, descriptor) in [("stdout", 1), ("stderr", 2)] {
                // By this path QEMU opens the pipe anew: its O_NONBLOCK then does not apply to the
                // inherited descriptor.
                qemu.args(["-chardev", &format!("file,id={name},path=/dev/fd/{descriptor}")]);
                qemu.args(["-device", &format!("virtserialport,chardev={name},name={name}")]);
            }
            qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            child = machine::spawn(&mut qemu)?;
            copies.push(copy(child.stdout.take().expect("piped"), io::stdout()));
            copies.push(copy(child.stderr.take().expect("piped"), io::stderr()));
        }
    }
    let timed_out = wait(&mut child)?;
    for copy in copies {
        let _ = copy.join();
    }
    if matches!(command, Command::Shell) {
        let _ = Process::new("stty").arg("sane").status();
    }
    Ok(timed_out)
}

/// Runs a guest from an initramfs with all its files. Output, kernel log and status come through
/// serial ports (`image.sh`).
fn run_in_memory(out: &Out, mut qemu: Process, wait: impl FnOnce(&mut Child) -> Result<bool>) -> Result<bool> {
    for name in ["console", "output", "dmesg", "status"] {
        let path = out.path.join(name);
        out.write(name, "")?;
        qemu.args(["-serial", &format!("file:{}", machine::comma(&path))]);
    }
    let mut child = machine::spawn(qemu.stdin(Stdio::null()))?;
    let has_ended = Arc::new(AtomicBool::new(false));
    let follower = follow(out.path.join("output"), Arc::clone(&has_ended))?;
    let timed_out = wait(&mut child);
    has_ended.store(true, Ordering::Release);
    let _ = follower.join();
    timed_out
}

impl Ended {
    /// Prints errors and returns the exit code. The run's folder is kept if the guest reported no
    /// status or its kernel complained.
    pub fn report(self, options: &Options) -> u8 {
        let log = self.out.read("dmesg");
        let trouble = kernel_log::trouble(&log);
        for line in &trouble {
            eprintln!("xtask: the guest's kernel logged: {line}");
        }
        if !trouble.is_empty() {
            eprintln!("xtask: the first of it:\n{}", kernel_log::first_trace(&log));
        }
        let code = match self.status {
            _ if self.timed_out => {
                let limit = options.timeout.unwrap_or_default();
                eprintln!("xtask: killed the guest: the command ran longer than {} s (--timeout)", limit.as_secs());
                124
            }
            None => {
                eprintln!("xtask: the guest ended without telling an exit status");
                125
            }
            Some(0) if options.check_dmesg && !trouble.is_empty() => 126,
            Some(status) => status,
        };
        if self.status.is_none() {
            eprintln!("xtask: the last lines of its console:\n{}", last_lines(&self.out.read("console"), 30));
        }
        if self.out.path.join("cut").exists() {
            eprintln!("xtask: programs that the command left behind hold its output; the end of it may be missing");
        }
        if self.status.is_none() || !trouble.is_empty() {
            eprintln!("xtask: see {}", self.out.path.display());
        } else {
            self.out.remove();
        }
        code
    }
}

/// Canonical paths of existing folders. QEMU opens the shares, and the guest mounts them, without
/// symlinks.
fn shares(folders: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let canonical = |folder: &PathBuf| {
        folder.canonicalize().with_context(|| format!("--share {}: no such folder", folder.display()))
    };
    folders.iter().map(canonical).collect()
}

/// Writes the input files of `init.sh` and `guest.sh`, for a guest with this host's files.
fn tell(out: &Out, command: &Command, kernel: &Kernel, accelerator: Accelerator, shares: &[PathBuf]) -> Result<()> {
    let folder = |path: &Path| quote(&path.to_string_lossy());
    let at = folder(&out.path);
    let mut mounts = format!("OUT={at}\nkeep {}\nkeep {}\n", folder(workspace::root()), folder(&workspace::target()));
    writeln!(mounts, "modules {} {}", folder(&kernel.modules()), quote(&kernel.release))?;
    for (number, share) in shares.iter().enumerate() {
        writeln!(mounts, "share share{number} {}", folder(share))?;
    }
    out.write("mounts.sh", &mounts)?;

    let mut script = format!("OUT={at}\nexport XTASK_VM_OUT={at}\n");
    script.push_str(&preparation(accelerator, is_passed_on)?);
    script.push_str(include_str!("guest.sh"));
    out.write("guest.sh", &script)?;

    match command {
        Command::Shell => out.write("shell", &terminal_size()),
        Command::Run(words) => out.write("command.sh", &exec(words)),
    }
}

/// Input files of `image.sh`, by name.
fn run_files(command: &Command, accelerator: Accelerator) -> Result<[(&'static str, String); 2]> {
    let Command::Run(words) = command else {
        bail!("a guest whose files are in its memory has no shell: name a command")
    };
    // Only variables with `ENVIRONMENT_PREFIXES`: the environment lies on the stack, so the host's
    // PATH or HOME would shift addresses in the guest.
    let script = preparation(accelerator, is_ours)? + include_str!("image_run.sh");
    Ok([("guest.sh", script), ("command.sh", exec(words))])
}

/// First part of the guest's script: working folder, environment variables, `prepare.sh`.
fn preparation(accelerator: Accelerator, is_passed_on: impl Fn(&str) -> bool) -> Result<String> {
    let here = env::current_dir().unwrap_or_else(|_| workspace::root().to_owned());
    let here = if here.starts_with(workspace::root()) { here } else { workspace::root().to_owned() };
    let mut script = format!("FOLDER={}\n", quote(&here.to_string_lossy()));
    for (name, value) in env::vars().filter(|(name, _)| is_passed_on(name)) {
        writeln!(script, "export {name}={}", quote(&value))?;
    }
    writeln!(script, "export PATH=\"$PATH:/usr/sbin:/sbin:/usr/bin:/bin\"")?;
    let counts = accelerator == Accelerator::TcgClock;
    writeln!(script, "export XTASK_VM_CLOCK={}", if counts { "instructions" } else { "host" })?;
    script.push_str(include_str!("prepare.sh"));
    Ok(script)
}

/// Shell script that executes the command.
fn exec(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| quote(word)).collect();
    format!("exec {}\n", words.join(" "))
}

fn is_passed_on(name: &str) -> bool {
    ENVIRONMENT.contains(&name) || is_ours(name)
}

fn is_ours(name: &str) -> bool {
    ENVIRONMENT_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Terminal size as `rows R cols C` for stty, because a serial line does not transmit it.
fn terminal_size() -> String {
    let size = Process::new("stty").arg("size").stdin(Stdio::inherit()).output();
    let size = size.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    match size.split_whitespace().collect::<Vec<_>>()[..] {
        [rows, columns] if io::stdin().is_terminal() => format!("rows {rows} cols {columns}"),
        _ => String::new(),
    }
}

fn copy(mut from: impl Read + Send + 'static, mut to: impl Write + Send + 'static) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = [0; 16 * 1024];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            // The reader of our output may be gone (`| head`); the guest must not block on a full
            // pipe.
            let _ = to.write_all(&buffer[..count]).and_then(|()| to.flush());
        }
    })
}

/// Copies a file that QEMU appends to, to standard output until QEMU has ended.
fn follow(path: PathBuf, has_ended: Arc<AtomicBool>) -> Result<JoinHandle<()>> {
    let mut file = fs::File::open(&path).with_context(|| path.display().to_string())?;
    Ok(thread::spawn(move || {
        loop {
            // Load before reading, so that output written in between is read in this pass. Pairs
            // with the store in `run_in_memory`.
            let is_last = has_ended.load(Ordering::Acquire);
            let mut out = io::stdout().lock();
            let _ = io::copy(&mut file, &mut out).and_then(|_| out.flush());
            drop(out);
            if is_last {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }))
}

/// Waits for QEMU's end, and places its threads once all of them have started. Kills QEMU when the
/// time limit has passed (returns true) or when it still runs [`LAST_MOMENT`] after the status
/// (returns false).
fn wait(child: &mut Child, out: &Out, limit: Option<Duration>, placement: &Placement) -> Result<bool> {
    let start = Instant::now();
    let mut placed = Placed::NotYet;
    let mut told: Option<Instant> = None;
    loop {
        if child.try_wait()?.is_some() {
            return Ok(false);
        }
        if placed == Placed::NotYet {
            placed = placement.place(child.id());
            if let Placed::Refused(reason) = &placed {
                eprintln!("xtask: {reason}");
            }
        }
        if told.is_none() && out.status().is_some() {
            told = Some(Instant::now());
        }
        let lingers = told.is_some_and(|at| at.elapsed() > LAST_MOMENT);
        let late = told.is_none() && limit.is_some_and(|limit| start.elapsed() > limit);
        if lingers || late {
            child.kill()?;
            child.wait()?;
            return Ok(late);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_gets_our_switches_and_not_our_secrets() {
        // Variables control the tests; the rest of the environment stays on the host.
        assert!(is_passed_on("UBLK_THROTTLE_BIN") && is_passed_on("RUST_BACKTRACE") && is_passed_on("CI"));
        assert!(!is_passed_on("AWS_SECRET_ACCESS_KEY") && !is_passed_on("CARGO_REGISTRY_TOKEN"));
    }
}
