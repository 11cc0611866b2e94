//! Counts of a test run, parsed from the last lines of libtest programs while their output is
//! passed on.

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::ops::AddAssign;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result};

use crate::process;

/// Numbers of tests by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Passed tests.
    pub passed: u64,
    /// Failed tests.
    pub failed: u64,
    /// Ignored tests.
    pub skipped: u64,
}

impl Tally {
    /// Whether all counts are zero.
    pub fn is_empty(self) -> bool {
        self == Tally::default()
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Runs a command and copies its standard output to `output`. Returns its counts and its exit
/// status.
pub fn run(command: &mut Command, mut output: impl Write) -> Result<(Tally, ExitStatus)> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", process::line(command)))?;
    let mut tally = Tally::default();
    let mut lines = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = Vec::new();
    // Bytes, not text: the output of a test may be invalid UTF-8.
    while lines.read_until(b'\n', &mut line)? > 0 {
        output.write_all(&line)?;
        if let Some(counted) = parse(&String::from_utf8_lossy(&line)) {
            tally += counted;
        }
        line.clear();
    }
    Ok((tally, child.wait()?))
}

/// Counts in a line of this form:
/// `test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s`
fn parse(line: &str) -> Option<Tally> {
    let (_, counts) = line.trim().strip_prefix("test result: ")?.split_once(". ")?;
    let mut tally = Tally::default();
    for count in counts.split(';') {
        let (number, what) = count.trim().split_once(' ')?;
        let place = match what {
            "passed" => &mut tally.passed,
            "failed" => &mut tally.failed,
            "ignored" => &mut tally.skipped,
            _ => continue,
        };
        *place = number.parse().ok()?;
    }
    Some(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_from_passing_and_failing_runs() {
        // Both results have the same form. Filtered tests do not count as skipped.
        let passing =
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s\n";
        assert_eq!(parse(passing), Some(Tally { passed: 12, failed: 0, skipped: 1 }));
        let failing = "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(parse(failing), Some(Tally { passed: 3, failed: 2, skipped: 0 }));
        assert_eq!(parse("test a ... ok"), None);
    }
}
