//! `features`: the features of the kernel's ublk driver, and which of them are used.

use serde::Serialize;

use super::{say, say_json};
use crate::error::{Class, Failure, Outcome};
use crate::ublk::control::Control;
use crate::ublk::features::ALL;

#[derive(Serialize)]
struct Features {
    kernel: String,
    bits: String,
    features: Vec<Feature>,
}

#[derive(Serialize)]
struct Feature {
    name: String,
    bit: u32,
    offered: bool,
    used: bool,
    meaning: String,
}

/// Queries the driver and prints its features.
pub fn run(json: bool) -> Outcome<()> {
    let bits = Control::open()?.features().map_err(|errno| {
        Failure::new(Class::Failed, format!("the kernel does not tell its features: {}", errno.desc()))
    })?;
    let kernel = nix::sys::utsname::uname().map_or(String::new(), |name| name.release().to_string_lossy().into_owned());
    let known = ALL.iter().map(|feature| Feature {
        name: feature.name.to_owned(),
        bit: feature.bit,
        offered: bits & (1 << feature.bit) != 0,
        used: feature.is_used,
        meaning: feature.meaning.to_owned(),
    });
    // Bits of a newer kernel appear by number.
    let unknown = (ALL.len() as u32..64).filter(|bit| bits & (1 << bit) != 0).map(|bit| Feature {
        name: format!("bit {bit}"),
        bit,
        offered: true,
        used: false,
        meaning: "unknown to this version".to_owned(),
    });
    let features = Features { kernel, bits: format!("{bits:#x}"), features: known.chain(unknown).collect() };
    if json {
        say_json(&features);
        return Ok(());
    }
    say(format_args!("ublk of Linux {}: {}", features.kernel, features.bits));
    for feature in &features.features {
        let offered = if feature.offered { "yes" } else { "-" };
        let used = if feature.used { "used" } else { "" };
        say(format_args!("  {:<24} {offered:<4} {used:<5} {}", feature.name, feature.meaning));
    }
    Ok(())
}
