//! The cases of a bench: loads to run, and the bars for their results.

mod file;
mod idle;
mod lateness;
mod limits;
mod members;
mod null;
mod paced;
mod rate;
mod shares;
mod throttled;
mod zero_copy;

use std::process::Command;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::Value;

use super::bar::{Bar, Bound};
use super::bench::{Bench, order, settle};
use super::load::Load;
use super::peers::Peer;
use super::sample::{Metric, Sample, Side};
use super::slices::Slices;
use crate::{build, process};

/// A case by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// null without limits, against kublk's and rublk's
    NullUnlimited,
    /// the same with a queue for each job
    NullQueueEach,
    /// a file on tmpfs in 4k, against the loop targets of kublk and rublk
    #[value(name = "file-4k")]
    File4k,
    /// a file on tmpfs in 64k, against the loop targets of kublk and rublk
    #[value(name = "file-64k")]
    File64k,
    /// a file on tmpfs and memory in 64k, with zero copy against without
    ZeroCopy,
    /// six limits far above the load, against none
    LimitsFarAbove,
    /// the same with a queue for each job
    LimitsQueueEach,
    /// 3000 idle members in the group, against none
    IdleMembers,
    /// 1000 operations a second, in all and in every window, beside io.max, qsd and nbdkit
    #[value(name = "iops-1000")]
    Iops1000,
    /// how late a request goes, against a bare ring's timeout
    Lateness,
    /// what a throttled request costs, against one that is not
    ThrottledCpu,
    /// what a throttled request costs, against one that comes at the same rate by itself
    HeldOrPaced,
    /// 64 devices that do nothing
    IdleDevices,
    /// four devices of unequal depth share a group's limit
    Shares,
}

/// Reason why sides that copy data in different ways are not compared on the counted clock.
const COPIES: &str = "most of it is copies, of which instructions do not tell the time: Linux takes one for 8 bytes to or from a process, \
                      and three within itself; see `--clock host`";

/// Outcome of a case.
pub enum Finding {
    /// Numbers, and the bars for them.
    Measured {
        /// The measured sides.
        sides: Vec<Side>,
        /// Bars on their numbers.
        bars: Vec<Bar>,
        /// Remarks for the reader of the report.
        notes: Vec<String>,
    },
    /// The case cannot run in this guest, for this reason.
    Skipped(String),
}

impl Case {
    /// Name of the case on the command line and in reports.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Claim that the case tests.
    pub fn claim(self) -> &'static str {
        match self {
            Case::NullUnlimited => {
                "null, no limits, 4k randread qd32 x 2: not slower and not dearer than null of kublk and of rublk"
            }
            Case::NullQueueEach => {
                "null, no limits, the same with a queue for each job: not slower and not dearer than null of kublk and of rublk"
            }
            Case::File4k => {
                "file on tmpfs, no limits, 4k randread qd32 x 2: not slower and not dearer than loop of kublk and of rublk"
            }
            Case::File64k => {
                "file on tmpfs, no limits, 64k randread qd32 x 2: not slower and not dearer than loop of kublk and of rublk"
            }
            Case::ZeroCopy => "file on tmpfs, and memory, 64k: zero copy is 1.5 times as fast as the copy path",
            Case::LimitsFarAbove => {
                "null with six limits far above the load: they cost 2 % of IOPS and 3 % of CPU at most"
            }
            Case::LimitsQueueEach => {
                "null with six limits far above the load, a queue for each job: they cost 2 % of IOPS and 3 % of CPU at most"
            }
            Case::IdleMembers => "3000 idle members of the group: they cost 2 % of IOPS at most",
            Case::Iops1000 => {
                "iops-total 1000, qd32, 10 s: exact in all and in every window, and no request waits longer than its turn"
            }
            Case::Lateness => {
                "iops-total 500, qd1: a request goes when it is due, as well as a ring's timeout can tell"
            }
            Case::ThrottledCpu => "a throttled request costs 1.3 times the CPU of one that is not, at most",
            Case::HeldOrPaced => {
                "a throttled request costs 1.3 times the CPU of one that comes at the same rate by itself, at most"
            }
            Case::IdleDevices => "64 devices x 2 queues that do nothing: 1 ms of CPU a second, 4 MiB a device",
            Case::Shares => "four devices of depths 1, 4, 16 and 32 share 1000 operations a second equally",
        }
    }

    /// Runs the case.
    pub fn run(self, bench: &Bench) -> Result<Finding> {
        match self {
            Case::NullUnlimited => null::run(bench, bench.plan.queues),
            Case::NullQueueEach => null::run(bench, JOBS),
            Case::File4k => file::run(bench, 4096),
            Case::File64k => file::run(bench, 65536),
            Case::ZeroCopy => zero_copy::run(bench),
            Case::LimitsFarAbove => limits::run(bench, bench.plan.queues),
            Case::LimitsQueueEach => limits::run(bench, JOBS),
            Case::IdleMembers => members::run(bench),
            Case::Iops1000 => rate::run(bench),
            Case::Lateness => lateness::run(bench),
            Case::ThrottledCpu => throttled::run(bench),
            Case::HeldOrPaced => paced::run(bench),
            Case::IdleDevices => idle::run(bench),
            Case::Shares => shares::run(bench),
        }
    }
}

/// Jobs of a full load. On one shared queue its thread and the two clients take turns on two
/// processors, and the schedule decides the number of requests a turn: three for some seconds, then
/// seven. With few requests a turn, a request costs up to half as much again. With a queue for each
/// job a turn has about 25 requests.
const JOBS: u32 = 2;

/// Seconds of a run that measures latencies, after its ramp time.
const LATENCY_SECONDS: u32 = 1;

/// Starts a side.
type Start<'a> = Box<dyn Fn() -> Result<Box<dyn Peer>> + 'a>;

/// Runs a load on all sides, which are started for each round and stopped after it. A short run of
/// each measures latencies, and slices measure the rest.
///
/// The placement of memory and threads at the start of a server or its client makes a request up to
/// 12 % dearer or cheaper under emulation. If a side ran for the whole boot, that effect would look
/// like a difference between the sides and would not show in the spread of the rounds.
fn loaded(bench: &Bench, starts: &[(&str, Start<'_>)], load: Load) -> Result<Vec<Side>> {
    let names: Vec<&str> = starts.iter().map(|(name, _)| *name).collect();
    bench.together(&names, |round| {
        let start = |(name, start): &(&str, Start<'_>)| start().with_context(|| (*name).to_owned());
        let peers = starts.iter().map(start).collect::<Result<Vec<_>>>()?;
        settle();
        let mut latencies: Vec<Option<Sample>> = vec![None; peers.len()];
        for place in order(peers.len(), round) {
            let short = Load { seconds: LATENCY_SECONDS, ..load };
            latencies[place] = Some(short.run(peers[place].node(), peers[place].server())?);
        }
        let slices = Slices::start(load, peers.iter().map(|peer| &**peer))?;
        let mut samples = slices.round(load.seconds)?;
        slices.end()?;
        for (sample, latencies) in samples.iter_mut().zip(latencies.into_iter().flatten()) {
            // A metric that both have measured is taken from the slices.
            let both = latencies.values.into_iter().chain(std::mem::take(&mut sample.values));
            sample.values = both.collect();
        }
        peers.into_iter().try_for_each(Peer::stop)?;
        Ok(samples)
    })
}

/// Natural rate of a device under this load, in requests a second, from a second run. The first run
/// executes code for the first time, which an emulator must translate.
fn natural_rate(load: Load, peer: &dyn Peer) -> Result<f64> {
    load.run(peer.node(), peer.server())?;
    Ok(load.run(peer.node(), peer.server())?.get(Metric::Iops))
}

/// Whether the kernel's ublk driver offers a feature, by the kernel's name for it.
fn is_offered(feature: &str) -> Result<bool> {
    let said = process::output(Command::new(build::daemon_path("release")).args(["features", "--json"]))?;
    let said: Value = serde_json::from_str(&said).context("ublk-throttle features --json")?;
    let features = said["features"].as_array().context("ublk-throttle features --json names no features")?;
    Ok(features.iter().any(|offered| offered["name"] == feature && offered["offered"] == true))
}

/// Reason why the case has no side for kublk with `-b`; `None` if it has one.
fn without_batches() -> Result<Option<String>> {
    let why = "kublk -b is skipped: this kernel's ublk has no BATCH_IO (Linux 7.0 or newer)";
    Ok(if is_offered("BATCH_IO")? { None } else { Some(why.to_owned()) })
}

/// Bars for the side `of` against the side `to`: at least `iops` times the IOPS, and at most `cpu`
/// times the CPU time a request. Latencies are shown only.
fn as_fast_as(of: usize, to: usize, iops: f64, cpu: f64) -> Vec<Bar> {
    vec![
        Bar::ratio(Metric::Iops, of, to, Bound::AtLeast(iops)),
        Bar::ratio(Metric::CpuOwn, of, to, Bound::AtMost(cpu)),
        Bar::ratio(Metric::CpuAll, of, to, Bound::AtMost(cpu)),
        Bar::ratio(Metric::P50, of, to, Bound::Shown),
        Bar::ratio(Metric::P99, of, to, Bound::Shown),
    ]
}
