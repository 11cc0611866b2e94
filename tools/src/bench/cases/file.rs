//! A file on tmpfs, against rublk's loop: both through the page cache, with the same queues and depth.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Finding, as_fast_as, loaded};
use crate::bench::bench::Bench;
use crate::bench::load::Load;
use crate::bench::peers::{Ours, Rublk};

/// In MiB: small enough for two of them in the guest's memory.
const SIZE: u64 = 256;

/// Runs the case.
pub fn run(bench: &Bench, block: u32) -> Result<Finding> {
    let queues = bench.plan.queues;
    let (our_file, peer_file) = (written("ours")?, written("rublk")?);
    let backend = format!("{{ file: {} }}", our_file.path.display());
    let config = format!("devices:\n  file: {{ backend: {backend}, queues: {queues} }}\n");
    let load = Load { rw: "randread", block, seconds: bench.plan.seconds, rate: None };
    let sides = loaded(
        bench,
        &[
            ("ours file", Box::new(|| Ok(Box::new(Ours::start("file", &config)?)))),
            ("rublk loop", Box::new(|| Ok(Box::new(Rublk::file(101, queues, &peer_file.path)?)))),
        ],
        load,
    )?;
    let notes = vec!["ours with the default, zero-copy: auto; both through the page cache, on tmpfs".to_owned()];
    Ok(Finding::Measured { sides, bars: as_fast_as(1.0, 1.0), notes })
}

/// A file that is removed when dropped.
pub struct Written {
    /// Where it is.
    pub path: PathBuf,
}

/// A file on tmpfs with every page written: reads of a hole would measure something else.
pub fn written(name: &str) -> Result<Written> {
    let path = Path::new("/dev/shm").join(format!("bench-{name}.img"));
    fs::File::create(&path).with_context(|| path.display().to_string())?;
    fill(&path, SIZE)?;
    Ok(Written { path })
}

/// Writes that many MiB of what is there.
pub fn fill(path: &Path, size: u64) -> Result<()> {
    let file = fs::OpenOptions::new().write(true).open(path).with_context(|| path.display().to_string())?;
    let chunk = vec![0xa5; 1 << 20];
    let written = (0..size).try_for_each(|place| file.write_all_at(&chunk, place << 20));
    written.and_then(|()| file.sync_data()).with_context(|| format!("cannot fill {}", path.display()))
}

impl Drop for Written {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
