//! The text of a file, and places in the text.
//!
//! Bytes become text here, once and strictly. YAML may come as UTF-16, may hold control characters
//! and has five kinds of line break, and each of these would make our line numbers differ from
//! those of the user's editor. This module refuses them by name, before the parser sees them.

use std::fmt;

use crate::fault::{Fault, shown};

/// A place in a file, line and column from 1; columns count characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The line.
    pub line: u32,
    /// The character in the line.
    pub column: u32,
}

impl Place {
    /// The start of every file.
    pub const START: Self = Self { line: 1, column: 1 };

    /// The place of a value in no file.
    pub(crate) const NOWHERE: Self = Self { line: 0, column: 0 };
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// The most characters of a source line that an error shows.
const EXCERPT_MAX: usize = 100;

/// A text that is fit for parsing, split into lines.
#[derive(Debug)]
pub(crate) struct Source<'a> {
    text: &'a str,
    lines: Vec<&'a str>,
    /// The byte offset of every [`STRIDE`]th character. A file may be a single long line (JSON is
    /// YAML), and counting its characters from the start for each value would take minutes.
    strides: Vec<usize>,
    /// The number of characters before each line.
    chars_before: Vec<usize>,
}

const STRIDE: usize = 256;

impl<'a> Source<'a> {
    /// Decodes the bytes. A fault means that the bytes are no text of a configuration; the source
    /// then ends at the fault and only serves to show the place.
    pub(crate) fn new(bytes: &'a [u8]) -> (Self, Option<Fault>) {
        let (text, broken) = match std::str::from_utf8(bytes) {
            Ok(text) => (text, None),
            Err(error) => {
                let good = &bytes[..error.valid_up_to()];
                // The prefix was just found valid; it serves to count lines and to show the line of
                // the fault.
                (std::str::from_utf8(good).unwrap_or_default(), Some(bytes[error.valid_up_to()]))
            }
        };
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let source = Self::index(text);
        if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
            let fault = Fault::new(Place::START, "", "the file is UTF-16", "save it as UTF-8");
            return (source, Some(fault));
        }
        if let Some((offset, c)) = text.char_indices().find(|&(_, c)| is_refused(c)) {
            let place = source.place(offset);
            let found = format!("the control character U+{:04X}", u32::from(c));
            let fault = Fault::new(place, "", found, "remove it; a configuration is plain text in UTF-8");
            return (source, Some(fault));
        }
        if let Some(byte) = broken {
            let place = source.place(text.len());
            let found = format!("the byte 0x{byte:02x} is not UTF-8");
            let cure = "save the file as UTF-8 (it may be Latin-1, or no text at all)";
            return (source, Some(Fault::new(place, "", found, cure)));
        }
        (source, None)
    }

    fn index(text: &'a str) -> Self {
        let lines = split_lines(text);
        let (mut strides, mut chars_before) = (Vec::new(), Vec::with_capacity(lines.len()));
        for (count, (offset, _)) in text.char_indices().enumerate() {
            if count % STRIDE == 0 {
                strides.push(offset);
            }
            let next_line = lines.get(chars_before.len());
            if next_line.is_some_and(|line| offset_in(text, line) == offset) {
                chars_before.push(count);
            }
        }
        Self { text, lines, strides, chars_before }
    }

    pub(crate) fn text(&self) -> &'a str {
        self.text
    }

    pub(crate) fn lines(&self) -> &[&'a str] {
        &self.lines
    }

    /// The text from a place to the end of its line; empty if the place does not exist.
    pub(crate) fn at(&self, place: Place) -> &'a str {
        let row = place.line as usize - 1;
        let (Some(line), Some(chars_before)) = (self.lines.get(row), self.chars_before.get(row)) else { return "" };
        let count = chars_before + place.column as usize - 1;
        let Some(stride) = self.strides.get(count / STRIDE) else { return "" };
        let Some((offset, _)) = self.text[*stride..].char_indices().nth(count % STRIDE) else { return "" };
        line.get(stride + offset - offset_in(self.text, line)..).unwrap_or_default()
    }

    /// The place, or the end of the last non-blank line if the place lies behind that: the parser
    /// often reports a missing token far behind the line to look at.
    pub(crate) fn clamp(&self, place: Place) -> Place {
        let last = self.lines.iter().rposition(|line| !line.trim().is_empty()).unwrap_or(0);
        if place.line as usize - 1 <= last {
            return place;
        }
        let column = self.lines.get(last).map_or(0, |line| line.trim_end().chars().count());
        Place { line: last as u32 + 1, column: column as u32 + 1 }
    }

    /// The line of a place, for an error; a long line is cut around the place.
    pub(crate) fn excerpt(&self, place: Place) -> Option<String> {
        let line = self.lines.get(place.line as usize - 1)?.trim_end();
        if line.is_empty() {
            return None;
        }
        let skip = (place.column as usize).saturating_sub(EXCERPT_MAX * 3 / 4);
        let rest = line.char_indices().nth(skip).map_or("", |(offset, _)| &line[offset..]);
        Some(format!("{}{}", if skip > 0 { "…" } else { "" }, shown(rest, EXCERPT_MAX)))
    }

    /// The place of a byte offset.
    fn place(&self, offset: usize) -> Place {
        let row = self.lines.partition_point(|line| offset_in(self.text, line) <= offset).saturating_sub(1);
        let line_start = self.lines.get(row).map_or(0, |line| offset_in(self.text, line));
        let column = self.text[line_start..offset].chars().count();
        Place { line: row as u32 + 1, column: column as u32 + 1 }
    }
}

/// The byte offset of `part` in `text`.
fn offset_in(text: &str, part: &str) -> usize {
    part.as_ptr() as usize - text.as_ptr() as usize
}

/// Lines as an editor numbers them: ended by LF, CR LF or a lone CR.
fn split_lines(text: &str) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(end) = rest.find(['\n', '\r']) {
        lines.push(&rest[..end]);
        rest = &rest[end + if rest[end..].starts_with("\r\n") { 2 } else { 1 }..];
    }
    lines.push(rest);
    lines
}

/// Control characters except tab and line ends, the two line breaks that only YAML knows, and byte
/// order marks.
fn is_refused(c: char) -> bool {
    (c.is_control() && !matches!(c, '\t' | '\n' | '\r')) || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(bytes: &[u8]) -> (String, String) {
        let fault = Source::new(bytes).1.expect("should be refused");
        (fault.place.expect("a place").to_string(), fault.found)
    }

    #[test]
    fn what_is_not_text_is_refused_where_it_is() {
        // The parser would report each of these without a place, or not at all.
        assert_eq!(fault(b"a: 1\nb: \0"), ("2:4".into(), "the control character U+0000".into()));
        assert_eq!(fault(b"a: caf\xe9\n"), ("1:7".into(), "the byte 0xe9 is not UTF-8".into()));
        assert_eq!(fault(b"\xff\xfea\0"), ("1:1".into(), "the file is UTF-16".into()));
        assert_eq!(fault("a\r\nb\rc\u{2028}".as_bytes()), ("3:2".into(), "the control character U+2028".into()));
    }

    #[test]
    fn text_at_a_place_is_found_in_long_lines_too() {
        // Each character of a text with lines around the stride and with characters of several
        // bytes.
        let text = format!("{}\n\r\n{}\rx\n", "aé€𝄞".repeat(200), "b".repeat(STRIDE));
        let source = Source::new(text.as_bytes()).0;
        for (row, line) in source.lines().iter().enumerate() {
            for (column, (offset, _)) in line.char_indices().enumerate() {
                assert_eq!(source.at(Place { line: row as u32 + 1, column: column as u32 + 1 }), &line[offset..]);
            }
            let behind = Place { line: row as u32 + 1, column: line.chars().count() as u32 + 1 };
            assert_eq!(source.at(behind), "", "behind line {behind}");
        }
        assert_eq!(source.at(Place { line: 99, column: 1 }), "");
    }

    #[test]
    fn excerpt_of_a_long_line_is_cut_around_the_place() {
        let text = format!("{}here{}", "a".repeat(500), "b".repeat(500));
        let source = Source::new(text.as_bytes()).0;
        let excerpt = source.excerpt(Place { line: 1, column: 501 }).expect("a line");
        assert!(excerpt.contains("here") && excerpt.chars().count() <= EXCERPT_MAX + 2, "{excerpt}");
    }

    #[test]
    fn place_behind_the_end_is_the_end_of_what_is_said() {
        let source = Source::new(b"a: [\n\n").0;
        assert_eq!(source.clamp(Place { line: 3, column: 1 }), Place { line: 1, column: 5 });
    }
}
