//! `cpus`, of a device or of the defaults: the CPUs that its queue threads may run on.
//!
//! ```text
//!   cpus: "0-3,8"      cpus: [0, 1, 2-3, 8]      cpus: 3      cpus: all
//! ```

use crate::cpus::Cpus;
use crate::fields::{Item, Notes};
use crate::yaml::Value;

const WANTED: &str = "allowed: CPUs like \"0-3,8\" or [0, 1, 8], or `all`";

/// The CPUs given, or `Some(None)` for `all`; `None` after a fault.
pub(super) fn read(item: &Item<'_>, notes: &mut Notes) -> Option<Option<Cpus>> {
    if item.is_word("all") {
        return Some(None);
    }
    let Value::List(nodes) = &item.node.value else {
        return Some(Some(one(item, notes)?));
    };
    if nodes.is_empty() {
        item.fault(notes, "an empty list", WANTED);
    }
    let entries = nodes.iter().map(|node| Item { node, ..item.clone() });
    // Read all entries, so that each fault is noted.
    let read: Vec<Option<Cpus>> = entries.map(|entry| one(&entry, notes)).collect();
    let read: Option<Vec<Cpus>> = read.into_iter().collect();
    read?.into_iter().reduce(|all, more| all.with(&more)).map(Some)
}

fn one(item: &Item<'_>, notes: &mut Notes) -> Option<Cpus> {
    let mut cpus = item.amount(notes, WANTED, Cpus::parse)?;
    cpus.line = item.place().line;
    Some(cpus)
}
