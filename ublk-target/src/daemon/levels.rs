//! How full every limit is, noted once a second while any is not full, so that a daemon's end gives nobody a burst.
//!
//! ```text
//!   one daemon      ●────────●────────●──────✗                     noted each second: ●
//!   the file                          level, at
//!   the next one                      ├ blind ┤─ earned while down ─┤ goes on from here
//! ```
//!
//! After the last note the one that was killed went on for a moment, and what it let through in that is not known: it counts as
//! all that the limits allow. So a kill may cost a tenant some of a burst, up to [`BLIND`] at its highest rate, and never grants
//! one; but for the debt of the very last request, which came again if it was not answered. An end that was asked for is noted
//! with its instant, and costs nothing. Idle limits are noted once: how long ago their daemon was killed is not known then, and
//! nothing counts as earned.
//!
//! The clock is monotonic and that of one start of the machine: what another one noted says nothing, as on this one nothing has
//! been served before.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use throttle_core::limiter::Level;
use throttle_core::limits::{Limit, LimitKind, VALUE_MAX};
use throttle_core::throttle::Throttle;
use throttle_core::time::Time;

use super::table::Table;
use crate::state_dir::{VERSION, boot};

/// How often they are noted.
pub const PERIOD_S: u64 = 1;
/// How long a daemon that was killed may have gone on after its last note, in nanoseconds: one period, and a note that is late by
/// as much.
const BLIND: u64 = 2 * PERIOD_S * 1_000_000_000;
/// No sound level is near it: the largest capacity is 10^15 units a second for hours, in units of 10^-9.
const LEVEL_MAX: u128 = 1 << 110;

/// What is written down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LevelsRecord {
    version: u64,
    boot: String,
    /// When they were like that, in nanoseconds of `CLOCK_MONOTONIC`.
    at_ns: u64,
    /// Nothing was let through after it.
    is_final: bool,
    groups: BTreeMap<String, Vec<Kept>>,
    devices: BTreeMap<String, Vec<Kept>>,
}

/// One limit. Levels are decimal strings: they do not fit in the numbers of JSON.
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
    /// As they are now.
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
            // Locked meanwhile, so that it cannot leave.
            let standing = entry.device.standing();
            // Most devices have the limits of their group only, and this is done each second for all of them.
            if let Some(member) = standing.member.filter(|_| !standing.limits.is_unlimited()) {
                record.devices.insert(name.clone(), kept(throttle.member_levels(member, now)));
            }
        }
        let has_limits = |_: &String, levels: &mut Vec<Kept>| !levels.is_empty();
        record.groups.retain(has_limits);
        record.devices.retain(has_limits);
        record
    }

    /// Whether every limit has all of its credit.
    pub fn is_idle(&self) -> bool {
        let is_zero = |kept: &Kept| kept.level == "0" && kept.burst_level == "0";
        self.groups.values().chain(self.devices.values()).flatten().all(is_zero)
    }

    /// Whether there is nothing in `self` that is not in `other` too.
    pub fn says_no_more_than(&self, other: &Self) -> bool {
        (&self.groups, &self.devices, self.is_final) == (&other.groups, &other.devices, other.is_final)
    }

    /// What is in it for a daemon that begins at `now`; nothing where it was noted in another start of the machine. An error is
    /// the name of what cannot be.
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

/// What an earlier daemon left of its limits' credit.
#[derive(Debug, Default, PartialEq)]
pub struct Left {
    elapsed_ns: u64,
    groups: BTreeMap<String, Vec<Level>>,
    devices: BTreeMap<String, Vec<Level>>,
}

impl Left {
    /// Of a group: how full its limits were, and for how long they have drained since, in nanoseconds.
    pub fn of_group(&self, name: &str) -> Option<(Vec<Level>, u64)> {
        self.groups.get(name).map(|levels| (levels.clone(), self.elapsed_ns))
    }

    /// Of a device.
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
        // 2 s at 1000/s, and the tenth of a second that the burst's own bucket holds; both full. Of 10 s, 8 count as earned.
        let at = Time::from_nanos(15 * SECOND_NS);
        let unit = u128::from(SECOND_NS);
        let (levels, elapsed_ns) = record(3 * unit, false).left(at).unwrap().of_group("g").unwrap();
        assert_eq!((levels[0].level, levels[0].burst_level), (2103 * unit, 100 * unit));
        assert_eq!(elapsed_ns, 8 * SECOND_NS);
        // Killed within the moment, begun again within it: nothing earned.
        let soon = Time::from_nanos(6 * SECOND_NS);
        assert_eq!(record(3 * unit, false).left(soon).unwrap().of_group("g").unwrap().1, 0);
        assert_eq!(record(3 * unit, false).left(Time::ZERO).unwrap().of_group("g").unwrap().1, 0);
    }

    #[test]
    fn what_was_idle_when_noted_has_earned_nothing_since() {
        // It is noted once, maybe long before the kill, and may have been used up right before that.
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
