//! What one side did in one round: numbers by name, and how much of the machine it had.

use std::collections::BTreeMap;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// Requests a second, by the kernel's counter.
    Iops,
    /// Processor time of the server's processes a request, in microseconds.
    CpuOwn,
    /// Processor time of everything that ran, a request, in microseconds: server, client and the kernel's threads.
    CpuAll,
    /// Latency, in microseconds: half of all.
    P50,
    /// Nine in ten.
    P90,
    /// All but one in a hundred.
    P99,
    /// All but one in a thousand.
    P999,
    /// Rate measured over rate configured.
    Rate,
    /// The slowest second, as a share of the rate configured.
    SecondMin,
    /// The fastest second.
    SecondMax,
    /// The slowest tenth of a second.
    TenthMin,
    /// The fastest tenth of a second.
    TenthMax,
    /// Jain's index over those that share.
    Jain,
    /// Lateness behind the grid of deadlines, in microseconds: half of all.
    Late50,
    /// All but one in a hundred.
    Late99,
    /// Processor time of the server while nothing happens, in milliseconds a second.
    IdleCpu,
    /// Memory of the server that is in RAM, in MiB a device.
    Resident,
    /// The same after each device was used with large requests and left alone.
    ResidentUsed,
}

impl Metric {
    /// Its key in the JSON report.
    pub fn key(self) -> &'static str {
        match self {
            Metric::Iops => "iops",
            Metric::CpuOwn => "cpu_own_us",
            Metric::CpuAll => "cpu_all_us",
            Metric::P50 => "latency_p50_us",
            Metric::P90 => "latency_p90_us",
            Metric::P99 => "latency_p99_us",
            Metric::P999 => "latency_p999_us",
            Metric::Rate => "rate",
            Metric::SecondMin => "second_min",
            Metric::SecondMax => "second_max",
            Metric::TenthMin => "tenth_min",
            Metric::TenthMax => "tenth_max",
            Metric::Jain => "jain",
            Metric::Late50 => "late_p50_us",
            Metric::Late99 => "late_p99_us",
            Metric::IdleCpu => "idle_cpu_ms_a_second",
            Metric::Resident => "resident_mib",
            Metric::ResidentUsed => "resident_used_mib",
        }
    }

    /// Its words in a table, with its unit.
    pub fn words(self) -> &'static str {
        match self {
            Metric::Iops => "IOPS",
            Metric::CpuOwn => "CPU/request, own [us]",
            Metric::CpuAll => "CPU/request, all [us]",
            Metric::P50 => "latency p50 [us]",
            Metric::P90 => "latency p90 [us]",
            Metric::P99 => "latency p99 [us]",
            Metric::P999 => "latency p99.9 [us]",
            Metric::Rate => "measured/configured",
            Metric::SecondMin => "slowest 1 s",
            Metric::SecondMax => "fastest 1 s",
            Metric::TenthMin => "slowest 100 ms",
            Metric::TenthMax => "fastest 100 ms",
            Metric::Jain => "Jain's index",
            Metric::Late50 => "lateness p50 [us]",
            Metric::Late99 => "lateness p99 [us]",
            Metric::IdleCpu => "CPU while idle [ms/s]",
            Metric::Resident => "RSS a device [MiB]",
            Metric::ResidentUsed => "RSS a device, used [MiB]",
        }
    }
}

/// One side in one round.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// What was measured.
    pub values: BTreeMap<Metric, f64>,
    /// What the machine did for a fixed piece of work around it, against the best of this boot: 1 if all of it was ours.
    pub pace: f64,
    /// Share of the processors' time that the host admits to have taken.
    pub stolen: f64,
}

impl Sample {
    /// Adds a value.
    pub fn set(&mut self, metric: Metric, value: f64) {
        self.values.insert(metric, value);
    }

    /// A value; NaN where it was not measured.
    pub fn get(&self, metric: Metric) -> f64 {
        self.values.get(&metric).copied().unwrap_or(f64::NAN)
    }
}

/// One side in all rounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Side {
    /// What it is.
    pub name: String,
    /// In the order of the rounds.
    pub samples: Vec<Sample>,
}

impl Side {
    /// One value over the rounds.
    pub fn values(&self, metric: Metric) -> Vec<f64> {
        self.samples.iter().map(|sample| sample.get(metric)).collect()
    }

    /// What was measured in every round.
    pub fn metrics(&self) -> Vec<Metric> {
        let first = self.samples.first().map(|sample| sample.values.keys().copied().collect::<Vec<_>>());
        let everywhere = |metric: &Metric| self.samples.iter().all(|sample| sample.values.contains_key(metric));
        first.unwrap_or_default().into_iter().filter(everywhere).collect()
    }
}
