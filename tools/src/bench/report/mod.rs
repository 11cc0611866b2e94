//! Results of a bench run: `text` for a terminal, `json` for programs, `html` as a page with plots.

pub mod html;
pub mod json;
pub mod text;

use std::time::Duration;

use super::bar::{Judged, Verdict};
use super::bench::Plan;
use super::sample::Side;

/// Name of the counted clock in `XTASK_VM_CLOCK`, the variable that `xtask vm` sets in the guest.
pub const INSTRUCTIONS: &str = "instructions";

/// A bench run.
#[derive(Clone, Debug)]
pub struct Report {
    /// `uname -r` of the guest.
    pub kernel: String,
    /// Processors of the guest.
    pub processors: u32,
    /// Clock of the guest: `host`, or `instructions` (a nanosecond is an instruction).
    pub clock: String,
    /// Rounds, seconds and queues of the run.
    pub plan: Plan,
    /// Results of the cases, in the order in which they ran.
    pub cases: Vec<Outcome>,
}

/// Result of a case.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Name of the case, as `--only` takes it.
    pub name: String,
    /// Claim that the case tests.
    pub claim: String,
    /// Duration of the case, by the guest's clock.
    pub took: Duration,
    /// Measurements, or the reason why the case has none.
    pub came: Came,
}

/// Outcome of a case.
#[derive(Clone, Debug)]
pub enum Came {
    /// The case ran.
    Measured {
        /// Samples of each side.
        sides: Vec<Side>,
        /// Each bar with its number and verdict.
        judged: Vec<Judged>,
        /// Remarks for the reader of the report.
        notes: Vec<String>,
    },
    /// The case cannot run in this guest, for this reason.
    Skipped(String),
    /// The case failed with this error.
    Failed(String),
}

impl Report {
    /// Unit of all times in the report.
    fn clock(&self) -> &'static str {
        if self.clock == INSTRUCTIONS { "a nanosecond is an instruction" } else { "time is the host's" }
    }

    /// Whether a case failed or a bar is not met. Skipped cases and bars without a trusted verdict
    /// do not count.
    pub fn is_failed(&self) -> bool {
        self.cases.iter().any(|case| match &case.came {
            Came::Measured { judged, .. } => judged.iter().any(|judged| judged.verdict == Verdict::NotMet),
            Came::Skipped(_) => false,
            Came::Failed(_) => true,
        })
    }
}

/// `value` with four significant digits and without an exponent.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 1000.0 => 0,
        size if size >= 100.0 => 1,
        size if size >= 10.0 => 2,
        size if size >= 1.0 => 3,
        _ => 4,
    };
    format!("{value:.digits$}")
}

/// The verdict as a short word for a column.
fn verdict(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Met => "met",
        Verdict::NotMet => "NOT MET",
        Verdict::NotTrusted(_) => "not trusted",
        Verdict::Shown => "",
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::bar::{Bar, Bound};
    use crate::bench::sample::{Metric, Sample};

    /// Two sides with five rounds of IOPS, and cases that did not run.
    pub fn report() -> Report {
        let side = |name: &str, iops: [f64; 5]| {
            let samples = iops.map(|iops| {
                let mut sample = Sample { pace: 1.0, ..Sample::default() };
                sample.set(Metric::Iops, iops);
                sample
            });
            Side { name: name.to_owned(), samples: samples.to_vec() }
        };
        let sides = vec![side("ours", [30_300.0, 31_000.0, 30_500.0, 30_600.0, 30_900.0]), side("peer", [30_000.0; 5])];
        let bars = [
            Bar::ratio(Metric::Iops, 0, 1, Bound::AtLeast(1.0)),
            Bar::ratio(Metric::Iops, 0, 1, Bound::AtLeast(1.02)),
            Bar::plain(Metric::Iops, 1, Bound::AtMost(29_000.0)),
        ];
        let judged = bars.iter().map(|bar| bar.judge(&sides)).collect();
        let outcome = |name: &str, came| Outcome {
            name: name.to_owned(),
            claim: "as fast & <not> dearer".to_owned(),
            took: Duration::from_secs(70),
            came,
        };
        Report {
            kernel: "6.12.1".to_owned(),
            processors: 2,
            clock: "instructions".to_owned(),
            plan: Plan { rounds: 5, seconds: 4, seconds_of_rates: 10, queues: 1 },
            cases: vec![
                outcome("null", Came::Measured { sides, judged, notes: vec!["a note".to_owned()] }),
                outcome("copy", Came::Skipped("no such feature".to_owned())),
                outcome("idle", Came::Failed("it broke".to_owned())),
            ],
        }
    }

    #[test]
    fn numbers_keep_four_digits() {
        // Four digits do not separate a rate of 1.0004 from 1.000. The report shows that difference
        // as the distance to the bar.
        assert_eq!(
            [31_234.6, 123.46, 12.346, 1.2346, 0.123_46].map(number),
            ["31235", "123.5", "12.35", "1.235", "0.1235"]
        );
    }

    #[test]
    fn run_fails_by_a_miss_or_a_failure_and_not_by_a_skip_or_by_doubt() {
        // The report has three bars; without the third, which is a miss, only a met and an
        // untrusted bar are left.
        let mut report = report();
        assert!(report.is_failed());
        report.cases.pop();
        let Came::Measured { judged, .. } = &mut report.cases[0].came else { panic!("the first one was measured") };
        assert_eq!(judged.pop().map(|judged| judged.verdict), Some(Verdict::NotMet));
        assert!(!report.is_failed());
    }
}
