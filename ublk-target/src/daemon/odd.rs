//! What is allowed and probably not meant in what a command asks for, told to who asked and to the log.
//!
//! ```text
//!   settings ─► what is odd about them ──────────────┐
//!   in force afterwards ─► long waits, shared paths ─┴─► `warnings` of the answer, log
//! ```
//!
//! The words are those of `check`, about what the command touched: whoever raises a limit hears nothing of other devices.

use serde_json::{Value, json};
use throttle_core::tree::DEPTH_MAX;
use ublk_throttle_config::{Config, Warning, odd_device, odd_group};

use crate::log;

/// About a device: how it was `given`, and how it is now. About the groups above it too, if it `is_new` in them.
pub fn device(config: &Config, name: &str, given: Vec<Warning>, is_new: bool) -> Vec<log::Warning> {
    let group = config.device(name).and_then(|device| device.group.as_deref()).filter(|_| is_new);
    let own = given.into_iter().chain(odd_device(config, name));
    about("device", name, own).chain(above(config, group)).collect()
}

/// The same about a group.
pub fn group(config: &Config, name: &str, given: Vec<Warning>, is_new: bool) -> Vec<log::Warning> {
    let parent = config.group(name).and_then(|group| group.parent.as_deref()).filter(|_| is_new);
    let own = given.into_iter().chain(odd_group(config, name));
    about("group", name, own).chain(above(config, parent)).collect()
}

fn about(what: &str, name: &str, odd: impl Iterator<Item = Warning>) -> impl Iterator<Item = log::Warning> {
    odd.map(move |odd| log::Warning::of_config(format_args!("{what} {name:?}: {odd}")))
}

/// What is odd about a group and those above it.
fn above<'c>(config: &'c Config, group: Option<&'c str>) -> impl Iterator<Item = log::Warning> {
    let parent = |name: &&str| config.group(name).and_then(|group| group.parent.as_deref());
    let groups = std::iter::successors(group, parent).take(DEPTH_MAX);
    groups.flat_map(|name| about("group", name, odd_group(config, name).into_iter()))
}

/// Logs them, and puts them into an answer.
pub fn tell(odd: &[log::Warning], mut answer: Value) -> Value {
    odd.iter().for_each(log::Warning::log);
    answer["warnings"] = json!(odd.iter().map(ToString::to_string).collect::<Vec<_>>());
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use ublk_throttle_config::{change_device, parse};

    #[test]
    fn a_command_hears_what_is_odd_about_what_it_touched_and_no_more() {
        // 128 requests at 1 a second wait 128 s, in d's own limits and in those of `top`; z has nothing to do with it.
        let text = "version: 1\ngroups: { top: { limits: { iops: 1 } }, g: { parent: top } }\ndevices:\n  \
                    d: { backend: { memory: 1MiB }, group: g }\n  z: { backend: { memory: 1MiB }, limits: { iops: 1 } }\n";
        let (mut config, _) = parse("f.yaml", text.as_bytes()).unwrap();
        let (after, given) = change_device(&config.devices[0], &[("iops", "1"), ("bps", "0")]).unwrap();
        config.devices[0] = after;
        let told = |is_new| {
            let odd = device(&config, "d", given.clone(), is_new);
            odd.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let hold = "the last of 128 requests at once waits 128 s at this rate; a lower depth bounds that";
        let own = [
            "warning[W-CONFIG]: device \"d\": bps-total: 0 means no limit; write `unlimited`, or remove the key, to say so"
                .to_owned(),
            format!("warning[W-CONFIG]: device \"d\": {hold}"),
        ];
        assert_eq!(told(false), own);
        assert_eq!(told(true)[2..], [format!("warning[W-CONFIG]: group \"top\": {hold}")]);
        assert_eq!(group(&config, "g", Vec::new(), true).len(), 1);
        assert!(group(&config, "g", Vec::new(), false).is_empty());
    }
}
