//! Lateness of a held request, against the timeout of an idle ring in the same boot.
//!
//! ```text
//!   at the client       reads one at a time, held:         timer of the daemon, kernel, client
//!   paced               the same reads without a limit:    timer of the client, kernel, daemon, kernel, client
//!   by `stats`          lateness that the daemon reports:  timer of the daemon
//!   bare ring           no request in the machine:         timer of this program
//!   ring beside reads   the timers of the paced reads:     timer of this program, beside reads
//! ```

use std::path::Path;
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use super::Finding;
use crate::bench::bar::{Bar, Bound};
use crate::bench::bench::Bench;
use crate::bench::grid;
use crate::bench::load;
use crate::bench::peers::{Ours, Peer};
use crate::bench::sample::{Metric, Sample, Side};
use crate::bench::statistics::percentile;

/// Runs the case.
pub fn run(bench: &Bench) -> Result<Finding> {
    let limited = "{ backend: { null: 1GiB }, limits: { iops-total: 500 } }";
    let ours =
        Ours::start("at-500", &format!("devices:\n  at-500: {limited}\n  paced: {{ backend: {{ null: 1GiB }} }}\n"))?;
    let free = Path::new("/dev/ublk-throttle/paced");
    for node in [ours.node(), free] {
        load::quiet(node)?;
    }
    let seconds = bench.plan.seconds_of_rates;
    let (mut accounts, mut beside) = (Vec::new(), Vec::new());
    let mut sides = bench.alternate(&["ours, at the client", "bare ring", "paced by a ring"], |place| {
        let lines = 500 * seconds;
        let late = if place == 1 {
            grid::ring(lines)?
        } else if place == 2 {
            let (at_client, of_ring) = grid::paced(free, lines)?;
            beside.push(sample(&of_ring));
            at_client
        } else {
            let node = ours.node();
            let (late, account) = thread::scope(|scope| {
                let reader = scope.spawn(|| grid::held(node, lines));
                let account = own_account(&ours, seconds);
                (reader.join(), account)
            });
            accounts.push(account?);
            late.map_err(|_| anyhow!("the thread that reads panicked"))??
        };
        Ok(sample(&late))
    })?;
    Box::new(ours).stop()?;
    let measured_with = |more: Vec<Sample>, side: &Side| -> Vec<Sample> {
        let pairs = more.into_iter().zip(&side.samples);
        pairs.map(|(more, with)| Sample { pace: with.pace, stolen: with.stolen, ..more }).collect()
    };
    let samples = measured_with(beside, &sides[2]);
    sides.push(Side { name: "ring beside reads".to_owned(), samples });
    let mut notes = vec![
        "reads past the page cache one at a time; paced: of a device without limits, each begun by a ring's timeout"
            .to_owned(),
        "at the client, and paced: above the earliest, which stands for one that was not late".to_owned(),
    ];
    let accounts: Option<Vec<Sample>> = accounts.into_iter().collect();
    let mut bars = Vec::new();
    if let Some(accounts) = accounts {
        let samples = measured_with(accounts, &sides[0]);
        sides.push(Side { name: "ours, by `stats`".to_owned(), samples });
        bars.push(Bar::ratio(Metric::Late99, 4, 1, Bound::AtMost(1.2)));
        bars.push(Bar::ratio(Metric::Late99, 4, 3, Bound::AtMost(1.2)));
        bars.push(Bar::ratio(Metric::Late99, 0, 2, Bound::Shown));
    } else {
        notes.push(
            "`stats` tells no lateness, so the client's view is judged, in which the way through the kernel is"
                .to_owned(),
        );
        bars.push(Bar::ratio(Metric::Late99, 0, 1, Bound::AtMost(1.2)));
    }
    Ok(Finding::Measured { sides, bars, notes })
}

/// Percentiles 50 and 99 of latenesses in microseconds.
fn sample(late: &[f64]) -> Sample {
    let mut sample = Sample::default();
    sample.set(Metric::Late50, percentile(late, 0.50));
    sample.set(Metric::Late99, percentile(late, 0.99));
    sample
}

/// Lateness that the daemon's `stats` reports over an interval of `seconds` - 1 s, at least 1 s;
/// `None` if it reports none.
fn own_account(ours: &Ours, seconds: u32) -> Result<Option<Sample>> {
    let interval = format!("{}s", seconds.saturating_sub(1).max(1));
    let told = ours.ask(&["stats", "at-500", "--json", "--interval", &interval, "--count", "1"])?;
    account(&told)
}

fn account(told: &str) -> Result<Option<Sample>> {
    let told: Value = serde_json::from_str(told).context("stats --json")?;
    let device = &told["devices"][0];
    if device.is_null() {
        bail!("stats --json knows no device");
    }
    let lateness = &device["lateness"];
    let (Some(p50), Some(p99)) = (lateness["p50_ns"].as_f64(), lateness["p99_ns"].as_f64()) else { return Ok(None) };
    let mut sample = Sample::default();
    sample.set(Metric::Late50, p50 / 1000.0);
    sample.set(Metric::Late99, p99 / 1000.0);
    Ok(Some(sample))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn account_of_the_daemon_is_read_where_it_has_one() {
        // A reply of an older daemon has no lateness and gives `None`; a reply without a device is
        // an error.
        let sample =
            account(r#"{"devices":[{"lateness":{"count":9,"p50_ns":1500,"p99_ns":70000}}]}"#).unwrap().unwrap();
        assert_eq!((sample.get(Metric::Late50), sample.get(Metric::Late99)), (1.5, 70.0));
        assert_eq!(account(r#"{"devices":[{"wait":{}}]}"#).unwrap(), None);
        assert!(account(r#"{"devices":[]}"#).is_err());
    }
}
