//! Report for a terminal.

use std::fmt::Write as _;

use super::{Came, Outcome, Report, number, verdict};
use crate::bench::bar::{Judged, Verdict};
use crate::bench::sample::Side;
use crate::bench::statistics::median;

/// Text of a case: a table of medians by side, then a line for each bar.
pub fn case(outcome: &Outcome) -> String {
    match &outcome.came {
        Came::Skipped(why) => format!("   skipped: {why}\n"),
        Came::Failed(why) => format!("   FAILED: {why}\n"),
        Came::Measured { sides, judged, notes } => {
            let mut text = medians(sides);
            text.push('\n');
            for judged in judged {
                let _ = writeln!(text, "   {}", line(judged));
            }
            for note in notes {
                let _ = writeln!(text, "   note: {note}");
            }
            let _ = writeln!(text, "   ({:.0} s)", outcome.took.as_secs_f64());
            text
        }
    }
}

/// Verdicts of all cases, one line for each bar that demands a value.
pub fn verdicts(report: &Report) -> String {
    let mut lines = vec![format!(
        "== the bars, on Linux {}, median of {} rounds; {}",
        report.kernel,
        report.plan.rounds,
        report.clock()
    )];
    for outcome in &report.cases {
        match &outcome.came {
            Came::Skipped(why) => lines.push(format!("{:16} skipped: {why}", outcome.name)),
            Came::Failed(why) => lines.push(format!("{:16} FAILED: {why}", outcome.name)),
            Came::Measured { judged, .. } => {
                let demanded = judged.iter().filter(|judged| judged.verdict != Verdict::Shown);
                lines.extend(demanded.map(|judged| format!("{:16} {}", outcome.name, line(judged))));
            }
        }
    }
    lines.join("\n")
}

/// Table of medians: a row for each metric, a column for each side, a dash where a side lacks the
/// metric.
fn medians(sides: &[Side]) -> String {
    let width = sides.iter().map(|side| side.name.len()).max().unwrap_or(0).max(10);
    let mut text = format!("   {:26}", "median (pace)");
    for side in sides {
        let _ = write!(text, "  {:>width$}", side.name);
    }
    text.push('\n');
    let mut metrics: Vec<_> = sides.iter().flat_map(Side::metrics).collect();
    metrics.sort_unstable();
    metrics.dedup();
    let mut row = |name: &str, value: &dyn Fn(&Side) -> f64| {
        let _ = write!(text, "   {name:26}");
        for side in sides {
            let value = value(side);
            let shown = if value.is_nan() { "-".to_owned() } else { number(value) };
            let _ = write!(text, "  {shown:>width$}");
        }
        text.push('\n');
    };
    for metric in metrics {
        row(metric.words(), &|side| median(&side.values(metric)));
    }
    row("pace of the machine", &|side| median(&side.samples.iter().map(|sample| sample.pace).collect::<Vec<_>>()));
    text
}

fn line(judged: &Judged) -> String {
    let Judged { what, bound, summary, verdict: came } = judged;
    let (middle, spread) = match summary {
        Some(summary) => (number(summary.median), format!("[{} .. {}]", number(summary.min), number(summary.max))),
        None => ("-".to_owned(), String::new()),
    };
    let why = if let Verdict::NotTrusted(why) = came { format!(": {why}") } else { String::new() };
    let text = format!("{what:58} {middle:>8} {spread:20} {:>16}  {}{why}", bound.words(), verdict(came));
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    #[test]
    fn every_bar_has_its_number_its_spread_and_its_verdict() {
        // The three bars of the report: met, not trusted (with the reason), not met.
        let text = verdicts(&report());
        assert!(text.lines().next().unwrap().ends_with("; a nanosecond is an instruction"), "{text}");
        let lines: Vec<Vec<&str>> = text.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0].join(" "), "null IOPS: ours / peer 1.020 [1.010 .. 1.033] >= 1 met");
        assert!(lines[1].join(" ").contains(">= 1.02 not trusted: the bar lies within the spread"), "{text}");
        assert!(lines[2].join(" ").ends_with("30000 [30000 .. 30000] <= 29000 NOT MET"), "{text}");
        assert_eq!(lines[3].join(" "), "copy skipped: no such feature");
        assert_eq!(lines[4].join(" "), "idle FAILED: it broke");
    }

    #[test]
    fn case_has_medians_in_columns() {
        // The columns hold the medians of both sides.
        let report = report();
        let text = case(&report.cases[0]);
        assert!(text.contains("IOPS                             30600       30000\n"), "{text}");
        assert!(text.contains("note: a note"), "{text}");
    }
}
