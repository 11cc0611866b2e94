//! The requests that each device and group got through, and how long they waited.
//!
//! ```text
//!   went ──► the device's row ──► its group's ──► the group above ──► … ──► total
//! ```
//!
//! A request counts for the groups above its device at the time of its dispatch. A row is at the
//! limit while at least one request of it waits.

use serde::Serialize;
use throttle_core::time::Time;
use ublk_throttle_config::Config;

use super::cast::Node;
use super::histogram::Histogram;
use super::world::{Observer, Went};

/// Counts while a trace is played.
pub struct Summary {
    groups: Vec<Row>,
    devices: Vec<Row>,
    total: Row,
    /// The time of the first line of the trace, and of the last event.
    span: Option<(Time, Time)>,
}

/// One line of the table.
#[derive(Default)]
struct Row {
    name: String,
    /// The group above.
    above: Option<usize>,
    requests: u64,
    bytes: u64,
    waits: Histogram,
    waiting: u64,
    waiting_since: Time,
    at_limit_ns: u64,
}

/// The result, for programs and for the table.
#[derive(Debug, PartialEq, Serialize)]
pub struct Facts {
    /// From the first line of the trace to its last line or the last request, whichever is later.
    pub span_ns: u64,
    /// In the order of the configuration.
    pub devices: Vec<RowFacts>,
    /// In the order of the configuration.
    pub groups: Vec<RowFacts>,
    /// All devices.
    pub total: RowFacts,
}

/// The results of a device or a group.
#[derive(Debug, PartialEq, Serialize)]
pub struct RowFacts {
    /// Its name in the configuration.
    pub name: String,
    /// Requests dispatched.
    pub requests: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Over the span; absent if that is 0.
    pub requests_per_s: Option<f64>,
    /// Over the span; absent if that is 0.
    pub bytes_per_s: Option<f64>,
    /// The waits of its requests.
    pub wait_ns: WaitFacts,
    /// How long at least one request of it waited.
    pub at_limit_ns: u64,
}

/// Waits in nanoseconds; percentiles are rounded up by at most 0.4 %.
#[derive(Debug, PartialEq, Serialize)]
pub struct WaitFacts {
    /// Half of the requests waited no longer.
    pub p50: u64,
    /// Nine of ten waited no longer.
    pub p90: u64,
    /// All but one of a hundred waited no longer.
    pub p99: u64,
    /// The longest, exactly.
    pub max: u64,
}

impl Summary {
    /// A summary without events.
    pub fn new(config: &Config) -> Self {
        let number = |name: &String| config.groups.iter().position(|group| group.name == *name);
        let row = |name: &str, above: Option<&String>| Row {
            name: name.to_owned(),
            above: above.and_then(number),
            ..Row::default()
        };
        Self {
            groups: config.groups.iter().map(|group| row(&group.name, group.parent.as_ref())).collect(),
            devices: config.devices.iter().map(|device| row(&device.name, device.group.as_ref())).collect(),
            total: row("total", None),
            span: None,
        }
    }

    /// The result.
    pub fn facts(&self) -> Facts {
        let span_ns = self.span.map_or(0, |(first, last)| last.nanos_since(first));
        let facts = |rows: &[Row]| rows.iter().map(|row| row.facts(span_ns)).collect();
        Facts { span_ns, devices: facts(&self.devices), groups: facts(&self.groups), total: self.total.facts(span_ns) }
    }

    /// Applies `with` to the row of a device, those of the groups above it, and the total.
    fn each_above(&mut self, device: usize, mut with: impl FnMut(&mut Row)) {
        let mut next = self.devices[device].above;
        with(&mut self.devices[device]);
        while let Some(group) = next {
            with(&mut self.groups[group]);
            next = self.groups[group].above;
        }
        with(&mut self.total);
    }
}

impl Observer for Summary {
    fn at(&mut self, now: Time) {
        let (_, last) = self.span.get_or_insert((now, now));
        *last = now;
    }

    fn held(&mut self, at: Time, device: usize) {
        self.each_above(device, |row| row.wait(at, 1));
    }

    fn went(&mut self, went: &Went) {
        let wait_ns = went.at.nanos_since(went.arrived);
        self.each_above(went.device, |row| {
            row.requests += 1;
            row.bytes = row.bytes.saturating_add(went.bytes);
            row.waits.add(wait_ns);
            if went.was_held {
                row.wait(went.at, -1);
            }
        });
    }

    fn moved(&mut self, at: Time, node: Node, above: Option<usize>) {
        let row = match node {
            Node::Group(group) => &mut self.groups[group],
            Node::Device(device) => &mut self.devices[device],
        };
        // Requests that wait in the moved node wait in different groups from now on.
        let waiting = row.waiting as i64;
        let left = std::mem::replace(&mut row.above, above);
        for (from, change) in [(left, -waiting), (above, waiting)] {
            let mut next = from;
            while let Some(group) = next {
                self.groups[group].wait(at, change);
                next = self.groups[group].above;
            }
        }
    }
}

impl Row {
    /// `change` more requests wait; fewer if negative.
    fn wait(&mut self, at: Time, change: i64) {
        let before = self.waiting;
        self.waiting = before.checked_add_signed(change).expect("what goes has been held");
        match (before, self.waiting) {
            (0, 1..) => self.waiting_since = at,
            (1.., 0) => self.at_limit_ns += at.nanos_since(self.waiting_since),
            _ => {}
        }
    }

    fn facts(&self, span_ns: u64) -> RowFacts {
        let rate = |count: u64| (span_ns > 0).then(|| count as f64 * 1e9 / span_ns as f64);
        RowFacts {
            name: self.name.clone(),
            requests: self.requests,
            bytes: self.bytes,
            requests_per_s: rate(self.requests),
            bytes_per_s: rate(self.bytes),
            wait_ns: WaitFacts {
                p50: self.waits.percentile(50),
                p90: self.waits.percentile(90),
                p99: self.waits.percentile(99),
                max: self.waits.max(),
            },
            at_limit_ns: self.at_limit_ns,
        }
    }
}
