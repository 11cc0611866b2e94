//! From text to a tree in which every key and value has its place. Only this file knows how YAML is
//! read.
//!
//! The parser is `serde_yaml`. It reports a place only as part of an *error*, and a configuration
//! needs the places of values that are valid YAML (`depth: 0` is an example). So every scalar is
//! turned into an error on purpose:
//!
//! ```text
//!   NodeSeed ──deserialize_any──► serde_yaml ──visit_u64(0)──► NodeVisitor
//!                                                                │ puts the scalar aside, answers with an error
//!   Node { place 3:10, "0" } ◄── catches it ◄── writes "at line 3 column 10" into it ◄──┘
//! ```
//!
//! The parser has moved past the scalar by then, so the map or list around it continues with its
//! next entry. Maps and lists themselves end without an error and take the place of their key. An
//! error without a scalar put aside is a real error and ends the reading.
//!
//! Numbers are kept as they are written (`0x10`, `1e3`, `-0`): [`crate::quantity`] decides on their
//! meaning, not YAML's guesses. An alias has the place of its anchor's text.
//!
//! Refused: tags, directives, several documents, keys that are not plain text, deep nesting, and
//! more nodes than a configuration needs or than the length of the file explains. The last limit
//! stops a small file whose aliases multiply.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, Visitor};

use crate::fault::{Fault, shown};
use crate::nesting;
use crate::source::{Place, Source};

/// The schema needs 5 levels.
const DEPTH_MAX: usize = 16;

/// 75 values for each of 2,000 devices; a device with every key has about 40.
const NODES_MAX: usize = 150_000;

/// Each value takes a byte of the text at least, unless it comes from an alias. A device that is an
/// alias (`a: *d` in a line) takes 7 bytes for its 15 to 45 values. With 8 values for each byte,
/// and 2,000 spare for small files, no list of such devices is refused, and a few hundred bytes
/// cannot keep a reader busy.
const NODES_A_BYTE: usize = 8;
const NODES_SPARE: usize = 2000;

/// The longest key: the parser spells out all keys above each scalar whose place is asked for.
const KEY_CHARS_MAX: usize = 128;

/// The text of the errors that carry a place.
const PLACE_WANTED: &str = "\u{1}place wanted\u{1}";

/// A value and where it is written.
#[derive(Debug, PartialEq)]
pub(crate) struct Node {
    /// Of a scalar: its start. Of a map or list: the start of its key.
    pub(crate) place: Place,
    pub(crate) value: Value,
}

#[derive(Debug, PartialEq)]
pub(crate) enum Value {
    /// An empty value, `~` or `null`.
    Null,
    /// A scalar as it is written, without its quotes.
    Text {
        text: String,
        quoted: bool,
    },
    Map(Vec<Entry>),
    List(Vec<Node>),
}

/// A key and its value. A map may have a key twice: its reader decides which spellings are equal,
/// and notes a fault.
#[derive(Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) place: Place,
    pub(crate) node: Node,
}

/// Reads the single document of a text.
pub(crate) fn read(source: &Source<'_>) -> Result<Node, Fault> {
    nesting::check(source)?;
    let mut reader = Reader { source, aside: None, refusal: None, nodes: 0, latest: Place::START };
    let seed = NodeSeed { reader: &mut reader, near: Place::START, depth: 0 };
    match seed.deserialize(serde_yaml::Deserializer::from_str(source.text())) {
        Ok(node) => Ok(node),
        Err(error) => {
            let place = error.location().map(|at| Place { line: at.line() as u32, column: at.column() as u32 });
            Err(match reader.refusal {
                Some((own_place, found, cure)) => {
                    Fault::new(own_place.or(place).unwrap_or(Place::START), "", found, cure)
                }
                None => syntax_fault(source, &error.to_string(), place, reader.latest),
            })
        }
    }
}

/// The state that all seeds and visitors of a reading share.
struct Reader<'s> {
    source: &'s Source<'s>,
    /// The scalar whose place the error will report.
    aside: Option<Scalar>,
    /// The reason for giving up: the place (`None` if the parser's error has it), the finding and
    /// the cure.
    refusal: Option<(Option<Place>, String, String)>,
    nodes: usize,
    /// The place of the latest value, for errors without a place.
    latest: Place,
}

enum Scalar {
    Null,
    /// No text in YAML's view; the value is kept in case it is not found in the source.
    Typed(String),
    Text(String),
}

impl Reader<'_> {
    fn refuse<E: Error>(&mut self, place: Option<Place>, found: impl Into<String>, cure: impl Into<String>) -> E {
        self.refusal = Some((place, found.into(), cure.into()));
        E::custom("refused")
    }

    fn set_aside<E: Error>(&mut self, scalar: Scalar) -> E {
        self.aside = Some(scalar);
        E::custom(PLACE_WANTED)
    }

    /// The text from a scalar's place on, without an anchor before it; a tag is refused.
    fn text_at<E: Error>(&mut self, place: Place) -> Result<&str, E> {
        let mut text = self.source.at(place);
        if text.starts_with('&') {
            text = text.split_once([' ', '\t']).map_or("", |(_, rest)| rest.trim_start());
        }
        if text.starts_with('!') {
            let tag = shown(text.split([' ', '\t']).next().unwrap_or_default(), 40);
            return Err(self.refuse(Some(place), format!("the tag {tag}"), TAG_CURE));
        }
        Ok(text)
    }

    fn count_node<E: Error>(&mut self, near: Place) -> Result<(), E> {
        self.nodes += 1;
        self.latest = near;
        if self.nodes > NODES_SPARE + NODES_A_BYTE * self.source.text().len() {
            return Err(self.refuse(Some(near), ALIASES_FOUND, ALIASES_CURE));
        }
        if self.nodes > NODES_MAX {
            let found = format!("more than {NODES_MAX} values, counting each use of an alias");
            return Err(self.refuse(Some(near), found, "use fewer aliases, or split the configuration"));
        }
        Ok(())
    }

    fn check_depth<E: Error>(&mut self, depth: usize) -> Result<(), E> {
        if depth > DEPTH_MAX {
            let found = format!("nested deeper than {DEPTH_MAX} levels");
            return Err(self.refuse(
                None,
                found,
                "no key of a configuration is deeper than 5 levels, and no alias may contain itself",
            ));
        }
        Ok(())
    }
}

const ALIASES_FOUND: &str = "aliases that multiply";
const ALIASES_CURE: &str = "use fewer aliases, or write the values out";
const TAG_CURE: &str = "tags are not used here; remove it, or quote the text if it really starts with `!`";

/// Reads a value.
struct NodeSeed<'r, 's> {
    reader: &'r mut Reader<'s>,
    /// The place of the key of the value, or of the list that holds it.
    near: Place,
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for NodeSeed<'_, '_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        let Self { reader, near, depth } = self;
        reader.count_node(near)?;
        let visitor = NodeVisitor { reader: &mut *reader, near, depth };
        let error = match deserializer.deserialize_any(visitor) {
            Ok(value) => return Ok(Node { place: near, value }),
            Err(error) => error,
        };
        let Some(scalar) = reader.aside.take() else { return Err(error) };
        let place = place_in(&error.to_string());
        let text = reader.text_at(place)?;
        let value = match scalar {
            Scalar::Null => Value::Null,
            Scalar::Typed(fallback) => {
                let end = text.find(|c: char| !c.is_ascii_alphanumeric() && !"+-._".contains(c)).unwrap_or(text.len());
                let written = &text[..end];
                Value::Text { text: if end == 0 { fallback } else { written.to_owned() }, quoted: false }
            }
            Scalar::Text(value) => Value::Text { quoted: text.starts_with(['"', '\'', '|', '>']), text: value },
        };
        Ok(Node { place, value })
    }
}

struct NodeVisitor<'r, 's> {
    reader: &'r mut Reader<'s>,
    near: Place,
    depth: usize,
}

impl<'de> Visitor<'de> for NodeVisitor<'_, '_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Err(self.reader.set_aside(Scalar::Null))
    }

    fn visit_none<E: Error>(self) -> Result<Value, E> {
        self.visit_unit()
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Err(self.reader.set_aside(Scalar::Typed(value.to_string())))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Err(self.reader.set_aside(Scalar::Typed(value.to_string())))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Err(self.reader.set_aside(Scalar::Typed(value.to_string())))
    }

    fn visit_u128<E: Error>(self, value: u128) -> Result<Value, E> {
        Err(self.reader.set_aside(Scalar::Typed(value.to_string())))
    }

    fn visit_i128<E: Error>(self, value: i128) -> Result<Value, E> {
        Err(self.reader.set_aside(Scalar::Typed(value.to_string())))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Err(self.reader.set_aside(Scalar::Typed(value.to_string())))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Err(self.reader.set_aside(Scalar::Text(value.to_owned())))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _: A) -> Result<Value, A::Error> {
        Err(self.reader.refuse(None, "a tag", TAG_CURE))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let Self { reader, near, depth } = self;
        reader.check_depth(depth)?;
        let mut list = Vec::new();
        while let Some(node) = elements.next_element_seed(NodeSeed { reader: &mut *reader, near, depth: depth + 1 })? {
            list.push(node);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let Self { reader, depth, .. } = self;
        reader.check_depth(depth)?;
        let mut map = Vec::new();
        while let Some((key, place)) = entries.next_key_seed(KeySeed { reader: &mut *reader })? {
            let seed = NodeSeed { reader: &mut *reader, near: place, depth: depth + 1 };
            map.push(Entry { key, place, node: entries.next_value_seed(seed)? });
        }
        Ok(Value::Map(map))
    }
}

/// Reads a key, as text in any spelling: a device may be called `007` or `null`.
struct KeySeed<'r, 's> {
    reader: &'r mut Reader<'s>,
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_, '_> {
    type Value = (String, Place);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        let reader = self.reader;
        let error = match deserializer.deserialize_str(KeyVisitor { reader: &mut *reader }) {
            Ok(never) => match never {},
            Err(error) => error,
        };
        let Some(Scalar::Text(key)) = reader.aside.take() else { return Err(error) };
        let place = place_in(&error.to_string());
        reader.text_at::<D::Error>(place)?;
        if key.chars().count() > KEY_CHARS_MAX {
            let found = format!("the key {:?} is longer than {KEY_CHARS_MAX} characters", shown(&key, 20));
            return Err(reader.refuse(Some(place), found, "a name has at most 64 characters"));
        }
        Ok((key, place))
    }
}

struct KeyVisitor<'r, 's> {
    reader: &'r mut Reader<'s>,
}

/// A key always ends in an error that carries its place, so it has no value.
enum Never {}

impl<'de> Visitor<'de> for KeyVisitor<'_, '_> {
    type Value = Never;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key that is plain text")
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Never, E> {
        Err(self.reader.set_aside(Scalar::Text(value.to_owned())))
    }
}

/// The place at the end of an error's text. `serde_yaml` omits it for the first character of a
/// file.
fn place_in(error: &str) -> Place {
    let parse = || {
        let (_, suffix) = error.rsplit_once(PLACE_WANTED)?;
        let (line, column) = suffix.strip_prefix(" at line ")?.split_once(" column ")?;
        Some(Place { line: line.parse().ok()?, column: column.parse().ok()? })
    };
    parse().unwrap_or(Place::START)
}

/// An error of the parser as a fault, with a cure for the frequent errors.
///
/// `latest` is the place of the latest value, for an error without a place.
fn syntax_fault(source: &Source<'_>, error: &str, place: Option<Place>, latest: Place) -> Fault {
    if error.contains("more than one document") {
        let place = second_document(source);
        return Fault::new(place, "", "a second document starts here", "a configuration is one document; remove it");
    }
    if error.contains("repetition limit") {
        return Fault::new(latest, "", ALIASES_FOUND, ALIASES_CURE);
    }
    let problem = match place {
        Some(place) => error.replacen(&format!(" at line {} column {}", place.line, place.column), "", 1),
        None => error.to_owned(),
    };
    let cure = if problem.contains("cannot start any token") {
        "indent with spaces, not tabs, and quote a text that starts with @, ` or %"
    } else if problem.contains("mapping values are not allowed") {
        "one `key: value` a line; quote a text that contains `: `"
    } else if problem.contains("',' or ']'") || problem.contains("',' or '}'") || problem.contains("flow node") {
        "close every bracket and brace, and put commas between"
    } else if problem.contains("quoted scalar") {
        "close the quote"
    } else if problem.contains("simple key") || problem.contains("expected ':'") {
        "put `: ` (a colon and a space) between key and value"
    } else if problem.contains("anchor") || problem.contains("alias") {
        "an alias (*name) needs its anchor (&name) before it; quote a text that starts with * or &"
    } else if problem.contains("invalid type") {
        "a key is a plain text, followed by a colon"
    } else {
        "check the indentation of this line and of the one before it"
    };
    let place = source.clamp(place.unwrap_or(latest));
    Fault::new(place, "", format!("not valid YAML: {}", shown(&problem, 160)), cure)
}

/// The marker that opens a second document; the parser does not report its place.
fn second_document(source: &Source<'_>) -> Place {
    let mut open = false;
    for (row, line) in source.lines().iter().enumerate() {
        let is_marker = line.starts_with("---");
        if open && is_marker {
            return Place { line: row as u32 + 1, column: 1 };
        }
        open |= is_marker || !(line.trim().is_empty() || line.trim_start().starts_with('#'));
    }
    Place::START
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Node, Fault> {
        read(&Source::new(text.as_bytes()).0)
    }

    /// The tree, a node per line: `line:column value`.
    fn outline(text: &str) -> String {
        fn walk(node: &Node, depth: usize, out: &mut String) {
            let what = match &node.value {
                Value::Null => "null".to_owned(),
                Value::Text { text, quoted: true } => format!("{text:?}"),
                Value::Text { text, quoted: false } => text.clone(),
                Value::Map(_) => "map".to_owned(),
                Value::List(_) => "list".to_owned(),
            };
            out.push_str(&format!("{} {what}\n", node.place));
            match &node.value {
                Value::Map(entries) => {
                    for entry in entries {
                        out.push_str(&format!("{}{} {}: ", "  ".repeat(depth), entry.place, entry.key));
                        walk(&entry.node, depth + 1, out);
                    }
                }
                Value::List(nodes) => {
                    for node in nodes {
                        out.push_str(&format!("{}- ", "  ".repeat(depth)));
                        walk(node, depth + 1, out);
                    }
                }
                Value::Null | Value::Text { .. } => {}
            }
        }
        let mut out = String::new();
        walk(&read_text(text).expect("fine YAML"), 0, &mut out);
        out
    }

    fn refusal(text: &str) -> String {
        let fault = read_text(text).expect_err("should be refused");
        format!("{} {}", fault.place.expect("a place"), fault.found)
    }

    #[test]
    fn every_key_and_scalar_knows_its_place() {
        // The first character of a file is the only place that the parser omits.
        assert_eq!(
            outline("version: 1\nünï: { 'q': \"a: b\", list: [1.50, ~] }\nempty:\n"),
            "1:1 map\n1:1 version: 1:10 1\n2:1 ünï: 2:1 map\n  2:8 q: 2:13 \"a: b\"\n  2:21 list: 2:21 list\n    \
             - 2:28 1.50\n    - 2:34 null\n3:1 empty: 3:7 null\n"
        );
    }

    #[test]
    fn numbers_stay_as_they_are_written() {
        // YAML would read these as 16, 0, 1000 and infinity.
        assert_eq!(
            outline("[0x10, -0, 1e3, .inf, 012, 18446744073709551616, True]"),
            "1:1 list\n- 1:2 0x10\n- 1:8 -0\n- 1:12 1e3\n- 1:17 .inf\n- 1:23 012\n- 1:28 18446744073709551616\n\
             - 1:50 True\n"
        );
    }

    #[test]
    fn repeated_keys_are_both_kept_with_their_places() {
        assert_eq!(outline("a: 1\na: 2\n"), "1:1 map\n1:1 a: 1:4 1\n2:1 a: 2:4 2\n");
    }

    #[test]
    fn alias_has_the_place_of_its_anchor() {
        // An error in the value is corrected where the value is written.
        assert_eq!(outline("a: &x 10k\nb: *x\n"), "1:1 map\n1:1 a: 1:4 10k\n2:1 b: 1:4 10k\n");
        assert_eq!(outline("a: &x { c: 1 }\nb: *x\n").lines().last(), Some("  1:9 c: 1:12 1"));
    }

    #[test]
    fn what_a_configuration_never_needs_is_refused() {
        assert_eq!(refusal("a: !x 1\n"), "1:4 a tag");
        assert_eq!(refusal("a: !!int 1\n"), "1:4 the tag !!int");
        assert_eq!(refusal("!!str a: 1\n"), "1:1 the tag !!str");
        assert_eq!(refusal("a: 1\n---\nb: 1\n"), "2:1 a second document starts here");
        assert_eq!(refusal("a: &x [*x]\n"), "1:4 nested deeper than 16 levels");
        assert!(refusal("a: 1\nb: *nobody\n").starts_with("2:4 not valid YAML: unknown anchor"));
        assert!(refusal("a: 1\n? [b]\n: 1\n").starts_with("2:3 not valid YAML"));
        assert!(refusal("a: 1\n\tb: 2\n").starts_with("2:1 not valid YAML"));
        assert!(refusal(&"- ".repeat(100)).contains("nested deeper"));
        assert!(refusal(&format!("{}: 1", "k".repeat(200))).contains("longer than 128"));
    }

    #[test]
    fn a_thousand_devices_may_be_aliases_of_one() {
        let keys: String = (0..44).map(|n| format!("k{n}: 1, ")).collect();
        let devices: String = (0..1000).map(|n| format!(" {n}: *d\n")).collect();
        let text = format!("d: &d {{ {keys} }}\ndevices:\n{devices}");
        assert!(read_text(&text).is_ok());
    }

    #[test]
    fn aliases_cannot_multiply_without_end() {
        // A billion nodes from 500 bytes, and 49 million from 7,000 uses of a list of 7,000.
        let mut text = String::from("a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n");
        for n in 1..9 {
            let uses = vec![format!("*a{}", n - 1); 10].join(",");
            text.push_str(&format!("a{n}: &a{n} [{uses}]\n"));
        }
        assert_eq!(refusal(&text), "4:1 aliases that multiply");
        // In a long text, the parser's own limit stops the billion nodes; below, our limit for any
        // file stops the repeated list.
        assert_eq!(refusal(&format!("{text}# {}\n", "x".repeat(10_000))), "5:1 aliases that multiply");
        let text = format!("a: &a [{}]\nb: [{}]\n", "1,".repeat(7000), "*a,".repeat(7000));
        assert_eq!(refusal(&text), "2:1 more than 150000 values, counting each use of an alias");
    }
}
