//! Splits the trials into shards. A shard runs in a guest of its own, trial after trial.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};

use crate::workspace;

/// Maximum number of shards: the boot of a guest takes 20 s.
const SHARDS_MAX: usize = 2;

/// Length of trials that justifies a further guest beside, in seconds of an emulating host.
const WORTH_A_BOOT: f64 = 60.0;

/// Length in seconds of a trial that the table lacks.
const UNKNOWN: f64 = 2.0;

/// Shorter trials get no line in the table. In seconds.
pub const LINE_MIN: f64 = 5.0;

/// Lengths of trials in seconds of an emulating host. Guest time is different: a wait for a timer
/// takes the host no time.
pub struct Lengths(BTreeMap<String, f64>);

impl Lengths {
    /// Reads `tests/lengths.txt`: a line `12 name` for each of the long trials. A run writes such a
    /// file to `target/e2e`.
    pub fn read() -> Result<Self> {
        let path = workspace::root().join("tests/lengths.txt");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        text.lines()
            .map(|line| parse(line).with_context(|| format!("{}: {line:?}", path.display())))
            .collect::<Result<_>>()
            .map(Self)
    }

    fn of(&self, name: &str) -> f64 {
        self.0.get(name).copied().unwrap_or(UNKNOWN)
    }
}

fn parse(line: &str) -> Result<(String, f64)> {
    let (seconds, name) = line.split_once(' ').context("no name")?;
    Ok((name.to_owned(), seconds.parse()?))
}

/// Splits the trials into shards of about the same length, the longest first. The result depends
/// only on the trials and the table.
pub fn split(names: &[String], lengths: &Lengths) -> Vec<Vec<String>> {
    let mut longest_first: Vec<(f64, usize)> =
        names.iter().enumerate().map(|(place, name)| (lengths.of(name), place)).collect();
    let all: f64 = longest_first.iter().map(|(length, _)| length).sum();
    let count = ((all / WORTH_A_BOOT) as usize).clamp(1, SHARDS_MAX);
    longest_first.sort_by(|one, other| other.0.total_cmp(&one.0).then(one.1.cmp(&other.1)));
    let mut shards: Vec<(f64, Vec<usize>)> = vec![(0.0, Vec::new()); count];
    for (length, place) in longest_first {
        let shortest = shards.iter_mut().min_by(|one, other| one.0.total_cmp(&other.0)).expect("there is one at least");
        shortest.0 += length;
        shortest.1.push(place);
    }
    shards.sort_by(|one, other| other.0.total_cmp(&one.0));
    let in_order = |mut places: Vec<usize>| {
        places.sort_unstable();
        places.into_iter().map(|place| names[place].clone()).collect()
    };
    shards.into_iter().map(|(_, places)| in_order(places)).filter(|shard: &Vec<String>| !shard.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn shards_are_balanced_and_have_every_trial_once() {
        let table = Lengths([("a", 140.0), ("b", 100.0), ("c", 40.0)].map(|(name, of)| (name.to_owned(), of)).into());
        let found = split(&names(&["c", "b", "a", "new"]), &table);
        assert_eq!(found, [names(&["a", "new"]), names(&["c", "b"])]);
    }

    #[test]
    fn few_trials_are_worth_one_boot_only() {
        assert_eq!(split(&names(&["x", "y"]), &Lengths(BTreeMap::new())), [names(&["x", "y"])]);
    }

    #[test]
    fn table_of_lengths_can_be_read() {
        let lengths = Lengths::read().unwrap();
        assert!(lengths.0.values().all(|&seconds| (0.0..600.0).contains(&seconds)));
        assert!(parse("1.5").is_err() && parse("x name").is_err());
    }
}
