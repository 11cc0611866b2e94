//! Plays the example traces through `ublk-throttle simulate`, to show the effect of the examples'
//! limits on a load.

use std::process::Command;

use anyhow::Result;

use crate::build;
use crate::install;
use crate::process;
use crate::workspace;

/// Configurations and traces below `config/examples`, which `traces/README.md` there explains.
const EXAMPLES: [(&str, &str); 3] =
    [("burst.yaml", "burst.jsonl"), ("fairness.yaml", "fairness.jsonl"), ("fairness.yaml", "raise.jsonl")];

/// The command `cargo xtask simulate`.
pub fn main() -> Result<u8> {
    install::packages(&[install::BUILD])?;
    build::daemon()?;
    let examples = workspace::root().join("config/examples");
    for (config, trace) in EXAMPLES {
        println!("\n== ublk-throttle simulate {config} --trace traces/{trace} --summary");
        let mut simulate = Command::new(build::daemon_path("release"));
        simulate
            .current_dir(&examples)
            .args(["simulate", config, "--summary", "--trace"])
            .arg(format!("traces/{trace}"));
        process::run(&mut simulate)?;
    }
    Ok(0)
}
