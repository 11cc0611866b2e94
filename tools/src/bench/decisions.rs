//! CPU cost of a throttle decision, beside a peer's: the criterion benchmarks of `throttle-core`.
//!
//! Absolute times depend on the machine and its load. The results are the ratios within one run.

use anyhow::Result;

use crate::build::cargo;
use crate::install;
use crate::process;

/// Runs the benchmarks and passes `criterion` on to criterion as arguments.
pub fn run(criterion: &[String]) -> Result<u8> {
    install::packages(&[install::BUILD])?;
    let mut bench = cargo();
    bench.args(["bench", "--package", "throttle-core", "--bench", "decision", "--"]).args(criterion);
    process::run(&mut bench)?;
    Ok(0)
}
