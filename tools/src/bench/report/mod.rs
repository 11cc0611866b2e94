//! What came out, for people in a terminal, for programs, and as a page with plots.

pub mod html;
pub mod json;
pub mod text;

use std::time::Duration;

use super::bar::{Judged, Verdict};
use super::bench::Plan;
use super::sample::Side;

/// The clock that counts instructions, as `xtask vm` names it to its guest.
pub const INSTRUCTIONS: &str = "instructions";

/// A run.
#[derive(Clone, Debug)]
pub struct Report {
    /// `uname -r` of the guest.
    pub kernel: String,
    /// Of the guest.
    pub processors: u32,
    /// What its time was: `host`, or `instructions`, of which one is a nanosecond.
    pub clock: String,
    /// How much was measured.
    pub plan: Plan,
    /// In the order in which they were run.
    pub cases: Vec<Outcome>,
}

/// A case of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its name.
    pub name: String,
    /// What it shows.
    pub claim: String,
    /// How long it took.
    pub took: Duration,
    /// What it came to.
    pub came: Came,
}

/// What a case came to.
#[derive(Clone, Debug)]
pub enum Came {
    /// Numbers.
    Measured {
        /// By side.
        sides: Vec<Side>,
        /// By bar.
        judged: Vec<Judged>,
        /// What a reader should know.
        notes: Vec<String>,
    },
    /// It cannot be run here; why.
    Skipped(String),
    /// It should have run; what went wrong.
    Failed(String),
}

impl Report {
    /// What a reader must know of the times.
    fn clock(&self) -> &'static str {
        if self.clock == INSTRUCTIONS { "a nanosecond is an instruction" } else { "time is the host's" }
    }

    /// Whether a case could not be run, or a bar was surely not met.
    pub fn is_failed(&self) -> bool {
        self.cases.iter().any(|case| match &case.came {
            Came::Measured { judged, .. } => judged.iter().any(|judged| judged.verdict == Verdict::NotMet),
            Came::Skipped(_) => false,
            Came::Failed(_) => true,
        })
    }
}

/// A number with four digits that count, without an exponent.
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

/// Short, for a column.
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
        // A rate of 1.0004 and one of 1.000 are told apart by their difference to the bar, not here.
        assert_eq!(
            [31_234.6, 123.46, 12.346, 1.2346, 0.123_46].map(number),
            ["31235", "123.5", "12.35", "1.235", "0.1235"]
        );
    }

    #[test]
    fn run_fails_by_a_miss_or_a_failure_and_not_by_a_skip_or_by_doubt() {
        // What is not trusted proves nothing either way.
        let mut report = report();
        assert!(report.is_failed());
        report.cases.pop();
        let Came::Measured { judged, .. } = &mut report.cases[0].came else { panic!("the first one was measured") };
        assert_eq!(judged.pop().map(|judged| judged.verdict), Some(Verdict::NotMet));
        assert!(!report.is_failed());
    }
}
