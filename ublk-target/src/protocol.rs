//! What goes over the control socket: a JSON object a line, each way.
//!
//! ```text
//!   → {"id":1,"cmd":"ping"}
//!   ← {"id":1,"ok":true,"result":{"pid":812,"version":"0.1.0"}}
//!   → {"id":2,"cmd":"del","device":"vol1","force":false,"timeout-ms":10000}
//!   ← {"id":2,"ok":false,"error":{"class":"E-BUSY","message":"…","exit":5}}
//! ```
//!
//! `id` is the client's, any JSON value, and comes back as it was. Long work answers once, at its end.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Class, Failure, Outcome, WireFailure};

/// The longest line that is read.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// What a client may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case", rename_all_fields = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// Are you there?
    Ping {},
    /// Every device and group.
    List {},
    /// Removes a device.
    Del {
        /// Its name, or its node.
        device: String,
        /// Also if it is in use.
        #[serde(default)]
        force: bool,
        /// When to answer at the latest; the removal goes on.
        #[serde(default = "default_timeout")]
        timeout_ms: u64,
    },
}

const fn default_timeout() -> u64 {
    10_000
}

/// A line from a client.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The client's.
    pub id: Value,
    /// What it wants.
    pub command: Command,
}

/// A line to a client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// That of the request; null if it had none that could be read.
    #[serde(default)]
    pub id: Value,
    /// Whether `result` or `error` follows.
    pub ok: bool,
    /// What was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<WireFailure>,
}

impl Request {
    /// Reads a line. The failure comes with the id, if one could be made out, so that the client can tell which it was.
    pub fn parse(line: &[u8]) -> Result<Self, (Value, Failure)> {
        let malformed = |id: &Value, what: &dyn std::fmt::Display| {
            (id.clone(), Failure::new(Class::Protocol, format!("not a request: {what}")))
        };
        let value: Value = serde_json::from_slice(line).map_err(|cause| malformed(&Value::Null, &cause))?;
        let Value::Object(mut fields) = value else {
            return Err(malformed(&Value::Null, &"a JSON object is wanted"));
        };
        let id = fields.remove("id").unwrap_or(Value::Null);
        let command = serde_json::from_value(Value::Object(fields)).map_err(|cause| malformed(&id, &cause))?;
        Ok(Self { id, command })
    }

    /// The line, with its end.
    pub fn line(&self) -> Vec<u8> {
        let mut value = serde_json::to_value(&self.command).expect("a command is plain data");
        value["id"] = self.id.clone();
        let mut line = value.to_string().into_bytes();
        line.push(b'\n');
        line
    }
}

impl Answer {
    /// The answer to a request.
    pub fn new(id: Value, outcome: Outcome<Value>) -> Self {
        match outcome {
            Ok(result) => Self { id, ok: true, result: Some(result), error: None },
            Err(failure) => Self { id, ok: false, result: None, error: Some((&failure).into()) },
        }
    }

    /// The line, with its end.
    pub fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("an answer is plain data");
        line.push(b'\n');
        line
    }

    /// What the client makes of it.
    pub fn outcome(self) -> Outcome<Value> {
        match self.error {
            Some(error) if !self.ok => Err(error.into()),
            _ if self.ok => Ok(self.result.unwrap_or(Value::Null)),
            _ => Err(Failure::new(Class::Protocol, "the daemon's answer is neither a result nor an error")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_request_is_read_with_its_defaults() {
        let request = Request::parse(br#"{"id":7,"cmd":"del","device":"vol1"}"#).unwrap();
        let command = Command::Del { device: "vol1".into(), force: false, timeout_ms: 10_000 };
        assert_eq!(request, Request { id: json!(7), command });
    }

    #[test]
    fn what_is_written_is_read_again() {
        for command in
            [Command::Ping {}, Command::List {}, Command::Del { device: "a".into(), force: true, timeout_ms: 5 }]
        {
            let request = Request { id: json!(1), command };
            let line = request.line();
            assert_eq!(line.last(), Some(&b'\n'));
            assert_eq!(Request::parse(&line[..line.len() - 1]), Ok(request));
        }
    }

    #[test]
    fn garbage_gets_one_answer_and_no_panic() {
        // Whatever comes in, including what a hostile client would send.
        let deep = "[".repeat(100_000);
        for line in ["", "{", "null", "[]", "\0", "{\"cmd\":\"fly\"}", "{\"cmd\":5}", "{\"cmd\":\"del\"}", &deep] {
            let (_, failure) = Request::parse(line.as_bytes()).unwrap_err();
            assert_eq!(failure.class, Class::Protocol, "{line:.20}");
        }
    }

    #[test]
    fn a_refused_request_keeps_its_id() {
        let (id, _) = Request::parse(br#"{"id":"x","cmd":"ping","loud":true}"#).unwrap_err();
        assert_eq!(id, json!("x"));
    }

    #[test]
    fn a_failure_travels_with_class_message_and_exit_code() {
        let answer = Answer::new(json!(1), Err(Failure::new(Class::Busy, "mounted at /srv")));
        let text = String::from_utf8(answer.line()).unwrap();
        assert_eq!(
            text,
            "{\"id\":1,\"ok\":false,\"error\":{\"class\":\"E-BUSY\",\"message\":\"mounted at /srv\",\"exit\":5}}\n"
        );
        assert_eq!(answer.outcome().unwrap_err().class, Class::Busy);
    }
}
