//! Waits with a limit: a condition is polled until it holds.

use std::process::{Child, ExitStatus};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::mode::Judge;

/// The pause between two polls of a condition: 2 % of the wait so far, between 10 and 100 ms. The
/// pause adds less to a measured time than any bound of the suite leaves, and a wait of half a
/// minute takes 350 polls.
fn pause(waited: Duration) -> Duration {
    (waited / 50).clamp(Duration::from_millis(10), Duration::from_millis(100))
}

/// The time after which a wait counts as a hang: `limit`, or ten times `limit` where times are not
/// judged, since the host may stop the guest for seconds.
pub fn patience(limit: Duration) -> Duration {
    match Judge::of_this_run() {
        Judge::Everything => limit,
        Judge::Correctness => 10 * limit,
    }
}

/// Polls `look` until it yields a value, for at most `limit` (see [`patience`]). The error names
/// the wait.
pub fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let (begin, limit) = (Instant::now(), patience(limit));
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if begin.elapsed() >= limit {
            bail!("{what}: not within {limit:?}");
        }
        sleep(pause(begin.elapsed()));
    }
}

/// Waits at most `limit` for the end of a child. After the limit the child still runs; its owner
/// kills it.
pub fn for_exit(what: &str, child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    until(&format!("end of {what}"), limit, || child.try_wait().with_context(|| format!("waiting for {what}")))
}

/// Sends SIGKILL to a child and waits at most 5 s for its end: the child may be stuck in the
/// kernel.
pub fn kill(child: &mut Child) {
    let _ = child.kill();
    let _ = for_exit("killed process", child, Duration::from_secs(5));
}
