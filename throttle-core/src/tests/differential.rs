//! The integer buckets against the plain arithmetic of QEMU's manual, in floating point, on random
//! loads.

use proptest::prelude::*;

use super::world::limits;
use crate::charge::ChargeTable;
use crate::cost::Operation;
use crate::limiter::Limiter;
use crate::time::Time;

/// A bucket in seconds and units, as the manual explains it.
struct Plain {
    avg: f64,
    max: f64,
    length: f64,
    level: f64,
    burst_level: f64,
}

impl Plain {
    fn wait(&self) -> f64 {
        let capacity = if self.max > 0.0 { self.max * self.length } else { self.avg / 10.0 };
        let over = (self.level - capacity) / self.avg;
        let burst_over = if self.length > 1.0 { (self.burst_level - self.max / 10.0) / self.max } else { 0.0 };
        over.max(burst_over).max(0.0)
    }

    fn pass(&mut self, seconds: f64) {
        self.level = (self.level - self.avg * seconds).max(0.0);
        self.burst_level = (self.burst_level - self.max * seconds).max(0.0);
    }
}

proptest! {
    #[test]
    fn release_times_agree_within_a_microsecond(
        avg in 1_u64..5_000,
        factor in 0_u64..4,
        length in 1_u64..4,
        gaps_us in prop::collection::vec(0_u64..200_000, 1..200),
    ) {
        let max = avg * factor;
        let length = if max > 0 { length } else { 1 };
        let text = if max > 0 {
            format!("iops-total={avg} iops-total-max={max} iops-total-max-length={length}")
        } else {
            format!("iops-total={avg}")
        };
        let mut ours = Limiter::new(&limits(&text));
        let mut plain =
            Plain { avg: avg as f64, max: max as f64, length: length as f64, level: 0.0, burst_level: 0.0 };
        let cost = ChargeTable::DEFAULT.cost(Operation::Read, 512);
        let (mut now, mut plain_now) = (Time::ZERO, 0.0_f64);
        for gap_us in gaps_us {
            // Each request arrives a while after the last one went, and goes as soon as it may.
            now = now.plus_nanos(gap_us * 1_000);
            plain.pass(gap_us as f64 / 1e6);
            plain_now += gap_us as f64 / 1e6;
            now = ours.ready_at(&cost, now).unwrap_or(now);
            let wait = plain.wait();
            plain.pass(wait);
            plain_now += wait;
            ours.charge(&cost, now);
            plain.level += 1.0;
            plain.burst_level += 1.0;
            let difference = now.as_nanos() as f64 / 1e9 - plain_now;
            // Each wait is rounded up to a nanosecond (200 of them: 0.2 us); doubles err by less than that here.
            prop_assert!(difference.abs() < 1e-6, "{difference} s apart at {plain_now} s");
        }
    }
}
