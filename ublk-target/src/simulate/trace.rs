//! A trace: JSON lines in the order of time.
//!
//! ```text
//!   {"t":0,"device":"vol1","op":"read","bytes":4096,"count":15}        15 requests at once
//!   {"t":5000000,"set":{"group":"tenant-a","limits":{"iops-total":500}}}
//!   {"t":6000000,"del":"vol1"}
//!   {"t":7000000,"add":"vol1"}
//! ```
//!
//! Only one line is in memory, limited to the longest line allowed. A good line is parsed in one
//! step; a bad one is parsed again, as plain JSON, to name its fault.

use std::borrow::Cow;
use std::io::{self, BufRead, Read};

use serde::Deserialize;
use serde_json::Value;
use throttle_core::cost::Operation;
use throttle_core::time::Time;
use ublk_throttle_config::nearest;

use super::cast::Cast;
use super::set::Set;
use crate::error::{Class, Failure, Outcome, plain};

/// The longest line; normal ones have some 100 bytes.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// The most requests that one line may stand for.
const COUNT_MAX: u64 = 1_000_000;

/// An event at a time of the trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Requests arrive.
    Request {
        /// The number of the device.
        device: usize,
        /// The operation of each.
        operation: Operation,
        /// The length of the range of each.
        bytes: u64,
        /// The number of equal requests.
        count: u32,
    },
    /// Limits, weights or parents change.
    Set(Set),
    /// A device is removed.
    Del(usize),
    /// A removed device is added again.
    Add(usize),
}

/// The keys of a line.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    t: u64,
    #[serde(borrow)]
    device: Option<Text<'a>>,
    #[serde(borrow)]
    op: Option<Text<'a>>,
    bytes: Option<u64>,
    count: Option<u64>,
    set: Option<Value>,
    #[serde(borrow)]
    del: Option<Text<'a>>,
    #[serde(borrow)]
    add: Option<Text<'a>>,
}

/// Borrowed if the text has no escapes; serde does that only for a `Cow` that is not in an
/// `Option`.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// The keys of a line and the kind of value for each.
const KEYS: [(&str, &str); 8] = [
    ("t", "nanoseconds belong here, a whole number below 2^64"),
    ("device", "the name of a device belongs here"),
    ("op", "allowed: read, write, flush, discard, write-zeroes"),
    ("bytes", "a whole number below 2^64 belongs here"),
    ("count", "a whole number belongs here"),
    ("set", r#"an object belongs here, like {"device":"vol1","limits":{"iops":500}}"#),
    ("del", "the name of a device belongs here"),
    ("add", "the name of a device belongs here"),
];

/// The operations by name.
pub(super) const OPERATIONS: [(&str, Operation); 5] = [
    ("read", Operation::Read),
    ("write", Operation::Write),
    ("flush", Operation::Flush),
    ("discard", Operation::Discard),
    // The daemon's backends all have a cheaper way than writing zeros.
    ("write-zeroes", Operation::WriteZeroes { as_data: false }),
];

/// A trace that is being read.
pub struct Trace<R> {
    name: String,
    input: R,
    line: Vec<u8>,
    /// The number of the line read last, from 1.
    number: u64,
    /// The time of that line.
    t: u64,
}

impl<R: BufRead> Trace<R> {
    /// `name` is for messages.
    pub fn new(name: &str, input: R) -> Self {
        Self { name: name.to_owned(), input, line: Vec::new(), number: 0, t: 0 }
    }

    /// The event of the next line that is not blank; `None` at the end.
    pub fn next(&mut self, cast: &Cast) -> Outcome<Option<(Time, Event)>> {
        while self.read_line()? {
            if self.line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let (t, event) = event(&self.line, cast).map_err(|refusal| self.refuse_line(&refusal))?;
            if t < self.t {
                let (before, t) = (self.t, t);
                let refusal =
                    format!("t goes back from {before} to {t}; a trace is in the order of time: sort it by t");
                return Err(self.refuse_line(&refusal));
            }
            self.t = t;
            return Ok(Some((Time::from_nanos(t), event)));
        }
        Ok(None)
    }

    /// A fault of the line read last. `refusal` names the value found and the cure.
    pub fn refuse_line(&self, refusal: &str) -> Failure {
        Failure::new(Class::Trace, format!("{}:{}: {refusal}", self.name, self.number))
    }

    /// A fault of the trace as a whole.
    pub fn refuse_file(&self, refusal: &str) -> Failure {
        Failure::new(Class::Trace, format!("{}: {refusal}", self.name))
    }

    fn read_line(&mut self) -> Outcome<bool> {
        self.line.clear();
        self.number += 1;
        let read = (&mut self.input).take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut self.line);
        match read {
            Ok(read) if read as u64 > LINE_BYTES_MAX => {
                Err(self.refuse_line(&format!("a line of more than {LINE_BYTES_MAX} bytes; write one event a line")))
            }
            Ok(read) => Ok(read > 0),
            Err(error) => Err(unreadable(&self.name, "read", &error)),
        }
    }
}

/// The failure of a trace that cannot be opened or read.
pub fn unreadable(name: &str, what: &str, error: &io::Error) -> Failure {
    let cure = match error.kind() {
        io::ErrorKind::NotFound => "check the path",
        io::ErrorKind::PermissionDenied => "give this user the right to read it, or run as another",
        _ => "name a file that can be read, or - for stdin",
    };
    Failure::new(Class::Trace, format!("{name}: cannot {what} it: {}; {cure}", plain(error)))
}

fn event(line: &[u8], cast: &Cast) -> Result<(u64, Event), String> {
    let line: Line<'_> = serde_json::from_slice(line).map_err(|error| diagnosis(line, &error))?;
    let names = [("device", line.device.is_some()), ("set", line.set.is_some())];
    let names = names.into_iter().chain([("del", line.del.is_some()), ("add", line.add.is_some())]);
    let said: Vec<&str> = names.filter(|(_, is_there)| *is_there).map(|(name, _)| name).collect();
    if let [first, second, ..] = said[..] {
        return Err(format!("both {first:?} and {second:?}; write one event a line"));
    }
    let event = match line {
        Line { device: Some(Text(device)), op, bytes, count, .. } => {
            let device = cast.device(&device)?;
            let operation = operation(op)?;
            let bytes = match (bytes, operation) {
                (Some(bytes), _) => bytes,
                (None, Operation::Flush) => 0,
                (None, _) => return Err("no \"bytes\"; add the length of the request".to_owned()),
            };
            let count = count.unwrap_or(1);
            if !(1..=COUNT_MAX).contains(&count) {
                return Err(format!("\"count\": {count}; allowed: 1 to {COUNT_MAX}, or more lines"));
            }
            Event::Request { device, operation, bytes, count: count as u32 }
        }
        Line { op: None, bytes: None, count: None, set: Some(set), .. } => Event::Set(Set::read(&set, cast)?),
        Line { op: None, bytes: None, count: None, del: Some(Text(device)), .. } => Event::Del(cast.device(&device)?),
        Line { op: None, bytes: None, count: None, add: Some(Text(device)), .. } => Event::Add(cast.device(&device)?),
        Line { op: None, bytes: None, count: None, .. } => {
            return Err("nothing happens here; add \"device\" and \"op\", or \"set\", \"del\" or \"add\"".to_owned());
        }
        _ => return Err("a request without a \"device\"; add its name".to_owned()),
    };
    Ok((line.t, event))
}

fn operation(op: Option<Text<'_>>) -> Result<Operation, String> {
    let Some(Text(op)) = op else {
        return Err(format!("no \"op\"; {}", KEYS[2].1));
    };
    let known = OPERATIONS.iter().find(|(name, _)| *name == op);
    known.map(|(_, operation)| *operation).ok_or_else(|| {
        let near = nearest(&op, OPERATIONS.iter().map(|(name, _)| *name));
        let hint = near.map_or_else(String::new, |near| format!("did you mean `{near}`? "));
        format!("\"op\": {op:?}; {hint}{}", KEYS[2].1)
    })
}

/// The fault of a line that could not be parsed, in the words of this module where it has any.
fn diagnosis(line: &[u8], error: &serde_json::Error) -> String {
    let cure = "a line is a JSON object like {\"t\":0,\"device\":\"vol1\",\"op\":\"read\",\"bytes\":4096}";
    let (column, error) = (error.column(), error.to_string());
    let error = error.split(" at line ").next().unwrap_or_default();
    let said = match serde_json::from_slice(line) {
        Ok(Value::Object(said)) => said,
        Ok(_) => return format!("JSON that is no object; {cure}"),
        Err(_) => return format!("not JSON, from column {column}: {error}; {cure}"),
    };
    for (key, value) in &said {
        let Some((_, wanted)) = KEYS.iter().find(|(known, _)| known == key) else {
            let known = || KEYS.iter().map(|(known, _)| *known);
            let hint = nearest(key, known()).map_or_else(String::new, |near| format!("did you mean `{near}`? "));
            return format!("the key {key:?}; {hint}known keys: {}", known().collect::<Vec<_>>().join(", "));
        };
        let fits = match key.as_str() {
            "t" | "bytes" | "count" => value.as_u64().is_some(),
            "set" => true,
            _ => value.is_string(),
        };
        if !fits {
            return format!("{key:?}: {value}; {wanted}");
        }
    }
    if !said.contains_key("t") {
        return "no \"t\"; add the time, nanoseconds from the start".to_owned();
    }
    // A key that occurs twice, which a parsed JSON object does not show.
    format!("{error}; {cure}")
}
