//! 1000 operations a second: the total rate, the rate in every window, and a wait no longer than
//! the queue. Beside ours run io.max, qemu-storage-daemon and nbdkit.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Finding;
use crate::bench::bar::{Bar, Bound};
use crate::bench::bench::Bench;
use crate::bench::load::{self, Look};
use crate::bench::peers::{IoMax, Nbdkit, Ours, Peer, Qsd};
use crate::bench::sample::{Metric, Sample};
use crate::bench::windows::Completions;
use crate::blockstat;
use crate::fio::Fio;

/// The limit in operations a second.
const RATE: u32 = 1000;

/// Bar for p99 in microseconds: the wait of 32 requests at 1000 a second, and 20 % more.
const P99_US: f64 = 1.2 * 32_000.0;

/// Wait between the first requests and the first look: the job's `ramp_time` of 2 s, and 0.2 s
/// more.
const RAMP: Duration = Duration::from_millis(2200);

/// Runs the case.
pub fn run(bench: &Bench) -> Result<Finding> {
    let queues = bench.plan.queues;
    let limited = format!("{{ backend: {{ null: 1GiB }}, queues: {queues}, limits: {{ iops-total: {RATE} }} }}");
    let ours = Ours::start("at-1000", &format!("devices:\n  at-1000: {limited}\n"))?;
    let mut peers: Vec<(&str, Box<dyn Peer>)> = vec![("ours", Box::new(ours))];
    let mut notes = vec!["nbdkit limits bits a second only: it gets 1000 x 4096 x 8".to_owned()];
    let others: [(&str, Result<Box<dyn Peer>>); 3] = [
        ("io.max over rublk", IoMax::start(102, queues, RATE).map(boxed)),
        ("qemu-storage-daemon", Qsd::start(0, 1, RATE).map(boxed)),
        ("nbdkit rate", Nbdkit::start(8, RATE, 4096).map(boxed)),
    ];
    for (name, peer) in others {
        match peer {
            Ok(peer) => peers.push((name, peer)),
            Err(error) => notes.push(format!("{name} is left out: {error:#}")),
        }
    }
    let names: Vec<&str> = peers.iter().map(|(name, _)| *name).collect();
    let seconds = bench.plan.seconds_of_rates;
    let sides = bench.alternate(&names, |place| measure(&*peers[place].1, seconds))?;
    for (_, peer) in peers {
        peer.stop()?;
    }
    let mut bars = vec![
        Bar::plain(Metric::Rate, 0, Bound::Within(0.998, 1.002)),
        Bar::plain(Metric::SecondMin, 0, Bound::AtLeast(0.98)),
        Bar::plain(Metric::SecondMax, 0, Bound::AtMost(1.02)),
        Bar::plain(Metric::TenthMin, 0, Bound::AtLeast(0.8)),
        Bar::plain(Metric::TenthMax, 0, Bound::AtMost(1.2)),
        Bar::plain(Metric::P99, 0, Bound::AtMost(P99_US)),
    ];
    for peer in 1..sides.len() {
        bars.push(Bar::plain(Metric::Rate, peer, Bound::Shown));
        bars.push(Bar::ratio(Metric::P99, 0, peer, Bound::Shown));
        bars.push(Bar::ratio(Metric::CpuAll, 0, peer, Bound::Shown));
    }
    Ok(Finding::Measured { sides, bars, notes })
}

fn boxed(peer: impl Peer + 'static) -> Box<dyn Peer> {
    Box::new(peer)
}

/// Runs the job once on a peer.
fn measure(peer: &dyn Peer, seconds: u32) -> Result<Sample> {
    let node = peer.node();
    let disk = load::quiet(node)?;
    let before = blockstat::completed(&disk).context("the device is gone")?;
    let log = Path::new("/tmp/bench-rate");
    let fio = Fio::new("rate-holds-in-every-window")
        .with("DEVICE", node.as_os_str())
        .with("SECONDS", seconds.to_string().as_ref())
        .with("LOG", log.as_os_str())
        .start()?;
    // fio forks its job after it has read the job file; the job starts in its parent's control
    // group.
    if let Some(client) = peer.client() {
        client.add(fio.pid())?;
    }
    load::started(&disk, before)?;
    thread::sleep(RAMP);
    let first = Look::now(&disk, peer.server())?;
    thread::sleep(Duration::from_secs(seconds.into()).saturating_sub(Duration::from_secs(1)));
    let mut sample = first.until(&Look::now(&disk, peer.server())?).sample()?;
    let jobs = fio.finish(Duration::from_secs(60))?;
    let [job] = &jobs[..] else { bail!("fio was to report one job; it reported {}", jobs.len()) };
    if job.error != 0 {
        bail!("fio on {} ended with errno {}", node.display(), job.error);
    }
    if let Some(latency) = job.latency {
        load::set_latency(&mut sample, latency);
    }
    let completions = Completions::read(&log.with_file_name("bench-rate_clat.1.log"))?;
    sample.set(Metric::Rate, completions.rate() / f64::from(RATE));
    for (window_ms, least, most) in
        [(1000, Metric::SecondMin, Metric::SecondMax), (100, Metric::TenthMin, Metric::TenthMax)]
    {
        let due = f64::from(RATE) * window_ms as f64 / 1000.0;
        let (min, max) = completions.extremes(window_ms).context("the run was shorter than a window")?;
        sample.set(least, min as f64 / due);
        sample.set(most, max as f64 / due);
    }
    Ok(sample)
}
