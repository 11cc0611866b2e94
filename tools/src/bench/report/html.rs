//! Report as one HTML page: a table of the bars, and for each case a plot for each bar and for each
//! metric.
//!
//! ```text
//!   bars      name   ──────────┬───●●─●●──      each dot a round, the line the bar, the tick the median
//!   numbers   side   ●● ●●●                     one strip a metric, one row a side
//! ```
//!
//! The page has no script, font or picture from another address, so it can be sent by mail.

use std::fmt::Write as _;

use super::{Came, Outcome, Report, number, verdict};
use crate::bench::bar::{Bound, Judged, Verdict};
use crate::bench::sample::{Metric, Side};
use crate::bench::statistics::median;

/// Widths of a plot in pixels (names, then dots), and the height of a row.
const NAMES: f64 = 380.0;
const DOTS: f64 = 420.0;
const ROW: f64 = 22.0;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222;background:#fff}\
table{border-collapse:collapse;margin:1em 0}td,th{padding:.15em .7em;text-align:left;border-bottom:1px solid #ddd}\
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}\
.met{color:#176b2c}.not-met{color:#b3161b;font-weight:600}.doubt{color:#8a5a00}\
svg{display:block;margin:.6em 0;max-width:100%;height:auto}svg text{font:13px system-ui,sans-serif;fill:#222}\
svg .axis{stroke:#bbb}svg .bar{stroke:#b3161b;stroke-width:2}svg .good{fill:#176b2c14}svg .median{stroke:#222;stroke-width:2}\
svg .dot{fill:#2563a8;fill-opacity:.65}svg .value{fill:#666}";

/// The whole page.
pub fn page(report: &Report) -> String {
    let plan = report.plan;
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>ublk-throttle bench, Linux {kernel}</title>\
         <style>{STYLE}</style></head><body>\n<h1>ublk-throttle against its peers</h1>\n\
         <p>Linux {kernel}, {} processors, one boot; {clock}. {} rounds of {} s ({} s where windows are looked for), all sides of \
         a case in turn, {} queue(s) a device. A number is the median of the rounds; what counts are ratios within this boot. \
         <em>Not trusted</em>: the rounds do not say on which side of the bar the number lies, or the machine was not the same \
         for both sides.</p>\n",
        report.processors,
        plan.rounds,
        plan.seconds,
        plan.seconds_of_rates,
        plan.queues,
        kernel = escape(&report.kernel),
        clock = report.clock(),
    );
    page.push_str(&table(report));
    for outcome in &report.cases {
        page.push_str(&case(outcome));
    }
    page.push_str("</body></html>\n");
    page
}

/// Table of the bars of all cases.
fn table(report: &Report) -> String {
    let mut text =
        "<table><tr><th>case</th><th>what</th><th class=\"n\">median</th><th class=\"n\">spread</th><th>bar</th>\
                    <th></th></tr>\n"
            .to_owned();
    for outcome in &report.cases {
        let name = escape(&outcome.name);
        let link = format!("<a href=\"#{name}\">{name}</a>");
        match &outcome.came {
            Came::Skipped(why) | Came::Failed(why) => {
                let class = if matches!(outcome.came, Came::Failed(_)) { "not-met" } else { "doubt" };
                let word = if class == "doubt" { "skipped" } else { "failed" };
                let _ = writeln!(
                    text,
                    "<tr><td>{link}</td><td colspan=\"4\">{}</td><td class=\"{class}\">{word}</td></tr>",
                    escape(why)
                );
            }
            Came::Measured { judged, .. } => {
                for judged in judged.iter().filter(|judged| judged.verdict != Verdict::Shown) {
                    let (middle, spread) = numbers(judged);
                    let _ = writeln!(
                        text,
                        "<tr><td>{link}</td><td>{}</td><td class=\"n\">{middle}</td><td class=\"n\">{spread}</td><td>{}</td>\
                         <td class=\"{}\" title=\"{}\">{}</td></tr>",
                        escape(&judged.what),
                        escape(&judged.bound.words()),
                        class(&judged.verdict),
                        escape(why(&judged.verdict)),
                        verdict(&judged.verdict),
                    );
                }
            }
        }
    }
    text.push_str("</table>\n");
    text
}

fn case(outcome: &Outcome) -> String {
    let (name, claim) = (escape(&outcome.name), escape(&outcome.claim));
    let mut text = format!("<h2 id=\"{name}\">{name}</h2>\n<p>{claim}</p>\n");
    match &outcome.came {
        Came::Skipped(why) => {
            let _ = writeln!(text, "<p class=\"doubt\">Skipped: {}</p>", escape(why));
        }
        Came::Failed(why) => {
            let _ = writeln!(text, "<p class=\"not-met\">Failed: {}</p>", escape(why));
        }
        Came::Measured { sides, judged, notes } => {
            for note in notes {
                let _ = writeln!(text, "<p>{}</p>", escape(note));
            }
            for judged in judged {
                text.push_str(&judged_plot(judged));
            }
            text.push_str("<details><summary>by side</summary>\n");
            let mut metrics: Vec<Metric> = sides.iter().flat_map(Side::metrics).collect();
            metrics.sort_unstable();
            metrics.dedup();
            for metric in metrics {
                text.push_str(&metric_plot(metric, sides));
            }
            text.push_str("</details>\n");
        }
    }
    text
}

/// Plot of a bar: its rounds, its median, and the range that the bar accepts.
fn judged_plot(judged: &Judged) -> String {
    let Some(summary) = &judged.summary else { return String::new() };
    let edges: &[f64] = match judged.bound {
        Bound::AtLeast(bar) | Bound::AtMost(bar) => &[bar],
        Bound::Within(low, high) => &[low, high],
        Bound::Shown => &[],
    };
    let scale = Scale::over(summary.rounds.iter().chain(edges).copied());
    let mut inner = String::new();
    let (left, right) = (NAMES, NAMES + DOTS);
    let good = match judged.bound {
        Bound::AtLeast(bar) => Some((scale.x(bar), right)),
        Bound::AtMost(bar) => Some((left, scale.x(bar))),
        Bound::Within(low, high) => Some((scale.x(low), scale.x(high))),
        Bound::Shown => None,
    };
    if let Some((from, to)) = good {
        let width = to - from;
        let _ = write!(inner, "<rect class=\"good\" x=\"{from:.1}\" y=\"1\" width=\"{width:.1}\" height=\"20\"/>");
    }
    inner.push_str(&strip(&judged.what, &summary.rounds, &scale, 0));
    for &edge in edges {
        let x = scale.x(edge);
        let _ = write!(inner, "<line class=\"bar\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"1\" y2=\"21\"/>");
    }
    let mut text = svg(1, &inner);
    if judged.verdict != Verdict::Shown {
        let reason = why(&judged.verdict);
        let colon = if reason.is_empty() { "" } else { ": " };
        let _ = writeln!(
            text,
            "<p class=\"{}\">{} ({}){colon}{}</p>",
            class(&judged.verdict),
            verdict(&judged.verdict),
            escape(&judged.bound.words()),
            escape(reason)
        );
    }
    text
}

/// Plot of a metric: the rounds of each side, all on one scale.
fn metric_plot(metric: Metric, sides: &[Side]) -> String {
    let has: Vec<&Side> = sides.iter().filter(|side| side.metrics().contains(&metric)).collect();
    let scale = Scale::over(has.iter().flat_map(|side| side.values(metric)));
    let rows: String =
        has.iter().enumerate().map(|(row, side)| strip(&side.name, &side.values(metric), &scale, row)).collect();
    format!("<h3>{}</h3>\n{}", escape(metric.words()), svg(has.len(), &rows))
}

/// Row of a plot: a name, a dot for each round, a tick at the median and the median as a number.
fn strip(name: &str, rounds: &[f64], scale: &Scale, row: usize) -> String {
    let (middle, top) = (ROW * (row as f64 + 0.5), ROW * row as f64);
    let mut text = format!(
        "<text x=\"0\" y=\"{:.1}\">{}</text><line class=\"axis\" x1=\"{NAMES}\" x2=\"{}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\"/>",
        middle + 4.5,
        escape(name),
        NAMES + DOTS
    );
    for &round in rounds {
        let _ = write!(
            text,
            "<circle class=\"dot\" cx=\"{:.1}\" cy=\"{middle:.1}\" r=\"4\"><title>{}</title></circle>",
            scale.x(round),
            number(round)
        );
    }
    let (x, value) = (scale.x(median(rounds)), number(median(rounds)));
    let _ = write!(
        text,
        "<line class=\"median\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>\
         <text class=\"value\" x=\"{}\" y=\"{:.1}\">{value}</text>",
        top + 3.0,
        top + ROW - 3.0,
        NAMES + DOTS + 10.0,
        middle + 4.5
    );
    text
}

fn svg(rows: usize, inner: &str) -> String {
    let (width, height) = (NAMES + DOTS + 80.0, ROW * rows as f64);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\">{inner}</svg>\n"
    )
}

/// Maps numbers to x coordinates.
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    /// A scale over all finite values, with 8 % of their range as a margin at either end.
    fn over(values: impl Iterator<Item = f64>) -> Scale {
        let (low, high) = values
            .filter(|value| value.is_finite())
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        // For a single value the range is 0: a minimal margin keeps it in the middle.
        let room = ((high - low) * 0.08).max(high.abs() * 1e-6).max(1e-9);
        if low > high { Scale { low: 0.0, high: 1.0 } } else { Scale { low: low - room, high: high + room } }
    }

    fn x(&self, value: f64) -> f64 {
        NAMES + DOTS * ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

fn numbers(judged: &Judged) -> (String, String) {
    judged.summary.as_ref().map_or_else(
        || ("-".to_owned(), String::new()),
        |summary| (number(summary.median), format!("{} to {}", number(summary.min), number(summary.max))),
    )
}

fn class(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Met => "met",
        Verdict::NotMet => "not-met",
        Verdict::NotTrusted(_) => "doubt",
        Verdict::Shown => "",
    }
}

fn why(verdict: &Verdict) -> &str {
    if let Verdict::NotTrusted(why) = verdict { why } else { "" }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    #[test]
    fn page_needs_nothing_from_elsewhere() {
        // The page must open from a mail years later. The only address in it is the name of SVG's
        // namespace.
        let page = page(&report()).replace("http://www.w3.org/2000/svg", "");
        for foreign in ["<script", "http:", "https:", "src=", "@import", "url("] {
            assert!(!page.contains(foreign), "{foreign}");
        }
    }

    #[test]
    fn words_of_a_case_are_no_markup() {
        // The claim of the test report contains `&`, `<` and `>`.
        let page = page(&report());
        assert!(page.contains("as fast &amp; &lt;not&gt; dearer") && !page.contains("<not>"));
    }

    #[test]
    fn every_bar_has_a_row_and_a_plot_with_its_rounds() {
        // Dots: 3 bars of 5 rounds, then the metric IOPS by side, which is 2 sides of 5 rounds.
        let page = page(&report());
        assert!(page.contains("one boot; a nanosecond is an instruction."), "{page}");
        assert_eq!(page.matches("<circle").count(), 3 * 5 + 2 * 5);
        assert_eq!(page.matches("class=\"bar\"").count(), 3);
        assert!(page.contains("<td class=\"not-met\" title=\"\">NOT MET</td>"), "{page}");
    }

    #[test]
    fn single_value_stands_in_the_middle() {
        // The range is 0 or empty; the scale must not divide by it.
        let scale = Scale::over([5.0].into_iter());
        assert_eq!(scale.x(5.0).round(), NAMES + DOTS / 2.0);
        assert!(Scale::over(std::iter::empty()).x(0.5).is_finite());
    }
}
