//! A live change in a trace:
//! `"set": {"group": "tenant-a", "limits": {"iops-total": 500}, "weight": 200}`.
//!
//! ```text
//!   "group" alone       the group to be changed        "parent"  its new parent; null: none
//!   "device"            the device to be changed       "group"   its new group; null: none
//! ```

use serde_json::{Map, Value};
use throttle_core::limits::Limits;
use throttle_core::share::WEIGHT_MAX;
use ublk_throttle_config::{Fault, change_limits, nearest};

use super::cast::{Cast, Node};

/// A change of a group or device; settings that it does not name stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// The group or device.
    pub node: Node,
    /// The new group above it; `Some(None)`: none.
    pub above: Option<Option<usize>>,
    /// Its new weight among the children of its parent.
    pub weight: Option<u32>,
    /// Keys and values as in the configuration.
    limits: Vec<(String, String)>,
}

const FOR_GROUP: [&str; 4] = ["group", "limits", "weight", "parent"];
const FOR_DEVICE: [&str; 4] = ["device", "limits", "weight", "group"];

impl Set {
    /// Parses the value of `"set":`; the error names the value found and the cure.
    pub fn read(value: &Value, cast: &Cast) -> Result<Self, String> {
        let Value::Object(said) = value else {
            return Err(format!(
                r#""set": {value}; an object belongs here, like {{"device":"vol1","limits":{{"iops":500}}}}"#
            ));
        };
        let name = |key: &str, value: &Value| match value {
            Value::String(name) => Ok(name.clone()),
            _ => Err(format!("{key:?}: {value} in \"set\"; a name belongs here")),
        };
        let above = |key: &str| match said.get(key) {
            None => Ok(None),
            Some(Value::Null) => Ok(Some(None)),
            Some(value) => Ok::<_, String>(Some(Some(cast.group(&name(key, value)?)?))),
        };
        let (node, above, keys) = match (said.get("device"), said.get("group")) {
            (Some(device), _) => (Node::Device(cast.device(&name("device", device)?)?), above("group")?, FOR_DEVICE),
            (None, Some(group)) => (Node::Group(cast.group(&name("group", group)?)?), above("parent")?, FOR_GROUP),
            (None, None) => return Err(r#""set" names neither a "device" nor a "group"; add one"#.to_owned()),
        };
        if let Some(key) = said.keys().find(|key| !keys.contains(&key.as_str())) {
            let hint = nearest(key, keys).map_or_else(String::new, |near| format!("did you mean `{near}`? "));
            return Err(format!("the key {key:?} in \"set\"; {hint}known keys: {}", keys.join(", ")));
        }
        Ok(Self { node, above, weight: weight(said)?, limits: limits(said)? })
    }

    /// The limits in force after the change; the error names their faults and the cures.
    pub fn limits_after(&self, in_force: &Limits) -> Result<Limits, String> {
        let named: Vec<(&str, &str)> = self.limits.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        change_limits(in_force, &named).map_err(|faults| said(&faults))
    }
}

fn said(faults: &[Fault]) -> String {
    let one = |fault: &Fault| match fault.path.as_str() {
        "" => format!("limits: {}; {}", fault.found, fault.cure),
        path => format!("limits.{path}: {}; {}", fault.found, fault.cure),
    };
    faults.iter().map(one).collect::<Vec<_>>().join("; ")
}

fn weight(said: &Map<String, Value>) -> Result<Option<u32>, String> {
    let Some(value) = said.get("weight") else { return Ok(None) };
    let weight = value.as_u64().and_then(|weight| u32::try_from(weight).ok());
    match weight.filter(|weight| (1..=WEIGHT_MAX).contains(weight)) {
        Some(weight) => Ok(Some(weight)),
        None => Err(format!("\"weight\": {value} in \"set\"; allowed: a whole number from 1 to {WEIGHT_MAX}")),
    }
}

fn limits(said: &Map<String, Value>) -> Result<Vec<(String, String)>, String> {
    let limits = match said.get("limits") {
        None => return Ok(Vec::new()),
        Some(Value::Object(limits)) => limits,
        Some(value) => {
            return Err(format!("\"limits\": {value} in \"set\"; an object belongs here, like {{\"iops\":500}}"));
        }
    };
    let text = |(key, value): (&String, &Value)| match value {
        Value::String(text) => Ok((key.clone(), text.clone())),
        Value::Number(number) => Ok((key.clone(), number.to_string())),
        _ => Err(format!("limits.{key}: {value}; a number belongs here, or a text like \"10MiB/s\" or \"unlimited\"")),
    };
    limits.iter().map(text).collect()
}
