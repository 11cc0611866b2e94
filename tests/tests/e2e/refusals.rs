//! Refusals: exit code, a message with the place and a remedy, and no change.
//!
//! Exit codes: 2 usage, 3 configuration, 5 busy or conflict, 6 not permitted.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ublk_throttle_tests::command::{self, Outcome};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::{COMMAND_LIMIT, Scene};

use crate::measure::{expect_all, expect_in_time};
use crate::{Case, cases, error_count};

/// Bound of the answer to a broken file.
const CHECK_LIMIT: Duration = Duration::from_secs(1);

/// Bound on the length of a message, in lines.
const MESSAGE_LINES: usize = 40;

pub(crate) fn cases() -> Vec<Case> {
    let anywhere = cases![[];
        f35_check_refuses_every_broken_file_and_says_where,
        check_accepts_every_example,
        f35_check_of_what_is_no_readable_file_is_refused,
        wrong_usage_is_refused_with_a_hint,
        commands_without_a_daemon_say_so,
    ];
    let ublk = cases![[Need::Ublk];
        f35_run_refuses_broken_files_without_making_a_device,
        f27_run_refuses_a_backing_that_cannot_serve,
        f15_second_daemon_on_a_state_directory_is_refused_and_the_first_unhurt,
        f14_run_without_privileges_is_refused,
        commands_about_unknown_devices_are_refused,
    ];
    anywhere.into_iter().chain(ublk).collect()
}

/// The files with this extension in a folder of the configuration crate, sorted.
pub(crate) fn files(folder: &str, extension: &str) -> Result<Vec<PathBuf>> {
    let folder = ublk_throttle_tests::workspace().join("config").join(folder);
    let entries = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension() == Some(OsStr::new(extension)));
    paths.sort();
    Ok(paths)
}

/// Copies a broken file into the scene, under the name that its expected message uses. Returns name
/// and message.
fn broken(scene: &Scene, path: &Path) -> Result<(String, String)> {
    let name = path.file_name().context("no file name")?.to_string_lossy().into_owned();
    fs::copy(path, scene.dir().join(&name))?;
    let expected = path.with_extension("expected");
    Ok((name, fs::read_to_string(&expected).with_context(|| expected.display().to_string())?))
}

fn expect_refusal(outcome: Outcome, expected: &str) -> Result<()> {
    let outcome = outcome.expect_code(3)?.expect_no_panic()?.expect_stderr(&[expected.trim()])?;
    expect_in_time(&outcome, outcome.took, CHECK_LIMIT)?;
    ensure!(outcome.stderr.lines().count() <= MESSAGE_LINES, "too long a message\n{outcome}");
    Ok(())
}

fn f35_check_refuses_every_broken_file_and_says_where(scene: &Scene) -> Result<()> {
    // Exit 3 and each message word for word, with line and column. The suite promises at least 30
    // kinds of broken files.
    let paths = files("tests/broken", "yaml")?;
    ensure!(paths.len() >= 30, "{} broken files", paths.len());
    eprintln!("          {} broken files", paths.len());
    expect_all(paths.iter().map(|path| {
        let (name, expected) = broken(scene, path)?;
        ensure!(expected.contains(&format!("{name}:")), "{name}: the expected message names no place:\n{expected}");
        expect_refusal(scene.run(&["check", &name])?, &expected)
    }))
}

fn f35_run_refuses_broken_files_without_making_a_device(scene: &Scene) -> Result<()> {
    // The same answer as from `check`; no device, state or socket is made. Every fifth file
    // suffices, as `run` and `check` share the reader.
    expect_all(files("tests/broken", "yaml")?.iter().step_by(5).map(|path| {
        let (name, expected) = broken(scene, path)?;
        expect_refusal(scene.ask(&["run", &name])?, &expected)?;
        ensure!(!scene.socket().exists(), "{name}: a socket was made");
        scene.expect_nothing_left().with_context(|| name)
    }))
}

fn check_accepts_every_example(scene: &Scene) -> Result<()> {
    // Newcomers copy the examples: `check` ends with 0 and describes each.
    let paths = files("examples", "yaml")?;
    ensure!(!paths.is_empty(), "no examples");
    expect_all(paths.iter().map(|path| {
        let outcome = scene.run(&[OsStr::new("check"), path.as_os_str()])?.expect_code(0)?;
        ensure!(!outcome.stdout.trim().is_empty(), "{} is accepted without a word", path.display());
        Ok(())
    }))
}

fn f35_check_of_what_is_no_readable_file_is_refused(scene: &Scene) -> Result<()> {
    // Exit 3 and the path, for a missing file, a directory and an endless file.
    fs::create_dir(scene.dir().join("folder"))?;
    expect_all(
        ["missing.yaml", "folder", "/dev/zero"].map(|path| {
            scene.run(&["check", path])?.expect_code(3)?.expect_stderr(&["error[E-CONFIG]", path]).map(drop)
        }),
    )
}

fn wrong_usage_is_refused_with_a_hint(scene: &Scene) -> Result<()> {
    // Exit 2 and a hint at correct usage.
    let wrong: [&[&str]; 4] = [&[], &["chek"], &["check"], &["list", "--jsno"]];
    expect_all(wrong.map(|words| scene.run(words)?.expect_code(2)?.expect_stderr(&["Usage"]).map(drop)))?;
    scene.run(&["chek"])?.expect_stderr(&["check"])?;
    scene.run(&["list", "--jsno"])?.expect_stderr(&["--json"]).map(drop)
}

fn commands_without_a_daemon_say_so(scene: &Scene) -> Result<()> {
    // Exit 4 and the path of the socket.
    let socket = scene.socket().display().to_string();
    scene.ask(&["del", "nothing"])?.expect_code(4)?.expect_stderr(&["error[", &socket]).map(drop)
}

fn f27_run_refuses_a_backing_that_cannot_serve(scene: &Scene) -> Result<()> {
    // Exit 3 and the path; the sound device of the same configuration is not made either. `required: true`,
    // because a device waits for a path that leads to no file.
    let folder = scene.dir().join("folder");
    fs::create_dir(&folder)?;
    let fifo = scene.dir().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
    let wrong = [
        ("file", folder),
        ("file", fifo),
        ("file", scene.dir().join("missing.img")),
        ("file", scene.dir().join("no-folder/disk.img")),
        ("block", PathBuf::from("/dev/null")),
        ("block", scene.dir().join("missing")),
    ];
    expect_all(wrong.iter().map(|(kind, path)| {
        let path = path.display().to_string();
        let config = format!(
            "version: 1\ndevices:\n  sound: {{ backend: {{ null: 1MiB }} }}\n  wrong: {{ backend: {{ {kind}: {path} }}, required: true }}\n"
        );
        scene.write("wrong.yaml", &config)?;
        scene.ask(&["run", "wrong.yaml"])?.expect_code(3)?.expect_stderr(&["error[E-BACKING]", &path])?;
        scene.expect_nothing_left().with_context(|| path)
    }))
}

fn f15_second_daemon_on_a_state_directory_is_refused_and_the_first_unhurt(scene: &Scene) -> Result<()> {
    // Exit 5 and the pid of the first daemon, also with a socket of its own. The first daemon
    // serves on.
    let mut first = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 1MiB } }\n")?;
    let config = scene.write("second.yaml", "version: 1\ndevices:\n  other: { backend: { null: 1MiB } }\n")?;
    let state_dir = scene.state_dir();
    let words = [
        OsStr::new("run"),
        config.as_os_str(),
        OsStr::new("--socket"),
        OsStr::new("second.sock"),
        OsStr::new("--state-dir"),
        state_dir.as_os_str(),
    ];
    scene.run(&words)?.expect_code(5)?.expect_stderr(&["error[E-LOCKED]", &first.pid().to_string()])?;
    ensure!(!scene.dir().join("second.sock").exists(), "the second daemon left a socket");
    ensure!(first.is_running()?, "the first daemon ended:\n{}", first.log()?);
    ensure!(fs::read(scene.device("d")?.node)?.len() == 1 << 20, "the first daemon's device does not read");
    scene.ask(&["list"])?.expect_code(0)?;
    first.stop().map(drop)
}

fn f14_run_without_privileges_is_refused(scene: &Scene) -> Result<()> {
    // Exit 6 before any change.
    scene.write("config.yaml", "version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?;
    let mut command = Command::new(scene.binary());
    // uid and gid 65534 (`nobody`): no write access to the scene's folders.
    command.args(["run", "config.yaml", "--socket", "control.sock", "--state-dir", "state"]).uid(65534).gid(65534);
    let outcome = command::start(scene.dir(), &mut command)?.finish(COMMAND_LIMIT)?;
    outcome.expect_code(6)?.expect_no_panic()?.expect_stderr(&["error[E-PERM]"]).map(drop)
}

fn commands_about_unknown_devices_are_refused(scene: &Scene) -> Result<()> {
    // Exactly one error, with the name of the device; the existing device stays.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { null: 1MiB } }\n")?;
    let outcome = scene.ask(&["del", "nothing"])?.expect_stderr(&["nothing"])?;
    ensure!(outcome.code != Some(0) && error_count(&outcome.stderr) == 1, "{outcome}");
    ensure!(scene.device("d")?.node.exists(), "the other device is gone");
    daemon.stop().map(drop)
}
