//! The summary as a table.

use std::fmt;

use super::summary::{Facts, RowFacts};

const HEAD: [&str; 10] =
    ["", "REQUESTS", "MiB", "REQUESTS/s", "MiB/s", "WAIT p50", "p90", "p99", "MAX", "AT THE LIMIT"];

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows: Vec<[String; HEAD.len()]> = vec![HEAD.map(str::to_owned)];
        let of = |kind: &str, row: &RowFacts| cells(format!("{kind}{}", row.name), row, self.span_ns);
        rows.extend(self.devices.iter().map(|row| of("device ", row)));
        rows.extend(self.groups.iter().map(|row| of("group ", row)));
        rows.push(of("", &self.total));
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; HEAD.len()] = std::array::from_fn(width);
        writeln!(f, "over {}", Duration(self.span_ns))?;
        for row in &rows {
            write!(f, "{:<width$}", row[0], width = widths[0])?;
            for (cell, width) in row.iter().zip(widths).skip(1) {
                write!(f, "  {cell:>width$}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

fn cells(name: String, row: &RowFacts, span_ns: u64) -> [String; HEAD.len()] {
    const MIB: f64 = (1 << 20) as f64;
    let rate = |rate: Option<f64>, unit: f64, digits: usize| match rate {
        Some(rate) => format!("{:.digits$}", rate / unit),
        None => "-".to_owned(),
    };
    let time = |ns: u64| Duration(ns).to_string();
    let share = if span_ns == 0 { 0.0 } else { row.at_limit_ns as f64 * 100.0 / span_ns as f64 };
    [
        name,
        row.requests.to_string(),
        format!("{:.1}", row.bytes as f64 / MIB),
        rate(row.requests_per_s, 1.0, 1),
        rate(row.bytes_per_s, MIB, 3),
        time(row.wait_ns.p50),
        time(row.wait_ns.p90),
        time(row.wait_ns.p99),
        time(row.wait_ns.max),
        format!("{} ({share:.0} %)", time(row.at_limit_ns)),
    ]
}

/// A time with four digits, in the largest unit that is not longer than the time.
struct Duration(u64);

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = match self.0 {
            0 => return write!(f, "0"),
            1..1_000 => return write!(f, "{} ns", self.0),
            1_000..1_000_000 => (1e3, "us"),
            1_000_000..1_000_000_000 => (1e6, "ms"),
            _ => (1e9, "s"),
        };
        let amount = self.0 as f64 / unit;
        let digits = match amount {
            ..10.0 => 3,
            ..100.0 => 2,
            ..1000.0 => 1,
            _ => 0,
        };
        write!(f, "{amount:.digits$} {name}")
    }
}
