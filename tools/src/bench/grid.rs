//! How late things that are due on a grid come: a bare ring's timeout, reads of a throttled device, and reads of one that is not
//! throttled by a client that keeps to the grid itself.
//!
//! ```text
//!   grid      |    2 ms    |            |            |
//!   ring      |.           |..          |.           |         a wait until each line, then a look at the clock
//!   held      | .          | .          | ...        | .       reads one at a time: each is held until its line
//!   paced     | ..         | ..         | ...        | ..      a wait until each line, then a read that nothing holds
//! ```
//!
//! Where a ring's lines are is known, and the daemon knows its own; those two can be compared as they are. What the throttle's
//! lines are is not known to its client, only that they are 2 ms apart: the earliest of all reads stands for one that was not late,
//! and the same is done to the paced ones.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use io_uring::IoUring;
use io_uring::types::{SubmitArgs, Timespec};
use nix::errno::Errno;

/// Between two lines: 500 a second.
pub const STEP: Duration = Duration::from_millis(2);

/// Reads that use up what the bucket has in hand: a tenth of a second's worth, and as many again to settle.
const LEAD: u32 = 100;

/// A read's size, and what its memory must be aligned to.
const BLOCK: usize = 4096;

/// Waits of a ring with nothing in it until lines ahead; how late each came, in microseconds.
pub fn ring(count: u32) -> Result<Vec<f64>> {
    let mut late = Vec::with_capacity(count as usize);
    on_each_line(count, |_, lateness, _| {
        late.push(lateness);
        Ok(())
    })?;
    Ok(late)
}

/// Reads of a device that lets one go at each line; how late each was back, in microseconds above the earliest.
pub fn held(node: &Path, count: u32) -> Result<Vec<f64>> {
    let mut reader = Reader::open(node)?;
    let mut seen = Vec::with_capacity(count as usize);
    for number in 0..LEAD + count {
        let back = reader.read(number)?;
        if number >= LEAD {
            seen.push(back);
        }
    }
    Ok(lateness(&seen))
}

/// Reads of a device that holds nothing, each begun when a ring's wait until its line is over: what [`held`] would be with a
/// timer of the client's own in the throttle's place. And how late each wait was over, as of [`ring`], beside such reads; but for the
/// lines that a read was not back for, which are not waited for.
pub fn paced(node: &Path, count: u32) -> Result<(Vec<f64>, Vec<f64>)> {
    let mut reader = Reader::open(node)?;
    let (mut seen, mut late) = (Vec::with_capacity(count as usize), Vec::with_capacity(count as usize));
    on_each_line(count, |line, lateness, is_waited_for| {
        late.extend(is_waited_for.then_some(lateness));
        seen.push(reader.read(line)?);
        Ok(())
    })?;
    Ok((lateness(&seen), late))
}

/// Does something whenever a ring's wait until a line is over: told its number, how late that was in microseconds, and whether the
/// line was yet to come when the wait began.
fn on_each_line(count: u32, mut act: impl FnMut(u32, f64, bool) -> Result<()>) -> Result<()> {
    // A timer of this thread fires when it is due, not when it suits the kernel.
    nix::sys::prctl::set_timerslack(1).context("cannot set the timer slack")?;
    let ring = IoUring::new(4).context("cannot make a ring")?;
    let start = Instant::now() + STEP;
    for line in 0..count {
        let due = start + STEP * line;
        let left = due.saturating_duration_since(Instant::now());
        let wait = Timespec::from(left);
        match ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&wait)) {
            Err(error) if error.raw_os_error() == Some(Errno::ETIME as i32) => {
                let lateness = due.elapsed().as_secs_f64() * 1e6;
                act(line, lateness, !left.is_zero())?;
            }
            Err(error) => return Err(error).context("a ring's wait"),
            Ok(_) => bail!("a ring with nothing in it had an event"),
        }
    }
    Ok(())
}

/// Reads past the page cache, one at a time.
struct Reader {
    file: File,
    memory: Vec<u8>,
}

impl Reader {
    fn open(node: &Path) -> Result<Reader> {
        let file = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(node);
        let file = file.with_context(|| format!("cannot open {}", node.display()))?;
        Ok(Reader { file, memory: vec![0; 2 * BLOCK] })
    }

    /// When the read was back.
    fn read(&mut self, number: u32) -> Result<Instant> {
        let aligned = self.memory.as_ptr().align_offset(BLOCK);
        let place = u64::from(number) * 8 * BLOCK as u64;
        self.file.read_exact_at(&mut self.memory[aligned..aligned + BLOCK], place).context("cannot read the device")?;
        Ok(Instant::now())
    }
}

/// How far behind a grid each of these is, in microseconds, if the earliest of them is on it.
fn lateness(seen: &[Instant]) -> Vec<f64> {
    let Some(&start) = seen.first() else { return Vec::new() };
    let behind = |(line, &at): (usize, &Instant)| {
        at.duration_since(start).as_secs_f64() * 1e6 - STEP.as_secs_f64() * 1e6 * line as f64
    };
    let behind: Vec<f64> = seen.iter().enumerate().map(behind).collect();
    let earliest = behind.iter().copied().fold(f64::INFINITY, f64::min);
    behind.into_iter().map(|behind| behind - earliest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lateness_is_told_against_the_earliest() {
        // The first was 30 us late, the third on time: the grid is the third's.
        let start = Instant::now();
        let us = Duration::from_micros;
        let seen = [start + us(30), start + us(2010), start + us(4000), start + us(6500)];
        let late: Vec<f64> = lateness(&seen).into_iter().map(f64::round).collect();
        assert_eq!(late, [30.0, 10.0, 0.0, 500.0]);
    }

    #[test]
    fn bare_ring_is_never_early() {
        // A kernel without io_uring, or one where it is forbidden, is no fault of ours.
        if let Ok(late) = ring(20) {
            assert!(late.len() == 20 && late.iter().all(|&late| late > 0.0), "{late:?}");
        }
    }
}
