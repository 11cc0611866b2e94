//! Devices and requests of unusual shape: the smallest and largest queues, odd requests, partition tables.
//!
//! Each trial begins with the number of its row in `FAULTS.md`.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::libc::{EINVAL, ENOSPC};
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::{disks, sysfs, wait};

use crate::measure::{expect_all, expect_at_least, expect_near, expect_within};
use crate::{Case, READS, cases, completions, let_run, load, now_ms};

const MIB: u64 = 1 << 20;

pub(crate) fn cases() -> Vec<Case> {
    let plain = cases![[Need::Ublk];
        f44_any_depth_and_number_of_queues_serves_or_is_refused_with_the_bound,
        f45_odd_requests_are_served_or_get_their_error,
        f45_buffered_bytes_and_many_segments_arrive_whole,
        f46_partitions_appear_and_vanish_with_their_disk,
        f46_a_partition_scan_does_not_wait_for_tokens,
    ];
    let discard = cases![[Need::Ublk, Need::UtilLinux]; f45_a_tebibyte_is_discarded_within_a_second];
    let load = cases![[Need::Ublk, Need::Fio, Need::UtilLinux]; f45_discards_of_everything_do_not_starve_readers];
    plain.into_iter().chain(discard).chain(load).collect()
}

fn f44_any_depth_and_number_of_queues_serves_or_is_refused_with_the_bound(scene: &Scene) -> Result<()> {
    // Depths 1, 2 and 4096 serve. The kernel cuts a number of queues that is above the number of
    // CPUs, and the daemon warns. Values outside the bounds: exit 3.
    let cpus = std::thread::available_parallelism()?.get();
    let more = cpus + 3;
    let daemon = scene.start(&format!(
        "version: 1\ndevices:\n  \
           one: {{ backend: {{ memory: 4MiB }}, depth: 1 }}\n  \
           two: {{ backend: {{ memory: 4MiB }}, depth: 2 }}\n  \
           most: {{ backend: {{ memory: 4MiB }}, depth: 4096 }}\n  \
           wide: {{ backend: {{ memory: 4MiB }}, queues: {more} }}\n"
    ))?;
    for name in ["one", "two", "most", "wide"] {
        let device = scene.device(name)?;
        let direct = Direct::open(&device.node)?;
        for block in 0..16 {
            direct.write(block * 65536, 65536, 0xa0 + block as u8)?;
        }
        for block in 0..16 {
            ensure!(direct.holds(block * 65536, 65536, 0xa0 + block as u8)?, "{name}: block {block} reads wrong");
        }
    }
    let queues = sysfs::queue_cpus(&scene.device("wide")?.disk)?.len();
    ensure!(queues == cpus, "{more} queues on {cpus} CPUs became {queues}");
    ensure!(daemon.log()?.contains("W-QUEUES"), "nothing is told of fewer queues:\n{}", daemon.log()?);
    daemon.stop()?;
    expect_all([("depth", "0"), ("depth", "4097"), ("queues", "0"), ("queues", "65536")].map(|(key, value)| {
        let config = format!("version: 1\ndevices:\n  d: {{ backend: {{ null: 1MiB }}, {key}: {value} }}\n");
        scene.write("wrong.yaml", &config)?;
        scene.ask(&["run", "wrong.yaml"])?.expect_code(3)?.expect_stderr(&["wrong.yaml:3:", value, "4096"]).map(drop)
    }))
}

fn f45_odd_requests_are_served_or_get_their_error(scene: &Scene) -> Result<()> {
    // Unaligned requests: EINVAL. Behind the end: a read returns no bytes, a write ENOSPC. 4 MiB in
    // one call arrive whole.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 16MiB } }\n")?;
    let device = scene.device("d")?;
    let direct = Direct::open(&device.node)?;
    let errno = |result: io::Result<()>| result.err().and_then(|error| error.raw_os_error());
    ensure!(errno(direct.write(100, 512, 1)) == Some(EINVAL), "a write at byte 100 is not refused with EINVAL");
    ensure!(errno(direct.write(0, 100, 1)) == Some(EINVAL), "a write of 100 bytes is not refused with EINVAL");
    ensure!(errno(direct.write(16 * MIB, 4096, 1)) == Some(ENOSPC), "a write at the end does not get ENOSPC");
    ensure!(errno(direct.write(1 << 60, 4096, 1)) == Some(ENOSPC), "a write far behind the end does not get ENOSPC");
    let behind = direct.read(16 * MIB, 4096).err().map(|error| error.kind());
    ensure!(behind == Some(io::ErrorKind::UnexpectedEof), "a read at the end gives {behind:?}");
    direct.write(0, 4 << 20, 0xa5)?;
    direct.write(4 * MIB + 512, (4 << 20) + 512, 0xa6)?;
    ensure!(direct.holds(0, 4 << 20, 0xa5)?, "4 MiB in one call read wrong");
    ensure!(direct.holds(4 * MIB, 512, 0)?, "the sector before an odd offset has changed");
    ensure!(direct.holds(4 * MIB + 512, (4 << 20) + 512, 0xa6)?, "4 MiB at an odd offset read wrong");
    for offset in ["33554432", "18446744073709551104"] {
        let answer = scene.try_tool("blkdiscard", &["--offset", offset, "--length", "512", device.node()])?;
        ensure!(answer.code == Some(1), "a discard behind the end\n{answer}");
    }
    ensure!(device.node.exists(), "the device is gone");
    drop(direct);
    daemon.stop().map(drop)
}

fn f45_buffered_bytes_and_many_segments_arrive_whole(scene: &Scene) -> Result<()> {
    // A single byte through the page cache; 200 pages as segments of one call.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 4MiB }, queues: 2 }\n")?;
    let device = scene.device("d")?;
    let direct = Direct::open(&device.node)?;
    direct.write(0, 8192, 0xa5)?;
    let buffered = OpenOptions::new().read(true).write(true).open(&device.node)?;
    buffered.write_all_at(&[0x17], 4097)?;
    buffered.sync_all()?;
    let page = direct.read(4096, 4096)?;
    ensure!((page[0], page[1], page[2]) == (0xa5, 0x17, 0xa5), "one byte arrived as {:x?}", &page[..4]);
    let pieces: Vec<Vec<u8>> = (0..200).map(|number| vec![number as u8; 4096]).collect();
    let slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
    let written = (&buffered).write_vectored(&slices)?;
    ensure!(written == 200 * 4096, "{written} bytes of 200 pages written");
    buffered.sync_all()?;
    drop(buffered);
    for number in 0..200 {
        ensure!(direct.holds(number * 4096, 4096, number as u8)?, "piece {number} reads wrong");
    }
    drop(direct);
    daemon.stop().map(drop)
}

fn f45_a_tebibyte_is_discarded_within_a_second(scene: &Scene) -> Result<()> {
    // A discard of all of 1 TiB, on a file and on null: each discard request costs one operation,
    // at any length.
    let file = scene.dir().join("disk.img");
    let daemon = scene.start(&format!(
        "version: 1\ndevices:\n  f: {{ backend: {{ file: {}, size: 1TiB, create: true }} }}\n  \
           n: {{ backend: {{ null: 1TiB }}, limits: {{ bps-total: 1MB/s }} }}\n",
        file.display()
    ))?;
    for name in ["f", "n"] {
        let device = scene.device(name)?;
        // Without --force blkdiscard first looks for file systems, and the limit holds those reads.
        let took = scene.tool("blkdiscard", &["--force", device.node()])?.took;
        expect_within(format!("discard of 1 TiB of {name}"), took, Duration::from_secs(1))?;
    }
    daemon.stop().map(drop)
}

fn f45_discards_of_everything_do_not_starve_readers(scene: &Scene) -> Result<()> {
    // A reader keeps at least half of 400 operations a second beside repeated discards of all of 1
    // TiB.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { iops-total: 400 } }\n\
         devices:\n  r: { backend: { null: 1GiB }, group: g }\n  d: { backend: { null: 1TiB }, group: g }\n",
    )?;
    let reader = scene.device("r")?;
    let load = load(scene, READS, &reader)?;
    let begin = now_ms()? + 500;
    let node = scene.device("d")?.node;
    let discards = format!("for i in 1 2 3 4 5 6; do timeout 1 blkdiscard --force {}; done; true", node.display());
    scene.tool("sh", &["-c", &discards])?;
    let end = now_ms()?.max(begin + 2000);
    let_run(1);
    load.stop()?;
    // Half of 400, less 2 %: each end of a window of 2 s cuts off at most 4 requests.
    expect_at_least("reader beside discards", completions(scene, &reader)?.rate(begin, end), 196.0)?;
    daemon.stop().map(drop)
}

/// A file of 16 MiB that is a disk of two partitions.
fn partitioned(path: &Path) -> Result<()> {
    File::create(path)?.set_len(16 * MIB).context("partitioned disk")?;
    disks::partition(path)
}

fn f46_partitions_appear_and_vanish_with_their_disk(scene: &Scene) -> Result<()> {
    // The nodes of two partitions appear with the device, I/O through them reaches its place, and
    // `del` removes all three nodes.
    let path = scene.dir().join("disk.img");
    partitioned(&path)?;
    let daemon = scene.start(&format!("version: 1\ndevices:\n  d: {{ backend: {{ file: {} }} }}\n", path.display()))?;
    let device = scene.device("d")?;
    let parts = [1, 2].map(|number| format!("{}p{number}", device.node()));
    for part in &parts {
        wait::until(part, Duration::from_secs(5), || Ok(Path::new(part).exists().then_some(())))?;
    }
    let second = Direct::open(Path::new(&parts[1]))?;
    second.write(0, 4096, 0xa5)?;
    second.flush()?;
    drop(second);
    let mut found = [0; 4096];
    File::open(&path)?.read_exact_at(&mut found, 10240 * 512)?;
    ensure!(found == [0xa5; 4096], "what went to the second partition is not at its place");
    scene.ask(&["del", "d"])?.expect_code(0)?;
    for part in &parts {
        ensure!(!Path::new(part).exists(), "{part} is still there after del");
    }
    daemon.stop().map(drop)
}

fn f46_a_partition_scan_does_not_wait_for_tokens(scene: &Scene) -> Result<()> {
    // At 1 request a second a scan of several requests would take as many seconds. The scan is
    // exempt from the limit; later reads are not.
    let path = scene.dir().join("disk.img");
    partitioned(&path)?;
    let begin = Instant::now();
    let daemon = scene.start(&format!(
        "version: 1\ndevices:\n  d: {{ backend: {{ file: {} }}, limits: {{ iops-total: 1 }} }}\n",
        path.display()
    ))?;
    let took = begin.elapsed();
    expect_within("start of a device of one request a second", took, Duration::from_secs(4))?;
    let device = scene.device("d")?;
    wait::until("second partition", Duration::from_secs(1), || {
        Ok(Path::new(&format!("{}p2", device.node())).exists().then_some(()))
    })?;
    let direct = Direct::open(&device.node)?;
    let begin = Instant::now();
    for block in 0..4 {
        direct.read(block * 4096, 4096)?;
    }
    let took = begin.elapsed();
    expect_near("seconds for 4 reads at 1 a second", took.as_secs_f64(), 2.9, 0.2)?;
    drop(direct);
    daemon.stop().map(drop)
}
