//! Shares of a common limit: equal bytes for all sizes, depths and directions; by weight; at each
//! level.
//!
//! ```text
//!   job a   |..settle..|################ 5 s ################|..   bytes completed in the window, from fio's logs
//!   job b      |..settle|################ 5 s ################|.   one window for all jobs, while all of them run
//!                       └ 1.5 s after the last job began
//! ```
//!
//! fio's report is not used: it counts each job over an interval of its own, up to the job's last
//! completion. Large requests in flight after the end of the remaining jobs get the whole rate, and
//! the report counts them.

use std::time::Duration;

use anyhow::{Context, Result};
use ublk_throttle_tests::fio::{Completions, Job};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;

use crate::measure::{expect, expect_all, expect_at_least, expect_near};
use crate::{Case, cases};

/// Time allowed for the jobs, which run for 8 s.
const RUNTIME: Duration = Duration::from_secs(12);

/// From the first completion of the last job. After that time the initial credit (0.1 s of the
/// rate) and the advance of a job that ran alone are used up.
const SETTLE_MS: u64 = 1500;

/// The measured interval.
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
    // 4 KiB against 64 KiB, both at depth 32.
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
    // Two members of a group, a reader and a writer.
    let daemon = scene.start(
        "version: 1\n\
         groups:\n  g: { limits: { bps-total: 10MB/s } }\n\
         devices:\n  reads: { backend: { null: 1GiB }, group: g }\n  writes: { backend: { null: 1GiB }, group: g }\n",
    )?;
    expect_reads_and_writes_equal(scene, "reads", "writes")?;
    daemon.stop().map(drop)
}

fn small_reads_and_large_writes_of_one_device_share_bytes_equally(scene: &Scene) -> Result<()> {
    // The two directions of one member, under a limit of its own.
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
    // The client of depth 1 has no request waiting when its turn comes; the group owes it that
    // turn.
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
    // Weights 1 : 2 : 4; the device with the smallest weight has the largest requests.
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
    // The tenant's share is independent of the number and the weights of its devices: those count
    // inside the tenant.
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
    // The cap is 4 MB/s of the 8 MB/s that the tenant's weight allows.
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

/// A rack of 12 MB/s with a tenant of weight 200 and a device `beside` of weight 100 (8 and 4
/// MB/s). In the tenant, `small` has a quarter and `large` three quarters. `more` is appended to
/// the tenant's keys.
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

/// Runs the jobs of a file and returns the bytes per second of each over one window, in the order
/// of the file.
pub(crate) fn bytes_per_second<const JOBS: usize>(scene: &Scene, job: Job) -> Result<[f64; JOBS]> {
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

/// Jain's index: the square of the sum over n times the sum of the squares. 1 for equal shares, 1/n
/// if one member gets all.
fn jain(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    let squares: f64 = shares.iter().map(|share| share * share).sum();
    sum * sum / (shares.len() as f64 * squares)
}
