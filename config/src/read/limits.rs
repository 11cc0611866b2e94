//! `limits`, of a group or a device: the six limits with their bursts, in every spelling, and the rules between them.
//!
//! ```text
//!   iops-total  iops_total  iops        ─┐  also with -max and -max-length
//!   bps-read    bps_read                 ├─► Field, of a LimitKind
//!   iops-size   iops_size               ─┘
//! ```
//!
//! The core has the rules themselves ([`Limits::violations`]); this module adds places and words.

use std::borrow::Cow;

use throttle_core::limits::{Field, LimitKind, Limits, Rule, SECOND_NS, VALUE_MAX, Violation};

use crate::fault::WarningKind;
use crate::fields::{Fields, Item, Notes, kebab};
use crate::quantity::{self, Unit, exact_seconds};
use crate::source::Place;

/// Every key, the frequent ones first: error messages show the beginning of this list.
pub(crate) const KEYS: [&str; 21] = [
    "iops-total",
    "iops-total-max",
    "iops-total-max-length",
    "bps-total",
    "bps-total-max",
    "bps-total-max-length",
    "iops-read",
    "iops-read-max",
    "iops-read-max-length",
    "iops-write",
    "iops-write-max",
    "iops-write-max-length",
    "bps-read",
    "bps-read-max",
    "bps-read-max-length",
    "bps-write",
    "bps-write-max",
    "bps-write-max-length",
    "iops-size",
    "iops",
    "bps",
];

pub(crate) fn read(item: &Item<'_>, notes: &mut Notes) -> Limits {
    let mut limits = Limits::UNLIMITED;
    let Some(mut fields) = Fields::with_names(item, notes, canonical) else { return limits };
    let mut places: Vec<(Field, Item<'_>)> = Vec::new();
    let faults_before = notes.faults.len();
    for kind in LimitKind::ALL {
        let unit = if kind.is_iops() { Unit::OperationsPerSecond } else { Unit::BytesPerSecond };
        let mut limit = limits.get(kind);
        let mut has_length = false;
        for field in [Field::Avg(kind), Field::Max(kind), Field::BurstLength(kind)] {
            let Some(item) = fields.take(&field.to_string()) else { continue };
            match field {
                Field::Avg(_) => limit.avg = rate(&item, unit, notes).unwrap_or(0),
                Field::Max(_) => limit.max = rate(&item, unit, notes).unwrap_or(0),
                Field::BurstLength(_) | Field::IopsSize => {
                    has_length = true;
                    limit.burst_length_ns =
                        item.amount(notes, "allowed: a time like 60s", quantity::parse_seconds).unwrap_or(SECOND_NS);
                }
            }
            places.push((field, item));
        }
        if has_length && limit.max == 0 && (1..=SECOND_NS).contains(&limit.burst_length_ns) {
            let (_, length) = &places[places.len() - 1];
            notes.warn(length.key_place, &length.path, WarningKind::LengthWithoutMax);
            // Without a burst rate the length means nothing. Drop it: a limit that is written down
            // and read again is equal.
            limit.burst_length_ns = SECOND_NS;
        }
        limits.set(kind, limit);
    }
    if let Some(item) = fields.take("iops-size") {
        limits.iops_size = rate(&item, Unit::Bytes, notes).unwrap_or(0);
        places.push((Field::IopsSize, item));
    }
    fields.finish(notes, &KEYS, &[]);
    // A value that could not be read counts as absent, so rules between values could blame the
    // wrong one.
    if notes.faults.len() == faults_before {
        for violation in limits.violations() {
            note_violation(&violation, &limits, item, &places, notes);
        }
    }
    limits
}

/// Whether the key, in any spelling, is a key of limits.
pub(crate) fn is_key(key: &str) -> bool {
    KEYS.contains(&canonical(key).as_ref())
}

/// Kebab case, with `total` added where the key names neither total, read nor write.
pub(crate) fn canonical(key: &str) -> Cow<'_, str> {
    let key = kebab(key);
    for unit in ["iops", "bps"] {
        if let Some(rest) = key.strip_prefix(unit)
            && matches!(rest, "" | "-max" | "-max-length")
        {
            return Cow::Owned(format!("{unit}-total{rest}"));
        }
    }
    key
}

/// Reads a rate or `unlimited`. 0 means `unlimited`, with a warning.
fn rate(item: &Item<'_>, unit: Unit, notes: &mut Notes) -> Option<u64> {
    let value = item.amount(notes, "allowed: a number like 500 or 10MiB, or `unlimited`", |text| match text {
        "unlimited" | "max" => Ok(None),
        _ => quantity::parse(text, unit).map(Some),
    })?;
    if value == Some(0) {
        notes.warn(item.place(), &item.path, WarningKind::ZeroIsUnlimited);
    }
    value
}

fn note_violation(
    violation: &Violation,
    limits: &Limits,
    of: &Item<'_>,
    places: &[(Field, Item<'_>)],
    notes: &mut Notes,
) {
    let field = violation.field;
    let given = places.iter().find(|(given, _)| *given == field).map(|(_, item)| item);
    // Only a given value can break a rule; the map itself is the fallback.
    let (place, path) = given.map_or((of.key_place, &of.path), |item| (item.place(), &item.path));
    let average = match field {
        Field::Avg(kind) | Field::Max(kind) | Field::BurstLength(kind) => kind.name(),
        Field::IopsSize => "iops-total",
    };
    let line_of = |wanted: Field| -> String {
        let at: Option<Place> = places.iter().find(|(given, _)| *given == wanted).map(|(_, item)| item.place());
        // Limits that are changed while the daemon runs have no place in a file: see `change.rs`.
        at.filter(|at| *at != Place::NOWHERE).map_or_else(String::new, |at| format!(", line {}", at.line))
    };
    let (found, cure) = match violation.rule {
        Rule::TooLarge { value } => (
            format!("{value} is above the largest value, {VALUE_MAX} (10^15)"),
            "write `unlimited`, or remove it, for no limit".to_owned(),
        ),
        Rule::MaxWithoutAvg { max } => (
            format!("{max} without {average}"),
            format!("a burst rate needs an average to exceed; add `{average}:`, or remove this"),
        ),
        Rule::MaxBelowAvg { max, avg } => {
            let average_line = match field {
                Field::Max(kind) => line_of(Field::Avg(kind)),
                _ => String::new(),
            };
            (
                format!("{max} is below {average} ({avg}{average_line})"),
                "a burst rate must be at least the average; raise it, or remove it for none".to_owned(),
            )
        }
        Rule::LengthZero => (
            "a burst length of 0".to_owned(),
            format!("a burst takes time; remove it for 1 s, or remove {average}-max for no burst"),
        ),
        Rule::LengthWithoutMax => {
            let length = match field {
                Field::BurstLength(kind) => exact_seconds(limits.get(kind).burst_length_ns),
                _ => String::new(),
            };
            (
                format!("{length} without {average}-max"),
                format!("a burst of more than 1 s needs a burst rate; add `{average}-max:`, or remove this"),
            )
        }
        Rule::BurstTooLarge { max, burst_length_ns } => (
            format!("{} at {max} a second is more than {VALUE_MAX} (10^15) in all", exact_seconds(burst_length_ns)),
            format!("shorten it, or lower {average}-max"),
        ),
        Rule::IopsSizeWithoutIops => {
            ("counts operations, and no iops limit is set".to_owned(), "add an iops limit, or remove this".to_owned())
        }
    };
    notes.fault(place, path, found, cure);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_snake_case_forms_are_the_same_key() {
        for (key, expected) in [
            ("iops", "iops-total"),
            ("bps", "bps-total"),
            ("iops_max", "iops-total-max"),
            ("bps-max-length", "bps-total-max-length"),
            ("iops_read_max", "iops-read-max"),
            ("iops-size", "iops-size"),
            ("iops-wat", "iops-wat"),
        ] {
            assert_eq!(canonical(key), expected);
        }
    }

    #[test]
    fn every_key_is_one_that_the_core_knows() {
        // KEYS feeds the suggestions and must include every key of the core.
        for kind in LimitKind::ALL {
            for field in [Field::Avg(kind), Field::Max(kind), Field::BurstLength(kind), Field::IopsSize] {
                assert!(KEYS.contains(&field.to_string().as_str()), "{field}");
            }
        }
    }
}
