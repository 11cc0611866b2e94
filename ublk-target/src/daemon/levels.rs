//! The levels of all limits, noted once a second while any is above 0, so that the end of a daemon
//! grants no burst.
//!
//! ```text
//!   this daemon     ●────────●────────●──────✗                     ● a note, each second
//!   the file                          level, at
//!   the next one                      ├ blind ┤─ drains while down ─┤ continues from here
//! ```
//!
//! A killed daemon let requests through after its last note. Their number is unknown, so the next
//! daemon takes the largest that the limits allow in [`BLIND`]. A kill may thus cost a tenant a
//! part of a burst, at most [`BLIND`] at its highest rate. It never grants a burst, except for the
//! debt of the very last request, which comes again if it was not answered. A daemon that ends on
//! request and keeps no device for the next one makes a final note, which costs nothing. Idle
//! limits are noted once. Their daemon may have been killed long after the note, so the next one
//! counts nothing as drained since.
//!
//! Instants are those of `CLOCK_MONOTONIC`, which starts anew with each boot. A note of an earlier
//! boot is ignored: in this boot the limits have let nothing through yet.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use throttle_core::limiter::Level;
use throttle_core::limits::{Limit, LimitKind, VALUE_MAX};
use throttle_core::throttle::Throttle;
use throttle_core::time::Time;

use super::table::Table;
use crate::state_dir::{VERSION, boot};

/// Interval between two notes, in seconds.
pub const PERIOD_S: u64 = 1;
/// How long a killed daemon may have served after its last note, in nanoseconds: one period, and a
/// note that is late by one more.
const BLIND: u64 = 2 * PERIOD_S * 1_000_000_000;
/// Bound on the levels in the file. No sound level is near it: the largest capacity is 10^15 units
/// a second for hours, in units of 10^-9.
const LEVEL_MAX: u128 = 1 << 110;

/// The contents of the state file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LevelsRecord {
    version: u64,
    boot: String,
    /// The instant of the note, in nanoseconds of `CLOCK_MONOTONIC`.
    at_ns: u64,
    /// No request was let through after the note.
    is_final: bool,
    groups: BTreeMap<String, Vec<Kept>>,
    devices: BTreeMap<String, Vec<Kept>>,
}

/// The levels of one limit, as decimal strings: JSON numbers cannot hold them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Kept {
    kind: String,
    avg: u64,
    max: u64,
    burst_length_ns: u64,
    level: String,
    burst_level: String,
}

impl Kept {
    fn of(level: &Level) -> Self {
        let Limit { avg, max, burst_length_ns } = level.limit;
        Self {
            kind: level.kind.name().to_owned(),
            avg,
            max,
            burst_length_ns,
            level: level.level.to_string(),
            burst_level: level.burst_level.to_string(),
        }
    }

    fn level(&self) -> Option<Level> {
        let number = |text: &str| text.parse().ok().filter(|level: &u128| *level <= LEVEL_MAX);
        let kind = LimitKind::ALL.into_iter().find(|kind| kind.name() == self.kind)?;
        let limit = Limit { avg: self.avg, max: self.max, burst_length_ns: self.burst_length_ns };
        let is_sound = limit.avg > 0 && limit.avg <= VALUE_MAX && limit.max <= VALUE_MAX;
        let level = Level { kind, limit, level: number(&self.level)?, burst_level: number(&self.burst_level)? };
        is_sound.then_some(level)
    }
}

impl LevelsRecord {
    /// The levels at `now`.
    pub fn note(table: &Table, throttle: &Throttle, now: Time, is_final: bool) -> Self {
        let kept = |levels: Vec<Level>| levels.iter().map(Kept::of).collect::<Vec<_>>();
        let mut record = Self {
            version: VERSION,
            boot: boot(),
            at_ns: now.as_nanos(),
            is_final,
            groups: BTreeMap::new(),
            devices: BTreeMap::new(),
        };
        for placed in &table.groups {
            record.groups.insert(placed.group.name.clone(), kept(throttle.group_levels(placed.id, now)));
        }
        for (name, entry) in &table.devices {
            // Locked, so that the member cannot leave the throttle before its levels are read.
            let standing = entry.device.standing();
            // Most devices have no limits of their own. Skip them: this code runs each second for
            // all devices.
            if let Some(member) = standing.member.filter(|_| !standing.limits.is_unlimited()) {
                record.devices.insert(name.clone(), kept(throttle.member_levels(member, now)));
            }
        }
        let has_limits = |_: &String, levels: &mut Vec<Kept>| !levels.is_empty();
        record.groups.retain(has_limits);
        record.devices.retain(has_limits);
        record
    }

    /// Whether every limit has its full credit.
    pub fn is_idle(&self) -> bool {
        let is_zero = |kept: &Kept| kept.level == "0" && kept.burst_level == "0";
        self.groups.values().chain(self.devices.values()).flatten().all(is_zero)
    }

    /// Whether `self` equals `other` in all but the instant.
    pub fn says_no_more_than(&self, other: &Self) -> bool {
        (&self.groups, &self.devices, self.is_final) == (&other.groups, &other.devices, other.is_final)
    }

    /// The levels for a daemon that starts at `now`; empty if the note is of an earlier boot. The
    /// error names the group or device whose level is impossible.
    pub fn left(&self, now: Time) -> Result<Left, String> {
        let mut left = Left::default();
        if self.boot != boot() {
            return Ok(left);
        }
        let since_ns = now.as_nanos().saturating_sub(self.at_ns);
        let blind_ns = if self.is_final { 0 } else { BLIND };
        left.elapsed_ns = if self.is_idle() && !self.is_final { 0 } else { since_ns.saturating_sub(blind_ns) };
        let read = |all: &BTreeMap<String, Vec<Kept>>| -> Result<BTreeMap<String, Vec<Level>>, String> {
            let mut read = BTreeMap::new();
            for (name, kept) in all {
                let levels: Option<Vec<Level>> =
                    kept.iter().map(|kept| Some(kept.level()?.at_most_after(blind_ns))).collect();
                read.insert(name.clone(), levels.ok_or_else(|| format!("{name:?} cannot have such a level"))?);
            }
            Ok(read)
        };
        (left.groups, left.devices) = (read(&self.groups)?, read(&self.devices)?);
        Ok(left)
    }
}

/// The levels that an earlier daemon left.
#[derive(Debug, Default, PartialEq)]
pub struct Left {
    elapsed_ns: u64,
    groups: BTreeMap<String, Vec<Level>>,
    devices: BTreeMap<String, Vec<Level>>,
}

impl Left {
    /// The levels of a group, and the time for which they have drained since, in nanoseconds.
    pub fn of_group(&self, name: &str) -> Option<(Vec<Level>, u64)> {
        self.groups.get(name).map(|levels| (levels.clone(), self.elapsed_ns))
    }

    /// The levels of a device, as [`Self::of_group`].
    pub fn of_device(&self, name: &str) -> Option<(Vec<Level>, u64)> {
        self.devices.get(name).map(|levels| (levels.clone(), self.elapsed_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;

    fn record(level: u128, is_final: bool) -> LevelsRecord {
        let limit = Limit { avg: 100, max: 1000, burst_length_ns: 60 * SECOND_NS };
        let level = Level { kind: LimitKind::IopsTotal, limit, level, burst_level: 7 };
        LevelsRecord {
            version: VERSION,
            boot: boot(),
            at_ns: 5 * SECOND_NS,
            is_final,
            groups: BTreeMap::from([("g".to_owned(), vec![Kept::of(&level)])]),
            devices: BTreeMap::new(),
        }
    }

    #[test]
    fn an_end_that_was_asked_for_costs_nothing() {
        let at = Time::from_nanos(15 * SECOND_NS);
        let (levels, elapsed_ns) = record(u128::MAX >> 20, true).left(at).unwrap().of_group("g").unwrap();
        assert_eq!((levels[0].level, levels[0].burst_level, elapsed_ns), (u128::MAX >> 20, 7, 10 * SECOND_NS));
    }

    #[test]
    fn a_kill_costs_what_could_have_been_let_through_until_then() {
        // The level: the 3 noted units, 2 s at 1000/s, and the tenth of a second that the burst
        // bucket holds. The burst bucket is full. Of the 10 s, 8 s count as drained.
        let at = Time::from_nanos(15 * SECOND_NS);
        let unit = u128::from(SECOND_NS);
        let (levels, elapsed_ns) = record(3 * unit, false).left(at).unwrap().of_group("g").unwrap();
        assert_eq!((levels[0].level, levels[0].burst_level), (2103 * unit, 100 * unit));
        assert_eq!(elapsed_ns, 8 * SECOND_NS);
        // Restarted within the blind time, nothing has drained.
        let soon = Time::from_nanos(6 * SECOND_NS);
        assert_eq!(record(3 * unit, false).left(soon).unwrap().of_group("g").unwrap().1, 0);
        assert_eq!(record(3 * unit, false).left(Time::ZERO).unwrap().of_group("g").unwrap().1, 0);
    }

    #[test]
    fn what_was_idle_when_noted_has_earned_nothing_since() {
        // An idle limit is noted once, possibly long before the kill, and may have been used up
        // right before the kill.
        let mut idle = record(0, false);
        idle.groups.get_mut("g").unwrap()[0].burst_level = "0".to_owned();
        assert!(idle.is_idle() && !record(1, false).is_idle());
        let left = idle.left(Time::from_nanos(1000 * SECOND_NS)).unwrap().of_group("g").unwrap();
        assert_eq!((left.0[0].level, left.1), (2100 * u128::from(SECOND_NS), 0));
    }

    #[test]
    fn what_cannot_be_is_refused_and_another_start_of_the_machine_says_nothing() {
        let now = Time::from_nanos(6 * SECOND_NS);
        for (field, value) in
            [("level", "-1"), ("level", "1e9"), ("level", "340282366920938463463374607431768211455"), ("kind", "x")]
        {
            let mut broken = record(1, true);
            let kept = &mut broken.groups.get_mut("g").unwrap()[0];
            *(if field == "level" { &mut kept.level } else { &mut kept.kind }) = value.to_owned();
            assert!(broken.left(now).unwrap_err().contains("\"g\""), "{field} {value}");
        }
        let other = LevelsRecord { boot: "another".to_owned(), ..record(1, true) };
        assert_eq!(other.left(now).unwrap(), Left::default());
    }

    #[test]
    fn what_is_written_is_read_again() {
        let record = record(12_345_678_901_234_567_890_123, false);
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<LevelsRecord>(&text).unwrap(), record);
    }
}
