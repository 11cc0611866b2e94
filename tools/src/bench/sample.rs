//! Measurements of one side in one round: values by metric, and the share of the machine that was
//! available.

use std::collections::BTreeMap;

/// A measured quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// Requests a second, by the kernel's counter.
    Iops,
    /// Processor time of the server's processes for each request, in microseconds.
    CpuOwn,
    /// Processor time of all threads for each request, in microseconds: server, client and kernel
    /// threads.
    CpuAll,
    /// Median latency, in microseconds.
    P50,
    /// 90th percentile of the latency, in microseconds.
    P90,
    /// 99th percentile of the latency, in microseconds.
    P99,
    /// 99.9th percentile of the latency, in microseconds.
    P999,
    /// Measured rate divided by configured rate.
    Rate,
    /// Rate of the slowest window of 1 s, divided by the configured rate.
    SecondMin,
    /// Rate of the fastest window of 1 s, divided by the configured rate.
    SecondMax,
    /// Rate of the slowest window of 100 ms, divided by the configured rate.
    TenthMin,
    /// Rate of the fastest window of 100 ms, divided by the configured rate.
    TenthMax,
    /// Jain's index of fairness over the devices that share a limit.
    Jain,
    /// Median lateness behind the grid of deadlines, in microseconds.
    Late50,
    /// 99th percentile of that lateness, in microseconds.
    Late99,
    /// Processor time of the server while no request comes, in milliseconds a second.
    IdleCpu,
    /// Resident memory (RSS) of the server, in MiB a device.
    Resident,
    /// Resident memory in MiB a device, after each device has served large requests and has then
    /// been idle.
    ResidentUsed,
}

impl Metric {
    /// Key of the metric in the JSON report.
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

    /// Name of the metric in a table, with its unit.
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

/// Measurements of one side in one round.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// Values by metric.
    pub values: BTreeMap<Metric, f64>,
    /// Speed of the machine around the sample (`machine::yardstick`), relative to the best of this
    /// boot: 1 if all processors were available.
    pub pace: f64,
    /// Share of processor time that the host reports as stolen.
    pub stolen: f64,
}

impl Sample {
    /// Adds a value.
    pub fn set(&mut self, metric: Metric, value: f64) {
        self.values.insert(metric, value);
    }

    /// The value of a metric, or NaN if it was not measured.
    pub fn get(&self, metric: Metric) -> f64 {
        self.values.get(&metric).copied().unwrap_or(f64::NAN)
    }
}

/// Measurements of one side in all rounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Side {
    /// Name of the side.
    pub name: String,
    /// Samples in the order of the rounds.
    pub samples: Vec<Sample>,
}

impl Side {
    /// The values of a metric in the order of the rounds.
    pub fn values(&self, metric: Metric) -> Vec<f64> {
        self.samples.iter().map(|sample| sample.get(metric)).collect()
    }

    /// Metrics that every round has.
    pub fn metrics(&self) -> Vec<Metric> {
        let first = self.samples.first().map(|sample| sample.values.keys().copied().collect::<Vec<_>>());
        let everywhere = |metric: &Metric| self.samples.iter().all(|sample| sample.values.contains_key(metric));
        first.unwrap_or_default().into_iter().filter(everywhere).collect()
    }
}
