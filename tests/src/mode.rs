//! Two variables of the environment: the judgement of a run, and the number of its repetitions.

use std::env;
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Result, bail};

/// `correctness`: see [`Judge::Correctness`]. Unset: everything is judged.
pub const JUDGE: &str = "UBLK_THROTTLE_JUDGE";

/// Set to 1: trials repeat as often as [`Times::thorough`] says.
pub const THOROUGH: &str = "UBLK_THROTTLE_THOROUGH";

/// Whether a variable of the environment is 1.
pub fn is_set(variable: &str) -> bool {
    env::var(variable).is_ok_and(|value| value == "1")
}

/// The judgement of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judge {
    /// Data, counts, times and rates.
    Everything,
    /// Data and counts. For a clock that goes on while the host withholds a CPU: times and rates
    /// then depend on the host.
    Correctness,
}

impl Judge {
    /// Reads the environment.
    pub fn from_environment() -> Result<Self> {
        match env::var(JUDGE).as_deref() {
            Err(_) => Ok(Self::Everything),
            Ok("correctness") => Ok(Self::Correctness),
            Ok(value) => bail!("{JUDGE}={value}: expected `correctness`, or no such variable"),
        }
    }

    /// The judgement of this run. Panics on a value that [`Judge::from_environment`] refuses.
    pub fn of_this_run() -> Self {
        static JUDGE: LazyLock<Judge> = LazyLock::new(|| Judge::from_environment().expect("main has read it before"));
        *JUDGE
    }
}

/// A pause that only a judged rate or time needs: none where neither is judged.
pub fn to_measure(pause: Duration) -> Duration {
    if Judge::of_this_run() == Judge::Everything { pause } else { Duration::ZERO }
}

/// The repetitions of a step that fails rarely.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// In a usual run.
    pub ci: usize,
    /// With [`THOROUGH`].
    pub thorough: usize,
}

impl Times {
    /// The number for this run.
    pub fn get(self) -> usize {
        if is_set(THOROUGH) { self.thorough } else { self.ci }
    }
}
