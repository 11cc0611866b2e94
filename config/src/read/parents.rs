//! Parents of groups: every chain of parents ends, after at most `DEPTH_MAX` groups.
//!
//! ```text
//!   a ──► b ──► c            a chain ends at a group without a parent, after at most DEPTH_MAX groups …
//!   x ──► y ──► z ──► y      … or is a cycle: a single fault, at the parent that comes first in the file
//! ```
//!
//! Each group is visited once for any file: the level of a group with a known chain is not computed
//! again.

use std::collections::BTreeMap;

use throttle_core::tree::DEPTH_MAX;

use crate::fault::shown;
use crate::fields::{Item, Notes};
use crate::source::Place;

/// Pairs of groups shown for a cycle; a longer cycle is shortened.
const PAIRS_MAX: usize = 3;

/// The length at which names in a chain are cut: several fit in a line.
const NAME_MAX: usize = 32;

/// Every given parent that exists.
#[derive(Debug, Default)]
pub(crate) struct Parents<'n> {
    links: BTreeMap<&'n str, Link<'n>>,
}

#[derive(Debug)]
struct Link<'n> {
    parent: &'n str,
    item: Item<'n>,
}

/// The chain of parents above a group, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The walk is still on this chain, or the chain ends in a cycle.
    Endless,
    /// The number of groups on the chain, including the group itself.
    Level(usize),
}

impl<'n> Parents<'n> {
    pub(super) fn add(&mut self, group: &'n str, parent: &'n str, item: Item<'n>) {
        self.links.insert(group, Link { parent, item });
    }

    /// Notes cycles and chains that are too long. `groups` has the places of all groups.
    pub(super) fn check(&self, groups: &BTreeMap<&str, Place>, notes: &mut Notes) {
        let mut known: BTreeMap<&str, Way> = BTreeMap::new();
        for &start in self.links.keys() {
            let mut walked = Vec::new();
            let mut at = start;
            let mut way = loop {
                if let Some(way) = known.get(at) {
                    break *way;
                }
                known.insert(at, Way::Endless);
                walked.push(at);
                match self.links.get(at) {
                    Some(link) => at = link.parent,
                    None => break Way::Level(0),
                }
            };
            if way == Way::Endless
                && let Some(entry) = walked.iter().position(|name| *name == at)
            {
                self.note_cycle(&mut walked[entry..], notes);
            }
            for name in walked.into_iter().rev() {
                let Way::Level(above) = way else { break };
                way = Way::Level(above + 1);
                known.insert(name, way);
                // Note only the group at which a chain gets too long: groups below it would repeat
                // the fault.
                if above == DEPTH_MAX {
                    self.note_too_deep(name, groups, notes);
                }
            }
        }
    }

    /// Notes a cycle. `cycle` holds each of its groups once, each below the next and the last below
    /// the first.
    fn note_cycle(&self, cycle: &mut [&str], notes: &mut Notes) {
        let place = |name: &&str| self.links[*name].item.place();
        let first = (0..cycle.len()).min_by_key(|&n| place(&cycle[n])).unwrap_or(0);
        cycle.rotate_left(first);
        let link = &self.links[cycle[0]];
        let name = |name: &str| shown(name, NAME_MAX);
        let found = match cycle {
            [own] => format!("{} stands below itself", name(own)),
            [own, rest @ ..] => {
                let mut found = format!("{} stands below {}", name(own), name(link.parent));
                for (n, lower) in rest.iter().enumerate() {
                    let is_last = n + 1 == rest.len();
                    if n + 2 < PAIRS_MAX || is_last {
                        let Link { parent, item } = &self.links[*lower];
                        found += &format!(", {} below {} (line {})", name(lower), name(parent), item.place().line);
                    } else if n + 2 == PAIRS_MAX {
                        found += &format!(", … {} more", rest.len() - n - 1);
                    }
                }
                found
            }
            [] => return,
        };
        link.item.fault(notes, found, "one of them must be the top; remove its parent");
    }

    fn note_too_deep(&self, name: &str, groups: &BTreeMap<&str, Place>, notes: &mut Notes) {
        let mut top = name;
        while let Some(link) = self.links.get(top) {
            top = link.parent;
        }
        let line = groups.get(top).map_or(0, |place| place.line);
        let found = format!("{} groups above each other, the top is {} (line {line})", DEPTH_MAX + 1, shown(top, 64));
        let cure = format!("at most {DEPTH_MAX} levels; name a parent further up");
        // Only a group with a parent can be too deep.
        self.links[name].item.fault(notes, found, cure);
    }
}
