//! Reading a map of known keys: each key is taken once, the keys left over are unknown, and every
//! fault has its path and place.
//!
//! No fault ends the reading. A faulty value is noted and counts as absent, so that one run reports
//! every fault.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use crate::fault::{Fault, WarningKind, shown};
use crate::near::nearest;
use crate::quantity::{self, Refusal};
use crate::source::Place;
use crate::yaml::{Entry, Node, Value};

/// Each suggestion costs a comparison with every candidate; beyond this number a file gets no more
/// suggestions.
const COMPARISONS_MAX: usize = 50_000;

/// The faults and warnings of a reading, in the order in which they were found.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    pub(crate) faults: Vec<Fault>,
    pub(crate) warnings: Vec<(Place, String, WarningKind)>,
    /// Comparisons spent on suggestions.
    comparisons: usize,
}

impl Notes {
    pub(crate) fn fault(&mut self, place: Place, path: &str, found: impl Into<String>, cure: impl Into<String>) {
        self.faults.push(Fault::new(place, path, found, cure));
    }

    pub(crate) fn warn(&mut self, place: Place, path: &str, kind: WarningKind) {
        self.warnings.push((place, path.to_owned(), kind));
    }

    /// `did you mean …? `, or an empty string.
    pub(crate) fn hint<'a>(&mut self, word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
        let comparisons = &mut self.comparisons;
        let known = known.into_iter().take(COMPARISONS_MAX - *comparisons).inspect(|_| *comparisons += 1);
        nearest(word, known).map_or_else(String::new, |near| format!("did you mean `{near}`? "))
    }
}

/// A value, its path, and the place of its key.
#[derive(Clone, Debug)]
pub(crate) struct Item<'n> {
    pub(crate) path: String,
    pub(crate) key_place: Place,
    pub(crate) node: &'n Node,
}

impl<'n> Item<'n> {
    pub(crate) fn place(&self) -> Place {
        self.node.place
    }

    pub(crate) fn fault(&self, notes: &mut Notes, found: impl Into<String>, cure: impl Into<String>) {
        notes.fault(self.place(), &self.path, found, cure);
    }

    /// The kind of value, for messages.
    pub(crate) fn kind(&self) -> String {
        match &self.node.value {
            Value::Null => "nothing".to_owned(),
            Value::Text { text, .. } => format!("{:?}", shown(text, 40)),
            Value::Map(_) => "a map".to_owned(),
            Value::List(_) => "a list".to_owned(),
        }
    }

    /// Whether the value is exactly this word.
    pub(crate) fn is_word(&self, word: &str) -> bool {
        matches!(&self.node.value, Value::Text { text, .. } if text == word)
    }

    /// The text of a non-empty scalar; otherwise notes a fault that names the `wanted` text.
    pub(crate) fn text(&self, notes: &mut Notes, wanted: &str) -> Option<&'n str> {
        match &self.node.value {
            Value::Text { text, .. } if !text.trim().is_empty() => Some(text),
            Value::Text { .. } => {
                self.fault(notes, "an empty text", wanted);
                None
            }
            _ => {
                self.fault(notes, format!("{} where a value belongs", self.kind()), wanted);
                None
            }
        }
    }

    pub(crate) fn bool(&self, notes: &mut Notes) -> Option<bool> {
        self.bool_or(notes, &[])
    }

    /// As [`Self::bool`], for a caller that accepts further words `others`, which the cure lists.
    pub(crate) fn bool_or(&self, notes: &mut Notes, others: &[&str]) -> Option<bool> {
        let allowed = ["true", "false"].iter().chain(others).copied().collect::<Vec<_>>().join(", ");
        let allowed = format!("allowed: {allowed}");
        match self.text(notes, &allowed)? {
            "true" | "True" | "TRUE" => Some(true),
            "false" | "False" | "FALSE" => Some(false),
            _ => {
                self.fault(notes, format!("{} is neither true nor false", self.kind()), allowed);
                None
            }
        }
    }

    /// A plain whole number within the bounds.
    pub(crate) fn count(&self, notes: &mut Notes, bounds: RangeInclusive<u64>) -> Option<u64> {
        self.count_or(notes, bounds, "")
    }

    /// As [`Self::count`], for a caller that accepts a further word; the cure ends with `or`.
    pub(crate) fn count_or(&self, notes: &mut Notes, bounds: RangeInclusive<u64>, or: &str) -> Option<u64> {
        let allowed = format!("allowed: a whole number from {} to {}{or}", bounds.start(), bounds.end());
        let text = self.text(notes, &allowed)?;
        match quantity::parse_count(text) {
            Ok(count) if bounds.contains(&count) => Some(count),
            Ok(count) => {
                self.fault(notes, format!("{count} is out of bounds"), allowed);
                None
            }
            Err(refusal) => {
                self.fault(notes, refusal.found, allowed);
                None
            }
        }
    }

    /// The text, parsed by a parser of [`crate::quantity`].
    pub(crate) fn amount<T>(
        &self,
        notes: &mut Notes,
        wanted: &str,
        parse: impl FnOnce(&str) -> Result<T, Refusal>,
    ) -> Option<T> {
        match parse(self.text(notes, wanted)?) {
            Ok(amount) => Some(amount),
            Err(refusal) => {
                self.fault(notes, refusal.found, refusal.cure);
                None
            }
        }
    }

    /// A word of a known list. Words of a `later` version are refused as such. If `on` and `off`
    /// are known, true and false are accepted too: a program that reads YAML 1.1 (Ansible, PyYAML)
    /// turns an unquoted `on` or `off` into them.
    pub(crate) fn word<T: Copy>(&self, notes: &mut Notes, known: &[(&str, T)], later: &[&str]) -> Option<T> {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        let allowed = format!("allowed: {}", names.join(", "));
        let word = self.text(notes, &allowed)?;
        let word = match word {
            "true" | "True" | "TRUE" if names.contains(&"on") => "on",
            "false" | "False" | "FALSE" if names.contains(&"off") => "off",
            word => word,
        };
        if let Some((_, value)) = known.iter().find(|(name, _)| *name == word) {
            return Some(*value);
        }
        if later.contains(&word) {
            self.fault(notes, format!("`{word}` is not supported yet"), allowed);
        } else {
            let hint = notes.hint(word, names);
            self.fault(notes, format!("{} is unknown", self.kind()), format!("{hint}{allowed}"));
        }
        None
    }

    /// Notes that a key is not supported yet.
    pub(crate) fn not_supported_yet(&self, notes: &mut Notes, cure: &str) {
        notes.fault(self.key_place, &self.path, "not supported yet", cure);
    }
}

/// `a.b`, shortened: keys may be long, and each line of an error names one key.
pub(crate) fn join(path: &str, key: &str) -> String {
    match path {
        "" => shown(key, 70),
        _ => format!("{path}.{}", shown(key, 70)),
    }
}

/// A map in which every key is known in advance.
pub(crate) struct Fields<'n> {
    path: String,
    /// Entries by canonical name; of repeated names the first.
    entries: BTreeMap<Cow<'n, str>, &'n Entry>,
}

impl<'n> Fields<'n> {
    /// Takes the keys in their kebab-case spelling.
    pub(crate) fn of(item: &Item<'n>, notes: &mut Notes) -> Option<Self> {
        Self::with_names(item, notes, kebab)
    }

    /// Takes the keys as `canonical` spells them. Two keys of one canonical name are a fault, in
    /// any spelling.
    pub(crate) fn with_names(
        item: &Item<'n>,
        notes: &mut Notes,
        canonical: impl Fn(&'n str) -> Cow<'n, str>,
    ) -> Option<Self> {
        let mut entries: BTreeMap<Cow<'n, str>, &'n Entry> = BTreeMap::new();
        for entry in map_of(item, notes)? {
            let name = canonical(&entry.key);
            match entries.get(&name) {
                None => {
                    entries.insert(name, entry);
                }
                Some(first) => note_twice(notes, &join(&item.path, &name), first, entry),
            }
        }
        Some(Self { path: item.path.clone(), entries })
    }

    /// Takes the value of a key; a second call returns `None`.
    pub(crate) fn take(&mut self, name: &str) -> Option<Item<'n>> {
        let item = self.peek(name)?;
        self.entries.remove(name);
        Some(item)
    }

    /// The value of a key that has not been taken.
    pub(crate) fn peek(&self, name: &str) -> Option<Item<'n>> {
        let entry = self.entries.get(name)?;
        Some(Item { path: join(&self.path, name), key_place: entry.place, node: &entry.node })
    }

    /// Notes every key left over as unknown. `known` lists the keys that work, `later` those that
    /// were refused as not yet supported.
    pub(crate) fn finish(self, notes: &mut Notes, known: &[&str], later: &[&str]) -> Leftovers {
        for (name, entry) in &self.entries {
            let hint = match name.as_ref() {
                "<<" => "merge keys are not used here; ".to_owned(),
                name if name.bytes().all(|c| c.is_ascii_digit() || c == b'-') => {
                    "quote a list with commas, like \"0-3,8\"; ".to_owned()
                }
                name if name.contains(':') => "put a space after the colon; ".to_owned(),
                name => notes.hint(name, known.iter().chain(later).copied()),
            };
            let cure = match known.len() {
                0..=16 => format!("{hint}known keys: {}", known.join(", ")),
                _ => format!("{hint}known keys: {}, …", known[..6].join(", ")),
            };
            notes.fault(entry.place, &join(&self.path, &entry.key), "unknown key", cure);
        }
        if self.entries.is_empty() { Leftovers::None } else { Leftovers::Some }
    }
}

/// Whether there were unknown keys. If a key seems to be missing, the unknown key is probably its
/// misspelling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leftovers {
    None,
    Some,
}

/// The entries of a map of names (groups, devices), in file order, each name once.
pub(crate) fn named<'n>(item: &Item<'n>, notes: &mut Notes) -> Option<Vec<(&'n str, Item<'n>)>> {
    let mut seen: BTreeMap<&str, &Entry> = BTreeMap::new();
    let mut list = Vec::new();
    for entry in map_of(item, notes)? {
        let path = join(&item.path, &entry.key);
        if let Some(first) = seen.get(entry.key.as_str()) {
            note_twice(notes, &path, first, entry);
            continue;
        }
        seen.insert(&entry.key, entry);
        if let Some(trouble) = name_trouble(&entry.key) {
            notes.fault(entry.place, &path, trouble, NAME_RULE);
        }
        list.push((entry.key.as_str(), Item { path, key_place: entry.place, node: &entry.node }));
    }
    Some(list)
}

pub(crate) const NAME_RULE: &str = "a name has 1 to 64 of A-Z a-z 0-9 _ . - and starts with none of . and -";

/// Names become file names (`/dev/ublk-throttle/NAME`) and arguments of commands.
pub(crate) fn name_trouble(name: &str) -> Option<String> {
    if name.is_empty() {
        return Some("an empty name".to_owned());
    }
    if let Some(c) = name.chars().find(|c| !(c.is_ascii_alphanumeric() || "_.-".contains(*c))) {
        return Some(format!("a name with {c:?} in it"));
    }
    if name.starts_with(['.', '-']) {
        return Some(format!("a name that starts with `{}`", &name[..1]));
    }
    (name.len() > 64).then(|| format!("a name of {} characters", name.len()))
}

fn map_of<'n>(item: &Item<'n>, notes: &mut Notes) -> Option<&'n [Entry]> {
    match &item.node.value {
        Value::Map(entries) => Some(entries),
        _ => {
            let cure = "keys and values belong here, indented below, or in braces; leave the key out if there is none";
            item.fault(notes, format!("{} where a map belongs", item.kind()), cure);
            None
        }
    }
}

fn note_twice(notes: &mut Notes, path: &str, first: &Entry, second: &Entry) {
    let spelling = if first.key == second.key { String::new() } else { format!(" as `{}`", shown(&first.key, 40)) };
    let found = match first.place {
        Place::NOWHERE if spelling.is_empty() => "given twice".to_owned(),
        Place::NOWHERE => format!("given twice, first{spelling}"),
        place => format!("given twice, first on line {}{spelling}", place.line),
    };
    notes.fault(second.place, path, found, "keep one");
}

/// The kebab-case spelling of a key; `snake_case` is accepted for every key.
pub(crate) fn kebab(key: &str) -> Cow<'_, str> {
    if key.contains('_') { Cow::Owned(key.replace('_', "-")) } else { Cow::Borrowed(key) }
}
