//! The example traces, played through `ublk-throttle simulate`: what the limits of the examples do to a load.

use std::process::Command;

use anyhow::Result;

use crate::build;
use crate::install;
use crate::process;
use crate::workspace;

/// Configuration and trace, below `config/examples`; what is to be seen in them is told in `traces/README.md`.
const EXAMPLES: [(&str, &str); 3] =
    [("burst.yaml", "burst.jsonl"), ("fairness.yaml", "fairness.jsonl"), ("fairness.yaml", "raise.jsonl")];

/// The chore `simulate`.
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
