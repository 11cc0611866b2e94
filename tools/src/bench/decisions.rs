//! What a decision of the throttle costs, beside a peer's: the criterion benchmarks of `throttle-core`.
//!
//! Times depend on the machine and on what else it does; what counts are the ratios within one run.

use anyhow::Result;

use crate::build::cargo;
use crate::install;
use crate::process;

/// Runs them; the arguments go to criterion.
pub fn run(criterion: &[String]) -> Result<u8> {
    install::packages(&[install::BUILD])?;
    let mut bench = cargo();
    bench.args(["bench", "--package", "throttle-core", "--bench", "decision", "--"]).args(criterion);
    process::run(&mut bench)?;
    Ok(0)
}
