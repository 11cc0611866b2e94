//! Who gets how much of a shared limit: by bytes, whatever the sizes, depths and directions; by weight; at each level.
//!
//! ```text
//!   job a   |..settle..|################ 8 s ################|..   bytes that completed in the window, out of fio's logs
//!   job b      |..settle|################ 8 s ################|.   the same window for all, inside all of them
//!                       └ 1.5 s after the last of them began
//! ```
//!
//! Not out of fio's report: each job of that has a window of its own, which ends with its own last request; large ones that
//! are in flight when the other jobs have ended go at the whole rate, and are counted.

use std::time::Duration;

use anyhow::{Context, Result};
use ublk_throttle_tests::fio::{Completions, Job};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;

use crate::measure::{expect, expect_all, expect_at_least, expect_near};
use crate::{Case, cases};

/// What the jobs run for.
const RUNTIME: Duration = Duration::from_secs(12);

/// From the first completion of the last job: the credit of 100 ms that is there at the start, and what a job could run ahead
/// while it was alone, are used up.
const SETTLE_MS: u64 = 1500;

/// What is measured.
const WINDOW_MS: u64 = 5000;

pub(crate) fn cases() -> Vec<Case> {
    cases![[Need::Ublk, Need::Fio];
        small_and_large_requests_share_bytes_equally,
        small_reads_and_large_writes_of_two_devices_share_bytes_equally,
        small_reads_and_large_writes_of_one_device_share_bytes_equally,
        one_request_at_a_time_gets_as_much_as_thirty_two,
        shares_follow_weights_whatever_the_sizes,
        shares_hold_at_each_level_of_groups,
        cap_on_a_tenant_holds_and_the_rest_is_lent,
    ]
    .into()
}

fn small_and_large_requests_share_bytes_equally(scene: &Scene) -> Result<()> {
    // 4 KiB against 64 KiB, both 32 deep.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { bps-total: 10MB/s } }\n\
         devices:\n  small: { backend: { null: 1GiB }, group: g }\n  large: { backend: { null: 1GiB }, group: g }\n",
    )?;
    let job = Job::new("small-and-large-requests-share-bytes-equally")
        .set("DEVICE_SMALL", scene.device("small")?.node())
        .set("DEVICE_LARGE", scene.device("large")?.node());
    let [small, large] = bytes_per_second(scene, job)?;
    expect_all([expect_near("sum", small + large, 1e7, 0.01), expect_jain(&[small, large], 0.98)])?;
    daemon.stop().map(drop)
}

fn small_reads_and_large_writes_of_two_devices_share_bytes_equally(scene: &Scene) -> Result<()> {
    // Two members of a group, each with one direction.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { bps-total: 10MB/s } }\n\
         devices:\n  reads: { backend: { null: 1GiB }, group: g }\n  writes: { backend: { null: 1GiB }, group: g }\n",
    )?;
    expect_reads_and_writes_equal(scene, "reads", "writes")?;
    daemon.stop().map(drop)
}

fn small_reads_and_large_writes_of_one_device_share_bytes_equally(scene: &Scene) -> Result<()> {
    // The two lines of one member, under a limit of its own.
    let daemon = scene.start(
        "version: 1\n\
         devices:\n  d: { backend: { null: 1GiB }, limits: { bps-total: 10MB/s } }\n",
    )?;
    expect_reads_and_writes_equal(scene, "d", "d")?;
    daemon.stop().map(drop)
}

fn expect_reads_and_writes_equal(scene: &Scene, reads_on: &str, writes_on: &str) -> Result<()> {
    let job = Job::new("small-reads-and-large-writes-share-bytes-equally")
        .set("DEVICE_READ", scene.device(reads_on)?.node())
        .set("DEVICE_WRITE", scene.device(writes_on)?.node());
    let [reads, writes] = bytes_per_second(scene, job)?;
    expect_all([expect_near("sum", reads + writes, 1e7, 0.01), expect_jain(&[reads, writes], 0.98)])
}

fn one_request_at_a_time_gets_as_much_as_thirty_two(scene: &Scene) -> Result<()> {
    // Who waits for each answer before asking again has nothing in line when its turn comes, and is owed it all the same.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { iops-total: 400 } }\n\
         devices:\n  deep: { backend: { null: 1GiB }, group: g }\n  shallow: { backend: { null: 1GiB }, group: g }\n",
    )?;
    let job = Job::new("depth-1-gets-as-much-as-depth-32")
        .set("DEVICE_DEEP", scene.device("deep")?.node())
        .set("DEVICE_SHALLOW", scene.device("shallow")?.node());
    let [deep, shallow] = bytes_per_second(scene, job)?;
    expect_all([expect_near("sum", deep + shallow, 400.0 * 4096.0, 0.01), expect_jain(&[deep, shallow], 0.95)])?;
    daemon.stop().map(drop)
}

fn shares_follow_weights_whatever_the_sizes(scene: &Scene) -> Result<()> {
    // 1 : 2 : 4, the lightest with the largest requests.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { bps-total: 21MB/s } }\n\
         devices:\n  one: { backend: { null: 1GiB }, group: g, weight: 100 }\n  \
           two: { backend: { null: 1GiB }, group: g, weight: 200 }\n  \
           four: { backend: { null: 1GiB }, group: g, weight: 400 }\n",
    )?;
    let job = Job::new("shares-follow-weights-whatever-the-sizes")
        .set("DEVICE_1", scene.device("one")?.node())
        .set("DEVICE_2", scene.device("two")?.node())
        .set("DEVICE_4", scene.device("four")?.node());
    let [one, two, four] = bytes_per_second(scene, job)?;
    expect_all([
        expect_near("sum", one + two + four, 21e6, 0.01),
        expect_near("weight 1, 64 KiB", one, 3e6, 0.02),
        expect_near("weight 2, 4 KiB", two, 6e6, 0.02),
        expect_near("weight 4, 16 KiB", four, 12e6, 0.02),
    ])?;
    daemon.stop().map(drop)
}

fn shares_hold_at_each_level_of_groups(scene: &Scene) -> Result<()> {
    // The tenant's share depends neither on how many devices it has nor on their weights: those count inside it.
    let daemon = scene.start(&rack(""))?;
    let [small, large, beside] = bytes_per_second(scene, rack_job(scene, "shares-hold-at-each-level")?)?;
    expect_all([
        expect_near("sum", small + large + beside, 12e6, 0.01),
        expect_near("tenant's device of weight 100, 4 KiB", small, 2e6, 0.02),
        expect_near("tenant's device of weight 300, 64 KiB", large, 6e6, 0.02),
        expect_near("device beside it", beside, 4e6, 0.02),
    ])?;
    daemon.stop().map(drop)
}

fn cap_on_a_tenant_holds_and_the_rest_is_lent(scene: &Scene) -> Result<()> {
    // 4 of the 8 MB/s that its weight would give it.
    let daemon = scene.start(&rack(", limits: { bps-total: 4MB/s }"))?;
    let [small, large, beside] =
        bytes_per_second(scene, rack_job(scene, "cap-on-a-tenant-holds-and-the-rest-is-lent")?)?;
    expect_all([
        expect_near("tenant", small + large, 4e6, 0.01),
        expect_near("tenant's device of weight 100, 4 KiB", small, 1e6, 0.02),
        expect_near("tenant's device of weight 300, 64 KiB", large, 3e6, 0.02),
        expect_near("device beside it", beside, 8e6, 0.01),
    ])?;
    daemon.stop().map(drop)
}

/// A rack of 12 MB/s with a tenant (two shares, of which one device has a quarter and one the rest) and a device beside it (one
/// share); `more` is said of the tenant.
fn rack(more: &str) -> String {
    format!(
        "version: 1\n\
         groups:\n  rack: {{ limits: {{ bps-total: 12MB/s }} }}\n  tenant: {{ parent: rack, weight: 200{more} }}\n\
         devices:\n  small: {{ backend: {{ null: 1GiB }}, group: tenant, weight: 100 }}\n  \
           large: {{ backend: {{ null: 1GiB }}, group: tenant, weight: 300 }}\n  \
           beside: {{ backend: {{ null: 1GiB }}, group: rack }}\n"
    )
}

fn rack_job(scene: &Scene, claim: &str) -> Result<Job> {
    Ok(Job::new(claim)
        .set("DEVICE_TENANT_SMALL", scene.device("small")?.node())
        .set("DEVICE_TENANT_LARGE", scene.device("large")?.node())
        .set("DEVICE_BESIDE", scene.device("beside")?.node()))
}

/// Runs the jobs of a file and returns what each moved over the same window, in the file's order.
fn bytes_per_second<const JOBS: usize>(scene: &Scene, job: Job) -> Result<[f64; JOBS]> {
    let log = scene.dir().join("completions");
    scene.fio(job.set("LOG", log.display()))?.finish(RUNTIME)?;
    let jobs = Completions::read_all(&log, JOBS)?;
    let first_ms = jobs.iter().map(Completions::first_ms).max().context("no jobs")?;
    let last_ms = jobs.iter().map(Completions::last_ms).min().context("no jobs")?;
    let (from, to) = (first_ms + SETTLE_MS, first_ms + SETTLE_MS + WINDOW_MS);
    expect(to <= last_ms, || format!("all jobs ran together for {} ms only", last_ms.saturating_sub(first_ms)))?;
    Ok(std::array::from_fn(|number| jobs[number].bytes(from, to) as f64 * 1000.0 / WINDOW_MS as f64))
}

/// Fails unless Jain's index of fairness reaches `least`.
pub(crate) fn expect_jain(shares: &[f64], least: f64) -> Result<()> {
    let index = jain(shares);
    let sum: f64 = shares.iter().sum();
    let parts = shares.iter().map(|share| format!("{:.2} %", 100.0 * share / sum)).collect::<Vec<_>>().join(" : ");
    expect_at_least(format!("shares {parts}, Jain's index"), index, least)
}

/// The square of the sum over n times the sum of the squares: 1 if all get the same, 1/n if one gets all.
fn jain(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    let squares: f64 = shares.iter().map(|share| share * share).sum();
    sum * sum / (shares.len() as f64 * squares)
}
