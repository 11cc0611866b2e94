//! Median of a few rounds and its confidence interval. Pure arithmetic.
//!
//! ```text
//!   rounds   1.031  1.019  1.042  1.027  1.036        bar 1.00
//!   sorted   1.019  1.027  1.031  1.036  1.042
//!            └──────────── interval ────────┘         the bar lies outside: the median is above it, trusted
//! ```
//!
//! The interval assumes nothing about the distribution of the values. A mean or a standard
//! deviation would move arbitrarily far by a single round in which the host was busy.

/// Probability that the true median lies outside [`Summary::interval`]. With five rounds the
/// interval from minimum to maximum leaves 2 · ½⁵ = 1/16, the smallest that five rounds can give.
const DOUBT: f64 = 1.0 / 16.0;

/// Median and spread of a value over the rounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Values in the order of the rounds.
    pub rounds: Vec<f64>,
    /// Median of the rounds.
    pub median: f64,
    /// Smallest value.
    pub min: f64,
    /// Largest value.
    pub max: f64,
}

impl Summary {
    /// `None` if there are no values, or if a value is not finite.
    pub fn of(rounds: Vec<f64>) -> Option<Summary> {
        if rounds.is_empty() || rounds.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let sorted = sorted(&rounds);
        let (min, max) = (sorted[0], sorted[sorted.len() - 1]);
        Some(Summary { median: median(&rounds), min, max, rounds })
    }

    /// Interval that contains the true median, except with a probability of [`DOUBT`]; `None` if
    /// there are too few rounds.
    ///
    /// Each round lies above the true median with probability ½. All but `k` of `n` rounds fall on
    /// one side with the probability 2 · Σ(i ≤ k) C(n, i) / 2ⁿ. The interval omits `k` values at
    /// either end, for the largest `k` with at most [`DOUBT`].
    pub fn interval(&self) -> Option<(f64, f64)> {
        let count = self.rounds.len();
        let mut chance = 2.0 * 0.5f64.powi(i32::try_from(count).ok()?);
        let (mut total, mut left_out) = (0.0, None);
        for k in 0..count / 2 {
            total += chance;
            if total > DOUBT {
                break;
            }
            left_out = Some(k);
            chance *= (count - k) as f64 / (k + 1) as f64;
        }
        let sorted = sorted(&self.rounds);
        left_out.map(|k| (sorted[k], sorted[count - 1 - k]))
    }
}

/// The middle value, or the mean of the two middle values. NaN for an empty slice.
pub fn median(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

/// The value below which `share` of all lie, by nearest rank. NaN for an empty slice.
pub fn percentile(values: &[f64], share: f64) -> f64 {
    let sorted = sorted(values);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
}

/// Jain's index of fairness: 1 if all shares are equal, 1/n if one share has everything.
pub fn jain(shares: &[f64]) -> f64 {
    let (sum, squares) = (shares.iter().sum::<f64>(), shares.iter().map(|share| share * share).sum::<f64>());
    sum * sum / (shares.len() as f64 * squares)
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(rounds: &[f64]) -> Summary {
        Summary::of(rounds.to_vec()).unwrap()
    }

    #[test]
    fn one_round_gone_wrong_does_not_move_the_median() {
        // The host was busy in one round of five.
        let summary = summary(&[1.01, 1.02, 0.31, 1.00, 1.03]);
        assert_eq!((summary.median, summary.min, summary.max), (1.01, 0.31, 1.03));
    }

    #[test]
    fn five_rounds_give_an_interval_and_four_do_not() {
        // 2/2⁴ is 1/8, more than `DOUBT`; 2/2⁵ is equal to it.
        assert_eq!(summary(&[4.0, 2.0, 3.0, 1.0]).interval(), None);
        assert_eq!(summary(&[4.0, 2.0, 3.0, 1.0, 5.0]).interval(), Some((1.0, 5.0)));
    }

    #[test]
    fn nine_rounds_forgive_one_at_either_end() {
        // 2 · (1 + 9) / 512 = 3.9 %; with eight it would be 7 %.
        let values: Vec<f64> = (1..=9).map(f64::from).collect();
        assert_eq!(summary(&values).interval(), Some((2.0, 8.0)));
        assert_eq!(summary(&values[..8]).interval(), Some((1.0, 8.0)));
    }

    #[test]
    fn value_that_is_not_a_number_has_no_summary() {
        // A division by zero requests must not become a median.
        assert_eq!(Summary::of(vec![1.0, f64::NAN]), None);
        assert_eq!(Summary::of(Vec::new()), None);
    }

    #[test]
    fn percentiles_are_values_that_were_there() {
        // Of 1 to 100 the 99th; of two values the larger.
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&values, 0.99), 99.0);
        assert_eq!(percentile(&[3.0, 1.0], 0.99), 3.0);
        assert!(percentile(&[], 0.99).is_nan());
    }

    #[test]
    fn jain_is_one_for_equal_shares_and_a_quarter_if_one_of_four_has_all() {
        // Both ends of the index's range.
        assert_eq!(jain(&[7.0; 4]), 1.0);
        assert_eq!(jain(&[0.0, 0.0, 5.0, 0.0]), 0.25);
    }
}
