//! The CPUs that a queue thread runs on.
//!
//! ```text
//!   the kernel: CPUs whose requests come to the queue   { 0, 2 }        { 0, 2 }       { 0, 2 }
//!   the configuration's `cpus`                          (all)           { 2, 3 }       { 3 }
//!   the thread runs on                                  { 0, 2 }        { 2 }          { 3 }
//! ```
//!
//! A request that is served on the CPU that made it stays in that CPU's caches, so the kernel's set
//! is the first choice. `cpus` is a promise to leave the rest of the CPUs to their users, so no
//! thread runs outside of it. Offline CPUs do not count; a thread with only offline CPUs is run by
//! the kernel on any CPU.

use std::fs;

use nix::sched::CpuSet;
use ublk_throttle_config::{Cpus, Device as Description};

use crate::error::{Class, Failure, Outcome};
use crate::log;

/// The affinity of a queue thread of the device; `None` = any CPU.
pub fn of_queue(device: &Description, queue: Option<CpuSet>) -> Option<CpuSet> {
    let Some(cpus) = device.cpus else { return queue };
    let is_in = |cpu: u16| queue.is_some_and(|queue| queue.is_set(cpu.into()).unwrap_or(false));
    set(&narrowed(&cpus, is_in, host("online").as_ref()))
}

/// The online CPUs in both sets; the configuration's set if there are none.
fn narrowed(cpus: &Cpus, is_of_queue: impl Fn(u16) -> bool, online: Option<&Cpus>) -> Cpus {
    cpus.filter(|cpu| is_of_queue(cpu) && online.is_none_or(|online| online.contains(cpu))).unwrap_or(*cpus)
}

fn set(cpus: &Cpus) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    cpus.iter().try_for_each(|cpu| set.set(cpu.into())).ok()?;
    Some(set)
}

/// The host's CPUs in a state (`present`, `online`), as the kernel lists them; `None` without such
/// a list, or for more CPUs than [`Cpus`] can hold.
fn host(state: &str) -> Option<Cpus> {
    let list = fs::read_to_string(format!("/sys/devices/system/cpu/{state}")).ok()?;
    Cpus::parse(list.trim()).ok()
}

/// Refuses new devices with `cpus` that the host does not have, in one failure for all devices.
pub fn expect_present<'d>(devices: impl IntoIterator<Item = &'d Description>) -> Outcome<()> {
    let Some(present) = host("present") else { return Ok(()) };
    let absent: Vec<String> = devices.into_iter().filter_map(|device| absent(device, &present)).collect();
    if absent.is_empty() { Ok(()) } else { Err(Failure::new(Class::Config, absent.join("\n"))) }
}

/// The complaint about absent CPUs of a device, if it has any.
fn absent(device: &Description, present: &Cpus) -> Option<String> {
    let cpus = device.cpus?;
    let absent = cpus.filter(|cpu| !present.contains(cpu))?;
    let line = if cpus.line > 0 { format!(" (line {})", cpus.line) } else { String::new() };
    Some(format!("device {:?}: cpus{line}: this host has no CPU {absent}; it has {present}", device.name))
}

/// Warns if all of a device's `cpus` are offline: the kernel will not keep to them.
pub fn warn_if_offline(device: &Description) {
    if let (Some(cpus), Some(online)) = (device.cpus, host("online"))
        && cpus.filter(|cpu| online.contains(cpu)).is_none()
    {
        log::warn("W-CPUS", format_args!("device={} cpus={cpus}: all offline; it runs on {online}", device.name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ublk_throttle_config::new_device;

    fn cpus(text: &str) -> Cpus {
        Cpus::parse(text).unwrap()
    }

    #[test]
    fn a_queue_runs_where_its_requests_come_from_as_far_as_the_configuration_lets_it() {
        let on = |named: &str, queue: &str, online: Option<&str>| {
            let (queue, online) = (cpus(queue), online.map(cpus));
            narrowed(&cpus(named), |cpu| queue.contains(cpu), online.as_ref()).to_string()
        };
        assert_eq!(on("2-3", "0,2", Some("0-3")), "2");
        assert_eq!(on("0-7", "0,2", Some("0-3")), "0,2");
        assert_eq!(on("3", "0,2", Some("0-3")), "3", "where they do not meet it is what was said");
        assert_eq!(on("2-3", "0,2", Some("0-1,3")), "2-3", "where they meet nothing runs");
        assert_eq!(on("2-3", "0,2", None), "2");
    }

    #[test]
    fn without_the_key_it_is_the_queues_own_and_without_that_what_was_said() {
        let device = |settings: &[(&str, &str)]| new_device("d", settings).unwrap().0;
        let (all, named) = (device(&[("null", "1MiB")]), device(&[("null", "1MiB"), ("cpus", "0")]));
        let mut queue = CpuSet::new();
        queue.set(5).unwrap();
        assert_eq!(of_queue(&all, Some(queue)), Some(queue));
        assert_eq!(of_queue(&all, None), None);
        assert_eq!(of_queue(&named, None), set(&cpus("0")));
    }

    #[test]
    fn a_cpu_that_the_host_lacks_is_named_with_its_line() {
        let text = "version: 1\ndevices:\n  d:\n    backend: { \"null\": 1MiB }\n    cpus: 1-3,9\n";
        let (config, _) = ublk_throttle_config::parse("c.yaml", text.as_bytes()).unwrap();
        let absent = |present: &str| absent(&config.devices[0], &cpus(present));
        let expected = "device \"d\": cpus (line 5): this host has no CPU 2-3,9; it has 0-1";
        assert_eq!(absent("0-1").as_deref(), Some(expected));
        assert_eq!(absent("0-15"), None);
        let (added, _) = new_device("d", &[("null", "1MiB"), ("cpus", "1000")]).unwrap();
        let failure = expect_present([&added]).unwrap_err();
        assert_eq!(failure.class, Class::Config);
        assert!(failure.message.starts_with("device \"d\": cpus: this host has no CPU 1000; "), "{}", failure.message);
    }
}
