//! The limits that a user sets: the six limits of QEMU's throttle, and the rules for a set of them.
//!
//! ```text
//!             total       read        write
//!   bytes/s   bps-total   bps-read    bps-write
//!   ops/s     iops-total  iops-read   iops-write      + iops-size, common to the three
//! ```
//!
//! Configuration only: no value here changes while requests run. The state is in [`crate::bucket`].
//! Names and rules follow QEMU (`docs/throttle.txt`), except that a total may stand beside a read or write limit of the
//! same unit (they are separate buckets, and all must pass), and a burst length may be a fraction of a second.

use thiserror::Error;

/// The largest rate, burst rate and burst volume, in units: QEMU's `THROTTLE_VALUE_MAX`.
pub const VALUE_MAX: u64 = 1_000_000_000_000_000;

/// One second in nanoseconds, QEMU's default burst length.
pub const SECOND_NS: u64 = 1_000_000_000;

/// The six kinds of limits, each with a bucket of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LimitKind {
    /// Bytes per second, reads and writes together.
    BpsTotal,
    /// Bytes per second of reads.
    BpsRead,
    /// Bytes per second of writes.
    BpsWrite,
    /// Operations per second, reads and writes together.
    IopsTotal,
    /// Operations per second of reads.
    IopsRead,
    /// Operations per second of writes.
    IopsWrite,
}

impl LimitKind {
    /// All six kinds, in the order of [`Limits::by_kind`].
    pub const ALL: [Self; 6] =
        [Self::BpsTotal, Self::BpsRead, Self::BpsWrite, Self::IopsTotal, Self::IopsRead, Self::IopsWrite];

    /// The canonical spelling, as in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BpsTotal => "bps-total",
            Self::BpsRead => "bps-read",
            Self::BpsWrite => "bps-write",
            Self::IopsTotal => "iops-total",
            Self::IopsRead => "iops-read",
            Self::IopsWrite => "iops-write",
        }
    }

    /// Whether the limit counts operations (otherwise bytes).
    pub const fn is_iops(self) -> bool {
        matches!(self, Self::IopsTotal | Self::IopsRead | Self::IopsWrite)
    }
}

/// A limit: an average rate and, optionally, the burst that may exceed it for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Units per second in the long run; 0 = no limit.
    pub avg: u64,
    /// Units per second during a burst; 0 = unset.
    pub max: u64,
    /// How long a burst at `max` may last, in nanoseconds.
    pub burst_length_ns: u64,
}

impl Limit {
    /// No limit.
    pub const UNLIMITED: Self = Self { avg: 0, max: 0, burst_length_ns: SECOND_NS };

    /// A plain average without a burst.
    pub const fn average(avg: u64) -> Self {
        Self { avg, ..Self::UNLIMITED }
    }

    /// Whether the limit is unset, so that no request waits for it.
    pub const fn is_unlimited(&self) -> bool {
        self.avg == 0
    }
}

impl Default for Limit {
    fn default() -> Self {
        Self::UNLIMITED
    }
}

/// The limits of one device or group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    by_kind: [Limit; 6],
    /// A request of more bytes than this counts as `bytes / iops-size` operations (a fraction); 0 = each counts as one.
    pub iops_size: u64,
}

impl Limits {
    /// No limit at all.
    pub const UNLIMITED: Self = Self { by_kind: [Limit::UNLIMITED; 6], iops_size: 0 };

    /// The limit of one kind.
    pub const fn get(&self, kind: LimitKind) -> Limit {
        self.by_kind[kind as usize]
    }

    /// Sets the limit of one kind.
    pub const fn set(&mut self, kind: LimitKind, limit: Limit) {
        self.by_kind[kind as usize] = limit;
    }

    /// The same limits with one of them replaced.
    #[must_use]
    pub const fn with(mut self, kind: LimitKind, limit: Limit) -> Self {
        self.set(kind, limit);
        self
    }

    /// Whether no limit is set, so that no request ever waits.
    pub fn is_unlimited(&self) -> bool {
        self.by_kind.iter().all(Limit::is_unlimited)
    }

    /// Every rule that these limits break, in the order of the kinds; empty if they are sound.
    pub fn violations(&self) -> Vec<Violation> {
        let mut found = Vec::new();
        for kind in LimitKind::ALL {
            self.get(kind).violations(kind, &mut found);
        }
        if self.iops_size > 0 && !LimitKind::ALL.iter().any(|&kind| kind.is_iops() && !self.get(kind).is_unlimited()) {
            found.push(Violation { field: Field::IopsSize, rule: Rule::IopsSizeWithoutIops });
        }
        if self.iops_size > VALUE_MAX {
            found.push(Violation { field: Field::IopsSize, rule: Rule::TooLarge { value: self.iops_size } });
        }
        found
    }
}

impl Limit {
    fn violations(&self, kind: LimitKind, found: &mut Vec<Violation>) {
        let Self { avg, max, burst_length_ns } = *self;
        let mut say = |field, rule| found.push(Violation { field, rule });
        if avg > VALUE_MAX {
            say(Field::Avg(kind), Rule::TooLarge { value: avg });
        }
        if max > VALUE_MAX {
            say(Field::Max(kind), Rule::TooLarge { value: max });
        } else if max > 0 && avg == 0 {
            say(Field::Max(kind), Rule::MaxWithoutAvg { max });
        } else if max > 0 && max < avg {
            say(Field::Max(kind), Rule::MaxBelowAvg { max, avg });
        }
        if burst_length_ns == 0 {
            say(Field::BurstLength(kind), Rule::LengthZero);
        } else if max == 0 {
            if burst_length_ns > SECOND_NS {
                say(Field::BurstLength(kind), Rule::LengthWithoutMax);
            }
        } else if u128::from(max) * u128::from(burst_length_ns) > u128::from(VALUE_MAX) * u128::from(SECOND_NS) {
            say(Field::BurstLength(kind), Rule::BurstTooLarge { max, burst_length_ns });
        }
    }
}

/// The setting that a [`Violation`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// `iops-total` and the like.
    Avg(LimitKind),
    /// `iops-total-max` and the like.
    Max(LimitKind),
    /// `iops-total-max-length` and the like.
    BurstLength(LimitKind),
    /// `iops-size`.
    IopsSize,
}

impl std::fmt::Display for Field {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Avg(kind) => f.write_str(kind.name()),
            Self::Max(kind) => write!(f, "{}-max", kind.name()),
            Self::BurstLength(kind) => write!(f, "{}-max-length", kind.name()),
            Self::IopsSize => f.write_str("iops-size"),
        }
    }
}

/// A rule that a set of limits breaks, and the setting that breaks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{field}: {rule}")]
pub struct Violation {
    /// The value to change.
    pub field: Field,
    /// The rule it breaks.
    pub rule: Rule,
}

/// The rules of QEMU's `throttle_is_valid`, less the one against a total beside its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Rule {
    /// A value above [`VALUE_MAX`].
    #[error("{value} is above {VALUE_MAX}, the largest value")]
    TooLarge {
        /// The value given.
        value: u64,
    },
    /// A burst rate without an average to exceed.
    #[error("a burst rate of {max} needs an average to exceed; add the limit itself")]
    MaxWithoutAvg {
        /// The burst rate given.
        max: u64,
    },
    /// A burst slower than the average.
    #[error("{max} is below the average of {avg}; a burst rate must be at least the average")]
    MaxBelowAvg {
        /// The burst rate given.
        max: u64,
        /// The average given.
        avg: u64,
    },
    /// A burst of no length.
    #[error("a burst length of 0 allows no burst; remove it, or the burst rate")]
    LengthZero,
    /// A burst length above 1 s without a burst rate.
    #[error("a burst length above 1 s needs a burst rate; add `-max`")]
    LengthWithoutMax,
    /// A burst volume above [`VALUE_MAX`].
    #[error("a burst of {max} a second for {burst_length_ns} ns is more than {VALUE_MAX} units in all")]
    BurstTooLarge {
        /// The burst rate given.
        max: u64,
        /// The burst length given.
        burst_length_ns: u64,
    },
    /// An operation size without a limit on operations.
    #[error("counts operations, but no iops limit is set; add one, or remove it")]
    IopsSizeWithoutIops,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iops(avg: u64, max: u64, burst_length_ns: u64) -> Limits {
        Limits::UNLIMITED.with(LimitKind::IopsTotal, Limit { avg, max, burst_length_ns })
    }

    fn rules(limits: &Limits) -> Vec<Rule> {
        limits.violations().iter().map(|violation| violation.rule).collect()
    }

    #[test]
    fn sound_limits_break_no_rule() {
        // The corners that are still allowed: the largest value, `max` = `avg`, a length below and at one second.
        for limits in [
            Limits::UNLIMITED,
            iops(1, 0, SECOND_NS),
            iops(VALUE_MAX, VALUE_MAX, SECOND_NS),
            iops(100, 100, 1),
            iops(100, 0, SECOND_NS / 2),
            iops(1, VALUE_MAX / 60, 60 * SECOND_NS),
        ] {
            assert_eq!(limits.violations(), [], "{limits:?}");
        }
    }

    #[test]
    fn total_may_stand_beside_its_parts() {
        // QEMU refuses this; here total and parts are separate buckets.
        let limits = iops(100, 0, SECOND_NS).with(LimitKind::IopsRead, Limit::average(50));
        assert_eq!(limits.violations(), []);
    }

    #[test]
    fn each_rule_is_named_with_its_values() {
        assert_eq!(rules(&iops(VALUE_MAX + 1, 0, SECOND_NS)), [Rule::TooLarge { value: VALUE_MAX + 1 }]);
        assert_eq!(rules(&iops(0, 5, SECOND_NS)), [Rule::MaxWithoutAvg { max: 5 }]);
        assert_eq!(rules(&iops(500, 100, SECOND_NS)), [Rule::MaxBelowAvg { max: 100, avg: 500 }]);
        assert_eq!(rules(&iops(500, 500, 0)), [Rule::LengthZero]);
        assert_eq!(rules(&iops(500, 0, SECOND_NS + 1)), [Rule::LengthWithoutMax]);
        assert_eq!(
            rules(&iops(1, VALUE_MAX, SECOND_NS + 1)),
            [Rule::BurstTooLarge { max: VALUE_MAX, burst_length_ns: SECOND_NS + 1 }]
        );
        assert_eq!(rules(&Limits { iops_size: 4096, ..Limits::UNLIMITED }), [Rule::IopsSizeWithoutIops]);
    }

    #[test]
    fn burst_length_beyond_32_bits_is_kept() {
        // R34: QEMU once cut 4294967300 s to 4. The volume rule sees the whole length.
        let length_ns = 4_294_967_300 * SECOND_NS;
        assert_eq!(iops(1, 1, length_ns).violations(), []);
        assert_eq!(
            rules(&iops(1, 1_000_000, length_ns)),
            [Rule::BurstTooLarge { max: 1_000_000, burst_length_ns: length_ns }]
        );
    }

    #[test]
    fn violations_print_field_and_cure() {
        let text = iops(500, 100, SECOND_NS).violations()[0].to_string();
        assert_eq!(text, "iops-total-max: 100 is below the average of 500; a burst rate must be at least the average");
    }
}
