//! The course of a bench: sides in turn, round after round.
//!
//! ```text
//!   round   1      2      3      4      5
//!           A B    B A    A B    B A    A B        what drifts (a host that gets busier) meets both alike
//!          │ │ │  │ │ │   …                         between samples: the yardstick
//! ```
//!
//! All sides of a round are there from its start to its end, so none has a warmer start than another.

use std::cell::Cell;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use super::machine;
use super::sample::{Sample, Side};

/// After a device came up, before it is measured: START's reads, udev, the kernel's own look for partitions.
const SETTLE: Duration = Duration::from_secs(1);

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Alternations.
    pub rounds: usize,
    /// Of a sample, after the ramp.
    pub seconds: u32,
    /// Of a sample that asks for a rate, in which windows are looked for.
    pub seconds_of_rates: u32,
    /// Queues of each device, ours and the peers'.
    pub queues: u32,
}

/// A bench that runs.
pub struct Bench {
    /// How much is measured.
    pub plan: Plan,
    best: Cell<f64>,
}

impl Bench {
    /// Gets to know the machine.
    pub fn new(plan: Plan) -> Bench {
        let best = (0..5).map(|_| machine::yardstick()).fold(1.0, f64::max);
        Bench { plan, best: Cell::new(best) }
    }

    /// Measures each side once a round; `measure` gets the side's place.
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

    /// Measures all sides together once a round: for each round, a sample of each.
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

    /// The yardstick against the best that was ever seen.
    fn pace(&self) -> f64 {
        let now = machine::yardstick();
        self.best.set(self.best.get().max(now));
        now / self.best.get()
    }
}

/// Waits until a device that came up is left alone.
pub fn settle() {
    thread::sleep(SETTLE);
}

fn sides(names: &[&str]) -> Vec<Side> {
    names.iter().map(|&name| Side { name: name.to_owned(), samples: Vec::new() }).collect()
}

/// The order of the sides in a round: there, and back in the next one.
pub fn order(sides: usize, round: usize) -> Vec<usize> {
    let there = 0..sides;
    if round.is_multiple_of(2) { there.collect() } else { there.rev().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_side_is_always_first() {
        // The second of two would always meet what the first one leaves.
        assert_eq!((order(2, 0), order(2, 1), order(3, 3)), (vec![0, 1], vec![1, 0], vec![2, 1, 0]));
    }
}
