//! A burst, second by second.

use std::time::Duration;

use anyhow::Result;
use ublk_throttle_tests::fio::{Completions, Job};
use ublk_throttle_tests::needs::Need;
use ublk_throttle_tests::scene::Scene;

use crate::measure::{expect, expect_all};
use crate::{Case, cases};

pub(crate) fn cases() -> Vec<Case> {
    cases![[Need::Ublk, Need::Fio]; burst_goes_as_its_two_buckets_say].into()
}

/// The end of the burst, and the number of operations until then: 8 + 70 t - 10 t = 280.
const OVER_MS: f64 = 4533.3;
const OVER_COUNT: f64 = 8.0 + 70.0 * OVER_MS / 1000.0;

/// Operations of `iops-total 10, max 70, length 4` until `ms`; the job's file has the arithmetic.
fn gone_after(ms: f64) -> f64 {
    if ms < OVER_MS { 8.0 + 70.0 * ms / 1000.0 } else { OVER_COUNT + 10.0 * (ms - OVER_MS) / 1000.0 }
}

fn burst_goes_as_its_two_buckets_say(scene: &Scene) -> Result<()> {
    // 8 operations at once, 78 by 1 s, 288 by 4 s, end of the burst at 4.53 s, then 10 a second.
    let daemon = scene.start(
        "version: 1\n\
         devices:\n  d:\n    backend: { null: 1GiB }\n    limits: { iops-total: 10, iops-total-max: 70, iops-total-max-length: 4s }\n",
    )?;
    let log = scene.dir().join("burst");
    let job = Job::new("burst-of-10-max-70-length-4-runs-as-computed")
        .set("DEVICE", scene.device("d")?.node())
        .set("LOG", log.display());
    scene.fio(job)?.finish(Duration::from_secs(13))?;
    let completions = Completions::read(&log)?;
    let first = completions.first_ms();
    let checks = [500, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000].map(|ms| {
        // The count includes the millisecond itself: 1 ms is the resolution of the log.
        let count = completions.count(first, first + ms + 1);
        let (early, late) = (gone_after(ms as f64 + 1.0) + 1.0, gone_after(ms as f64 - 40.0));
        eprintln!("          by {ms} ms: {count}, expected {:.1}", gone_after(ms as f64));
        expect((late..=early).contains(&(count as f64)), || {
            format!("by {ms} ms: {count} gone, expected {late:.1} to {early:.1}")
        })
    });
    expect_all(checks)?;
    daemon.stop().map(drop)
}
