//! The groups and devices of a configuration: their numbers by name.

use std::collections::BTreeMap;

use ublk_throttle_config::{Config, nearest};

/// A group or a device, by its number in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// The group of that number.
    Group(usize),
    /// The device of that number.
    Device(usize),
}

/// The names of a configuration.
#[derive(Debug)]
pub struct Cast {
    groups: Names,
    devices: Names,
}

#[derive(Debug)]
struct Names {
    kind: &'static str,
    numbers: BTreeMap<String, usize>,
}

impl Cast {
    /// The names of `config`.
    pub fn new(config: &Config) -> Self {
        let number = |names: Vec<&String>| names.into_iter().cloned().enumerate().map(|(n, name)| (name, n)).collect();
        Self {
            groups: Names { kind: "group", numbers: number(config.groups.iter().map(|group| &group.name).collect()) },
            devices: Names { kind: "device", numbers: number(config.devices.iter().map(|it| &it.name).collect()) },
        }
    }

    /// The number of a group, or the reason why it does not exist.
    pub fn group(&self, name: &str) -> Result<usize, String> {
        self.groups.find(name)
    }

    /// The number of a device, or the reason why it does not exist.
    pub fn device(&self, name: &str) -> Result<usize, String> {
        self.devices.find(name)
    }
}

impl Names {
    fn find(&self, name: &str) -> Result<usize, String> {
        self.numbers.get(name).copied().ok_or_else(|| {
            let kind = self.kind;
            let known = || self.numbers.keys().map(String::as_str);
            let cure = match nearest(name, known()) {
                Some(near) => format!("did you mean `{near}`?"),
                None if self.numbers.is_empty() => format!("the configuration has no {kind}s"),
                None => {
                    let more = if self.numbers.len() > 8 { ", …" } else { "" };
                    format!("there are: {}{more}", known().take(8).collect::<Vec<_>>().join(", "))
                }
            };
            format!("no {kind} {name:?} in the configuration; {cure}")
        })
    }
}
