//! Refuses brackets that nest too deep, and directives, before the parser works on them.
//!
//! The parser examines every open bracket again at each token, and every `%TAG` line at each
//! further one: a megabyte of `[` keeps it busy for a minute and a half. So the open brackets are
//! counted first, and never too few:
//!
//! ```text
//!   opening bracket    counts, even in quotes
//!   closing bracket    counts unless it is in quotes, or after text on its line that makes quotes doubtful
//!   rest of a comment  does not count
//! ```
//!
//! A quote is certain if it stands where only a value can start, and closes on its line. Otherwise
//! it is doubtful (the apostrophe of `it's`, a quote over several lines, a tag), and closing
//! brackets behind it may be text.

use crate::fault::Fault;
use crate::source::{Place, Source};

/// Far above the nesting of a configuration, far below a number that costs time.
const OPEN_MAX: u32 = 64;

pub(crate) fn check(source: &Source<'_>) -> Result<(), Fault> {
    let mut count = Count { open: 0, before: None, quote_over_lines: false };
    for (row, line) in source.lines().iter().enumerate() {
        let line_number = row as u32 + 1;
        if line.starts_with('%') {
            let place = Place { line: line_number, column: 1 };
            return Err(Fault::new(place, "", "a YAML directive", "directives are not used here; remove the line"));
        }
        if let Err(column) = count.line(line) {
            let found = format!("more than {OPEN_MAX} brackets are open here");
            let cure = "close them; a quoted text must end on the line it starts on";
            return Err(Fault::new(Place { line: line_number, column }, "", found, cure));
        }
    }
    Ok(())
}

struct Count {
    open: u32,
    /// The last character that is neither a blank nor in a comment.
    before: Option<char>,
    /// From here on no closing bracket counts.
    quote_over_lines: bool,
}

impl Count {
    /// Counts a line; `Err` is the column at which too many brackets are open.
    fn line(&mut self, line: &str) -> Result<(), u32> {
        let mut quote = None;
        let mut doubtful = self.quote_over_lines;
        let mut line_started = false;
        let mut before_is_space = true;
        let mut chars = line.chars().zip(1..).peekable();
        while let Some((c, column)) = chars.next() {
            match (c, quote) {
                ('[' | '{', _) => {
                    self.open += 1;
                    if self.open > OPEN_MAX {
                        return Err(column);
                    }
                }
                (']' | '}', None) if !doubtful => self.open = self.open.saturating_sub(1),
                ('#', None) if before_is_space && !doubtful => return Ok(()),
                ('\\', Some('"')) => {
                    chars.next_if(|&(next, _)| !matches!(next, '[' | '{'));
                }
                ('\'', Some('\'')) if chars.next_if(|&(next, _)| next == '\'').is_some() => {}
                ('"' | '\'', Some(opened)) if c == opened => quote = None,
                ('"' | '\'', None) if !doubtful => {
                    // Within open brackets, plain text may continue over a line end, or after a `-`
                    // or `a:`.
                    let starts_value = match self.before {
                        None | Some(',' | '[' | '{') => true,
                        Some(':') => before_is_space,
                        Some('-') => self.open == 0,
                        Some(_) => !line_started && self.open == 0,
                    };
                    if starts_value {
                        quote = Some(c);
                    } else {
                        doubtful = true;
                    }
                }
                ('!', None) => doubtful = true,
                _ => {}
            }
            before_is_space = c == ' ' || c == '\t';
            if !before_is_space {
                line_started = true;
                self.before = Some(c);
            }
        }
        self.quote_over_lines |= quote.is_some();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_text(text: &str) -> Result<(), String> {
        let source = Source::new(text.as_bytes()).0;
        check(&source).map_err(|fault| format!("{} {}", fault.place.expect("a place"), fault.found))
    }

    #[test]
    fn balanced_brackets_never_add_up() {
        // Typical lines of configurations, many times over.
        for line in [
            "a: { b: [1, 2], 'c]': \"d}\\\"\" } # it's [a comment\n",
            "a: it's plain\n",
            "a: {\n  b: 1 }\n",
            "- '}}' \n",
            "\"vol 1\": { backend: { null: '1M' } }\n",
        ] {
            assert_eq!(check_text(&line.repeat(1000)), Ok(()), "{line}");
        }
    }

    #[test]
    fn closing_brackets_that_may_be_text_do_not_count() {
        // Each part nests deeper with every repetition, and hides that behind a closing bracket.
        for part in [
            "[",
            "{a: ",
            "[\"]\",",
            "[']',",
            "[x \", \"]\", ",
            "[\"\n]\",",
            "[!<]> ",
            "[ # ]\n",
            "[\"\\\"]\",",
            "[a\n\"b,\"]]]\",",
            "[a - \"b,\"]]]\",",
            "[a:\"b,\"]]]\",",
            "[- \"b\", \"]\", '',']',",
        ] {
            assert!(check_text(&part.repeat(1000)).is_err(), "{part}");
        }
        assert_eq!(check_text(&"[".repeat(65)), Err("1:65 more than 64 brackets are open here".into()));
    }

    #[test]
    fn directives_are_refused() {
        assert_eq!(check_text("# a\n%TAG ! x\n---\n"), Err("2:1 a YAML directive".into()));
    }
}
