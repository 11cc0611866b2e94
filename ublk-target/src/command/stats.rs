//! `stats`: a table of rates over an interval, or of totals.
//!
//! ```text
//!   report ─── interval ─── report ─── interval ─── report
//!      └── difference ──► table ──┘└── difference ──► table
//! ```
//!
//! The row of a group covers the devices that are in it at the end of the interval. A device that
//! was added, removed or moved in the interval cannot make the numbers jump.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::ask::{ask, understood};
use super::list::{size, table};
use super::{say, say_json_line};
use crate::daemon::stats::{CreditReport, Report};
use crate::device::DeviceStats;
use crate::error::Outcome;
use crate::flags::Place;
use crate::histogram::Histogram;
use crate::protocol::Command;

/// Prints the statistics once, or once for each interval.
pub fn run(
    place: &Place,
    name: Option<String>,
    interval: Option<Duration>,
    count: Option<u64>,
    json: bool,
) -> Outcome<()> {
    // The daemon's report on a group includes its devices, which the rows of the group are summed
    // from.
    let report = |name: Option<String>| -> Outcome<Report> { understood(ask(place, &Command::Stats { name })?) };
    let mut before = report(name.clone())?;
    let Some(interval) = interval else {
        show(&Sample::of(None, &before), json);
        return Ok(());
    };
    for _ in 0..count.unwrap_or(u64::MAX) {
        std::thread::sleep(interval);
        let after = report(name.clone())?;
        show(&Sample::of(Some(&before), &after), json);
        before = after;
    }
    Ok(())
}

/// The output for one point in time.
#[derive(Debug, Serialize)]
struct Sample {
    /// The length of the interval; `None` for totals since each device was made.
    seconds: Option<f64>,
    devices: Vec<Row>,
    groups: Vec<Row>,
}

/// A device or group. Counts are those of the interval, or totals.
#[derive(Debug, PartialEq, Serialize)]
struct Row {
    name: String,
    requests: u64,
    bytes: u64,
    errors: u64,
    operations: BTreeMap<&'static str, Done>,
    held_now: u32,
    held: u64,
    wait: Times,
    service: Times,
    lateness: Times,
    credit: Vec<CreditReport>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Done {
    requests: u64,
    bytes: u64,
    errors: u64,
}

/// Percentiles of a histogram, in nanoseconds.
#[derive(Debug, PartialEq, Serialize)]
struct Times {
    count: u64,
    p50_ns: u64,
    p99_ns: u64,
    max_ns: u64,
}

impl Times {
    fn of(histogram: &Histogram) -> Self {
        Self {
            count: histogram.count(),
            p50_ns: histogram.percentile(50.0),
            p99_ns: histogram.percentile(99.0),
            max_ns: histogram.max(),
        }
    }
}

impl Row {
    fn of(name: &str, stats: &DeviceStats, held_now: u32, credit: &[CreditReport]) -> Self {
        let total = stats.total();
        let operations = stats
            .operations()
            .into_iter()
            .map(|(name, of)| (name, Done { requests: of.requests, bytes: of.bytes, errors: of.errors }));
        Self {
            name: name.to_owned(),
            requests: total.requests,
            bytes: total.bytes,
            errors: total.errors,
            operations: operations.collect(),
            held_now,
            held: stats.held_total,
            wait: Times::of(&stats.wait),
            service: Times::of(&stats.service),
            lateness: Times::of(&stats.lateness),
            credit: credit.to_vec(),
        }
    }
}

impl Sample {
    fn of(before: Option<&Report>, after: &Report) -> Self {
        let Some(before) = before else {
            let row = |name: &String, stats, held, credit: &Vec<_>| Row::of(name, stats, held, credit);
            return Self {
                seconds: None,
                devices: after.devices.iter().map(|of| row(&of.name, &of.stats, of.held, &of.credit)).collect(),
                groups: after.groups.iter().map(|of| row(&of.name, &of.stats, of.held, &of.credit)).collect(),
            };
        };
        let seconds = after.at_ns.saturating_sub(before.at_ns) as f64 / 1e9;
        let earlier: BTreeMap<_, _> =
            before.devices.iter().map(|device| ((&device.name, device.nonce), &device.stats)).collect();
        let mut done: BTreeMap<&str, DeviceStats> = BTreeMap::new();
        for device in &after.devices {
            // All counts of a new device are of this interval.
            let since = earlier.get(&(&device.name, device.nonce)).map(|earlier| device.stats.since(earlier));
            done.insert(&device.name, since.unwrap_or_else(|| device.stats.clone()));
        }
        let devices = after.devices.iter().map(|of| Row::of(&of.name, &done[of.name.as_str()], of.held, &of.credit));
        let groups = after.groups.iter().map(|of| {
            let mut sum = DeviceStats::default();
            of.devices.iter().filter_map(|name| done.get(name.as_str())).for_each(|device| sum.add(device));
            Row::of(&of.name, &sum, of.held, &of.credit)
        });
        Self { seconds: Some(seconds), devices: devices.collect(), groups: groups.collect() }
    }
}

fn show(sample: &Sample, json: bool) {
    if json {
        return say_json_line(sample);
    }
    let (requests, bytes) = if sample.seconds.is_some() { ("IOPS", "BYTES/S") } else { ("REQUESTS", "BYTES") };
    for (what, list) in [("DEVICE", &sample.devices), ("GROUP", &sample.groups)] {
        if list.is_empty() {
            continue;
        }
        let head = [
            what,
            requests,
            bytes,
            "ERRORS",
            "HELD",
            "WAITED",
            "WAIT p50",
            "p99",
            "max",
            "SERVICE p50",
            "p99",
            "max",
            "LATE p50",
            "p99",
            "max",
            "LEFT",
        ];
        let mut rows = vec![head.map(str::to_owned)];
        rows.extend(list.iter().map(|row| cells(row, sample.seconds)));
        if what == "GROUP" && !sample.devices.is_empty() {
            say("");
        }
        table(&rows);
    }
    if sample.seconds.is_some() {
        say("");
    }
}

fn cells(row: &Row, seconds: Option<f64>) -> [String; 16] {
    let rate = |count: u64| seconds.map_or(count, |seconds| (count as f64 / seconds.max(1e-9)).round() as u64);
    let left = |credit: &CreditReport| {
        let show = |units| if credit.limit.starts_with("bps") { size(units) } else { units.to_string() };
        match credit.debt {
            0 => format!("{}={}/{}", credit.limit, show(credit.left), show(credit.capacity)),
            debt => format!("{}=-{}/{}", credit.limit, show(debt), show(credit.capacity)),
        }
    };
    let left: Vec<String> = row.credit.iter().map(left).collect();
    [
        row.name.clone(),
        rate(row.requests).to_string(),
        amount(rate(row.bytes)),
        row.errors.to_string(),
        row.held_now.to_string(),
        row.held.to_string(),
        time(row.wait.count, row.wait.p50_ns),
        time(row.wait.count, row.wait.p99_ns),
        time(row.wait.count, row.wait.max_ns),
        time(row.service.count, row.service.p50_ns),
        time(row.service.count, row.service.p99_ns),
        time(row.service.count, row.service.max_ns),
        time(row.lateness.count, row.lateness.p50_ns),
        time(row.lateness.count, row.lateness.p99_ns),
        time(row.lateness.count, row.lateness.max_ns),
        if left.is_empty() { "unlimited".to_owned() } else { left.join(" ") },
    ]
}

/// An amount with three digits: measured, not configured.
fn amount(bytes: u64) -> String {
    let units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    let bytes = bytes as f64;
    units
        .iter()
        .find(|(one, _)| bytes >= *one)
        .map_or_else(|| format!("{bytes}B"), |(one, unit)| format!("{}{unit}", three_digits(bytes / one)))
}

fn time(count: u64, ns: u64) -> String {
    let units = [(1e9, "s"), (1e6, "ms"), (1e3, "us")];
    let ns = ns as f64;
    if count == 0 {
        return "-".to_owned();
    }
    units
        .iter()
        .find(|(one, _)| ns >= *one)
        .map_or_else(|| format!("{ns}ns"), |(one, unit)| format!("{}{unit}", three_digits(ns / one)))
}

fn three_digits(value: f64) -> String {
    let digits = if value >= 100.0 { 0 } else { 1 + usize::from(value < 10.0) };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::stats::{DeviceReport, GroupReport};
    use crate::device::OperationStats;

    fn device(name: &str, nonce: u32, requests: u64) -> DeviceReport {
        let stats = DeviceStats {
            read: OperationStats { requests, bytes: requests * 4096, errors: 0 },
            ..DeviceStats::default()
        };
        DeviceReport { name: name.to_owned(), nonce: Some(nonce), held: 0, stats, credit: Vec::new() }
    }

    fn report(at_ns: u64, devices: Vec<DeviceReport>) -> Report {
        let mut stats = DeviceStats::default();
        devices.iter().for_each(|device| stats.add(&device.stats));
        let members = devices.iter().map(|device| device.name.clone()).collect();
        let group = GroupReport { name: "g".to_owned(), devices: members, held: 0, stats, credit: Vec::new() };
        Report { at_ns, devices, groups: vec![group], log_lines_lost: 0 }
    }

    #[test]
    fn devices_that_come_and_go_make_no_group_jump() {
        // b leaves after a million requests; c is added; n is removed and made anew, so all counts
        // of the second n are of the interval.
        let before = report(0, vec![device("a", 1, 1000), device("b", 2, 1_000_000), device("n", 5, 7)]);
        let after = report(2_000_000_000, vec![device("a", 1, 1500), device("c", 3, 50), device("n", 6, 3)]);
        let sample = Sample::of(Some(&before), &after);
        let requests = |rows: &[Row]| rows.iter().map(|row| (row.name.clone(), row.requests)).collect::<Vec<_>>();
        assert_eq!(requests(&sample.devices), [("a".into(), 500), ("c".into(), 50), ("n".into(), 3)]);
        assert_eq!(requests(&sample.groups), [("g".into(), 553)]);
        assert_eq!(cells(&sample.groups[0], sample.seconds)[1], "277");
        assert_eq!(Sample::of(None, &after).groups[0].requests, 1553);
    }

    #[test]
    fn amounts_and_times_have_three_digits() {
        assert_eq!([0, 999, 1000, 12_345, 4_096_000].map(amount), ["0B", "999B", "1.00kB", "12.3kB", "4.10MB"]);
        assert_eq!([12, 1500, 250_000_000].map(|ns| time(1, ns)), ["12ns", "1.50us", "250ms"]);
        assert_eq!(time(0, 0), "-");
    }
}
