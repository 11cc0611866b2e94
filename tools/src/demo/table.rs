//! Table of configured and measured rates.

/// Tolerance of a judged rate, as the product promises.
const TOLERANCE: f64 = 0.01;

/// A rate.
pub struct Row {
    what: String,
    configured: f64,
    measured: f64,
    judged: bool,
}

impl Row {
    /// A rate that must be within the tolerance.
    pub fn judged(what: &str, configured: f64, measured: f64) -> Row {
        Row { what: what.to_owned(), configured, measured, judged: true }
    }

    /// A rate that is only shown: two jobs do not start and end at the same instant, so halves
    /// differ a little.
    pub fn shown(what: &str, configured: f64, measured: f64) -> Row {
        Row { judged: false, ..Row::judged(what, configured, measured) }
    }

    /// Whether the rate is within 1 %, or is not judged.
    pub fn is_met(&self) -> bool {
        !self.judged || self.difference().abs() <= TOLERANCE
    }

    fn difference(&self) -> f64 {
        self.measured / self.configured - 1.0
    }

    fn verdict(&self) -> &'static str {
        match (self.judged, self.is_met()) {
            (true, true) => "ok",
            (true, false) => "MISSED (more than 1 %)",
            (false, _) => "",
        }
    }
}

/// Prints the rows, aligned.
pub fn print(rows: &[Row]) {
    println!("{}", text(rows));
}

fn text(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.what.len()).max().unwrap_or(0);
    let mut lines =
        vec![format!("{:width$}  {:>10}  {:>10}  {:>10}", "requests a second", "configured", "measured", "difference")];
    for row in rows {
        let difference = format!("{:+.2} %", row.difference() * 100.0);
        let line = format!(
            "{:width$}  {:>10.0}  {:>10.1}  {difference:>10}  {}",
            row.what,
            row.configured,
            row.measured,
            row.verdict()
        );
        lines.push(line.trim_end().to_owned());
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_met_up_to_one_percent_either_way() {
        // A rate that is too high is as wrong as one that is too low.
        assert!(Row::judged("a", 1000.0, 1009.9).is_met() && Row::judged("a", 1000.0, 990.1).is_met());
        assert!(!Row::judged("a", 1000.0, 1010.5).is_met() && !Row::judged("a", 1000.0, 989.0).is_met());
        assert!(Row::shown("a", 1000.0, 700.0).is_met());
    }

    #[test]
    fn rate_that_is_not_a_number_is_not_met() {
        // A count of 0 in 0 s must not pass.
        assert!(!Row::judged("a", 1000.0, f64::NAN).is_met());
    }

    #[test]
    fn columns_are_aligned() {
        // Numbers to compare are in one column.
        let rows = [Row::judged("vol0 + vol1, both busy", 1000.0, 1000.31), Row::shown("  vol0", 500.0, 495.0)];
        let expected = "\
            requests a second       configured    measured  difference\n\
            vol0 + vol1, both busy        1000      1000.3     +0.03 %  ok\n  \
            vol0                         500       495.0     -1.00 %";
        assert_eq!(text(&rows), expected);
    }
}
