//! Bounds on the time that a user waits, and on the disturbance of neighbours. Each trial prints its measurements.

mod abuse;
mod answers;
mod changes;
mod crash;
mod cycles;
mod removals;

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;
use ublk_throttle_tests::command::Started;
use ublk_throttle_tests::disks::{self, Mount, RamDisk};
use ublk_throttle_tests::fio::Fio;
use ublk_throttle_tests::mode::Times;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::wait;

use self::abuse::abuse_of_the_socket_holds_up_nobody_and_takes_no_memory;
use self::answers::{
    every_command_answers_in_five_seconds_while_a_backend_is_stalled_for_a_minute,
    every_command_answers_in_five_seconds_while_a_device_is_mounted_or_open,
    every_command_answers_in_five_seconds_while_queues_are_busy,
};
use self::changes::{reload_of_every_broken_file_changes_nothing, sets_under_load_take_50_ms_each_and_lose_nothing};
use self::crash::{
    f04_ext4_over_kills_is_clean_and_has_all_that_fsync_promised,
    f04_kills_under_verified_writes_lose_nothing_and_show_no_error,
    f04_on_crash_fail_ends_everything_in_five_seconds_and_lets_it_be_deleted,
    f04_sixteen_devices_of_a_killed_daemon_are_back_in_two_seconds,
};
use self::cycles::devices_come_and_go_and_leave_nothing;
use self::removals::removals_under_load_hurt_no_neighbour;
use crate::measure::expect_within;
use crate::removal::{held_at_one_a_second, kill_during_dels};
use crate::{Case, cases, foreign};

/// Limit of a trial with many rounds.
const TRIAL_LIMIT: Duration = Duration::from_secs(900);

/// Bound of a `del` with held requests.
const HELD_LIMIT: Duration = Duration::from_millis(500);

/// Bound of a DEL by another client, and of an `add` at the same time.
const FOREIGN_LIMIT: Duration = Duration::from_secs(1);

/// Bound on the end of a killed daemon with its helpers, and on the start of the next daemon.
const KILLED_LIMIT: Duration = Duration::from_secs(2);

/// Repetitions of our own removal, of a foreign one, and of a kill during a removal. A usual run needs them for the
/// time bounds alone: races of removals and kills are the subject of `removals` and `crash`.
const DELS: Times = Times { ci: 2, thorough: 5 };
const FOREIGN_DELS: Times = Times { ci: 1, thorough: 3 };
const KILLS: Times = Times { ci: 2, thorough: 5 };

pub(crate) fn cases() -> Vec<Case> {
    let plain = cases![[Need::Ublk];
        devices_come_and_go_and_leave_nothing,
        reload_of_every_broken_file_changes_nothing,
        abuse_of_the_socket_holds_up_nobody_and_takes_no_memory,
        f04_sixteen_devices_of_a_killed_daemon_are_back_in_two_seconds,
    ];
    let stalled = cases![[Need::Ublk, Need::Fio, Need::RamDisk, Need::Mapper];
        every_command_answers_in_five_seconds_while_a_backend_is_stalled_for_a_minute,
    ];
    let mounted = cases![[Need::Ublk, Need::Ext4];
        every_command_answers_in_five_seconds_while_a_device_is_mounted_or_open,
        f04_ext4_over_kills_is_clean_and_has_all_that_fsync_promised,
    ];
    let fio = cases![[Need::Ublk, Need::Fio];
        removals_under_load_hurt_no_neighbour,
        every_command_answers_in_five_seconds_while_queues_are_busy,
        sets_under_load_take_50_ms_each_and_lose_nothing,
        del_of_32_requests_held_at_one_a_second_takes_half_a_second,
        foreign_del_under_load_takes_a_second_and_so_does_an_add_beside_it,
        daemon_killed_in_the_middle_of_a_del_is_gone_in_two_seconds,
        f04_kills_under_verified_writes_lose_nothing_and_show_no_error,
        f04_on_crash_fail_ends_everything_in_five_seconds_and_lets_it_be_deleted,
    ];
    let ext4 = cases![[Need::Ublk, Need::RamDisk, Need::Ext4];
        forced_del_of_a_mounted_file_system_keeps_the_24_mib_just_written,
    ];
    let all = plain.into_iter().chain(stalled).chain(mounted).chain(fio).chain(ext4);
    all.map(|case| case.within(TRIAL_LIMIT)).collect()
}

fn del_of_32_requests_held_at_one_a_second_takes_half_a_second(scene: &Scene) -> Result<()> {
    // At the limit's rate, 32 requests would take half a minute. Measured from the question on the
    // socket to its answer.
    for _ in 0..DELS.get() {
        let (daemon, device, fio) = held_at_one_a_second(scene)?;
        let mut client = scene.connect()?;
        let begin = Instant::now();
        client.must(&json!({"cmd": "del", "device": "slow", "force": true}), Duration::from_secs(10))?;
        let took = begin.elapsed();
        ensure!(!device.node.exists(), "{} is still there", device.node());
        fio.finish_any(Duration::ZERO)?;
        drop(client);
        daemon.stop()?;
        expect_within("del", took, HELD_LIMIT)?;
    }
    Ok(())
}

fn foreign_del_under_load_takes_a_second_and_so_does_an_add_beside_it(scene: &Scene) -> Result<()> {
    // A DEL without STOP holds the driver's lock until the last request is answered: the daemon has
    // to notice it and dispatch the held requests.
    for _ in 0..FOREIGN_DELS.get() {
        let (daemon, device, fio) = held_at_one_a_second(scene)?;
        let del = foreign::begin_delete(scene.dir(), device.id)?;
        // The `add` starts in the middle of the DEL.
        sleep(Duration::from_millis(100));
        let add = scene.ask(&["add", "beside", "--null", "1MiB"])?.expect_code(0)?;
        let del = del.finish(Duration::from_secs(10))?.expect_code(0)?;
        fio.finish_any(Duration::ZERO)?;
        daemon.wait_for_log("W-REMOVED-EXTERNALLY", Duration::from_secs(2))?;
        ensure!(scene.device("beside")?.node.exists(), "the device added meanwhile is not there");
        daemon.stop()?;
        expect_within("DEL by another client", del.took, FOREIGN_LIMIT)?;
        expect_within("add beside it", add.took, FOREIGN_LIMIT)?;
    }
    Ok(())
}

fn daemon_killed_in_the_middle_of_a_del_is_gone_in_two_seconds(scene: &Scene) -> Result<()> {
    // Daemon and helper end, the driver's locks are free, and another device starts at once.
    let check = |_, fio: Fio, del: Started, killed: Instant| {
        let helpers_gone = || Ok(scene.processes().iter().all(|&pid| pid == del.pid()).then_some(()));
        wait::until("end of daemon and helpers", Duration::from_secs(10), helpers_gone)?;
        let gone = killed.elapsed();
        let begin = Instant::now();
        let again = scene.start("version: 1\ndevices:\n  other: { backend: { null: 1MiB } }\n")?;
        let added = begin.elapsed();
        del.finish(Duration::from_secs(10))?;
        again.stop()?;
        fio.finish_any(Duration::ZERO)?;
        scene.remove_devices();
        scene.expect_nothing_left()?;
        expect_within("everything gone", gone, KILLED_LIMIT)?;
        expect_within("another daemon and its device", added, KILLED_LIMIT)
    };
    kill_during_dels(scene, KILLS, || held_at_one_a_second(scene), check)
}

fn forced_del_of_a_mounted_file_system_keeps_the_24_mib_just_written(scene: &Scene) -> Result<()> {
    // Data is written without a sync and the disk removed by force: the backend holds all of the
    // data afterwards.
    let disk = RamDisk::new(64)?;
    let config = format!("version: 1\ndevices:\n  d: {{ backend: {{ block: {} }} }}\n", disk.node().display());
    let daemon = scene.start(&config)?;
    let mount = Mount::new(&scene.device("d")?.node, &scene.dir().join("mount"))?;
    let content: Vec<u8> = (0..24_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(mount.point().join("file"), &content)?;
    let del = scene.ask(&["del", "d", "--force"])?.expect_code(0)?;
    expect_within("del --force of a mounted file system", del.took, Duration::from_secs(5))?;
    scene.tool("umount", &[&mount.point().display().to_string()])?;
    daemon.stop()?;
    let mount = Mount::existing(disk.node(), &scene.dir().join("again"))?;
    ensure!(fs::read(mount.point().join("file"))? == content, "24 MiB were written and something else is there");
    mount.unmount()?;
    disks::fsck(disk.node())
}
