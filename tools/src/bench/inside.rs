//! The part of a bench that runs in the guest: case by case, then the reports.

use std::env;
use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};

use super::bar::Bar;
use super::bench::{Bench, Plan};
use super::cases::{Case, Finding};
use super::cgroup;
use super::machine;
use super::report::{self, Came, INSTRUCTIONS, Outcome, Report};

/// Runs the cases and writes the reports; returns the exit code.
pub fn run(plan: &Plan, cases: &[Case], kernel: &str, folder: &Path) -> Result<u8> {
    cgroup::prepare()?;
    let bench = Bench::new(*plan);
    let mut report = Report {
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        processors: machine::processors(),
        clock: env::var("XTASK_VM_CLOCK").unwrap_or_else(|_| "host".to_owned()),
        plan: *plan,
        cases: Vec::new(),
    };
    for (number, case) in cases.iter().enumerate() {
        println!("\n== {}/{} {}: {}", number + 1, cases.len(), case.name(), case.claim());
        let outcome = one(*case, &bench, report.clock == INSTRUCTIONS);
        print!("{}", report::text::case(&outcome));
        report.cases.push(outcome);
        // Written after each case, so that its numbers survive if a later case crashes the guest.
        write(&report, kernel, folder)?;
    }
    println!("\n{}", report::text::verdicts(&report));
    println!(
        "\n{}\n{}",
        folder.join(format!("{kernel}.html")).display(),
        folder.join(format!("{kernel}.json")).display()
    );
    Ok(u8::from(report.is_failed()))
}

fn one(case: Case, bench: &Bench, are_instructions_time: bool) -> Outcome {
    let start = Instant::now();
    let came = match case.run(bench) {
        Ok(Finding::Measured { sides, bars, notes }) => {
            let judge = |bar: &Bar| match bar.doubt_in_instructions {
                Some(why) if are_instructions_time => bar.judge(&sides).doubted(why),
                _ => bar.judge(&sides),
            };
            let judged = bars.iter().map(judge).collect();
            Came::Measured { sides, judged, notes }
        }
        Ok(Finding::Skipped(why)) => Came::Skipped(why),
        Err(error) => Came::Failed(format!("{error:#}")),
    };
    Outcome { name: case.name(), claim: case.claim().to_owned(), took: start.elapsed(), came }
}

fn write(report: &Report, kernel: &str, folder: &Path) -> Result<()> {
    for (suffix, text) in [("json", report::json::text(report)), ("html", report::html::page(report))] {
        let path = folder.join(format!("{kernel}.{suffix}"));
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
