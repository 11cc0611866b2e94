//! Commands that print facts, as text and as JSON.

use anyhow::{Context, Result, ensure};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;

use crate::{Case, cases};

pub(crate) fn cases() -> Vec<Case> {
    let ublk = cases![[Need::Ublk];
        list_tells_devices_and_groups,
        features_tells_what_this_kernel_offers,
        every_device_has_a_stable_name_while_it_lives,
    ];
    let anywhere = cases![[]; help_describes_every_command];
    ublk.into_iter().chain(anywhere).collect()
}

const CONFIG: &str = "version: 1\n\
    groups:\n  tenant: { limits: { iops-total: 3000 } }\n\
    devices:\n  first: { backend: { null: 1GiB }, group: tenant, limits: { bps-write: 80MB/s } }\n  \
      second: { backend: { memory: 4MiB }, queues: 2 }\n";

fn list_tells_devices_and_groups(scene: &Scene) -> Result<()> {
    // Names, nodes, groups and limits, as text and as JSON.
    let daemon = scene.start(CONFIG)?;
    let (first, second) = (scene.device("first")?, scene.device("second")?);
    let text = scene.ask(&["list"])?.expect_code(0)?.stdout;
    for part in ["first", "second", "tenant", first.node(), second.node(), "iops-total", "3000", "bps-write"] {
        ensure!(text.contains(part), "`list` does not say {part:?}:\n{text}");
    }
    let facts = scene.listing()?;
    let devices = facts["devices"].as_array().with_context(|| format!("no devices in {facts}"))?;
    let names: Vec<_> = devices.iter().map(|device| &device["name"]).collect();
    ensure!(names == ["first", "second"], "`list --json`: devices {names:?}");
    ensure!(
        devices[0]["node"] == first.node(),
        "`list --json`: node {}, expected {}",
        devices[0]["node"],
        first.node()
    );
    ensure!(devices[0]["group"] == "tenant", "`list --json`: group {}", devices[0]["group"]);
    ensure!(devices[1]["size"] == 4 << 20, "`list --json`: size {}, expected {}", devices[1]["size"], 4 << 20);
    ensure!(facts["groups"][0]["name"] == "tenant", "`list --json`: groups {}", facts["groups"]);
    daemon.stop().map(drop)
}

fn features_tells_what_this_kernel_offers(scene: &Scene) -> Result<()> {
    // `features` needs no daemon. Every supported kernel (6.12 and newer) offers recovery, which
    // the daemon needs.
    let text = scene.run(&["features"])?.expect_code(0)?.stdout;
    let facts = scene.run(&["features", "--json"])?.expect_code(0)?.json()?;
    let features = facts["features"].as_array().with_context(|| format!("no features in {facts}"))?;
    let offered = |name: &str| features.iter().any(|feature| feature["name"] == name && feature["offered"] == true);
    for name in ["USER_RECOVERY", "USER_RECOVERY_REISSUE"] {
        ensure!(offered(name), "`features --json` does not offer {name}:\n{facts}");
        ensure!(text.contains(name), "`features` does not say {name}:\n{text}");
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(text.contains(release.trim()), "`features` does not say of which kernel:\n{text}");
    Ok(())
}

fn every_device_has_a_stable_name_while_it_lives(scene: &Scene) -> Result<()> {
    // /dev/ublk-throttle/NAME points to the node, and goes with the device.
    let daemon = scene.start(CONFIG)?;
    let first = scene.device("first")?;
    ensure!(first.node.exists() && scene.device("second")?.id != first.id, "two names of one node");
    scene.ask(&["del", "first"])?.expect_code(0)?;
    ensure!(scene.device("first").is_err(), "the name outlives its device");
    ensure!(scene.device("second").is_ok(), "the other's name is gone too");
    daemon.stop().map(drop)
}

fn help_describes_every_command(scene: &Scene) -> Result<()> {
    // `--help` lists every command, and every command has a help text of its own.
    let help = scene.run(&["--help"])?.expect_code(0)?.stdout;
    for command in ["run", "check", "list", "features", "del"] {
        ensure!(help.contains(command), "`--help` does not mention {command}:\n{help}");
        scene.run(&[command, "--help"])?.expect_code(0)?;
    }
    scene.run(&["--version"])?.expect_code(0).map(drop)
}
