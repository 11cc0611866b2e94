//! Warnings about settings that a command may use but that its user probably did not mean.
//!
//! ```text
//!   settings of the command ─► odd values ───────────────────────────┐
//!   settings in force after the command ─► long waits, shared paths ─┴─► `warnings` of the answer, log
//! ```
//!
//! The texts are those of `check`. Warnings cover the device or group that the command changed, and the
//! groups above it if the command put it there. A command that raises a limit of one device gets no
//! warning about a second device.

use serde_json::{Value, json};
use throttle_core::tree::DEPTH_MAX;
use ublk_throttle_config::{Config, Warning, odd_device, odd_group};

use crate::log;

/// The warnings about a device: `given`, from parsing the command, then those about its settings in
/// force. With `is_new` (the command put the device into its group) also those about the groups above.
pub fn device(config: &Config, name: &str, given: Vec<Warning>, is_new: bool) -> Vec<log::Warning> {
    let group = config.device(name).and_then(|device| device.group.as_deref()).filter(|_| is_new);
    let own = given.into_iter().chain(odd_device(config, name));
    about("device", name, own).chain(above(config, group)).collect()
}

/// The warnings about a group, as [`device`] has them for a device.
pub fn group(config: &Config, name: &str, given: Vec<Warning>, is_new: bool) -> Vec<log::Warning> {
    let parent = config.group(name).and_then(|group| group.parent.as_deref()).filter(|_| is_new);
    let own = given.into_iter().chain(odd_group(config, name));
    about("group", name, own).chain(above(config, parent)).collect()
}

fn about(what: &str, name: &str, odd: impl Iterator<Item = Warning>) -> impl Iterator<Item = log::Warning> {
    odd.map(move |odd| log::Warning::of_config(format_args!("{what} {name:?}: {odd}")))
}

/// The warnings about a group and its ancestors, at most [`DEPTH_MAX`] levels.
fn above<'c>(config: &'c Config, group: Option<&'c str>) -> impl Iterator<Item = log::Warning> {
    let parent = |name: &&str| config.group(name).and_then(|group| group.parent.as_deref());
    let groups = std::iter::successors(group, parent).take(DEPTH_MAX);
    groups.flat_map(|name| about("group", name, odd_group(config, name).into_iter()))
}

/// Logs the warnings, and adds them to an answer.
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
        // The last of 128 requests waits 128 s at 1 a second, for the limits of `d` and for those of `top`. No
        // command changed `z`, so `z` gets no warning.
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
