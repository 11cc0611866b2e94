//! Shares where requests need several limits: of each limit that is used up, by weight, among the
//! requests that wait for it.

use anyhow::Result;
use ublk_throttle_tests::fio::Job;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;

use crate::fairness::bytes_per_second;
use crate::measure::{expect_all, expect_near};
use crate::{Case, cases};

/// The tolerance of each share; the job files derive it.
const TOLERANCE: f64 = 0.05;

pub(crate) fn cases() -> Vec<Case> {
    cases![[Need::Ublk, Need::Fio];
        f99_writers_share_a_write_limit_beside_reads_at_another,
        f99_a_request_that_needs_two_limits_is_not_passed_for_ever,
        f99_weights_rule_a_read_limit_beside_a_writer_at_the_total,
        f99_writes_of_a_device_do_not_cost_it_its_reads,
        f99_a_total_that_is_never_short_joins_no_reads_and_writes,
    ]
    .into()
}

/// Devices of a group `g` with these limits, each with further settings, under a job; the bytes per
/// second of the job's sections must be near those that are due.
fn expect_shares<const JOBS: usize>(
    scene: &Scene,
    claim: &str,
    limits: &str,
    devices: &[(&str, &str)],
    due: [(&str, f64); JOBS],
) -> Result<()> {
    let entry = |(name, more): &(&str, &str)| format!("  {name}: {{ backend: {{ null: 1GiB }}, group: g{more} }}\n");
    let entries: String = devices.iter().map(entry).collect();
    let daemon =
        scene.start(&format!("version: 1\ngroups:\n  g: {{ limits: {{ {limits} }} }}\ndevices:\n{entries}"))?;
    let mut job = Job::new(claim);
    for (name, _) in devices {
        job = job.set(&format!("DEVICE_{}", name.to_uppercase()), scene.device(name)?.node());
    }
    let parts: [f64; JOBS] = bytes_per_second(scene, job)?;
    expect_all(parts.into_iter().zip(due).map(|(part, (name, due))| expect_near(name, part, due, TOLERANCE)))?;
    daemon.stop().map(drop)
}

fn f99_writers_share_a_write_limit_beside_reads_at_another(scene: &Scene) -> Result<()> {
    expect_shares(
        scene,
        "writers-share-a-write-limit-beside-reads-at-another",
        "bps-write: 4MB/s",
        &[("a", ", limits: { bps-read: 4MB/s }"), ("b", ""), ("c", "")],
        [("a reads", 4e6), ("a writes", 4e6 / 3.0), ("b writes", 4e6 / 3.0), ("c writes", 4e6 / 3.0)],
    )
}

fn f99_a_request_that_needs_two_limits_is_not_passed_for_ever(scene: &Scene) -> Result<()> {
    // 3.5 MB/s of b are half reads, half writes; a reads what is left of 100 operations.
    let half = 3.5e6 / 2.0;
    expect_shares(
        scene,
        "a-request-that-needs-two-limits-is-not-passed-for-ever",
        "iops-read: 100",
        &[("a", ""), ("b", ", limits: { bps-total: 3500000 }")],
        [("a reads", 100.0 * 65_536.0 - half), ("b reads", half), ("b writes", half)],
    )
}

fn f99_weights_rule_a_read_limit_beside_a_writer_at_the_total(scene: &Scene) -> Result<()> {
    expect_shares(
        scene,
        "weights-rule-a-read-limit-beside-a-writer-at-the-total",
        "bps-total: 20MB/s, bps-read: 4MB/s",
        &[("a", ", weight: 100"), ("b", ", weight: 900"), ("c", ", weight: 100")],
        [("a reads", 0.4e6), ("b reads", 3.6e6), ("c writes", 16e6)],
    )
}

fn f99_writes_of_a_device_do_not_cost_it_its_reads(scene: &Scene) -> Result<()> {
    expect_shares(
        scene,
        "writes-of-a-device-do-not-cost-it-its-reads",
        "iops-total: 1000, iops-read: 200",
        &[("a", ", weight: 100"), ("b", ", weight: 900")],
        [("a reads", 20.0 * 4096.0), ("a writes", 800.0 * 4096.0), ("b reads", 180.0 * 4096.0)],
    )
}

fn f99_a_total_that_is_never_short_joins_no_reads_and_writes(scene: &Scene) -> Result<()> {
    expect_shares(
        scene,
        "a-total-that-is-never-short-joins-no-reads-and-writes",
        "bps-total: 1GB/s, bps-read: 6MB/s, bps-write: 6MB/s",
        &[("a", ""), ("b", ""), ("c", "")],
        [("a reads", 3e6), ("a writes", 3e6), ("b writes", 3e6), ("c reads", 3e6)],
    )
}
