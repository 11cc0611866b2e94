//! The credit that a burst has used stays used, after a kill and after SIGTERM.
//!
//! ```text
//!   20/s, or 200/s for 10 s: 2000 above the rate at most
//!   load     ▇▇▇▇▇▇▇▇  ✗  ▁▂▁▁▁▁▁▁  SIGTERM  ▁▁▁
//!            8 s of burst  the rest of the burst
//! ```

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ublk_throttle_tests::direct::Direct;
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;

use crate::measure::{expect, expect_at_least};
use crate::{Case, cases, let_run};

const RATE: f64 = 20.0;
const CAPACITY: f64 = 2000.0;
/// Bound of an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

const CONFIG: &str = "version: 1
groups: { g: { limits: { iops-total: 20, iops-total-max: 200, iops-total-max-length: 10s } } }
devices: { d: { backend: { null: 1GiB }, group: g } }
";

pub(crate) fn cases() -> Vec<Case> {
    cases![[Need::Ublk]; a_restart_in_the_middle_of_a_burst_grants_none].into()
}

/// Reads one after another until `stop`.
struct Load {
    ends: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Load {
    fn start(node: &Path) -> Result<Self> {
        let (ends, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let direct = Direct::open(node)?;
        let (until, count) = (Arc::clone(&ends), Arc::clone(&served));
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                direct.read(0, 4096)?;
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        Ok(Self { ends, served, thread })
    }

    fn served(&self) -> f64 {
        self.served.load(Ordering::Relaxed) as f64
    }

    fn stop(self) -> Result<f64> {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("the load's thread")??;
        Ok(self.served.load(Ordering::Relaxed) as f64)
    }
}

fn a_restart_in_the_middle_of_a_burst_grants_none(scene: &Scene) -> Result<()> {
    // Served over the whole time: at most rate · T + capacity, 2400 in about 20 s. A daemon without
    // the noted levels serves 200/s for 10 more seconds, 1600 too many. The bound adds 1/16 of the
    // capacity, which a queue far below its limit may have prepaid, one request beyond the capacity
    // for each daemon, and the request in flight at the kill, which is served twice.
    let begin = Instant::now();
    let most = || RATE * begin.elapsed().as_secs_f64() + CAPACITY * (1.0 + 1.0 / 16.0) + 5.0;
    let daemon = scene.start(CONFIG)?;
    let load = Load::start(&scene.device("d")?.node)?;
    let_run(8);
    let before = load.served();
    expect_at_least("a burst before the kill", before, 1000.0)?;
    daemon.kill(ANSWER_LIMIT)?;
    let daemon = scene.start(CONFIG)?;
    let back = Instant::now();
    let_run(10);
    let after = load.served() - before;
    let least = RATE * back.elapsed().as_secs_f64() * 0.9;
    let served = load.stop()?;
    eprintln!("          {before} before the kill, {after} after it, at most {:.0}", most());
    expect(served <= most(), || format!("{served} served, at most {:.0}", most()))?;
    expect_at_least("served after the kill", after, least)?;
    // A regular end removes all devices, and still the group of the next daemon continues at its
    // level.
    daemon.stop()?;
    let daemon = scene.start(CONFIG)?;
    let load = Load::start(&scene.device("d")?.node)?;
    let_run(3);
    let last = load.stop()?;
    eprintln!("          {last} after SIGTERM, at most {:.0} in all", most());
    expect(served + last <= most(), || format!("{} served, at most {:.0}", served + last, most()))?;
    daemon.stop().map(drop)
}
