//! The protocol of the control socket: one JSON object per line, in both directions. Version 1.
//!
//! ```text
//!   → {"id":1,"cmd":"ping"}
//!   ← {"id":1,"ok":true,"result":{"protocol":1,"pid":812,"version":"0.1.0"}}
//!   → {"id":2,"cmd":"del","device":"vol1","force":false,"timeout-ms":10000}
//!   ← {"id":2,"ok":false,"error":{"class":"E-BUSY","message":"…","exit":5}}
//! ```
//!
//! The client chooses `id`, any JSON value, and the answer repeats it unchanged. Each request gets one
//! answer, also a long one: when its work ends, or at its timeout. Commands and their fields mirror the
//! command line; unknown commands and fields are refused. `man/ublk-throttle-protocol.7` describes the
//! whole protocol.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::device::PATIENCE;
use crate::error::{Class, Failure, OrFail, Outcome, WireFailure};
use crate::settings::Settings;

/// The version of the protocol, which `ping` reports as `protocol`. The version grows with each change that a client of
/// the old version would misunderstand; new commands and new fields of answers are no such change.
pub const VERSION: u32 = 1;

/// The longest line that the daemon reads, in bytes.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// A command from a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case", rename_all_fields = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// Checks that the daemon is alive: the answer has its process id and versions.
    Ping {},
    /// Lists every device and group.
    List {},
    /// Reports the counters of devices and groups since they were made.
    Stats {
        /// Only this device or group.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
    /// Makes a device.
    Add {
        /// The name of the device.
        device: String,
        /// Keys of a device, its backend and its limits in a configuration: `file`, `size`, `iops-total`, …
        settings: Settings,
        /// Time until the answer at the latest, in milliseconds; the work goes on.
        #[serde(default = "default_timeout")]
        timeout_ms: u64,
    },
    /// Removes a device or a group; the request names one of the two.
    Del {
        /// The name or the node of the device.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        device: Option<String>,
        /// The name of the group.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        group: Option<String>,
        /// Remove a device even if it is in use.
        #[serde(default)]
        force: bool,
        /// Time until the answer at the latest, in milliseconds; the removal goes on.
        #[serde(default = "default_patience")]
        timeout_ms: u64,
    },
    /// Changes a device or a group; the request names one of the two. Either all settings change or none.
    Set {
        /// The name or the node of the device.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        device: Option<String>,
        /// The name of the group.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        group: Option<String>,
        /// The new values of limits, weight, group and so on, with the keys of a configuration.
        settings: Settings,
        /// Make the group if there is none.
        #[serde(default)]
        create: bool,
        /// Time until the answer at the latest, in milliseconds, if a size changes.
        #[serde(default = "default_timeout")]
        timeout_ms: u64,
    },
    /// Brings the settings of a configuration file into force.
    Reload {
        /// The path of the file; without it, the file of the start of the daemon.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        config: Option<PathBuf>,
        /// Report the differences only, without a change.
        #[serde(default)]
        dry_run: bool,
        /// Allow devices to become smaller, where the file sets a smaller size or the disk of the backend is smaller.
        #[serde(default, skip_serializing_if = "is_false")]
        allow_shrink: bool,
        /// Limit for making, resizing and removing the devices, in milliseconds.
        #[serde(default = "default_timeout")]
        timeout_ms: u64,
    },
    /// Ends the daemon and leaves its devices, all or none, to the next daemon, which sends this command.
    HandOver {},
}

/// `allow_shrink` is not sent while it is false: an older daemon refuses requests with unknown fields.
#[allow(clippy::trivially_copy_pass_by_ref)] // The signature that serde requires.
const fn is_false(is: &bool) -> bool {
    !*is
}

const fn default_timeout() -> u64 {
    10_000
}

const fn default_patience() -> u64 {
    PATIENCE.as_millis() as u64
}

impl Command {
    /// Whether the command changes nothing, so that clients with read access may send it.
    pub const fn is_reading(&self) -> bool {
        matches!(self, Self::Ping {} | Self::List {} | Self::Stats { .. })
    }

    /// Time for which the daemon may work on the command before it answers, in milliseconds.
    pub const fn timeout_ms(&self) -> u64 {
        match self {
            Self::Ping {} | Self::List {} | Self::Stats { .. } | Self::HandOver {} => 0,
            Self::Add { timeout_ms, .. }
            | Self::Del { timeout_ms, .. }
            | Self::Set { timeout_ms, .. }
            | Self::Reload { timeout_ms, .. } => *timeout_ms,
        }
    }
}

/// A line from a client.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The `id` of the client.
    pub id: Value,
    /// The command to carry out.
    pub command: Command,
}

/// A line to a client.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Answer {
    /// The `id` of the request; null if the request has none, or none that could be read.
    #[serde(default)]
    pub id: Value,
    /// Whether `result` or `error` follows.
    pub ok: bool,
    /// The result of the command, if `ok`.
    #[serde(default)]
    pub result: Option<Value>,
    /// The failure of the command, if not `ok`.
    #[serde(default)]
    pub error: Option<WireFailure>,
}

impl Request {
    /// Parses a line. The failure carries the id (null if unreadable), by which the client recognizes its request.
    pub fn parse(line: &[u8]) -> Result<Self, (Value, Failure)> {
        let malformed = |id: &Value, what: &dyn std::fmt::Display| {
            // The message quotes the line of the client, which may be long.
            let what: String = what.to_string().chars().take(200).collect();
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

    /// The line of a request, with its newline. Fails if a path in it is not UTF-8.
    pub fn line(&self) -> Outcome<Vec<u8>> {
        let mut value = serde_json::to_value(&self.command).or_fail(Class::Config, "the request cannot be sent")?;
        value["id"] = self.id.clone();
        let mut line = value.to_string().into_bytes();
        line.push(b'\n');
        Ok(line)
    }
}

impl Answer {
    /// The line of an answer, with its newline. `outcome` holds the result as JSON text, so that a long result is
    /// serialized once and shared by many answers.
    pub fn line(id: &Value, outcome: &Outcome<impl AsRef<str>>) -> Vec<u8> {
        let mut line = match outcome {
            Ok(result) => format!("{{\"id\":{id},\"ok\":true,\"result\":{}}}", result.as_ref()),
            Err(failure) => {
                let error = serde_json::to_string(&WireFailure::from(failure)).expect("a failure is plain data");
                format!("{{\"id\":{id},\"ok\":false,\"error\":{error}}}")
            }
        }
        .into_bytes();
        line.push(b'\n');
        line
    }

    /// The result or the failure of the command. E-PROTOCOL if the answer has neither.
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

    fn del(device: &str, force: bool, timeout_ms: u64) -> Command {
        Command::Del { device: Some(device.into()), group: None, force, timeout_ms }
    }

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        Settings(pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect())
    }

    #[test]
    fn a_request_is_read_with_its_defaults() {
        let request = Request::parse(br#"{"id":7,"cmd":"del","device":"vol1"}"#).unwrap();
        assert_eq!(request, Request { id: json!(7), command: del("vol1", false, 4_500) });
    }

    #[test]
    fn numbers_and_texts_are_both_values_of_settings() {
        let line = br#"{"cmd":"set","group":"g","settings":{"iops-total":500,"bps-read":"10MiB/s","parent":null}}"#;
        let Command::Set { settings: read, .. } = Request::parse(line).unwrap().command else { panic!("set") };
        assert_eq!(read, settings(&[("bps-read", "10MiB/s"), ("iops-total", "500"), ("parent", "none")]));
    }

    #[test]
    fn what_is_written_is_read_again() {
        let new = settings(&[("create", "true"), ("file", "/srv/a"), ("iops", "5")]);
        for command in [
            Command::Ping {},
            Command::List {},
            Command::Stats { name: Some("a".into()) },
            Command::Add { device: "a".into(), settings: new, timeout_ms: 1 },
            del("a", true, 5),
            Command::Set {
                device: None,
                group: Some("g".into()),
                settings: settings(&[("weight", "7")]),
                create: true,
                timeout_ms: 1,
            },
            Command::Reload { config: Some("/etc/x.yaml".into()), dry_run: true, allow_shrink: false, timeout_ms: 5 },
            Command::Reload { config: None, dry_run: false, allow_shrink: true, timeout_ms: 5 },
        ] {
            let request = Request { id: json!(1), command };
            let line = request.line().unwrap();
            assert_eq!(line.last(), Some(&b'\n'));
            assert_eq!(Request::parse(&line[..line.len() - 1]), Ok(request));
        }
    }

    #[test]
    fn f33_garbage_gets_one_answer_and_no_panic() {
        // Any line, including those of a hostile client, fails with E-PROTOCOL.
        let (deep, braces) = ("[".repeat(100_000), "{\"a\":".repeat(100_000));
        let nested = format!("{{\"cmd\":\"set\",\"group\":\"g\",\"settings\":{}", "{\"a\":".repeat(1000));
        for line in [
            "",
            "{",
            "null",
            "[]",
            "\0",
            "{\"cmd\":\"ping\"}\0",
            "{\"cmd\":\"fly\"}",
            "{\"cmd\":5}",
            "{\"cmd\":\"ping\",\"loud\":true}",
            "{\"cmd\":\"del\",\"device\":7}",
            "{\"cmd\":\"del\",\"device\":\"a\",\"timeout-ms\":-1}",
            "{\"cmd\":\"del\",\"device\":\"a\",\"timeout-ms\":18446744073709551616}",
            "{\"cmd\":\"del\",\"device\":\"a\",\"timeout-ms\":1e400}",
            "{\"cmd\":\"set\",\"group\":\"g\",\"settings\":[]}",
            "{\"cmd\":\"set\",\"group\":\"g\",\"settings\":{\"iops\":[1]}}",
            &deep,
            &braces,
            &nested,
        ] {
            let (_, failure) = Request::parse(line.as_bytes()).unwrap_err();
            assert_eq!(failure.class, Class::Protocol, "{line:.80}");
            assert!(failure.message.len() < 400, "{}", failure.message.len());
        }
        assert!(Request::parse(b"\xff\xfe{}").is_err());
    }

    #[test]
    fn a_refused_request_keeps_its_id() {
        let (id, _) = Request::parse(br#"{"id":"x","cmd":"ping","loud":true}"#).unwrap_err();
        assert_eq!(id, json!("x"));
    }

    #[test]
    fn a_failure_travels_with_class_message_and_exit_code() {
        let line = Answer::line(&json!(1), &Err::<&str, _>(Failure::new(Class::Busy, "mounted at /srv")));
        let text = String::from_utf8(line).unwrap();
        assert_eq!(
            text,
            "{\"id\":1,\"ok\":false,\"error\":{\"class\":\"E-BUSY\",\"message\":\"mounted at /srv\",\"exit\":5}}\n"
        );
        let answer: Answer = serde_json::from_str(&text).unwrap();
        assert_eq!(answer.outcome().unwrap_err().class, Class::Busy);
        let line = Answer::line(&json!([2]), &Ok("{\"a\":1}"));
        let answer: Answer = serde_json::from_slice(&line).unwrap();
        assert_eq!((answer.id.clone(), answer.outcome()), (json!([2]), Ok(json!({"a": 1}))));
    }

    #[test]
    fn the_manual_names_every_command_and_every_class() {
        // The manual page is written by hand, so this test compares it with the code.
        let page = include_str!("../man/ublk-throttle-protocol.7").replace("\\-", "-");
        for command in ["ping", "list", "stats", "add", "del", "set", "reload"] {
            assert!(page.contains(&format!("\"cmd\":\"{command}\"")), "{command}");
        }
        for class in Class::ALL {
            let exit = class.exit();
            assert!(page.contains(&format!("{}\t{exit}", class.name())), "{} with {exit}", class.name());
        }
    }
}
