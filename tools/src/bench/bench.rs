//! Runs the sides of a case in alternating order, round after round.
//!
//! ```text
//!   round   1      2      3      4      5
//!           A B    B A    A B    B A    A B        a drift (a host that gets busier) affects both alike
//!          │ │ │  │ │ │   …                        between samples: the yardstick
//! ```
//!
//! All sides of a round exist from its start to its end, so no side starts warmer than the rest.

use std::cell::Cell;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use super::machine;
use super::sample::{Sample, Side};

/// Wait between a device's start and its first measurement: START's reads, udev, the kernel's
/// partition scan.
const SETTLE: Duration = Duration::from_secs(1);

/// Amount of measurement.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Rounds, each of which measures every side.
    pub rounds: usize,
    /// Seconds of a sample, after its ramp time.
    pub seconds: u32,
    /// Seconds of a sample that measures a rate, with its extremes over a sliding window.
    pub seconds_of_rates: u32,
    /// Queues of each device, ours and the peers'.
    pub queues: u32,
}

/// A running bench.
pub struct Bench {
    /// Amount of measurement.
    pub plan: Plan,
    best: Cell<f64>,
}

impl Bench {
    /// Takes the best of five yardsticks as the machine's full speed.
    pub fn new(plan: Plan) -> Bench {
        let best = (0..5).map(|_| machine::yardstick()).fold(1.0, f64::max);
        Bench { plan, best: Cell::new(best) }
    }

    /// Measures each side once a round; `measure` gets the index of the side.
    pub fn alternate(&self, names: &[&str], mut measure: impl FnMut(usize) -> Result<Sample>) -> Result<Vec<Side>> {
        settle();
        let mut sides = sides(names);
        let mut before = self.pace();
        for round in 0..self.plan.rounds {
            for place in order(names.len(), round) {
                let mut sample = measure(place).with_context(|| format!("{}, round {}", names[place], round + 1))?;
                let after = self.pace();
                sample.pace = f64::midpoint(before, after);
                before = after;
                sides[place].samples.push(sample);
            }
        }
        Ok(sides)
    }

    /// Measures all sides together once a round; `measure` returns a sample of each.
    pub fn together(&self, names: &[&str], mut measure: impl FnMut(usize) -> Result<Vec<Sample>>) -> Result<Vec<Side>> {
        let mut sides = sides(names);
        let mut before = self.pace();
        for round in 0..self.plan.rounds {
            let samples = measure(round).with_context(|| format!("round {}", round + 1))?;
            let after = self.pace();
            for (side, sample) in sides.iter_mut().zip(samples) {
                side.samples.push(Sample { pace: f64::midpoint(before, after), ..sample });
            }
            before = after;
        }
        Ok(sides)
    }

    /// Ratio of the yardstick to the best one of this boot.
    fn pace(&self) -> f64 {
        let now = machine::yardstick();
        self.best.set(self.best.get().max(now));
        now / self.best.get()
    }
}

/// Waits until the requests that follow a device's start are over.
pub fn settle() {
    thread::sleep(SETTLE);
}

fn sides(names: &[&str]) -> Vec<Side> {
    names.iter().map(|&name| Side { name: name.to_owned(), samples: Vec::new() }).collect()
}

/// Order of the sides in a round: ascending in even rounds, descending in odd ones.
pub fn order(sides: usize, round: usize) -> Vec<usize> {
    let there = 0..sides;
    if round.is_multiple_of(2) { there.collect() } else { there.rev().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_side_is_always_first() {
        // With a fixed order, the second side would always run after the first one.
        assert_eq!((order(2, 0), order(2, 1), order(3, 3)), (vec![0, 1], vec![1, 0], vec![2, 1, 0]));
    }
}
