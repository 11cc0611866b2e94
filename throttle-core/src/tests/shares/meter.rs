//! A replay of one limit in integers: the level that the grants so far must have left.
//!
//! The units granted in any window of length `T` stay within `rate · T + capacity + one request` if
//! and only if a bucket that leaks `rate` never stands above `capacity + one request`. So a single
//! level per rate checks all windows, in constant time for each grant.

use super::plan::NANO;
use crate::limits::{Limit, SECOND_NS};

/// The nanoseconds by which a plain rate, and the rate of a burst, may run ahead.
const AHEAD_NS: u128 = SECOND_NS as u128 / 10;

/// One leaking level, in nano-units: a rate of one unit a second leaks one nano-unit a nanosecond.
#[derive(Clone, Copy, Debug)]
struct Leak {
    rate: u128,
    capacity: u128,
    level: u128,
    /// The least level before a grant and the largest level after one, since `begin`.
    least: u128,
    most: u128,
}

impl Leak {
    fn new(rate: u64, capacity: u128) -> Self {
        Self { rate: rate.into(), capacity, level: 0, least: u128::MAX, most: 0 }
    }

    fn drain(&mut self, elapsed_ns: u64) {
        self.level = self.level.saturating_sub(self.rate * u128::from(elapsed_ns));
    }

    fn add(&mut self, cost: u128) {
        self.least = self.least.min(self.level);
        self.level += cost;
        self.most = self.most.max(self.level);
    }
}

/// The state of a limit over a window, as far as it says at which rate the limit lets requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Regime {
    /// The burst is spent, or there is none: `avg`.
    Average,
    /// The burst lasts: `max`.
    Burst,
    /// The pool of a burst of at most 1 s is not empty: no rate.
    Pool,
    /// The window has a part in which the burst lasts, and a part in which it is spent.
    Mixed,
}

#[derive(Clone, Debug)]
pub struct Meter {
    pool: Leak,
    /// The rate `max` of a burst longer than 1 s.
    burst: Option<Leak>,
    has_burst: bool,
    /// The largest charge of a request.
    largest: u128,
    at_ns: u64,
    excess: u128,
}

impl Meter {
    pub fn new(limit: Limit, largest: u128, at_ns: u64) -> Self {
        let Limit { avg, max, burst_length_ns } = limit;
        let has_burst = max > 0;
        let capacity =
            if has_burst { u128::from(max) * u128::from(burst_length_ns) } else { u128::from(avg) * AHEAD_NS };
        let burst = (has_burst && burst_length_ns > SECOND_NS).then(|| Leak::new(max, u128::from(max) * AHEAD_NS));
        Self { pool: Leak::new(avg, capacity), burst, has_burst, largest, at_ns, excess: 0 }
    }

    /// Counts one grant.
    pub fn add(&mut self, cost: u128, now_ns: u64) {
        let elapsed_ns = now_ns - self.at_ns;
        self.at_ns = now_ns;
        for leak in std::iter::once(&mut self.pool).chain(&mut self.burst) {
            if elapsed_ns > 0 {
                leak.drain(elapsed_ns);
            }
            leak.add(cost);
            self.excess = self.excess.max(leak.level.saturating_sub(leak.capacity + self.largest));
        }
    }

    /// Units above the bound, at the worst instant so far.
    pub fn excess(&self) -> f64 {
        self.excess as f64 / NANO as f64
    }

    /// Starts a window.
    pub fn begin(&mut self) {
        for leak in std::iter::once(&mut self.pool).chain(&mut self.burst) {
            (leak.least, leak.most) = (u128::MAX, 0);
        }
    }

    /// The regime since `begin`.
    ///
    /// A pool never holds a request if its level stays at or below its capacity. A pool holds
    /// requests all the time if its level never falls by more than the headroom of a plain rate
    /// (100 ms) below the capacity: the window then passes at most 100 ms of `avg` more than
    /// `avg · T`, as with a plain rate.
    pub fn regime(&self) -> Regime {
        let Leak { rate, capacity, least, most, .. } = self.pool;
        if !self.has_burst || least.saturating_add(rate * AHEAD_NS) >= capacity {
            Regime::Average
        } else if most > capacity {
            Regime::Mixed
        } else if self.burst.is_some() {
            Regime::Burst
        } else {
            Regime::Pool
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eleven_requests_at_once_are_within_ten_a_tenth_of_a_second_and_twelve_are_not() {
        // 100/s: capacity 10 and one request, so 11 at an instant; after 10 ms one more.
        let mut meter = Meter::new(Limit::average(100), NANO, 0);
        (0..11).for_each(|_| meter.add(NANO, 0));
        assert_eq!(meter.excess(), 0.0);
        meter.add(NANO, 10_000_000);
        assert_eq!(meter.excess(), 0.0);
        meter.add(NANO, 19_000_000);
        assert_eq!(meter.excess(), 0.1, "9 ms earn 0.9 operations");
    }

    #[test]
    fn burst_passes_at_max_until_its_volume_is_spent() {
        // 100/s, 1000/s for 2 s: pool 2000. At 1000/s it is spent after 2000 / 900 = 2.2 s.
        let mut meter = Meter::new(Limit { avg: 100, max: 1000, burst_length_ns: 2 * SECOND_NS }, NANO, 0);
        let mut run = |from_ms: u64, to_ms: u64, step_ms: u64| {
            meter.begin();
            (from_ms..to_ms).step_by(step_ms as usize).for_each(|ms| meter.add(NANO, ms * 1_000_000));
            (meter.regime(), meter.excess())
        };
        assert_eq!(run(0, 2000, 1), (Regime::Burst, 0.0));
        assert_eq!(run(2000, 2220, 1), (Regime::Burst, 0.0));
        assert_eq!(run(2220, 2320, 10).0, Regime::Average);
        assert_eq!(run(2320, 9000, 10), (Regime::Average, 0.0));
        assert!(run(9000, 9100, 1).1 > 80.0, "90 more than are due");
    }
}
