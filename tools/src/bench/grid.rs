//! Lateness of events that are due on a grid of instants: the timeout of an idle ring, reads of a
//! throttled device, and reads of a device without limits by a client that keeps to the grid
//! itself.
//!
//! ```text
//!   grid      |    2 ms    |            |            |
//!   ring      |.           |..          |.           |         a wait until each line, then the clock is read
//!   held      | .          | .          | ...        | .       reads one at a time: each is held until its line
//!   paced     | ..         | ..         | ...        | ..      a wait until each line, then a read without a limit
//! ```
//!
//! The lines of the ring's grid are known, and the daemon knows those of its own, so both can be
//! compared directly. The client of a throttle knows only that the lines are 2 ms apart: the
//! earliest read of all counts as on time. The paced reads are evaluated in the same way.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use io_uring::IoUring;
use io_uring::types::{SubmitArgs, Timespec};
use nix::errno::Errno;

/// Distance of two lines: 500 a second.
pub const STEP: Duration = Duration::from_millis(2);

/// Reads before the measurement: 50 use up the bucket's burst credit (0.1 s worth), and 50 more
/// settle.
const LEAD: u32 = 100;

/// Size of a read, and alignment of its memory.
const BLOCK: usize = 4096;

/// Lateness of the timeout of an idle ring at each of `count` lines, in microseconds.
pub fn ring(count: u32) -> Result<Vec<f64>> {
    let mut late = Vec::with_capacity(count as usize);
    on_each_line(count, |_, lateness, _| {
        late.push(lateness);
        Ok(())
    })?;
    Ok(late)
}

/// Reads a device that dispatches one request at each line. Returns the lateness of each
/// completion, in microseconds after the earliest.
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

/// Reads a device without limits; a ring's timeout starts each read at its line. Compared with
/// [`held`], a timer of the client takes the place of the throttle's. Returns the lateness of each
/// completion as `held` does, and the lateness of each timeout as [`ring`] does. Timeouts of lines
/// that were past when the preceding read completed are left out.
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

/// Calls `act` at each line, when a ring's wait for that line has ended. `act` gets the number of
/// the line, the lateness in microseconds, and whether the line was still ahead when the wait
/// began.
fn on_each_line(count: u32, mut act: impl FnMut(u32, f64, bool) -> Result<()>) -> Result<()> {
    // Timer slack of 1 ns: a timer of this thread fires when it is due.
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

/// Reads a device with `O_DIRECT`, one request at a time.
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

    /// Reads a block and returns the instant of completion.
    fn read(&mut self, number: u32) -> Result<Instant> {
        let aligned = self.memory.as_ptr().align_offset(BLOCK);
        let place = u64::from(number) * 8 * BLOCK as u64;
        self.file.read_exact_at(&mut self.memory[aligned..aligned + BLOCK], place).context("cannot read the device")?;
        Ok(Instant::now())
    }
}

/// Lateness of each instant against a grid of lines [`STEP`] apart, in microseconds, if the
/// earliest of them is on time.
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
        // The third instant is the earliest relative to the grid; the first is 30 us late.
        let start = Instant::now();
        let us = Duration::from_micros;
        let seen = [start + us(30), start + us(2010), start + us(4000), start + us(6500)];
        let late: Vec<f64> = lateness(&seen).into_iter().map(f64::round).collect();
        assert_eq!(late, [30.0, 10.0, 0.0, 500.0]);
    }

    #[test]
    fn bare_ring_is_never_early() {
        // A host without io_uring, or one that forbids it, skips the check.
        if let Ok(late) = ring(20) {
            assert!(late.len() == 20 && late.iter().all(|&late| late > 0.0), "{late:?}");
        }
    }
}
