//! Faults of clients of the control socket, and of the state directory, the log and the paths of
//! the daemon.
//!
//! Each trial begins with the number of its row in `FAULTS.md`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use serde_json::{Value, json};
use ublk_throttle_tests::command::Started;
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::disks::Tmpfs;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::process::Holdings;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::socket::Client;
use ublk_throttle_tests::wait;

use crate::measure::{expect_all, expect_in_time, expect_limit_held, expect_near, expect_within};
use crate::{Case, READS, cases, completions, let_run, load, now_ms};

/// Bound of the answer to a well-behaved client, beside any number of clients that misbehave.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

pub(crate) fn cases() -> Vec<Case> {
    let plain = cases![[Need::Ublk];
        f32_clients_that_misbehave_hold_up_nobody,
        f32_a_command_is_carried_through_although_its_client_left,
        f33_garbage_gets_one_error_and_no_panic,
        f34_commands_that_conflict_each_get_a_definite_answer,
        f47_a_group_in_use_is_not_removed,
        f51_a_full_state_directory_stops_no_device,
        f51_a_state_file_that_cannot_be_read_is_named,
        f52_a_log_that_takes_nothing_stops_no_device,
        f91_lines_for_the_journal_begin_with_their_priority,
        f53_what_is_not_ours_at_our_paths_is_refused_and_left_alone,
        f85_a_link_in_place_of_the_socket_is_not_followed_by_a_reload,
        f85_paths_that_would_lead_to_another_file_are_refused,
        f54_readers_of_the_group_may_look_and_not_touch,
        f54_passed_descriptors_are_not_kept,
    ];
    let fio = cases![[Need::Ublk, Need::Fio];
        f11_a_reload_during_a_burst_leaves_others_without_a_gap,
    ];
    plain.into_iter().chain(fio).collect()
}

fn ping() -> Value {
    json!({"id": 1, "cmd": "ping"})
}

/// Connects a new client and sends a ping; fails unless the answer arrives within [`ANSWER_LIMIT`].
fn expect_answer(scene: &Scene, what: &str) -> Result<()> {
    let begin = Instant::now();
    scene.connect()?.must(&ping(), Duration::from_secs(10)).with_context(|| what.to_owned())?;
    let took = begin.elapsed();
    expect_in_time(format!("{what}: the answer to another client"), took, ANSWER_LIMIT)
}

/// A configuration with one device of memory.
const ONE: &str = "version: 1\ndevices:\n  d: { backend: { memory: 1MiB } }\n";

fn f11_a_reload_during_a_burst_leaves_others_without_a_gap(scene: &Scene) -> Result<()> {
    // A load of 500/s on a device that the reload does not change: no gap above 50 ms and no
    // request beyond the limit. The changes of the reload are in force.
    let config = |other: u32, more: &str| {
        format!(
            "version: 1\n\
             groups:\n  g: {{ limits: {{ iops-total: 500 }} }}\n  other: {{ limits: {{ iops-total: {other} }} }}\n\
             devices:\n  steady: {{ backend: {{ null: 1GiB }}, group: g }}\n  \
               changed: {{ backend: {{ null: 1GiB }}, group: other }}\n{more}"
        )
    };
    let daemon = scene.start(&config(100, ""))?;
    let path = daemon.config().to_owned();
    let device = scene.device("steady")?;
    let load = load(scene, READS, &device)?;
    let_run(1);
    let begin = now_ms()?;
    fs::write(&path, config(200, "  added: { backend: { memory: 1MiB } }\n"))?;
    scene.ask(&["reload"])?.expect_code(0)?;
    let_run(1);
    fs::write(&path, config(300, ""))?;
    daemon.signal(Signal::SIGHUP)?;
    wait::until("the group's new limit", Duration::from_secs(5), || {
        let groups = scene.listing()?["groups"].clone();
        let other = groups.as_array().and_then(|groups| groups.iter().find(|group| group["name"] == "other"));
        Ok(other.filter(|group| group["limits"]["iops-total"] == 300).map(drop))
    })?;
    wait::until("end of the device that is in the file no more", Duration::from_secs(5), || {
        Ok(scene.device("added").is_err().then_some(()))
    })?;
    let_run(1);
    let end = now_ms()?;
    load.stop()?;
    daemon.stop()?;
    let done = completions(scene, &device)?;
    let (count, seconds) = done.in_all();
    let gap = done.longest_gap(begin, end);
    expect_all([
        expect_near("beside two reloads", done.rate(begin, end), 500.0, 0.01),
        expect_limit_held("beside two reloads, over all", count, 500.0, seconds, 32),
        expect_within("the longest gap through a reload", gap, Duration::from_millis(50)),
    ])
}

fn f32_clients_that_misbehave_hold_up_nobody(scene: &Scene) -> Result<()> {
    // Clients leave after any byte, close their sending half, never read, idle by the hundred,
    // flood, or send lines without an end. A well-behaved client is answered beside each of them.
    let daemon = scene.start(ONE)?;
    let idle = (0..300).map(|_| scene.connect()).collect::<Result<Vec<_>>>()?;
    let idle_since = Instant::now();
    expect_answer(scene, "300 idle clients")?;

    let question = b"{\"id\":1,\"cmd\":\"list\"}\n";
    for end in 0..=question.len() {
        scene.connect()?.send(&question[..end], ANSWER_LIMIT)?;
    }
    expect_answer(scene, "clients that left at every byte")?;

    let mut half_closed = scene.connect()?;
    half_closed.send(question, ANSWER_LIMIT)?;
    half_closed.finish_sending()?;
    let answer = half_closed.line(ANSWER_LIMIT)?.context("no answer to a client that sends no more")?;
    ensure!(answer.contains("\"ok\":true"), "{answer}");

    let mut deaf = scene.connect()?;
    let flood = question.repeat(100_000);
    let taken = deaf.send(&flood, Duration::from_secs(1))?;
    ensure!(taken < flood.len(), "100,000 questions of a client that reads no answer were taken");
    expect_answer(scene, "a client that floods and never reads")?;

    let mut endless = scene.connect()?;
    endless.send(&vec![b'x'; 2 << 20], ANSWER_LIMIT)?;
    let answer = endless.line(ANSWER_LIMIT)?.context("hung up without an answer to a line of 2 MiB")?;
    ensure!(answer.contains("E-TOOBIG"), "{answer}");
    ensure!(endless.line(ANSWER_LIMIT)?.is_none(), "a client with an endless line may go on");
    expect_answer(scene, "a line of 2 MiB")?;

    // The daemon closes idle connections after 30 s.
    for mut client in idle {
        let left = Duration::from_secs(35).saturating_sub(idle_since.elapsed());
        let said = client.line(left.max(Duration::from_secs(1))).context("an idle client after 35 s")?;
        ensure!(said.as_deref().is_none_or(|line| line.contains("error")), "an idle client is told {said:?}");
    }
    expect_answer(scene, "after all of that")?;
    drop(deaf);
    daemon.stop().map(drop)
}

fn f32_a_command_is_carried_through_although_its_client_left(scene: &Scene) -> Result<()> {
    // The removal is carried through although its client has left before the answer.
    let daemon = scene.start(ONE)?;
    let device = scene.device("d")?;
    scene.connect()?.send(b"{\"id\":1,\"cmd\":\"del\",\"device\":\"d\"}\n", ANSWER_LIMIT)?;
    wait::until("end of the device", Duration::from_secs(5), || Ok((!device.node.exists()).then_some(())))?;
    expect_answer(scene, "after a client that left")?;
    daemon.stop().map(drop)
}

fn f33_garbage_gets_one_error_and_no_panic(scene: &Scene) -> Result<()> {
    // One answer of class E-PROTOCOL per line, with the id if the line contains one. The connection
    // stays open or is closed.
    let mut daemon = scene.start(ONE)?;
    let deep = "[".repeat(200_000);
    let deep_object = "{\"cmd\":".repeat(100_000);
    let lines: [&[u8]; 18] = [
        b"",
        b"\0",
        b"garbage",
        b"{",
        b"null",
        b"[]",
        b"\"ping\"",
        b"{}",
        b"{\"cmd\":5}",
        b"{\"cmd\":\"fly\"}",
        b"{\"cmd\":\"del\"}",
        b"{\"cmd\":\"del\",\"device\":[\"d\"]}",
        b"{\"cmd\":\"del\",\"device\":\"d\",\"timeout-ms\":1e400}",
        b"{\"cmd\":\"del\",\"device\":\"d\",\"timeout-ms\":-1}",
        b"{\"cmd\":\"ping\",\"loud\":true}",
        b"\xff\xfe{\"cmd\":\"ping\"}",
        deep.as_bytes(),
        deep_object.as_bytes(),
    ];
    for line in lines {
        let told = String::from_utf8_lossy(&line[..line.len().min(60)]).into_owned();
        let mut client = scene.connect()?;
        client.send(line, ANSWER_LIMIT)?;
        client.send(b"\n", ANSWER_LIMIT)?;
        let answer = client.line(ANSWER_LIMIT).with_context(|| told.clone())?;
        let answer = answer.with_context(|| format!("{told}: hung up without an answer"))?;
        let answer: Value = serde_json::from_str(&answer).with_context(|| told.clone())?;
        ensure!(answer["ok"] == false && answer["error"]["class"] == "E-PROTOCOL", "{told}: {answer}");
        expect_answer(scene, &told)?;
    }
    let answer = scene.connect()?.ask(&json!({"id": "mine", "cmd": "fly"}), ANSWER_LIMIT)?;
    ensure!(answer["id"] == "mine", "the id of a wrong question is lost: {answer}");
    ensure!(daemon.is_running()?, "the daemon ended");
    daemon.stop().map(drop)
}

fn f34_commands_that_conflict_each_get_a_definite_answer(scene: &Scene) -> Result<()> {
    // Two commands at the same time: one succeeds (0); the second joins (0), is refused (5) or
    // finds no device (1). At least one of the two succeeds.
    let daemon = scene.start(
        "version: 1\ngroups:\n  g: { limits: { iops-total: 100 } }\ndevices:\n  stays: { backend: { memory: 1MiB } }\n",
    )?;
    let pairs: [(&[&str], &[&str]); 5] = [
        (&["add", "x", "--memory", "1MiB"], &["add", "x", "--null", "1MiB"]),
        (&["add", "x", "--memory", "1MiB"], &["del", "x"]),
        (&["del", "x"], &["set", "device", "x", "iops-total=5"]),
        (&["del", "x"], &["reload"]),
        (&["del", "x"], &["del", "x", "--force"]),
    ];
    for (one, other) in pairs {
        if one[0] == "del" {
            scene.ask(&["add", "x", "--memory", "1MiB"])?.expect_code(0)?;
        }
        let both = [scene.begin_ask(one)?, scene.begin_ask(other)?];
        let both = both.map(|begun: Started| begun.finish(Duration::from_secs(10)));
        let both = both.into_iter().collect::<Result<Vec<_>>>()?;
        let codes: Vec<_> = both.iter().map(|outcome| outcome.code).collect();
        eprintln!("          {one:?} with {other:?}: {codes:?}");
        ensure!(codes.contains(&Some(0)), "neither succeeded:\n{}{}", both[0], both[1]);
        let definite = codes.iter().all(|code| matches!(code, Some(0 | 1 | 5)));
        ensure!(definite, "not definite:\n{}{}", both[0], both[1]);
        if one[0] == "add" && other[0] == "add" {
            ensure!(codes.contains(&Some(5)), "two devices of one name:\n{}{}", both[0], both[1]);
        }
        // The name is free for the next pair after any outcome.
        let _ = scene.ask(&["del", "x", "--force"])?;
        ensure!(scene.device("x").is_err() && scene.device("stays")?.node.exists(), "not what was asked for");
    }
    daemon.stop().map(drop)
}

fn f47_a_group_in_use_is_not_removed(scene: &Scene) -> Result<()> {
    // Exit 5 with the member's name. A reload that moves all members and drops the group is one
    // transaction, and allowed.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  old: { limits: { iops-total: 100 } }\n  new: { limits: { iops-total: 200 } }\n\
         devices:\n  member: { backend: { memory: 1MiB }, group: old }\n",
    )?;
    scene.ask(&["del", "--group", "old"])?.expect_code(5)?.expect_stderr(&["error[E-GROUP-IN-USE]", "member"])?;
    fs::write(
        daemon.config(),
        "version: 1\n\
         groups:\n  new: { limits: { iops-total: 200 } }\n\
         devices:\n  member: { backend: { memory: 1MiB }, group: new }\n",
    )?;
    scene.ask(&["reload"])?.expect_code(0)?;
    let facts = scene.listing()?;
    let groups: Vec<_> = facts["groups"].as_array().context("no groups")?.iter().map(|group| &group["name"]).collect();
    ensure!(groups == ["new"] && facts["devices"][0]["group"] == "new", "after the reload: {facts}");
    daemon.stop().map(drop)
}

fn f51_a_full_state_directory_stops_no_device(scene: &Scene) -> Result<()> {
    // W-STATE in the log reports that state cannot be written; devices serve, and can be added and
    // removed.
    let tmpfs = Tmpfs::new(&scene.state_dir(), 1)?;
    fs::set_permissions(tmpfs.point(), fs::Permissions::from_mode(0o750))?;
    let daemon = scene.start(ONE)?;
    let filled = fs::write(tmpfs.point().join("filler"), vec![0; 2 << 20]);
    ensure!(filled.is_err(), "2 MiB went into 1");
    scene.ask(&["add", "more", "--memory", "1MiB"])?.expect_code(0)?;
    daemon.wait_for_log("W-STATE", Duration::from_secs(2))?;
    for name in ["d", "more"] {
        let direct = Direct::open(&scene.device(name)?.node)?;
        direct.write(0, 4096, 0xa5)?;
        ensure!(direct.holds(0, 4096, 0xa5)?, "{name} reads wrong");
    }
    scene.ask(&["del", "d"])?.expect_code(0)?;
    daemon.stop().map(drop)
}

fn f51_a_state_file_that_cannot_be_read_is_named(scene: &Scene) -> Result<()> {
    // Exit 1, the path and a remedy: the state is never guessed from a damaged file.
    let mut daemon = scene.start(ONE)?;
    let file = scene.state_dir().join("d.device.json");
    let sound = fs::read_to_string(&file).context("the device's state file")?;
    daemon.signal(Signal::SIGKILL)?;
    daemon.wait_for_end(Duration::from_secs(5))?;
    scene.remove_devices();
    let half = &sound[..sound.len() / 2];
    for (what, text) in [("half-written", half), ("not JSON", "\0\u{1}garbage"), ("empty", "")] {
        fs::write(&file, text)?;
        let outcome = scene.ask(&["list"])?;
        let path = file.display().to_string();
        outcome.expect_code(1)?.expect_stderr(&["error[E-STATE]", &path]).with_context(|| what.to_owned())?;
    }
    fs::remove_file(&file)?;
    scene.start(ONE)?.stop().map(drop)
}

fn f52_a_log_that_takes_nothing_stops_no_device(scene: &Scene) -> Result<()> {
    // The log (stdout and stderr) is a full disk, a pipe without a reader, closed, or a full pipe
    // whose reader does not read: the daemon starts, serves and ends.
    let config = scene.write("config.yaml", ONE)?;
    let config = config.to_str().context("path")?;
    let unread = "> >(exec sleep 60 >/dev/null 2>&1) 2>&1";
    for sink in [">/dev/full 2>&1", "> >(true) 2>&1", ">&- 2>&-", unread] {
        let fill = if sink == unread { "dd if=/dev/zero bs=65536 count=1 2>/dev/null;" } else { "" };
        let script = format!("{{ {fill} exec \"$@\"; }} {sink}");
        let mut daemon = scene.begin_under(&["bash", "-c", &script, "bash"], &["run", config])?;
        wait::until("the device", Duration::from_secs(20), || Ok(scene.device("d").ok()))
            .with_context(|| sink.to_owned())?;
        let direct = Direct::open(&scene.device("d")?.node)?;
        direct.write(0, 4096, 0xa5)?;
        // The only device serves a moment before the daemon is ready, and the line `ready` cannot
        // be read here.
        wait::until("ready", Duration::from_secs(5), || {
            Ok(scene.ask(&["add", "more", "--memory", "1MiB"])?.expect_code(0).ok())
        })
        .with_context(|| sink.to_owned())?;
        scene.ask(&["del", "more"])?.expect_code(0)?;
        ensure!(direct.holds(0, 4096, 0xa5)? && daemon.is_running()?, "{sink}: the device or the daemon is hurt");
        drop(direct);
        daemon.signal(Signal::SIGTERM)?;
        daemon.finish(Duration::from_secs(10))?.expect_code(0).with_context(|| sink.to_owned())?;
        scene.expect_nothing_left().with_context(|| sink.to_owned())?;
    }
    Ok(())
}

fn f91_lines_for_the_journal_begin_with_their_priority(scene: &Scene) -> Result<()> {
    // A file in place of the journal: JOURNAL_STREAM has device and inode of stderr. An error of two faults is an error on each line.
    let log = File::create(scene.dir().join("daemon-0.log"))?.metadata()?;
    let stream = format!("JOURNAL_STREAM={}:{}", log.dev(), log.ino());
    let odd = ONE.replace("1MiB }", "1MiB }, limits: { iops: 0 }");
    let daemon = scene.start_under_without_waiting(&["env", &stream], &odd)?;
    daemon.wait_for_log("<6>ready\n", Duration::from_secs(30))?;
    fs::write(daemon.config(), odd.replace("memory: 1MiB", "memory: none").replace("iops: 0", "iops: -1"))?;
    daemon.signal(Signal::SIGHUP)?;
    daemon.wait_for_log("error[E-CONFIG]", Duration::from_secs(5))?;
    let text = daemon.log()?;
    let of = |mark: &str| -> Vec<&str> { text.lines().filter_map(|line| line.strip_prefix(mark)).collect() };
    let (errors, warnings, facts) = (of("<3>"), of("<4>"), of("<6>"));
    let is_whole = errors.len() + warnings.len() + facts.len() == text.lines().count();
    ensure!(is_whole, "a line has no priority:\n{text}");
    ensure!(errors.len() > 1 && errors.iter().all(|line| !line.starts_with("warning[")), "{errors:?}");
    ensure!(warnings.iter().any(|line| line.starts_with("warning[W-CONFIG]")), "{warnings:?}");
    ensure!(facts.iter().any(|line| line.contains("state=started")), "{facts:?}");
    daemon.stop().map(drop)
}

fn f53_what_is_not_ours_at_our_paths_is_refused_and_left_alone(scene: &Scene) -> Result<()> {
    // Exit 6 and no change for a link, a FIFO or a file at the socket, a link or a FIFO at the
    // lock, and a state directory that everyone may write to.
    let config = scene.write("config.yaml", ONE)?;
    let config = config.to_str().context("path")?;
    let precious = scene.write("precious", "precious")?;
    let place = |what: &str, at: &Path| -> Result<()> {
        match what {
            "link" => symlink(&precious, at)?,
            "fifo" => nix::unistd::mkfifo(at, Mode::S_IRWXU)?,
            _ => fs::write(at, "precious")?,
        }
        Ok(())
    };
    let refused = |what: &str| -> Result<()> {
        scene
            .ask(&["run", config])?
            .expect_code(6)?
            .expect_stderr(&["error[E-UNSAFE-PATH]"])
            .with_context(|| what.to_owned())?;
        ensure!(fs::read_to_string(&precious)? == "precious", "{what}: followed");
        Ok(())
    };
    fs::create_dir(scene.state_dir())?;
    fs::set_permissions(scene.state_dir(), fs::Permissions::from_mode(0o750))?;
    for what in ["link", "fifo", "file"] {
        place(what, &scene.socket())?;
        refused(&format!("{what} at the socket"))?;
        ensure!(scene.socket().symlink_metadata().is_ok(), "{what} at the socket was removed");
        fs::remove_file(scene.socket())?;
    }
    let lock = scene.state_dir().join("lock");
    for what in ["link", "fifo"] {
        let _ = fs::remove_file(&lock);
        place(what, &lock)?;
        refused(&format!("{what} at the lock"))?;
        ensure!(lock.symlink_metadata().is_ok(), "{what} at the lock was removed");
        fs::remove_file(&lock)?;
    }
    fs::set_permissions(scene.state_dir(), fs::Permissions::from_mode(0o777))?;
    refused("a state directory that everybody may write")?;
    fs::set_permissions(scene.state_dir(), fs::Permissions::from_mode(0o750))?;
    // The daemon's own socket, left by a killed daemon, does not block a start.
    drop(std::os::unix::net::UnixListener::bind(scene.socket())?);
    scene.start(ONE)?.stop().map(drop)
}

fn f85_a_link_in_place_of_the_socket_is_not_followed_by_a_reload(scene: &Scene) -> Result<()> {
    // A user with write access to the directory of `--socket` renames the socket and puts a link in
    // its place. The reload changes the mode and group of the daemon's own socket, not of root's
    // file behind the link; the end of the daemon does not remove the link.
    let daemon = scene.start(&format!("control: {{ group: 1 }}\n{ONE}"))?;
    let config = daemon.config().to_owned();
    let (socket, away, precious) = (scene.socket(), scene.dir().join("away"), scene.write("precious", "precious")?);
    let told = |path: &Path| -> Result<(u32, u32)> {
        let metadata = fs::symlink_metadata(path)?;
        Ok((metadata.mode() & 0o777, metadata.gid()))
    };
    ensure!(told(&socket)? == (0o660, 1), "the socket is {:?}", told(&socket)?);
    fs::set_permissions(&precious, fs::Permissions::from_mode(0o644))?;
    std::os::unix::fs::chown(&precious, None, Some(2))?;
    fs::rename(&socket, &away)?;
    symlink(&precious, &socket)?;
    fs::write(&config, ONE)?;
    daemon.signal(Signal::SIGHUP)?;
    wait::until("the reload", ANSWER_LIMIT, || Ok((told(&away)? == (0o600, 0)).then_some(())))?;
    ensure!(told(&precious)? == (0o644, 2), "the file behind the link is {:?}", told(&precious)?);
    daemon.signal(Signal::SIGTERM)?;
    daemon.expect_end(Duration::from_secs(10))?;
    ensure!(socket.is_symlink() && fs::read_to_string(&precious)? == "precious", "what is not ours was removed");
    fs::remove_file(&socket)?;
    Ok(())
}

fn f85_paths_that_would_lead_to_another_file_are_refused(scene: &Scene) -> Result<()> {
    // Paths that JSON cannot carry (of a backend and of a configuration) and a link of another user
    // are refused; no file or device is made.
    let daemon = scene.start(ONE)?;
    let name = OsStr::from_bytes(b"vol\xff.img");
    let path = scene.dir().join(name);
    let words = ["add", "v", "--size", "1MiB", "--create", "--file"].map(OsStr::new);
    let refused = scene.ask(&[&words[..], &[path.as_os_str()]].concat())?.expect_code(3)?;
    refused.expect_stderr(&["error[E-CONFIG]", r"vol\xFF.img", "not UTF-8"])?;
    let images = fs::read_dir(scene.dir())?.flatten().filter(|entry| entry.file_name().as_bytes().starts_with(b"vol"));
    ensure!(images.count() == 0, "a file was made");
    fs::write(&path, ONE)?;
    let refused = scene.ask(&[OsStr::new("reload"), path.as_os_str()])?.expect_code(3)?;
    refused.expect_stderr(&["error[E-CONFIG]", r"vol\xFF.img", "not UTF-8"])?;

    let (image, link) = (scene.write("image", "precious")?, scene.dir().join("link"));
    symlink(&image, &link)?;
    std::os::unix::fs::lchown(&link, Some(65534), None)?;
    let link = link.to_str().context("path")?;
    let refused = scene.ask(&["add", "v", "--file", link])?.expect_code(3)?;
    refused.expect_stderr(&["error[E-BACKING]", link, "user 65534"])?;
    ensure!(scene.devices()?.len() == 1, "a device was made: {}", scene.listing()?);
    daemon.stop().map(drop)
}

fn f54_readers_of_the_group_may_look_and_not_touch(scene: &Scene) -> Result<()> {
    // Members of the configured group may use list and stats, and no command that changes a device.
    // Users outside the group are refused both.
    let daemon = scene.start(&format!("{ONE}control: {{ group: games }}\n"))?;
    let member = ["setpriv", "--reuid=65534", "--regid=games", "--clear-groups"];
    let other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    for words in [["list"], ["stats"]] {
        scene.ask_under(&member, &words)?.expect_code(0)?;
        scene.ask_under(&other, &words)?.expect_code(6)?.expect_stderr(&["error[E-PERM]"])?;
    }
    let changing: [&[&str]; 4] =
        [&["del", "d"], &["set", "device", "d", "iops-total=1"], &["add", "x", "--null", "1MiB"], &["reload"]];
    for words in changing {
        scene.ask_under(&member, words)?.expect_code(6)?.expect_stderr(&["error[E-PERM]"])?;
        scene.ask_under(&other, words)?.expect_code(6)?.expect_stderr(&["error[E-PERM]"])?;
    }
    ensure!(scene.device("d")?.node.exists() && scene.device("x").is_err(), "something has changed");
    daemon.stop().map(drop)
}

fn f54_passed_descriptors_are_not_kept(scene: &Scene) -> Result<()> {
    // 64 descriptors sent along with questions: each question is answered, and the daemon keeps no
    // descriptor.
    let daemon = scene.start(ONE)?;
    expect_answer(scene, "before")?;
    let before = Holdings::of(daemon.pid())?.descriptors;
    let mut client: Client = scene.connect()?;
    let file = File::open("/dev/zero")?;
    for _ in 0..64 {
        client.send_with_descriptor(format!("{}\n", ping()).as_bytes(), &file)?;
        let answer = client.line(ANSWER_LIMIT)?.context("hung up")?;
        ensure!(answer.contains("\"ok\":true"), "{answer}");
    }
    let with_client = Holdings::of(daemon.pid())?.descriptors;
    ensure!(with_client <= before + 2, "{before} descriptors before 64 were passed, {with_client} after it");
    let zeros = fs::read_dir(format!("/proc/{}/fd", daemon.pid()))?
        .flatten()
        .filter(|entry| fs::read_link(entry.path()).is_ok_and(|to| to == Path::new("/dev/zero")))
        .count();
    ensure!(zeros == 0, "the daemon has {zeros} of the passed descriptors");
    drop(client);
    daemon.stop().map(drop)
}
