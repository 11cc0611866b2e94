//! Runs the loads of all sides in slices of 0.5 s: at any time one load runs and the rest are
//! frozen.
//!
//! ```text
//!   A  ░███          ░███░███          ░███         ░ settles   █ is measured   blank: the clients are frozen
//!   B       ░███░███          ░███░███
//! ```
//!
//! Complete runs in turn differ by a fifth under emulation, even two runs on one device: a result
//! depends on the processor a thread happens to stay on, and the host's load changes all the time.
//! A sample made of slices meets these conditions as often as its neighbour does. Slices give no
//! latencies, because a freeze interrupts requests under way; [`Load::run`] measures latencies.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::bench::order;
use super::cgroup::Cgroup;
use super::load::{Load, Look, Spell, quiet, started};
use super::peers::Peer;
use super::sample::Sample;
use crate::blockstat;
use crate::fio::Running;

/// Wait between thaw and slice. Requests under way complete, and a bucket that filled up during the
/// freeze (0.1 s worth of tokens) is used up.
const SETTLE: Duration = Duration::from_millis(250);

/// Length of a measured slice.
const SLICE: Duration = Duration::from_millis(500);

/// Time limit for the kernel to freeze or thaw a control group.
const FREEZE: Duration = Duration::from_secs(5);

/// Runtime of fio in seconds, longer than any case. [`Slices::end`] interrupts fio.
const FOR_EVER: u32 = 36_000;

/// A running load for each side, frozen between slices.
pub struct Slices<'a> {
    sides: Vec<Frozen<'a>>,
}

struct Frozen<'a> {
    peer: &'a dyn Peer,
    disk: String,
    client: Cgroup,
    fio: Running,
}

impl<'a> Slices<'a> {
    /// Starts the load on each peer, then freezes it.
    pub fn start(load: Load, peers: impl Iterator<Item = &'a dyn Peer>) -> Result<Slices<'a>> {
        let sides = peers.enumerate().map(|(place, peer)| Frozen::start(load, place, peer)).collect::<Result<_>>()?;
        Ok(Slices { sides })
    }

    /// Runs one round: `seconds` of each side, in slices.
    pub fn round(&self, seconds: u32) -> Result<Vec<Sample>> {
        let slices = (Duration::from_secs(seconds.into()).as_millis() / SLICE.as_millis()).max(2);
        let mut spells = vec![Spell::default(); self.sides.len()];
        for slice in 0..slices as usize {
            for place in order(self.sides.len(), slice) {
                spells[place] += self.sides[place].slice().with_context(|| self.sides[place].disk.clone())?;
            }
        }
        spells.into_iter().map(Spell::sample).collect()
    }

    /// Thaws and interrupts all loads.
    pub fn end(self) -> Result<()> {
        for Frozen { disk, client, fio, .. } in self.sides {
            client.freeze(false, FREEZE)?;
            fio.interrupt()?;
            let jobs = fio.finish(Duration::from_secs(60))?;
            // fio reports no error for the interrupt itself.
            if let Some(job) = jobs.iter().find(|job| job.error != 0) {
                bail!("fio on {disk} ended with errno {}", job.error);
            }
        }
        Ok(())
    }
}

impl<'a> Frozen<'a> {
    fn start(load: Load, place: usize, peer: &'a dyn Peer) -> Result<Frozen<'a>> {
        let disk = quiet(peer.node())?;
        let before = blockstat::completed(&disk).context("the device is gone")?;
        let client = Cgroup::create(&format!("load{place}"))?;
        let fio = load.start(peer.node(), FOR_EVER)?;
        // fio forks its jobs after it has read the job file; a forked job starts in its parent's
        // control group.
        client.add(fio.pid())?;
        started(&disk, before)?;
        client.freeze(true, FREEZE)?;
        Ok(Frozen { peer, disk, client, fio })
    }

    fn slice(&self) -> Result<Spell> {
        self.client.freeze(false, FREEZE)?;
        thread::sleep(SETTLE);
        let first = Look::now(&self.disk, self.peer.server())?;
        thread::sleep(SLICE);
        let second = Look::now(&self.disk, self.peer.server())?;
        self.client.freeze(true, FREEZE)?;
        Ok(first.until(&second))
    }
}
