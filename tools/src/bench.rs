//! What a decision of the throttle costs, beside a peer's: the criterion benchmarks of `throttle-core`.
//!
//! Times depend on the machine and on what else it does; what counts are the ratios within one run.

use anyhow::Result;
use clap::Args;

use crate::build::cargo;
use crate::install;
use crate::process;

/// Measure what a decision of the throttle costs, beside governor's
///
/// Arguments after -- go to criterion: a filter, --quick, --save-baseline NAME.
#[derive(Args)]
pub struct Flags {
    /// Arguments for criterion
    #[arg(last = true, value_name = "ARGS")]
    criterion: Vec<String>,
}

/// The chore `bench`.
pub fn main(flags: &Flags) -> Result<u8> {
    install::packages(&[install::BUILD])?;
    let mut bench = cargo();
    bench.args(["bench", "--package", "throttle-core", "--bench", "decision", "--"]).args(&flags.criterion);
    process::run(&mut bench)?;
    Ok(0)
}
