//! A bar: what a number must be, and whether the rounds show that it is.
//!
//! # When a number is not trusted
//!
//! ```text
//!                      bar
//!    met           ─────┼──├───•───┤──    the whole interval of the median on the good side
//!    not met       ├─•──┤──┼──────────    all of it on the bad side
//!    not trusted   ───├─┼•────┤───────    the bar lies within it: another five rounds might say otherwise
//! ```
//!
//! 1. *Spread against distance.* The interval is that of [`Summary::interval`]: no assumption on noise, doubt of 1/16. With
//!    fewer than five rounds there is none. A number equal to its bar can never be told from it, so `1.00` as a bar of a
//!    ratio is met by those that are better, and "as good as" stays open unless the bar leaves room.
//! 2. *Processors taken away.* Around each sample a fixed piece of work is timed on all processors. In a round whose two sides had
//!    paces more than [`PACE`] apart, or one in which the host says it stole more than [`STOLEN`], the ratio compares two machines.
//!    What either did is at worst proportional to its pace, and the pace is known before and after, not within: so the ratio
//!    counts as unknown by that factor twice, in the direction that hurts. 3.6 with one side at 0.8 of the other's pace is still
//!    2.3 at least; 1.05 is nothing.
//! 3. *A plain number on half a machine* can only be worse for it: later, longer, dearer. So it may still be met; that it is not
//!    met is believed only if it would be so with the pace made up for.

use super::sample::{Metric, Side};
use super::statistics::Summary;

/// The pace of one and the same idle machine repeats to about 3 % under emulation; 10 % is something else at work.
const PACE: f64 = 0.10;

/// One per cent moves a ratio by one per cent, about what the bars ask for.
const STOLEN: f64 = 0.01;

/// What is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// One side's number over another's, in the same round. Sides by their place in the case.
    Ratio(Metric, usize, usize),
    /// One side's number.
    Plain(Metric, usize),
}

/// What it must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
    /// Between the two.
    Within(f64, f64),
    /// Nothing: it is shown.
    Shown,
}

/// A demand.
#[derive(Clone, Debug)]
pub struct Bar {
    /// What is judged.
    pub value: Value,
    /// What it must be.
    pub bound: Bound,
    /// Why it is not judged where a nanosecond is an instruction, if it is not.
    pub doubt_in_instructions: Option<&'static str>,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// It is so.
    Met,
    /// It is not so.
    NotMet,
    /// The rounds do not say; why.
    NotTrusted(String),
    /// Nothing was demanded.
    Shown,
}

/// A bar with its number.
#[derive(Clone, Debug)]
pub struct Judged {
    /// What was judged, in words.
    pub what: String,
    /// What it must be.
    pub bound: Bound,
    /// The number, unless it was not measured.
    pub summary: Option<Summary>,
    /// What became of it.
    pub verdict: Verdict,
}

impl Bar {
    /// Of a ratio between two sides.
    pub fn ratio(metric: Metric, of: usize, to: usize, bound: Bound) -> Bar {
        Bar { value: Value::Ratio(metric, of, to), bound, doubt_in_instructions: None }
    }

    /// Of one side's own number.
    pub fn plain(metric: Metric, side: usize, bound: Bound) -> Bar {
        Bar { value: Value::Plain(metric, side), bound, doubt_in_instructions: None }
    }

    /// The same, for that reason not judged where a nanosecond is an instruction.
    pub fn not_in_instructions(self, why: &'static str) -> Bar {
        Bar { doubt_in_instructions: Some(why), ..self }
    }

    /// Judges it by what the sides did.
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

    /// The factor by which a round's number may be off, as the machine was not the same for all; 1 if it was.
    fn slack(&self, sides: &[Side], round: usize) -> f64 {
        let at = |side: usize| (sides[side].samples[round].pace, sides[side].samples[round].stolen);
        let (apart, stolen) = match self.value {
            Value::Ratio(_, of, to) => {
                let (mine, theirs) = (at(of), at(to));
                ((mine.0 / theirs.0).ln().abs(), mine.1.max(theirs.1))
            }
            // Below the whole machine by as much as two sides may differ counts as whole.
            Value::Plain(_, side) => ((-at(side).0.ln() - PACE).max(0.0), at(side).1),
        };
        let apart = if apart > PACE { apart } else { 0.0 };
        let stolen = if stolen > STOLEN { stolen } else { 0.0 };
        (2.0 * (apart + stolen)).exp()
    }
}

impl Judged {
    /// The same, on a machine where the number says nothing of what was demanded; why.
    pub fn doubted(self, why: &str) -> Judged {
        let verdict = match self.verdict {
            Verdict::Shown => Verdict::Shown,
            _ => Verdict::NotTrusted(why.to_owned()),
        };
        Judged { verdict, ..self }
    }
}

impl Bound {
    /// Whether a number is as it must be.
    pub fn holds(self, number: f64) -> bool {
        match self {
            Bound::AtLeast(bar) => number >= bar,
            Bound::AtMost(bar) => number <= bar,
            Bound::Within(low, high) => (low..=high).contains(&number),
            Bound::Shown => true,
        }
    }

    /// In a table.
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
    // For a range, both ends outside is not enough: they must be on the same side of it.
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

/// Whether all of `low..=high` lies on one bad side of the bound.
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

    /// A side whose IOPS were these, on a machine of these paces.
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
        // The worst of five is above the bar.
        let judged = judged(&[103.0, 101.0, 104.0, 102.0, 103.0], &[1.0; 5], Bound::AtLeast(1.0));
        assert_eq!((judged.verdict, judged.what.as_str()), (Verdict::Met, "IOPS: ours / peer"));
    }

    #[test]
    fn bar_within_the_spread_is_not_trusted_either_way() {
        // The median is on the good side, then on the bad one; one round says otherwise each time.
        for rounds in [[103.0, 99.0, 104.0, 102.0, 103.0], [97.0, 101.0, 96.0, 98.0, 97.0]] {
            let verdict = judged(&rounds, &[1.0; 5], Bound::AtLeast(1.0)).verdict;
            assert!(matches!(&verdict, Verdict::NotTrusted(why) if why.contains("spread")), "{verdict:?}");
        }
    }

    #[test]
    fn all_rounds_on_the_bad_side_are_a_miss() {
        // Also for a range, on one side of it.
        assert_eq!(judged(&[90.0; 5], &[1.0; 5], Bound::AtLeast(1.0)).verdict, Verdict::NotMet);
        assert_eq!(judged(&[90.0; 5], &[1.0; 5], Bound::Within(0.98, 1.02)).verdict, Verdict::NotMet);
    }

    #[test]
    fn range_with_rounds_on_both_sides_of_it_is_not_trusted() {
        // 0.9 and 1.1 are both outside; their median may well be inside.
        let verdict = judged(&[90.0, 110.0, 90.0, 110.0, 90.0], &[1.0; 5], Bound::Within(0.98, 1.02)).verdict;
        assert!(matches!(verdict, Verdict::NotTrusted(_)), "{verdict:?}");
    }

    #[test]
    fn round_on_another_machine_counts_as_unknown_by_the_square_of_the_difference() {
        // 1.1 with one side at 0.8 of the pace may be 0.70; 3.6 is still 2.3.
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
        // The interval leaves out one at either end.
        let paces = [1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        assert_eq!(judged(&[110.0; 9], &paces, Bound::AtLeast(1.0)).verdict, Verdict::Met);
    }

    #[test]
    fn plain_number_on_half_a_machine_may_be_met_and_is_missed_only_by_far() {
        // Who is on time with half the processors is on time; who is not might have been with all.
        let sides = [side("ours", &[110.0; 5], &[0.5; 5])];
        assert_eq!(Bar::plain(Metric::Iops, 0, Bound::AtLeast(100.0)).judge(&sides).verdict, Verdict::Met);
        assert_eq!(Bar::plain(Metric::Iops, 0, Bound::AtLeast(1000.0)).judge(&sides).verdict, Verdict::NotMet);
        let missed = Bar::plain(Metric::Iops, 0, Bound::AtLeast(120.0)).judge(&sides).verdict;
        assert!(matches!(missed, Verdict::NotTrusted(_)), "{missed:?}");
    }

    #[test]
    fn what_a_machine_cannot_tell_is_neither_met_nor_missed() {
        // 64k copied on the clock of instructions: far on the good side says as little as far on the bad one.
        for rounds in [[200.0; 5], [50.0; 5]] {
            let doubted = judged(&rounds, &[1.0; 5], Bound::AtLeast(1.0)).doubted("copies");
            assert_eq!(doubted.verdict, Verdict::NotTrusted("copies".to_owned()));
        }
        assert_eq!(judged(&[50.0; 5], &[1.0; 5], Bound::Shown).doubted("copies").verdict, Verdict::Shown);
    }

    #[test]
    fn too_few_rounds_are_not_trusted() {
        // --quick shows numbers, not verdicts.
        let verdict = judged(&[110.0; 2], &[1.0; 2], Bound::AtLeast(1.0)).verdict;
        assert_eq!(verdict, Verdict::NotTrusted("2 rounds cannot say; five can".to_owned()));
    }

    #[test]
    fn number_that_was_not_measured_is_not_trusted() {
        // A peer that failed must not read as a bar met.
        let empty = Side { name: "ours".to_owned(), samples: vec![Sample::default(); 5] };
        let judged = Bar::plain(Metric::Rate, 0, Bound::AtMost(1.0)).judge(&[empty]);
        assert!(judged.summary.is_none() && matches!(judged.verdict, Verdict::NotTrusted(_)));
    }
}
