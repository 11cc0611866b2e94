//! The CPUs of queue threads, as reported by the kernel.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use ublk_throttle_tests::daemon::Daemon;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::process::{Thread, cpu_list};
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::sysfs;

use crate::measure::expect_all;
use crate::{Case, cases};

pub(crate) fn cases() -> Vec<Case> {
    let two = cases![[Need::Ublk, Need::TwoCpus];
        queue_threads_run_on_the_cpus_of_their_queue_within_those_that_are_named,
    ];
    let any = cases![[Need::Ublk]; cpus_that_the_host_lacks_are_refused_with_their_line];
    two.into_iter().chain(any).collect()
}

/// The CPUs of a device's queue threads, in the order of the queues.
fn of_queues(daemon: &Daemon, device: &str) -> Result<Vec<BTreeSet<u32>>> {
    let threads = Thread::all_of(daemon.pid())?;
    let of = |queue: usize| threads.iter().find(|thread| thread.name == format!("{device}/q{queue}"));
    Ok((0..).map_while(of).map(|thread| thread.cpus.clone()).collect())
}

fn queue_threads_run_on_the_cpus_of_their_queue_within_those_that_are_named(scene: &Scene) -> Result<()> {
    // `free` gets the kernel's masks. `first` names CPU 0: the queue of CPU 0 gets it, and the
    // second queue gets it as its own mask has no common CPU with it. `last` has one queue for all
    // CPUs and gets the named CPU. `both` names all CPUs and gets the kernel's masks.
    let online = cpu_list(&std::fs::read_to_string("/sys/devices/system/cpu/online")?)?;
    let last = *online.last().context("no CPU")?;
    let config = format!(
        "version: 1\ndevices:\n  free: {{ backend: {{ null: 1MiB }}, queues: 2 }}\n  \
         first: {{ backend: {{ null: 1MiB }}, queues: 2, cpus: 0 }}\n  \
         last: {{ backend: {{ null: 1MiB }}, cpus: [{last}] }}\n  \
         both: {{ backend: {{ null: 1MiB }}, queues: 2, cpus: \"0-{last}\" }}\n"
    );
    let check = |daemon: &Daemon, name: &str, named: Option<&BTreeSet<u32>>| -> Result<()> {
        let queues = sysfs::queue_cpus(&scene.device(name)?.disk)?;
        let expected: Vec<BTreeSet<u32>> = queues
            .into_iter()
            .map(|queue| {
                let queue: BTreeSet<u32> = queue.into_iter().collect();
                let Some(named) = named else { return queue };
                let both: BTreeSet<u32> = queue.intersection(named).copied().collect();
                if both.is_empty() { named.clone() } else { both }
            })
            .collect();
        let found = of_queues(daemon, name)?;
        eprintln!("          {name}: {found:?}");
        ensure!(found == expected, "{name}: queue threads run on {found:?}, expected {expected:?}");
        Ok(())
    };
    let named = [("first", BTreeSet::from([0])), ("last", BTreeSet::from([last])), ("both", (0..=last).collect())];
    let check_all = |daemon: &Daemon| {
        expect_all(
            std::iter::once(check(daemon, "free", None))
                .chain(named.iter().map(|(name, cpus)| check(daemon, name, Some(cpus)))),
        )
    };
    let daemon = scene.start(&config)?;
    check_all(&daemon)?;
    let facts = scene.listing()?;
    let told: Vec<String> = facts["devices"].as_array().into_iter().flatten().map(|d| d["cpus"].to_string()).collect();
    ensure!(
        told == [format!("\"0-{last}\""), "\"0\"".into(), "null".into(), format!("\"{last}\"")],
        "`list --json` says {told:?}"
    );
    // After a kill the next daemon reads the CPUs from the state files.
    daemon.kill(std::time::Duration::from_secs(5))?;
    let daemon = scene.start(&config)?;
    check_all(&daemon)?;
    daemon.stop().map(drop)
}

fn cpus_that_the_host_lacks_are_refused_with_their_line(scene: &Scene) -> Result<()> {
    // No host under test has CPUs 900 to 902. Exit 3 from `run`, `add` and `reload`, with all
    // errors in one answer, and no device is made. `check` does not look at the host.
    let config = "version: 1\ndevices:\n  sound: { backend: { null: 1MiB } }\n  \
                  wrong:\n    backend: { null: 1MiB }\n    cpus: [0, 900-901]\n  more: { backend: { null: 1MiB }, cpus: 902 }\n";
    scene.write("wrong.yaml", config)?;
    let said = [
        "error[E-CONFIG]: device \"wrong\": cpus (line 6): this host has no CPU 900-901; it has 0",
        "device \"more\": cpus (line 7): this host has no CPU 902",
    ];
    scene.run(&["check", "wrong.yaml"])?.expect_code(0)?;
    scene.ask(&["run", "wrong.yaml"])?.expect_code(3)?.expect_stderr(&said)?;
    scene.expect_nothing_left()?;
    let daemon = scene.start("version: 1\ndevices:\n  sound: { backend: { null: 1MiB } }\n")?;
    let path = scene.dir().join("wrong.yaml");
    scene.ask(&["reload", path.to_str().context("a path of ours")?])?.expect_code(3)?.expect_stderr(&said)?;
    let add = ["add", "v", "--null", "1MiB", "--cpus", "0,900"];
    scene.ask(&add)?.expect_code(3)?.expect_stderr(&["device \"v\": cpus: this host has no CPU 900; it has 0"])?;
    ensure!(scene.device("wrong").is_err() && scene.device("v").is_err(), "a device was made");
    daemon.stop().map(drop)
}
