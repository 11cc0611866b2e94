//! The status of a device: for `list`, for clients of the socket, and for its state file.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Number;
use throttle_core::limits::{LimitKind, Limits, SECOND_NS};

use super::{Shared, State, set_size};
use crate::clock;
use crate::queue::{Handle, counters};
use crate::state_dir::Record;

/// The facts about a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its name in the configuration.
    pub name: String,
    /// `ok`, or `degraded`: the backend's last answer was an error, or one came within the last 10 s.
    #[serde(default)]
    pub health: String,
    /// See [`State`]; `unserved` if there is a state file and no daemon.
    pub state: String,
    /// The reason, in words, while the device is `waiting` for its backend.
    #[serde(default)]
    pub waiting_for: Option<String>,
    /// The N of `/dev/ublkbN`.
    pub id: Option<u32>,
    /// The device node.
    pub node: Option<String>,
    /// The stable name.
    pub link: String,
    /// The size in bytes.
    pub size: Option<u64>,
    /// `file`, `block`, `memory`, `null`.
    pub backend: String,
    /// The path of the file or block device behind the device.
    pub path: Option<String>,
    /// Whether I/O to the backend bypasses the page cache (`O_DIRECT`). `None` until the backend is
    /// open, and for memory and null.
    #[serde(default)]
    pub direct: Option<bool>,
    /// The group of the device.
    pub group: Option<String>,
    /// Its share of the rate of the group, relative to the weights of its siblings.
    pub weight: u32,
    /// Its own limits, by their keys in the configuration.
    pub limits: BTreeMap<String, Number>,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// The setting for zero copy, as in the configuration. Empty in a state file from before this
    /// key.
    #[serde(default)]
    pub zero_copy: String,
    /// How data gets from the kernel to the daemon: `copy` or `zero-copy`; empty until the device is made.
    #[serde(default)]
    pub transfer: String,
    /// The reason for `copy` where the configuration has `auto`, in words.
    #[serde(default)]
    pub transfer_reason: Option<String>,
    /// The CPUs that its queue threads may run on, as in the configuration; `None` = all.
    #[serde(default)]
    pub cpus: Option<String>,
    /// The number of queues that the kernel granted.
    pub queues: u16,
    /// The depth of each queue.
    pub depth: u16,
    /// Requests that a limit holds at the moment.
    pub held: u32,
    /// How long the oldest held request has waited, in milliseconds.
    pub held_ms_oldest: u64,
    /// Requests fetched since the start.
    pub requests: u64,
    /// Requests answered with an error since the start.
    pub errors: u64,
    /// The process id of the daemon.
    pub pid: u32,
    /// Distinguishes the device from earlier and later devices with its id.
    pub nonce: Option<u32>,
}

impl Shared {
    pub(super) fn status(&self) -> Status {
        let description = &self.description;
        let made = self.made.get();
        let sum = |of: fn(&Handle) -> u64| made.map_or(0, |made| made.queues.iter().map(|queue| of(queue)).sum());
        let (standing, held) = {
            let standing = self.standing();
            // Under the lock of `standing`: without it, the member might leave the throttle in
            // between.
            let held = standing.member.map(|member| self.throttle.held(member)).unwrap_or_default();
            (standing.clone(), held)
        };
        let now = clock::now();
        let oldest = held.oldest.map_or(0, |since| now.nanos_since(since) / 1_000_000);
        let counters = made.iter().flat_map(|made| &made.queues).map(|queue| &queue.counters);
        let is_degraded = counters::is_degraded(counters, now);
        Status {
            name: description.name.clone(),
            health: if is_degraded { "degraded" } else { "ok" }.to_owned(),
            state: self.state().name().to_owned(),
            waiting_for: standing.waiting_for,
            id: made.map(|made| made.id),
            node: made.map(|made| super::traces::node(made.id)),
            link: super::traces::link(&description.name),
            size: standing.size,
            backend: description.backend.kind().to_owned(),
            path: description.backend.path().map(|path| path.display().to_string()),
            direct: self.is_direct.get().copied(),
            group: standing.group,
            weight: standing.weight,
            limits: limits(&standing.limits),
            read_only: description.read_only,
            zero_copy: description.zero_copy.word().to_owned(),
            transfer: made.map_or("", |made| made.transfer.word()).to_owned(),
            transfer_reason: self.copied_because.get().cloned(),
            cpus: description.cpus.map(|cpus| cpus.to_string()),
            queues: made.map_or(description.queues, |made| made.queues.len() as u16),
            depth: made.map_or(description.depth, |made| made.depth),
            held: held.count,
            held_ms_oldest: oldest,
            requests: sum(Handle::fetched),
            errors: sum(|queue| queue.counters.errors()),
            pid: std::process::id(),
            nonce: Some(self.nonce),
        }
    }

    /// The contents of the state file, for the next daemon.
    pub(super) fn record(&self) -> Record {
        let status = self.status();
        let standing = self.standing().clone();
        let mut device = self.description.clone();
        (device.group, device.weight, device.limits) = (standing.group, standing.weight, standing.limits);
        // The next daemon keeps the choice of this one, even if the file system reports different
        // units.
        if let Some(is_direct) = self.is_direct.get() {
            device.backend.settle_direct(*is_direct);
        }
        // The kernel's size is cut to whole blocks. A larger difference is a resize.
        if let Some((wanted, size)) = device.backend.size().zip(standing.size)
            && !(size..size + 4096).contains(&wanted)
        {
            set_size(&mut device, size);
        }
        let entry = standing.entry.map(|entry| entry.settings());
        Record::new(status, device.settings(), entry, self.behind.get().map(|behind| behind.identity))
    }

    pub(super) fn is_live(&self) -> bool {
        self.state() == State::Live
    }
}

/// The limits that are set, by their keys in the configuration.
pub fn limits(limits: &Limits) -> BTreeMap<String, Number> {
    let mut told = BTreeMap::new();
    for kind in LimitKind::ALL {
        let limit = limits.get(kind);
        if limit.is_unlimited() {
            continue;
        }
        told.insert(kind.name().to_owned(), limit.avg.into());
        if limit.max != 0 {
            told.insert(format!("{}-max", kind.name()), limit.max.into());
            told.insert(format!("{}-max-length", kind.name()), seconds(limit.burst_length_ns));
        }
    }
    if limits.iops_size != 0 {
        told.insert("iops-size".to_owned(), limits.iops_size.into());
    }
    told
}

/// A duration in seconds: an integer if it is whole.
fn seconds(ns: u64) -> Number {
    if ns.is_multiple_of(SECOND_NS) {
        return (ns / SECOND_NS).into();
    }
    Number::from_f64(ns as f64 / SECOND_NS as f64).expect("a quotient of integers is finite")
}

#[cfg(test)]
mod tests {
    use super::*;
    use throttle_core::limits::Limit;

    #[test]
    fn only_limits_that_are_set_are_told() {
        let burst = Limit { avg: 100, max: 200, burst_length_ns: SECOND_NS / 2 };
        let told = limits(&Limits::UNLIMITED.with(LimitKind::IopsTotal, burst));
        let told = serde_json::to_string(&told).unwrap();
        assert_eq!(told, r#"{"iops-total":100,"iops-total-max":200,"iops-total-max-length":0.5}"#);
    }
}
