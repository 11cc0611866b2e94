//! Splits the output of a suite into trials.
//!
//! ```text
//!   test NAME ...                                  start of a trial
//!             what was measured: 1, expected 1     its text
//!     12.3 s  NAME                                 its duration in guest time
//!   ok                                             its end
//! ```

use std::time::{Duration, Instant};

use crate::tally::Tally;

/// An ended trial.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// Name of the trial.
    pub name: String,
    /// Output of the trial, with line ends.
    pub text: String,
    /// `ok`, `FAILED` or `ignored`, the last optionally with a reason.
    outcome: String,
    /// Duration in seconds of guest time.
    took: Option<f64>,
    /// Duration on the host's clock.
    pub host: Duration,
}

impl Ended {
    /// Summary line.
    pub fn line(&self) -> String {
        let took = self.took.map_or_else(String::new, |seconds| format!(" ({seconds:.1} s)"));
        format!("test {} ... {}{took}", self.name, self.outcome)
    }

    /// Line of the trial in the table of lengths.
    pub fn length(&self) -> String {
        format!("{:.0} {}\n", self.host.as_secs_f64(), self.name)
    }

    /// Counts of this trial.
    pub fn tally(&self) -> Tally {
        let is = |outcome| u64::from(self.outcome.starts_with(outcome));
        let (passed, skipped) = (is("ok"), is("ignored"));
        Tally { passed, skipped, failed: 1 - passed - skipped }
    }
}

/// Output of a suite since the start of the current trial.
pub struct Blocks {
    name: Option<String>,
    text: String,
    took: Option<f64>,
    /// Start of the trial on the host's clock.
    since: Instant,
    failed: u64,
}

impl Blocks {
    /// An empty parser.
    pub fn new(now: Instant) -> Self {
        Self { name: None, text: String::new(), took: None, since: now, failed: 0 }
    }

    /// Takes a line with its line end. Returns the trial that the line ends.
    pub fn line(&mut self, line: &str, now: Instant) -> Option<Ended> {
        let plain = line.trim_end();
        if let Some((name, rest)) = begin(plain) {
            *self = Self { name: Some(name.to_owned()), failed: self.failed, ..Self::new(now) };
            return self.end(rest, now);
        }
        let name = self.name.as_deref().unwrap_or_default();
        if let Some(took) = took(plain, name) {
            self.took = Some(took);
            return None;
        }
        let ended = self.end(plain, now);
        if ended.is_none() && !plain.is_empty() {
            self.text.push_str(line);
        }
        ended
    }

    fn end(&mut self, outcome: &str, now: Instant) -> Option<Ended> {
        let is_outcome = outcome == "ok" || outcome == "FAILED" || outcome.starts_with("ignored");
        if !is_outcome {
            return None;
        }
        let name = self.name.take()?;
        let (text, took) = (std::mem::take(&mut self.text), self.took.take());
        self.failed += u64::from(outcome == "FAILED");
        Some(Ended { name, text, outcome: outcome.to_owned(), took, host: now - self.since })
    }

    /// Number of failed trials.
    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// Output since the last trial ended.
    pub fn rest(&self) -> &str {
        &self.text
    }
}

/// Name and rest of a line `test [kind] NAME   ... REST`.
fn begin(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.strip_prefix("test ")?.split_once(" ...")?;
    Some((without_kind(name.trim()), rest.trim()))
}

/// Name in a line `[kind] NAME: test` of the suite's list.
pub fn listed(line: &str) -> Option<&str> {
    line.strip_suffix(": test").map(without_kind)
}

fn without_kind(name: &str) -> &str {
    name.strip_prefix('[').and_then(|rest| rest.split_once("] ")).map_or(name, |(_, name)| name)
}

/// Seconds in a line `  12.3 s  NAME`, if it is that of the trial `name`.
fn took(line: &str, name: &str) -> Option<f64> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [seconds, "s", of] = words[..] else { return None };
    if of == name { seconds.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(output: &str) -> Vec<Ended> {
        let begin = Instant::now();
        let mut blocks = Blocks::new(begin);
        let after = |line| begin + Duration::from_secs(line);
        output.split_inclusive('\n').zip(0..).filter_map(|(line, number)| blocks.line(line, after(number))).collect()
    }

    #[test]
    fn trial_is_all_from_its_name_to_its_outcome() {
        let ended = all("\nrunning 2 tests\ntest a_b ... \n          rate: 1\n  12.3 s  a_b\nok\n\
                         test [correctness] c         ... ignored, no fio\n\ntest result: ok. 1 passed\n");
        assert_eq!(ended[0].line(), "test a_b ... ok (12.3 s)");
        assert_eq!((ended[0].text.as_str(), ended[0].length().as_str()), ("          rate: 1\n", "3 a_b\n"));
        assert_eq!(ended[1].line(), "test c ... ignored, no fio");
        assert_eq!(ended.len(), 2);
    }

    #[test]
    fn failure_is_counted_and_its_text_kept() {
        let now = Instant::now();
        let mut blocks = Blocks::new(now);
        assert_eq!(blocks.line("test a ... \n", now), None);
        assert_eq!(blocks.line("          above its limit\n", now), None);
        let ended = blocks.line("FAILED\n", now).unwrap();
        assert_eq!((ended.tally().failed, blocks.failed()), (1, 1));
        assert!(ended.text.contains("above"));
        // Output after the last trial belongs to no trial.
        blocks.line("failures:\n", now);
        assert_eq!(blocks.rest(), "failures:\n");
    }

    #[test]
    fn names_are_listed_without_their_kind() {
        assert_eq!((listed("a: test"), listed("[correctness] a: test")), (Some("a"), Some("a")));
        assert_eq!(listed("1 test, 0 benchmarks"), None);
    }
}
