//! Small trees with the numbers that are due, one test each.
//!
//! All flows are backlogged; each request has the size given. A window of 60 s follows 5 s of
//! warm-up. The tolerance is 2 %: a rate may be 100 ms ahead at either end of the window (0.3 %), and
//! a flow may be one request of each competitor ahead or behind at either end (1 % of the slowest
//! flow here, which has 545 requests in a window, with at most three competitors).

use super::drive::Run;
use super::plan::Plan;

const SECOND_NS: u64 = 1_000_000_000;
const K64: u64 = 65_536;

/// Requests a second of each flow.
fn rates(plan: &Plan) -> Vec<f64> {
    let mut run = Run::new(plan, 16);
    run.switch_all_on();
    run.run_until(5 * SECOND_NS);
    let before = run.grants();
    run.run_until(65 * SECOND_NS);
    run.grants().iter().zip(before).map(|(after, before)| (after - before) as f64 / 60.0).collect()
}

#[track_caller]
fn assert_due(granted: &[f64], due: &[f64]) {
    let is_fair = granted.iter().zip(due).all(|(granted, due)| (granted - due).abs() <= due * 0.02);
    assert!(is_fair, "granted {granted:.1?} a second, due {due:.1?}");
}

/// Bytes a second of each flow, in 10⁶.
fn megabytes(plan: &Plan) -> Vec<f64> {
    rates(plan).iter().zip(&plan.flows).map(|(rate, flow)| rate * flow.bytes as f64 / 1e6).collect()
}

#[test]
fn device_held_by_its_own_read_limit_takes_a_third_of_the_writes() {
    // Writes: 4 MB/s by three. Reads: the device alone.
    let mut plan = Plan::root("bps-write=4000000");
    let a = plan.device(0, "bps-read=4000000", 100);
    plan.reads(a, K64);
    plan.writes(a, K64);
    for _ in 0..2 {
        let device = plan.device(0, "", 100);
        plan.writes(device, K64);
    }
    assert_due(&megabytes(&plan), &[4.0, 4.0 / 3.0, 4.0 / 3.0, 4.0 / 3.0]);
}

#[test]
fn reads_at_their_limit_cost_no_more_than_their_bytes_of_the_total() {
    // Half of the total each: A 1 + 49 MB/s.
    let mut plan = Plan::root("bps-total=100000000 bps-read=1000000");
    let a = plan.device(0, "", 100);
    plan.reads(a, K64);
    plan.writes(a, K64);
    let b = plan.device(0, "", 100);
    plan.writes(b, K64);
    assert_due(&megabytes(&plan), &[1.0, 49.0, 50.0]);
}

#[test]
fn read_that_needs_two_limits_is_not_passed_by_requests_that_need_one() {
    // b: 3.5 MB/s are 53.4 requests, half of them reads. a: the rest of 100 reads.
    let mut plan = Plan::root("iops-read=100");
    let a = plan.device(0, "", 100);
    plan.reads(a, K64);
    let b = plan.device(0, "bps-total=3500000", 100);
    plan.reads(b, K64);
    plan.writes(b, K64);
    assert_due(&rates(&plan), &[73.3, 26.7, 26.7]);
}

#[test]
fn weights_rule_a_read_limit_beside_a_writer_at_the_total() {
    // Reads: 10 MB/s as 1 : 9. The writer: the rest of the total.
    let mut plan = Plan::root("bps-total=100000000 bps-read=10000000");
    let [a, b, c] = [100, 900, 100].map(|weight| plan.device(0, "", weight));
    plan.reads(a, K64);
    plan.reads(b, K64);
    plan.writes(c, K64);
    assert_due(&megabytes(&plan), &[1.0, 9.0, 90.0]);
}

#[test]
fn writes_of_a_device_do_not_cost_it_its_reads() {
    // Reads: 100 as 100 : 1000. Writes: the rest of the total.
    let mut plan = Plan::root("iops-total=1000 iops-read=100");
    let a = plan.device(0, "", 100);
    plan.reads(a, 4096);
    plan.writes(a, 4096);
    let b = plan.device(0, "", 1000);
    plan.reads(b, 4096);
    assert_due(&rates(&plan), &[100.0 / 11.0, 900.0, 1000.0 / 11.0]);
}

#[test]
fn group_with_small_and_large_requests_gets_half_of_both_limits() {
    // d: 500 of 100 kB, half of both. h: 500 requests and 50 MB: s + b = 500, 4096 s + 1048576 b = 50 MB.
    let mut plan = Plan::root("bps-total=100000000 iops-total=1000");
    let d = plan.device(0, "", 100);
    plan.reads(d, 100_000);
    let h = plan.group(0, "", 100);
    for bytes in [4096, 1 << 20] {
        let device = plan.device(h, "", 100);
        plan.reads(device, bytes);
    }
    let big = (50e6 - 4096.0 * 500.0) / (1_048_576.0 - 4096.0);
    assert_due(&rates(&plan), &[500.0, 500.0 - big, big]);
}

#[test]
fn bytes_and_operations_are_both_used_up_by_small_and_large_writes() {
    // a + b = 350, 1024 a + 262144 b = 6.8 MB: a by its share of operations, b by its share of bytes.
    let mut plan = Plan::root("bps-total=6800000 iops-total=350");
    let [a, b] = [188, 61].map(|weight| plan.device(0, "", weight));
    plan.writes(a, 1024);
    plan.writes(b, 262_144);
    let large = (6.8e6 - 1024.0 * 350.0) / (262_144.0 - 1024.0);
    assert_due(&rates(&plan), &[350.0 - large, large]);
}

#[test]
fn total_that_is_never_short_joins_no_reads_and_writes() {
    // Reads by two, writes by two.
    let mut plan = Plan::root("bps-total=1000000000 bps-read=10000000 bps-write=10000000");
    let [a, b, c] = [100; 3].map(|weight| plan.device(0, "", weight));
    plan.reads(a, K64);
    plan.writes(a, K64);
    plan.writes(b, K64);
    plan.reads(c, K64);
    assert_due(&megabytes(&plan), &[5.0, 5.0, 5.0, 5.0]);
}

#[test]
fn half_used_long_burst_changes_no_share() {
    // Bytes are short: 610 requests of 8 KiB and 38 of 128 KiB, 648 of the 1000 that the burst allows.
    // Its 100,000 operations, less 548 a second, last 182 s; half are left at 91 s.
    let mut plan = Plan::root("bps-total=10000000 iops-total=100 iops-total-max=1000 iops-total-max-length=100");
    let [a, b] = [100; 2].map(|weight| plan.device(0, "", weight));
    plan.reads(a, 8192);
    plan.reads(b, 131_072);
    let mut run = Run::new(&plan, 16);
    run.switch_all_on();
    run.run_until(100 * SECOND_NS);
    let before = run.grants();
    run.run_until(170 * SECOND_NS);
    let granted: Vec<f64> = std::iter::zip(run.grants(), before).map(|(now, before)| (now - before) as f64).collect();
    let megabytes = [granted[0] * 8192.0 / 70e6, granted[1] * 131_072.0 / 70e6];
    assert_due(&megabytes, &[5.0, 5.0]);
}

/// The longest pause of the first flow, in milliseconds, in the 10 s after all the flows from `first`
/// on come at once. Before that they have paused for 4 s; `used` says whether they had their share
/// until then, or never sent a request.
fn pause_ms(plan: &Plan, first: usize, used: bool) -> f64 {
    let mut run = Run::new(plan, 16);
    let coming = first..plan.flows.len();
    (0..first).for_each(|flow| run.switch(flow, true));
    coming.clone().for_each(|flow| run.switch(flow, used));
    run.run_until(SECOND_NS);
    coming.clone().for_each(|flow| run.switch(flow, false));
    run.run_until(5 * SECOND_NS);
    assert!(run.is_drained(), "the pause has begun");
    run.forget_pauses();
    coming.for_each(|flow| run.switch(flow, true));
    run.run_until(15 * SECOND_NS);
    run.pause_ns(0) as f64 / 1e6
}

/// Asserts the pause of a steady reader of weight 100 when `weights` come back to a group of 1000
/// reads a second: at most its wait at the fair share, and 150 ms.
#[track_caller]
fn assert_return(weights: &[u32], fair_ms: f64) {
    let mut plan = Plan::root("iops-total=1000");
    for &weight in std::iter::once(&100).chain(weights) {
        let device = plan.device(0, "", weight);
        plan.reads(device, 4096);
    }
    let pause_ms = pause_ms(&plan, 1, true);
    assert!(pause_ms <= fair_ms + 150.0, "a pause of {pause_ms:.0} ms, fair {fair_ms} ms");
}

#[test]
fn return_of_a_device_of_weight_1000_is_a_short_pause() {
    // One of 11 requests: 11 ms.
    assert_return(&[1000], 11.0);
}

#[test]
fn return_of_a_device_of_weight_10_000_is_a_short_pause() {
    // One of 101 requests: 101 ms.
    assert_return(&[10_000], 101.0);
}

#[test]
fn return_of_a_hundred_devices_is_a_short_pause() {
    // One of 101 requests: 101 ms.
    assert_return(&[100; 100], 101.0);
}

#[test]
fn arrival_within_a_group_of_little_weight_is_a_short_pause() {
    // The group has 1 of 100 requests, and each of its devices one of two: 200 ms.
    let mut plan = Plan::root("iops-total=1000");
    let h = plan.group(0, "", 1);
    let a = plan.device(h, "", 100);
    plan.reads(a, 4096);
    let big = plan.device(0, "", 99);
    plan.reads(big, 4096);
    let b = plan.device(h, "", 100);
    plan.reads(b, 4096);
    let pause_ms = pause_ms(&plan, 2, false);
    assert!(pause_ms <= 200.0 + 150.0, "a pause of {pause_ms:.0} ms, fair 200 ms");
}
