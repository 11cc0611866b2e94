//! A bar: the bound on a number, and whether the rounds show that the number meets it.
//!
//! # When a number is not trusted
//!
//! ```text
//!                      bar
//!    met           ─────┼──├───•───┤──    the whole interval of the median is on the good side
//!    not met       ├─•──┤──┼──────────    the whole interval is on the bad side
//!    not trusted   ───├─┼•────┤───────    the bar lies within the interval: five further rounds may decide differently
//! ```
//!
//! 1. *Spread against distance.* The interval is [`Summary::interval`]: it assumes nothing about the
//!    noise and leaves a doubt of 1/16. With fewer than five rounds there is no interval. A number
//!    equal to its bar cannot be separated from it: a ratio with the bar `1.00` is met only by a side
//!    that is better, and "as good as" is never proved unless the bar leaves room.
//! 2. *Processors taken away.* Before and after each sample all processors do the same kind of work for
//!    0.1 s; the pace is the amount of work done. A ratio compares two different machines if the paces
//!    of its two sides are more than [`PACE`] apart, or if the host reports more than [`STOLEN`] as
//!    stolen. A side's result is at worst proportional to its pace, and the pace is known before and
//!    after the sample only. The ratio therefore counts as uncertain by the square of that factor, in
//!    the direction that hurts. A ratio of 3.6 with one side at 0.8 of the pace is at least 2.3; a ratio
//!    of 1.05 proves nothing.
//! 3. *A plain number on half a machine* can only be worse for it: later, longer, dearer. A plain number
//!    that meets its bar is therefore accepted at any pace. A miss is accepted only if the number
//!    misses its bar even when corrected for the pace.

use super::sample::{Metric, Side};
use super::statistics::Summary;

/// On an idle machine the pace repeats to about 3 % under emulation; a difference of 10 % is
/// another load on the host.
const PACE: f64 = 0.10;

/// 1 % of stolen time moves a ratio by 1 %, about the resolution that the bars need.
const STOLEN: f64 = 0.01;

/// The judged number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// A metric of one side divided by that of another side, in the same round. Sides are given by
    /// their index in the case.
    Ratio(Metric, usize, usize),
    /// A metric of one side.
    Plain(Metric, usize),
}

/// The bound on a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// At least this value.
    AtLeast(f64),
    /// At most this value.
    AtMost(f64),
    /// Between both values.
    Within(f64, f64),
    /// No bound: the number is only shown.
    Shown,
}

/// A number and its bound.
#[derive(Clone, Debug)]
pub struct Bar {
    /// The judged number.
    pub value: Value,
    /// Bound on the number.
    pub bound: Bound,
    /// Reason why the number is not judged on the counted clock; `None` if it is.
    pub doubt_in_instructions: Option<&'static str>,
}

/// Verdict on a bar.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// The number meets the bar.
    Met,
    /// The number misses the bar.
    NotMet,
    /// The rounds do not decide, for this reason.
    NotTrusted(String),
    /// The bar has no bound.
    Shown,
}

/// A bar with its number and verdict.
#[derive(Clone, Debug)]
pub struct Judged {
    /// Description of the number.
    pub what: String,
    /// Bound on the number.
    pub bound: Bound,
    /// Summary of the number over the rounds; `None` if a round lacks it.
    pub summary: Option<Summary>,
    /// Verdict on the bar.
    pub verdict: Verdict,
}

impl Bar {
    /// Bar on the ratio of a metric between the sides `of` and `to`.
    pub fn ratio(metric: Metric, of: usize, to: usize, bound: Bound) -> Bar {
        Bar { value: Value::Ratio(metric, of, to), bound, doubt_in_instructions: None }
    }

    /// Bar on a metric of one side.
    pub fn plain(metric: Metric, side: usize, bound: Bound) -> Bar {
        Bar { value: Value::Plain(metric, side), bound, doubt_in_instructions: None }
    }

    /// The bar, not judged on the counted clock for the reason `why`.
    pub fn not_in_instructions(self, why: &'static str) -> Bar {
        Bar { doubt_in_instructions: Some(why), ..self }
    }

    /// Judges the bar by the samples of the sides.
    pub fn judge(&self, sides: &[Side]) -> Judged {
        let what = self.words(sides);
        let summary = Summary::of(self.rounds(sides));
        let verdict = match (&summary, self.bound) {
            (_, Bound::Shown) => Verdict::Shown,
            (None, _) => Verdict::NotTrusted("it was not measured in every round".to_owned()),
            (Some(summary), bound) => {
                let is_harmless = matches!(self.value, Value::Plain(..)) && bound.holds(summary.median);
                let slack = |round| if is_harmless { 1.0 } else { self.slack(sides, round) };
                verdict(summary, bound, &(0..summary.rounds.len()).map(slack).collect::<Vec<_>>())
            }
        };
        Judged { what, bound: self.bound, summary, verdict }
    }

    fn words(&self, sides: &[Side]) -> String {
        match self.value {
            Value::Ratio(metric, of, to) => {
                format!("{}: {} / {}", without_unit(metric.words()), sides[of].name, sides[to].name)
            }
            Value::Plain(metric, side) => format!("{}: {}", metric.words(), sides[side].name),
        }
    }

    fn rounds(&self, sides: &[Side]) -> Vec<f64> {
        match self.value {
            Value::Ratio(metric, of, to) => {
                let pairs = sides[of].values(metric).into_iter().zip(sides[to].values(metric));
                pairs.map(|(of, to)| of / to).collect()
            }
            Value::Plain(metric, side) => sides[side].values(metric),
        }
    }

    /// Factor by which the number of a round may be wrong because the machine was not the same for
    /// both sides; 1 if it was.
    fn slack(&self, sides: &[Side], round: usize) -> f64 {
        let at = |side: usize| (sides[side].samples[round].pace, sides[side].samples[round].stolen);
        let (apart, stolen) = match self.value {
            Value::Ratio(_, of, to) => {
                let (mine, theirs) = (at(of), at(to));
                ((mine.0 / theirs.0).ln().abs(), mine.1.max(theirs.1))
            }
            // A pace is relative to the best of the boot. `PACE` is subtracted here, and the check
            // below adds `PACE` again: a plain number counts as measured on a whole machine down to
            // a pace of exp(-0.2).
            Value::Plain(_, side) => ((-at(side).0.ln() - PACE).max(0.0), at(side).1),
        };
        let apart = if apart > PACE { apart } else { 0.0 };
        let stolen = if stolen > STOLEN { stolen } else { 0.0 };
        (2.0 * (apart + stolen)).exp()
    }
}

impl Judged {
    /// The result as not trusted, for the reason `why`, because this machine's clock says nothing
    /// about the number.
    pub fn doubted(self, why: &str) -> Judged {
        let verdict = match self.verdict {
            Verdict::Shown => Verdict::Shown,
            _ => Verdict::NotTrusted(why.to_owned()),
        };
        Judged { verdict, ..self }
    }
}

impl Bound {
    /// Whether `number` lies within the bound.
    pub fn holds(self, number: f64) -> bool {
        match self {
            Bound::AtLeast(bar) => number >= bar,
            Bound::AtMost(bar) => number <= bar,
            Bound::Within(low, high) => (low..=high).contains(&number),
            Bound::Shown => true,
        }
    }

    /// The bound as text for a table.
    pub fn words(self) -> String {
        match self {
            Bound::AtLeast(bar) => format!(">= {bar}"),
            Bound::AtMost(bar) => format!("<= {bar}"),
            Bound::Within(low, high) => format!("{low} to {high}"),
            Bound::Shown => String::new(),
        }
    }
}

fn verdict(summary: &Summary, bound: Bound, slacks: &[f64]) -> Verdict {
    let Some((low, high)) = summary.interval() else {
        let count = summary.rounds.len();
        return Verdict::NotTrusted(format!("{count} rounds cannot say; five can"));
    };
    let holds = bound.holds(summary.median);
    // For a range, both ends of the interval must lie on the same side of it.
    let is_sure = |low, high| if holds { bound.holds(low) && bound.holds(high) } else { outside(bound, low, high) };
    if !is_sure(low, high) {
        return Verdict::NotTrusted(format!("the bar lies within the spread of the rounds, {low:.4} to {high:.4}"));
    }
    let at_worst = |sign: f64| {
        let rounds = summary.rounds.iter().zip(slacks).map(|(round, slack)| round * slack.powf(sign));
        Summary::of(rounds.collect()).and_then(|worst| worst.interval())
    };
    let disturbed = slacks.iter().filter(|&&slack| slack > 1.0).count();
    match (at_worst(-1.0), at_worst(1.0)) {
        (Some((low, _)), Some((_, high))) if !is_sure(low, high) => Verdict::NotTrusted(format!(
            "processors were taken away in {disturbed} rounds: with that it may lie anywhere from {low:.4} to {high:.4}"
        )),
        _ if holds => Verdict::Met,
        _ => Verdict::NotMet,
    }
}

/// Whether the interval `low..=high` lies entirely on one bad side of the bound.
fn outside(bound: Bound, low: f64, high: f64) -> bool {
    match bound {
        Bound::Within(least, most) => high < least || low > most,
        _ => !bound.holds(low) && !bound.holds(high),
    }
}

fn without_unit(words: &str) -> &str {
    words.split(" [").next().unwrap_or(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::sample::Sample;

    /// A side with these IOPS, on a machine with these paces.
    fn side(name: &str, iops: &[f64], paces: &[f64]) -> Side {
        let samples = iops.iter().zip(paces).map(|(&iops, &pace)| {
            let mut sample = Sample { pace, ..Sample::default() };
            sample.set(Metric::Iops, iops);
            sample
        });
        Side { name: name.to_owned(), samples: samples.collect() }
    }

    fn judged(ours: &[f64], paces: &[f64], bound: Bound) -> Judged {
        let peer = side("peer", &vec![100.0; ours.len()], &vec![1.0; ours.len()]);
        Bar::ratio(Metric::Iops, 0, 1, bound).judge(&[side("ours", ours, paces), peer])
    }

    #[test]
    fn ratio_is_met_when_every_round_is_on_the_good_side() {
        // The smallest of five rounds is above the bar.
        let judged = judged(&[103.0, 101.0, 104.0, 102.0, 103.0], &[1.0; 5], Bound::AtLeast(1.0));
        assert_eq!((judged.verdict, judged.what.as_str()), (Verdict::Met, "IOPS: ours / peer"));
    }

    #[test]
    fn bar_within_the_spread_is_not_trusted_either_way() {
        // The median is on the good side, then on the bad side; in each case a round is on the
        // opposite side.
        for rounds in [[103.0, 99.0, 104.0, 102.0, 103.0], [97.0, 101.0, 96.0, 98.0, 97.0]] {
            let verdict = judged(&rounds, &[1.0; 5], Bound::AtLeast(1.0)).verdict;
            assert!(matches!(&verdict, Verdict::NotTrusted(why) if why.contains("spread")), "{verdict:?}");
        }
    }

    #[test]
    fn all_rounds_on_the_bad_side_are_a_miss() {
        // The range is missed on one side.
        assert_eq!(judged(&[90.0; 5], &[1.0; 5], Bound::AtLeast(1.0)).verdict, Verdict::NotMet);
        assert_eq!(judged(&[90.0; 5], &[1.0; 5], Bound::Within(0.98, 1.02)).verdict, Verdict::NotMet);
    }

    #[test]
    fn range_with_rounds_on_both_sides_of_it_is_not_trusted() {
        // 0.9 and 1.1 are both outside of the range; the true median may lie inside.
        let verdict = judged(&[90.0, 110.0, 90.0, 110.0, 90.0], &[1.0; 5], Bound::Within(0.98, 1.02)).verdict;
        assert!(matches!(verdict, Verdict::NotTrusted(_)), "{verdict:?}");
    }

    #[test]
    fn round_on_another_machine_counts_as_unknown_by_the_square_of_the_difference() {
        // 1.1 with one side at 0.8 of the pace may be 0.70; 3.6 is at least 2.3.
        let paces = [1.0, 0.8, 1.0, 1.0, 1.0];
        let close = judged(&[110.0; 5], &paces, Bound::AtLeast(1.0)).verdict;
        assert!(
            matches!(&close, Verdict::NotTrusted(why) if why.contains("in 1 rounds") && why.contains("0.704")),
            "{close:?}"
        );
        assert_eq!(judged(&[360.0; 5], &paces, Bound::AtLeast(2.2)).verdict, Verdict::Met);
        assert_eq!(judged(&[50.0; 5], &paces, Bound::AtLeast(1.0)).verdict, Verdict::NotMet);
    }

    #[test]
    fn nine_rounds_forgive_one_on_another_machine() {
        // With nine rounds the interval omits one at either end.
        let paces = [1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        assert_eq!(judged(&[110.0; 9], &paces, Bound::AtLeast(1.0)).verdict, Verdict::Met);
    }

    #[test]
    fn plain_number_on_half_a_machine_may_be_met_and_is_missed_only_by_far() {
        // A side that meets its bar with half of the processors meets it with all of them. A side
        // that misses its bar might have met it with all.
        let sides = [side("ours", &[110.0; 5], &[0.5; 5])];
        assert_eq!(Bar::plain(Metric::Iops, 0, Bound::AtLeast(100.0)).judge(&sides).verdict, Verdict::Met);
        assert_eq!(Bar::plain(Metric::Iops, 0, Bound::AtLeast(1000.0)).judge(&sides).verdict, Verdict::NotMet);
        let missed = Bar::plain(Metric::Iops, 0, Bound::AtLeast(120.0)).judge(&sides).verdict;
        assert!(matches!(missed, Verdict::NotTrusted(_)), "{missed:?}");
    }

    #[test]
    fn what_a_machine_cannot_tell_is_neither_met_nor_missed() {
        // On the counted clock, a ratio of 64k copies far on the good side proves as little as one
        // far on the bad side.
        for rounds in [[200.0; 5], [50.0; 5]] {
            let doubted = judged(&rounds, &[1.0; 5], Bound::AtLeast(1.0)).doubted("copies");
            assert_eq!(doubted.verdict, Verdict::NotTrusted("copies".to_owned()));
        }
        assert_eq!(judged(&[50.0; 5], &[1.0; 5], Bound::Shown).doubted("copies").verdict, Verdict::Shown);
    }

    #[test]
    fn too_few_rounds_are_not_trusted() {
        // `--quick` shows numbers and no verdicts.
        let verdict = judged(&[110.0; 2], &[1.0; 2], Bound::AtLeast(1.0)).verdict;
        assert_eq!(verdict, Verdict::NotTrusted("2 rounds cannot say; five can".to_owned()));
    }

    #[test]
    fn number_that_was_not_measured_is_not_trusted() {
        // A missing number must not read as a bar met.
        let empty = Side { name: "ours".to_owned(), samples: vec![Sample::default(); 5] };
        let judged = Bar::plain(Metric::Rate, 0, Bound::AtMost(1.0)).judge(&[empty]);
        assert!(judged.summary.is_none() && matches!(judged.verdict, Verdict::NotTrusted(_)));
    }
}
