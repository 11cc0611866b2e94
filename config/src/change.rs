//! A change of limits in force: named limits change, the rest stays.
//!
//! ```text
//!   in force   iops-total=500  iops-total-max=1000  bps-read=10MiB
//!   settings   iops-total=200  bps-read=unlimited
//!   result     iops-total=200  iops-total-max=1000
//! ```
//!
//! A lifted value lifts the values that depend on it, unless they are named too: a burst rate means
//! nothing without its average, nor a burst length without its burst rate. Keys, values and rules
//! are those of the configuration: the limits in force are written down with the settings over
//! them, and read as if from a file.

use throttle_core::limits::{Field, LimitKind, Limits, SECOND_NS};

use crate::fault::Fault;
use crate::fields::{Item, Notes};
use crate::quantity::{self, Unit, exact_seconds};
use crate::read::limits::{canonical, read};
use crate::source::Place;
use crate::yaml::{Entry, Node, Value};

/// The limits in force after `settings`, each a key and a value as in the configuration. `Err` has
/// every fault, with the key as its path.
pub fn change_limits(in_force: &Limits, settings: &[(&str, &str)]) -> Result<Limits, Vec<Fault>> {
    let mut notes = Notes::default();
    let limits = limits_over(in_force, settings, &mut notes);
    if notes.faults.is_empty() { Ok(limits) } else { Err(notes.faults) }
}

/// As [`change_limits`], with the faults noted in `notes`. The result is meaningless if a fault was
/// noted.
pub(crate) fn limits_over(in_force: &Limits, settings: &[(&str, &str)], notes: &mut Notes) -> Limits {
    let lifts = |field: Field| {
        let name = field.to_string();
        settings.iter().any(|(key, value)| canonical(key) == name && is_lifted(value))
    };
    let is_named = |name: &str| settings.iter().any(|(key, _)| canonical(key) == name);
    let mut entries: Vec<Entry> = Vec::new();
    let mut keep = |field: Field, value: String| {
        let name = field.to_string();
        if !is_named(&name) {
            entries.push(entry(&name, &value));
        }
    };
    let sets = |kind: LimitKind| is_named(kind.name()) && !lifts(Field::Avg(kind));
    let mut keeps_iops = LimitKind::ALL.into_iter().any(|kind| kind.is_iops() && sets(kind));
    for kind in LimitKind::ALL {
        let limit = in_force.get(kind);
        let (avg, max, length) = (Field::Avg(kind), Field::Max(kind), Field::BurstLength(kind));
        if limit.is_unlimited() || lifts(avg) {
            continue;
        }
        keeps_iops |= kind.is_iops();
        keep(avg, limit.avg.to_string());
        if limit.max == 0 || lifts(max) {
            continue;
        }
        keep(max, limit.max.to_string());
        if limit.burst_length_ns != SECOND_NS {
            keep(length, exact_seconds(limit.burst_length_ns));
        }
    }
    if in_force.iops_size > 0 && keeps_iops {
        keep(Field::IopsSize, in_force.iops_size.to_string());
    }
    entries.extend(settings.iter().map(|(key, value)| entry(key, value)));

    let node = Node { place: Place::NOWHERE, value: Value::Map(entries) };
    read(&Item { path: String::new(), key_place: Place::NOWHERE, node: &node }, notes)
}

/// A setting as an entry of a file.
pub(crate) fn entry(key: &str, value: &str) -> Entry {
    let value = Value::Text { text: value.to_owned(), quoted: false };
    Entry { key: key.to_owned(), place: Place::NOWHERE, node: Node { place: Place::NOWHERE, value } }
}

fn is_lifted(value: &str) -> bool {
    matches!(value, "unlimited" | "max") || quantity::parse(value, Unit::BytesPerSecond) == Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `key=value` for each value that is set after the change, or the faults.
    fn changed(in_force: &str, settings: &str) -> String {
        let pairs = |text: &'static str| -> Vec<(&'static str, &'static str)> {
            text.split_whitespace().map(|pair| pair.split_once('=').expect("key=value")).collect()
        };
        let leak = |text: &str| -> &'static str { text.to_owned().leak() };
        let in_force = change_limits(&Limits::UNLIMITED, &pairs(leak(in_force))).expect("sound limits");
        match change_limits(&in_force, &pairs(leak(settings))) {
            Err(faults) => {
                let faults: Vec<String> =
                    faults.iter().map(|fault| format!("{}: {}", fault.path, fault.found)).collect();
                faults.join("; ")
            }
            Ok(limits) => {
                let mut words = Vec::new();
                for kind in LimitKind::ALL {
                    let limit = limits.get(kind);
                    if limit.avg > 0 {
                        words.push(format!("{}={}", kind.name(), limit.avg));
                    }
                    if limit.max > 0 {
                        words.push(format!("{}-max={}", kind.name(), limit.max));
                    }
                    if limit.burst_length_ns != SECOND_NS {
                        words.push(format!("{}-max-length={}", kind.name(), exact_seconds(limit.burst_length_ns)));
                    }
                }
                if limits.iops_size > 0 {
                    words.push(format!("iops-size={}", limits.iops_size));
                }
                words.join(" ")
            }
        }
    }

    #[test]
    fn what_is_not_named_stays() {
        let burst = "iops=500 iops-max=1000 iops-max-length=60s bps-read=10MiB/s";
        assert_eq!(
            changed(burst, "iops_total=200 bps-write=1k"),
            "bps-read=10485760 bps-write=1000 iops-total=200 iops-total-max=1000 iops-total-max-length=60s"
        );
        assert_eq!(
            changed(burst, ""),
            "bps-read=10485760 iops-total=500 iops-total-max=1000 iops-total-max-length=60s"
        );
    }

    #[test]
    fn what_hangs_on_a_lifted_value_is_lifted_with_it() {
        // Without this rule, a limit with a burst could not be lifted in one command.
        let burst = "iops=500 iops-max=1000 iops-max-length=60s iops-size=4k";
        assert_eq!(changed(burst, "iops=unlimited"), "");
        assert_eq!(changed(burst, "iops=0"), "");
        assert_eq!(changed(burst, "iops-max=max"), "iops-total=500 iops-size=4000");
        assert_eq!(changed(burst, "iops=max iops-read=7"), "iops-read=7 iops-size=4000");
    }

    #[test]
    fn rules_hold_between_what_is_named_and_what_stays() {
        assert_eq!(changed("iops=500", "iops-max=100"), "iops-total-max: 100 is below iops-total (500)");
        assert_eq!(changed("iops=500 iops-max=600", "iops=601"), "iops-total-max: 600 is below iops-total (601)");
        assert_eq!(changed("", "iops-max=5"), "iops-total-max: 5 without iops-total");
        assert_eq!(changed("", "iops=5 iops-total=6"), "iops-total: given twice, first as `iops`");
        assert_eq!(changed("iops=1", "iops=5Mbit"), "iops-total: \"5Mbit\" counts bits");
        assert_eq!(changed("", "ipos=5"), "ipos: unknown key");
    }
}
