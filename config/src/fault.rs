//! The faults and warnings with which a reading ends, and their display.
//!
//! ```text
//! error[E-CONFIG]: vols.yaml:14:23: groups.tenant-a.limits.iops-total-max: 100 is below iops-total (500)
//!   |     iops-total-max: 100
//!   a burst rate must be at least the average; raise it, or remove it for none
//! ```
//!
//! The text has at most 20 lines, so that it fits a terminal: up to six errors are shown as above,
//! more of them on a line each, at most ten, and the rest are counted.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::source::{Place, Source};

/// Errors shown in full, with the line of the file and the cure.
const SHOWN_IN_FULL: usize = 6;

/// Errors shown at all.
const SHOWN: usize = 10;

/// An error that makes a configuration unusable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The place in the file; `None` if the file could not be read.
    pub place: Option<Place>,
    /// The keys that lead to the value, joined by dots; empty for the file as a whole.
    pub path: String,
    /// The finding.
    pub found: String,
    /// The cure.
    pub cure: String,
    /// The line of the file, shortened.
    pub excerpt: Option<String>,
}

impl Fault {
    pub(crate) fn new(
        place: Place,
        path: impl Into<String>,
        found: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self { place: Some(place), path: path.into(), found: found.into(), cure: cure.into(), excerpt: None }
    }

    pub(crate) fn of_file(found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { place: None, path: String::new(), found: found.into(), cure: cure.into(), excerpt: None }
    }
}

/// A single line, for errors without a file: `size: a size of 0; allowed: …`.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, found, cure, .. } = self;
        match path.as_str() {
            "" => write!(f, "{found}; {cure}"),
            _ => write!(f, "{path}: {found}; {cure}"),
        }
    }
}

/// All errors that make a configuration unusable, in file order; at least one.
///
/// `Display` gives the whole text for a terminal, without a final newline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Errors {
    file: PathBuf,
    faults: Vec<Fault>,
}

impl Errors {
    /// Sorts the faults and adds the excerpts of those that will be shown.
    pub(crate) fn new(file: &Path, mut faults: Vec<Fault>, source: Option<&Source<'_>>) -> Self {
        assert!(!faults.is_empty(), "errors without a fault");
        faults.sort_by_key(|fault| fault.place);
        for fault in faults.iter_mut().take(SHOWN) {
            fault.excerpt = source.zip(fault.place).and_then(|(source, place)| source.excerpt(place));
        }
        Self { file: file.to_owned(), faults }
    }

    /// The file of the faults, as it was named.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// All faults, in file order. Excerpts are filled in for the faults that `Display` shows.
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }
}

impl std::error::Error for Errors {}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let in_full = self.faults.len() <= SHOWN_IN_FULL;
        for (n, fault) in self.faults.iter().take(SHOWN).enumerate() {
            if n > 0 {
                writeln!(f)?;
            }
            write!(f, "error[E-CONFIG]: ")?;
            write_head(f, &self.file, fault.place, &fault.path)?;
            write!(f, "{}", fault.found)?;
            if in_full {
                if let Some(excerpt) = &fault.excerpt {
                    write!(f, "\n  | {excerpt}")?;
                }
                write!(f, "\n  {}", fault.cure)?;
            } else {
                write!(f, "; {}", fault.cure)?;
            }
        }
        match self.faults.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "\nand {more} more"),
        }
    }
}

/// A setting that is allowed and probably not meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The file, as it was named, and the place in it; `None` if a command gave the setting.
    pub at: Option<(PathBuf, Place)>,
    /// The keys that lead to the setting, joined by dots; for a command, its key. Empty: the whole
    /// subject of the command.
    pub path: String,
    /// The kind of the warning.
    pub kind: WarningKind,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.at, self.path.as_str()) {
            (Some((file, place)), path) => write_head(f, file, Some(*place), path)?,
            (None, "") => {}
            (None, path) => write!(f, "{path}: ")?,
        }
        write!(f, "{}", self.kind)
    }
}

/// The first ten warnings, a line each, and the number of further ones.
pub fn warning_lines(warnings: &[Warning]) -> Vec<String> {
    let mut lines: Vec<String> = warnings.iter().take(SHOWN).map(Warning::to_string).collect();
    if warnings.len() > SHOWN {
        lines.push(format!("and {} more", warnings.len() - SHOWN));
    }
    lines
}

/// The kinds of warnings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WarningKind {
    /// A limit of 0 means no limit, where a reader may expect that nothing passes.
    ZeroIsUnlimited,
    /// A burst length without a burst rate changes nothing.
    LengthWithoutMax,
    /// A full device waits long enough for timeouts above it (guests, file systems) to strike.
    LongHold {
        /// The wait of the last of all requests that fit, in seconds.
        seconds: u64,
        /// The number of requests that fit.
        requests: u64,
        /// The size of each request in the estimate, for a limit on bytes.
        request_bytes: Option<u64>,
    },
    /// A weight without a group to share.
    WeightAlone {
        /// The key that would name the group.
        group_key: &'static str,
    },
    /// A group without devices in it or below it.
    GroupWithoutDevices,
    /// A device reads the file or disk that a second one writes, each behind its own cache.
    SharedPath {
        /// The second device.
        other: String,
        /// The line at which the second device names the path; `None` if no file does.
        line: Option<u32>,
    },
    /// No devices to serve.
    NoDevices,
}

impl fmt::Display for WarningKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ZeroIsUnlimited => write!(f, "0 means no limit; write `unlimited`, or remove the key, to say so"),
            Self::LengthWithoutMax => write!(f, "a burst length without a burst rate changes nothing; add `-max`"),
            Self::LongHold { seconds, requests, request_bytes } => {
                write!(f, "the last of {requests} requests")?;
                if let Some(bytes) = request_bytes {
                    write!(f, " of {} KiB", bytes / 1024)?;
                }
                write!(f, " at once waits {seconds} s at this rate; a lower depth bounds that")
            }
            Self::WeightAlone { group_key } => {
                write!(f, "a weight without `{group_key}` changes nothing: it is a share of what a group allows")
            }
            Self::GroupWithoutDevices => write!(f, "no device is in this group"),
            Self::SharedPath { other, line } => {
                let line = line.map_or_else(String::new, |line| format!(" (line {line})"));
                write!(f, "device {other}{line} has the same path, and one of the two writes to it")
            }
            Self::NoDevices => write!(f, "no devices: nothing will be served"),
        }
    }
}

/// `FILE:LINE:COLUMN: path.to.key: `, without the parts that are not known.
fn write_head(f: &mut fmt::Formatter<'_>, file: &Path, place: Option<Place>, path: &str) -> fmt::Result {
    write!(f, "{}", shown(&file.to_string_lossy(), 200))?;
    if let Some(place) = place {
        write!(f, ":{place}")?;
    }
    write!(f, ": ")?;
    match path {
        "" => Ok(()),
        path => write!(f, "{path}: "),
    }
}

/// Untrusted text for a message: on one line, without control characters, at most about `max`
/// characters.
pub(crate) fn shown(text: &str, max: usize) -> String {
    let visible = |c: char| match c {
        '\t' => ' ',
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    let mut out: String = text.chars().take(max).map(visible).collect();
    if text.chars().nth(max).is_some() {
        out.push('…');
    }
    out
}
