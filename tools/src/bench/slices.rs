//! Loads on all sides of a case, of which one runs at a time: a slice of this one, a slice of the next.
//!
//! ```text
//!   A  ░███          ░███░███          ░███         ░ settles   █ counts      its clients' control group is frozen else
//!   B       ░███░███          ░███░███
//! ```
//!
//! Whole runs in turn differ from each other by a fifth under emulation, two of one and the same device too: it matters which
//! processor a thread happens to stay on, and the host is never the same for long. A sample made of slices has met all of that as
//! often as its neighbour has. Latencies are no use here, of what is under way when the clients are frozen; see [`Load::run`].

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

/// After the thaw: what was under way is answered, and a bucket that filled up meanwhile (a tenth of a second's worth) is used up.
const SETTLE: Duration = Duration::from_millis(250);

/// What counts.
const SLICE: Duration = Duration::from_millis(500);

/// What the kernel may take to freeze or thaw.
const FREEZE: Duration = Duration::from_secs(5);

/// Longer than any case; the loads are ended when it is over.
const FOR_EVER: u32 = 36_000;

/// A load on each side, frozen.
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
    /// Starts the load on each, and freezes it.
    pub fn start(load: Load, peers: impl Iterator<Item = &'a dyn Peer>) -> Result<Slices<'a>> {
        let sides = peers.enumerate().map(|(place, peer)| Frozen::start(load, place, peer)).collect::<Result<_>>()?;
        Ok(Slices { sides })
    }

    /// One round: so many seconds of each, in slices.
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

    /// Ends the loads.
    pub fn end(self) -> Result<()> {
        for Frozen { disk, client, fio, .. } in self.sides {
            client.freeze(false, FREEZE)?;
            fio.interrupt()?;
            let jobs = fio.finish(Duration::from_secs(60))?;
            // Those of the interrupt itself are none: fio tells them as no error.
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
        // Its jobs are processes that it forks once it has read the file: they begin where their parent is by then.
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
