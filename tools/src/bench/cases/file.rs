//! A file on tmpfs, against the loop targets of kublk and rublk. All sides use the page cache and
//! have the same queues and depth.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{COPIES, Finding, Start, as_fast_as, is_offered, loaded, without_batches, zero_copy};
use crate::bench::bar::Bar;
use crate::bench::bench::Bench;
use crate::bench::load::Load;
use crate::bench::peers::{Commands, Kublk, Ours, Rublk};

/// Size of a file in MiB. Five files fit in half of the guest's memory of 3 GiB, the size of its
/// tmpfs.
const SIZE: u64 = 256;

/// Request size from which on copies are most of a request's cost.
const LARGE: u32 = 65536;

/// Runs the case. For large requests on a kernel with zero copy, a second side of ours with zero
/// copy off is compared with the peers' copies as well.
pub fn run(bench: &Bench, block: u32) -> Result<Finding> {
    let queues = bench.plan.queues;
    let (our_file, rublk_file, kublk_file) = (written("ours")?, written("rublk")?, written("kublk")?);
    let without_batches = without_batches()?;
    let batched_file = without_batches.is_none().then(|| written("batched")).transpose()?;
    let compares_copies = block >= LARGE && is_offered(zero_copy::FEATURE)?;
    let our_copied = compares_copies.then(|| written("copied")).transpose()?;
    let start = |name: &str, file: &Written, key: &str| {
        let device = format!("{name}: {{ backend: {{ file: {} }}, queues: {queues}{key} }}", file.path.display());
        Ours::start(name, &format!("devices:\n  {device}\n"))
    };
    let load = Load { rw: "randread", block, seconds: bench.plan.seconds, rate: None };
    let mut starts: Vec<(&str, Start<'_>)> = vec![
        ("ours file", Box::new(|| Ok(Box::new(start("file", &our_file, "")?)))),
        ("rublk loop", Box::new(|| Ok(Box::new(Rublk::file(101, queues, &rublk_file.path)?)))),
        ("kublk loop", Box::new(|| Ok(Box::new(Kublk::file(105, queues, Commands::EachTag, &kublk_file.path)?)))),
    ];
    if let Some(file) = &batched_file {
        starts.push((
            "kublk loop -b",
            Box::new(|| Ok(Box::new(Kublk::file(106, queues, Commands::Batched, &file.path)?))),
        ));
    }
    let peers = 1..starts.len();
    let mut bars: Vec<Bar> = peers.clone().flat_map(|peer| as_fast_as(0, peer, 1.0, 1.0)).collect();
    if let Some(our_copied) = &our_copied {
        let place = starts.len();
        starts.push((
            "ours, zero-copy: off",
            Box::new(|| Ok(Box::new(start("copied", our_copied, ", zero-copy: 'off'")?))),
        ));
        bars = bars.into_iter().map(|bar| bar.not_in_instructions(COPIES)).collect();
        bars.extend(peers.flat_map(|peer| as_fast_as(place, peer, 1.0, 1.0)));
    }
    let sides = loaded(bench, &starts, load)?;
    let mut notes = vec![
        "ours with the default, zero-copy: auto; all through the page cache, on tmpfs".to_owned(),
        "kublk opens its file with O_DIRECT, which tmpfs serves out of the page cache all the same".to_owned(),
    ];
    notes.extend(without_batches);
    Ok(Finding::Measured { sides, bars, notes })
}

/// A file that is removed when dropped.
pub struct Written {
    /// Path of the file.
    pub path: PathBuf,
}

/// Creates a file on tmpfs and writes every page, because tmpfs serves reads of a hole without any
/// page of the file.
pub fn written(name: &str) -> Result<Written> {
    let path = Path::new("/dev/shm").join(format!("bench-{name}.img"));
    fs::File::create(&path).with_context(|| path.display().to_string())?;
    fill(&path, SIZE)?;
    Ok(Written { path })
}

/// Writes the first `size` MiB of an existing file or device.
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
