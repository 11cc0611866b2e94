//! Changes of devices, groups and limits while the daemon runs: by commands, by reloads and by
//! signals.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::{sysfs, wait};

use crate::measure::{expect_all, expect_near, expect_within};
use crate::{Case, WRITES, cases, load};

/// Bound of an answer of a busy daemon.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

const PAIR: &str = "version: 1\n\
                    groups:\n  g: { limits: { iops-total: 100 } }\n  old: { weight: 7 }\n\
                    devices:\n  a: { backend: { memory: 1MiB }, group: g }\n  b: { backend: { memory: 1MiB } }\n";

pub(crate) fn cases() -> Vec<Case> {
    let plain = cases![[Need::Ublk];
        device_that_is_added_is_there_and_one_that_fails_leaves_nothing,
        set_prints_what_is_in_force_and_changes_all_or_nothing,
        groups_come_and_go_by_command,
        reload_tells_its_plan_and_carries_it_out,
        reload_that_fails_in_the_middle_changes_nothing,
        reload_leaves_alone_what_commands_made,
        sighup_reloads_the_file,
        systemd_hears_of_the_start_a_reload_and_the_watchdog,
    ];
    let fio = cases![[Need::Ublk, Need::Fio];
        raised_limit_lets_held_requests_go_at_once,
        stats_tell_what_was_let_through_and_what_waited,
    ];
    plain.into_iter().chain(fio).collect()
}

/// The device or group with this name in the output of `list --json`.
fn listed(scene: &Scene, what: &str, name: &str) -> Result<Option<Value>> {
    let facts = scene.listing()?;
    let all = facts[what].as_array().with_context(|| format!("no {what}: {facts}"))?;
    Ok(all.iter().find(|one| one["name"] == name).cloned())
}

fn expect_listed(scene: &Scene, what: &str, name: &str, wanted: &[(&str, Value)]) -> Result<()> {
    let found = listed(scene, what, name)?.with_context(|| format!("no {name} in {what}"))?;
    for (key, value) in wanted {
        ensure!(found[key] == *value, "{what} {name}: {key} should be {value}: {found}");
    }
    Ok(())
}

fn device_that_is_added_is_there_and_one_that_fails_leaves_nothing(scene: &Scene) -> Result<()> {
    // `add` prints the node for every kind of backend. Every refusal has its class and leaves all
    // devices as they were.
    let daemon = scene.start(&format!("{PAIR}limits: {{ memory: 400MiB }}\n"))?;
    let file = scene.dir().join("new.img");
    let file = file.to_str().context("path")?;
    let adds: [&[&str]; 3] = [
        &[
            "add", "f", "--file", file, "--size", "1MiB", "--create", "--group", "g", "--limit", "iops=50", "--depth",
            "8",
        ],
        &["add", "m", "--memory", "2MiB", "--read-only", "--weight", "5", "--group", "g"],
        &["add", "n", "--null", "1GiB", "--block-size", "4096", "--id", "auto"],
    ];
    for words in adds {
        let done = scene.ask(words)?.expect_code(0)?;
        let node = scene.device(words[1])?.node;
        ensure!(done.stdout.trim() == node.to_str().unwrap_or_default(), "the node is not printed: {done}");
    }
    let odd = ["add", "odd", "--null", "1MiB", "--limit", "iops=1", "--json"];
    let odd =
        scene.ask(&odd)?.expect_code(0)?.expect_stderr(&["warning[W-CONFIG]: device \"odd\": the last of 128"])?;
    ensure!(odd.json()?["warnings"].as_array().map(Vec::len) == Some(1), "{odd}");
    scene.ask(&["del", "odd"])?.expect_code(0)?;
    expect_listed(
        scene,
        "devices",
        "f",
        &[("group", json!("g")), ("limits", json!({"iops-total": 50})), ("depth", json!(8)), ("size", json!(1 << 20))],
    )?;
    let id = scene.device("a")?.id.to_string();
    let refused: [(&[&str], i32, &str); 9] = [
        (&["add", "x", "--memory", "1MiB", "--depth", "4096"], 3, "limits.memory"),
        (&["add", "a", "--memory", "1MiB"], 5, "E-EXISTS"),
        (&["add", "x", "--memory", "1MiB", "--id", &id], 5, "E-ID-TAKEN"),
        (&["add", "x", "--memory", "1MiB", "--group", "h"], 1, "E-NOGROUP"),
        (&["add", "x", "--file", "/no/such/file"], 3, "E-BACKING"),
        (&["add", "x", "--memory", "1Mbit"], 3, "E-CONFIG"),
        (&["add", "../x", "--memory", "1MiB"], 3, "E-CONFIG"),
        (&["add", "x", "--memory", "1MiB", "--limit", "ipos=5"], 3, "E-CONFIG"),
        (&["add", "x", "--memory", "1MiB", "--queues", "0"], 3, "E-CONFIG"),
    ];
    for (words, code, class) in refused {
        scene.ask(words)?.expect_code(code)?.expect_stderr(&[class])?;
        ensure!(words[1] == "a" || listed(scene, "devices", words[1])?.is_none(), "{words:?} left something");
    }
    let log = daemon.log()?;
    let lines = |wanted: &str| log.lines().filter(|line| line.starts_with(wanted)).count();
    for (name, adding, failed) in [("f", 1, 0), ("x", 1, 1), ("../x", 0, 0)] {
        let counts = (lines(&format!("device={name} state=adding")), lines(&format!("device={name} state=failed")));
        ensure!(counts == (adding, failed), "{name}: {counts:?} lines of a beginning and a failure:\n{log}");
    }
    for name in ["f", "m", "n", "a", "b"] {
        scene.ask(&["del", name])?.expect_code(0)?;
        ensure!(scene.device(name).is_err(), "{name} is still there");
    }
    daemon.stop().map(drop)
}

fn set_prints_what_is_in_force_and_changes_all_or_nothing(scene: &Scene) -> Result<()> {
    // A command with one wrong value changes nothing.
    let daemon = scene.start(PAIR)?;
    let done = scene.ask(&["set", "group", "g", "iops-total=500", "bps-read=10MiB/s", "parent=old"])?.expect_code(0)?;
    ensure!(done.stdout.contains("bps-read=10MiB iops-total=500 parent=old"), "{done}");
    let node = scene.device("b")?.node;
    let moved = scene.ask(&["set", "device", node.to_str().context("node")?, "group=g", "weight=300", "iops=9"])?;
    ensure!(moved.expect_code(0)?.stdout.contains("device b: iops-total=9 group=g weight=300"), "b has not moved");
    let odd = scene.ask(&["set", "device", "b", "iops-write=0", "bps-total=unlimited"])?.expect_code(0)?;
    ensure!(odd.stderr.starts_with("warning[W-CONFIG]: device \"b\": iops-write: 0 means no limit"), "{odd}");
    let wrong: [(&[&str], i32, &str); 8] = [
        (&["set", "group", "g", "iops-total=7", "bps-read=fast"], 3, "E-CONFIG"),
        (&["set", "group", "old", "weight=9", "parent=g"], 3, "E-CONFIG"),
        (&["set", "group", "h", "iops-total=7"], 1, "E-NOGROUP"),
        (&["set", "device", "b", "iops-total=7", "group=h"], 1, "E-NOGROUP"),
        (&["set", "device", "b", "iops-total=7", "queues=2"], 3, "E-CONFIG"),
        (&["set", "device", "b", "iops-total=7", "size=2MiB"], 3, "E-CONFIG"),
        (&["set", "device", "c", "iops-total=7"], 1, "E-NODEVICE"),
        (&["set", "device", "b", "iops-total=7", "iops-total=8"], 3, "E-CONFIG"),
    ];
    for (words, code, class) in wrong {
        scene.ask(words)?.expect_code(code)?.expect_stderr(&[class])?;
    }
    let limits = json!({"bps-read": 10 << 20, "iops-total": 500});
    expect_listed(scene, "groups", "g", &[("limits", limits), ("parent", json!("old"))])?;
    expect_listed(scene, "groups", "old", &[("weight", json!(7)), ("parent", Value::Null)])?;
    expect_listed(scene, "devices", "b", &[("limits", json!({"iops-total": 9})), ("weight", json!(300))])?;
    scene.ask(&["set", "device", "b", "iops-total=unlimited", "group=none"])?.expect_code(0)?;
    expect_listed(scene, "devices", "b", &[("limits", json!({})), ("group", Value::Null)])?;
    daemon.stop().map(drop)
}

fn groups_come_and_go_by_command(scene: &Scene) -> Result<()> {
    // A group in use is not removed; an empty group is, and its name is free again.
    let daemon = scene.start(PAIR)?;
    scene.ask(&["set", "group", "new", "--create", "iops-total=5", "parent=g"])?.expect_code(0)?;
    scene.ask(&["set", "device", "a", "group=new"])?.expect_code(0)?;
    scene.ask(&["del", "--group", "new"])?.expect_code(5)?.expect_stderr(&["E-GROUP-IN-USE", "device a"])?;
    scene.ask(&["del", "--group", "g"])?.expect_code(5)?.expect_stderr(&["E-GROUP-IN-USE", "group new"])?;
    scene.ask(&["set", "device", "a", "group=none"])?.expect_code(0)?;
    for name in ["new", "g"] {
        scene.ask(&["del", "--group", name])?.expect_code(0)?;
        scene.ask(&["del", "--group", name])?.expect_code(1)?.expect_stderr(&["E-NOGROUP"])?;
    }
    scene.ask(&["set", "group", "g", "--create"])?.expect_code(0)?;
    daemon.stop().map(drop)
}

const CHANGED: &str = "version: 1\n\
                       groups:\n  g: { limits: { iops-total: 200 }, parent: top }\n  top: { limits: { bps-total: 1MB/s } }\n\
                       devices:\n  a: { backend: { memory: 1MiB }, group: top, limits: { iops-read: 5 } }\n  \
                         c: { backend: { memory: 1MiB }, group: g }\n";

fn reload_tells_its_plan_and_carries_it_out(scene: &Scene) -> Result<()> {
    // `reload --dry-run` prints the differences and changes nothing. After a reload no difference
    // is left.
    let daemon = scene.start(PAIR)?;
    let before = scene.listing()?;
    fs::write(daemon.config(), CHANGED)?;
    let plan = scene.ask(&["reload", "--dry-run"])?.expect_code(0)?.stdout;
    for line in
        ["group top: added", "group old: removed", "iops-total 100 → 200", "device c: added", "device b: removed"]
    {
        ensure!(plan.contains(line), "{line:?} is not in the plan:\n{plan}");
    }
    let after = scene.listing()?;
    let names = |facts: &Value| -> Vec<String> {
        let of = |what: &str| facts[what].as_array().cloned().unwrap_or_default();
        of("devices").iter().chain(&of("groups")).map(|one| one["name"].to_string()).collect()
    };
    ensure!(names(&before) == names(&after), "--dry-run changed something: {after}");
    let done = scene.ask(&["reload"])?.expect_code(0)?.stdout;
    ensure!(done == plan, "done:\n{done}\nplanned:\n{plan}");
    expect_listed(scene, "groups", "g", &[("limits", json!({"iops-total": 200})), ("parent", json!("top"))])?;
    expect_listed(scene, "devices", "a", &[("group", json!("top")), ("limits", json!({"iops-read": 5}))])?;
    expect_listed(scene, "devices", "c", &[("group", json!("g")), ("state", json!("live"))])?;
    ensure!(listed(scene, "devices", "b")?.is_none() && listed(scene, "groups", "old")?.is_none(), "b or old is left");
    let again = scene.ask(&["reload"])?.expect_code(0)?.stdout;
    ensure!(again.trim() == "nothing changes", "{again}");
    let again = scene.ask(&["reload", "--json"])?.expect_code(0)?.json()?;
    ensure!(again["changes"] == json!([]), "{again}");
    daemon.stop().map(drop)
}

fn reload_that_fails_in_the_middle_changes_nothing(scene: &Scene) -> Result<()> {
    // A broken file, a key that cannot change live, a device that cannot be made, and a removed
    // device that is in use: each fails the reload.
    let daemon = scene.start(PAIR)?;
    let before = scene.listing()?;
    let unusable = CHANGED.to_owned() + "  d: { backend: { file: /no/such/file } }\n";
    let cases = [
        (CHANGED.replace("iops-read: 5", "iops-read: fast"), 3, "E-CONFIG"),
        (CHANGED.replace("memory: 1MiB }, group: top", "memory: 1MiB }, queues: 2, group: top"), 3, "E-CONFIG"),
        (unusable, 3, "E-BACKING"),
        (CHANGED.replace("group: g }", "group: g, id: 1048575 }"), 0, ""),
    ];
    for (text, code, class) in &cases[..3] {
        fs::write(daemon.config(), text)?;
        scene.ask(&["reload"])?.expect_code(*code)?.expect_stderr(&[class])?;
        let after = scene.listing()?;
        ensure!(after["groups"] == before["groups"], "groups changed: {after}");
        ensure!(after["devices"].as_array().map(Vec::len) == Some(2), "devices changed: {after}");
        expect_listed(scene, "devices", "a", &[("group", json!("g")), ("limits", json!({}))])?;
    }
    fs::write(daemon.config(), CHANGED)?;
    let user = fs::File::open(&scene.device("b")?.node)?;
    for words in [&["reload"][..], &["reload", "--dry-run"]] {
        scene.ask(words)?.expect_code(5)?.expect_stderr(&["E-BUSY", "device \"b\"", "nothing was changed"])?;
    }
    expect_listed(scene, "devices", "a", &[("group", json!("g"))])?;
    ensure!(listed(scene, "devices", "c")?.is_none(), "c was made");
    drop(user);
    scene.ask(&["reload"])?.expect_code(0)?;
    daemon.stop().map(drop)
}

fn reload_leaves_alone_what_commands_made(scene: &Scene) -> Result<()> {
    // A reload keeps the devices of `add` unless the file names them; from then on they belong to
    // the file.
    let daemon = scene.start(PAIR)?;
    scene.ask(&["add", "mine", "--memory", "1MiB", "--group", "g"])?.expect_code(0)?;
    scene.ask(&["set", "device", "a", "iops-total=7"])?.expect_code(0)?;
    let told = scene.ask(&["reload"])?.expect_code(0)?.stdout;
    ensure!(told.contains("device a") && !told.contains("mine"), "{told}");
    expect_listed(scene, "devices", "a", &[("limits", json!({}))])?;
    fs::write(daemon.config(), PAIR.replace("  g: { limits: { iops-total: 100 } }\n", "").replace(", group: g", ""))?;
    scene.ask(&["reload"])?.expect_code(5)?.expect_stderr(&["E-GROUP-IN-USE", "mine"])?;
    fs::write(daemon.config(), format!("{PAIR}  mine: {{ backend: {{ memory: 1MiB }} }}\n"))?;
    let told = scene.ask(&["reload"])?.expect_code(0)?.stdout;
    ensure!(told.contains("device mine: group g → none"), "{told}");
    fs::write(daemon.config(), PAIR)?;
    let told = scene.ask(&["reload"])?.expect_code(0)?.stdout;
    ensure!(told.contains("device mine: removed"), "{told}");
    daemon.stop().map(drop)
}

fn sighup_reloads_the_file(scene: &Scene) -> Result<()> {
    // SIGHUP reloads the file of `run`, by the absolute path that the daemon took at its start. A
    // refused file is logged and changes nothing.
    let daemon = scene.start(PAIR)?;
    fs::write(daemon.config(), CHANGED)?;
    daemon.signal(Signal::SIGHUP)?;
    daemon.wait_for_log("state=reloaded", ANSWER_LIMIT)?;
    expect_listed(scene, "groups", "g", &[("limits", json!({"iops-total": 200}))])?;
    fs::write(daemon.config(), "version: 1\ndevices: 5\n")?;
    daemon.signal(Signal::SIGHUP)?;
    daemon.wait_for_log("error[E-CONFIG]: reload:", ANSWER_LIMIT)?;
    expect_listed(scene, "groups", "g", &[("limits", json!({"iops-total": 200}))])?;
    daemon.stop().map(drop)
}

fn systemd_hears_of_the_start_a_reload_and_the_watchdog(scene: &Scene) -> Result<()> {
    // The protocol of sd_notify(3): READY once, RELOADING with a timestamp before the next READY,
    // WATCHDOG twice per interval.
    let path = scene.dir().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(wait::patience(ANSWER_LIMIT)))?;
    let place = format!("NOTIFY_SOCKET={}", path.display());
    let daemon = scene.start_under(&["env", &place, "WATCHDOG_USEC=400000"], PAIR)?;
    let mut heard = Vec::new();
    let mut hear = |wanted: &str| -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < wait::patience(ANSWER_LIMIT) {
            let mut told = [0; 256];
            let count = socket.recv(&mut told).with_context(|| format!("no {wanted} in {heard:?}"))?;
            let told = String::from_utf8_lossy(&told[..count]).into_owned();
            heard.push(told.clone());
            if told.starts_with(wanted) {
                return Ok(());
            }
        }
        anyhow::bail!("no {wanted} in {heard:?}")
    };
    hear("READY=1")?;
    let began = Instant::now();
    for _ in 0..5 {
        hear("WATCHDOG=1")?;
    }
    expect_within("5 times, of a watchdog of 0.4 s", began.elapsed(), Duration::from_millis(1600))?;
    scene.ask(&["reload"])?.expect_code(0)?;
    hear("RELOADING=1\nMONOTONIC_USEC=")?;
    hear("READY=1\nSTATUS=serving 2 devices")?;
    daemon.stop()?;
    hear("STOPPING=1")
}

fn raised_limit_lets_held_requests_go_at_once(scene: &Scene) -> Result<()> {
    // 32 requests are held at 1 operation a second. A raised limit and a lifted limit dispatch them
    // at once.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { null: 1GiB }, limits: { iops-total: 1 } }\n")?;
    let device = scene.device("d")?;
    for setting in ["iops-total=1000000", "iops-total=unlimited"] {
        scene.ask(&["set", "device", "d", "iops-total=1"])?.expect_code(0)?;
        let load = load(scene, WRITES, &device)?;
        // Counts the kernel's completed writes. The command is not timed: its program may have to
        // be read from disk first.
        let writes = || Ok::<_, anyhow::Error>(sysfs::stat(&device.disk)?[4]);
        let before = writes()?;
        scene.ask(&["set", "device", "d", setting])?.expect_code(0)?;
        let began = Instant::now();
        wait::until("the held requests", ANSWER_LIMIT, || Ok((writes()? >= before + 32).then_some(())))?;
        expect_within(format!("{setting}: all held requests gone"), began.elapsed(), Duration::from_millis(100))?;
        drop(load);
    }
    daemon.stop().map(drop)
}

fn stats_tell_what_was_let_through_and_what_waited(scene: &Scene) -> Result<()> {
    // At 100 operations a second and 32 in flight each request waits 0.32 s. The group shows the
    // numbers of its only device.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { iops-total: 100 } }\n\
         devices:\n  d: { backend: { null: 1GiB }, group: g }\n",
    )?;
    let device = scene.device("d")?;
    let load = load(scene, WRITES, &device)?;
    let told = scene.ask(&["stats", "--interval", "3s", "--count", "1", "--json"])?.expect_code(0)?.json()?;
    for row in [&told["devices"][0], &told["groups"][0]] {
        let rate = row["requests"].as_f64().context("requests")? / told["seconds"].as_f64().context("seconds")?;
        let wait = row["wait"]["p50_ns"].as_f64().context("wait")? / 1e9;
        expect_all([expect_near("rate", rate, 100.0, 0.03), expect_near("median wait", wait, 0.32, 0.15)])?;
    }
    // Each request is due 10 ms after the one before and has a deadline of its own, unless the
    // thread is so late that two requests are dispatched together. Most dispatches are less than 5
    // ms late.
    let (requests, late) = (&told["devices"][0]["requests"], &told["devices"][0]["lateness"]);
    eprintln!("          {requests} requests, lateness {late}");
    let (requests, deadlines) = (requests.as_u64().context("requests")?, late["count"].as_u64().context("lateness")?);
    ensure!((requests / 2..=requests + 2).contains(&deadlines), "{deadlines} deadlines for {requests} requests");
    let median = Duration::from_nanos(late["p50_ns"].as_u64().filter(|&ns| ns > 0).context("median lateness")?);
    expect_within("median lateness", median, Duration::from_millis(5))?;
    ensure!(told["groups"][0]["lateness"] == *late, "the group's lateness: {}", told["groups"][0]["lateness"]);
    let credit = &told["groups"][0]["credit"][0];
    ensure!(credit["limit"] == "iops-total" && credit["left"] == 0 && credit["capacity"] == 10, "{told}");
    let table = scene.ask(&["stats", "g"])?.expect_code(0)?.stdout;
    ensure!(table.contains("iops-total=") && table.contains("/10") && table.contains("DEVICE"), "{table}");
    ensure!(table.contains("LATE p50"), "{table}");
    let table = scene.ask(&["stats", "d"])?.expect_code(0)?.stdout;
    ensure!(table.contains("unlimited") && !table.contains("GROUP"), "{table}");
    scene.ask(&["stats", "nobody"])?.expect_code(1)?.expect_stderr(&["E-NODEVICE"])?;
    drop(load);
    daemon.stop().map(drop)
}
