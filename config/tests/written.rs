//! Groups and devices that a daemon writes down are read back as equal.

use proptest::prelude::*;
use throttle_core::charge::{Charge, ChargeTable};
use throttle_core::limits::{Limit, LimitKind, Limits, SECOND_NS};
use ublk_throttle_config::{Config, Device, Group, change_group, new_device, parse, write_groups};

fn config(body: &str) -> Config {
    parse("/etc/f.yaml", format!("version: 1\n{body}").as_bytes()).unwrap_or_else(|errors| panic!("{errors}")).0
}

fn unplaced(groups: &[Group]) -> Vec<Group> {
    groups.iter().map(|group| Group { line: 0, ..group.clone() }).collect()
}

fn read_again(groups: &[Group]) -> Vec<Group> {
    let written = write_groups(groups);
    let read = parse("groups.json", written.as_bytes()).unwrap_or_else(|errors| panic!("{written}: {errors}"));
    unplaced(&read.0.groups)
}

fn device_again(device: &Device) -> Device {
    let settings = device.settings();
    let pairs: Vec<(&str, &str)> = settings.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    new_device(&device.name, &pairs).unwrap_or_else(|faults| panic!("{settings:?}: {faults:?}")).0
}

#[test]
fn f66_weight_of_a_group_without_parent_is_read_as_it_was_written() {
    // The weight has no effect until the group gets a parent; without it, the record would differ
    // from the file.
    let groups = config("groups: { g: { weight: 200, limits: { iops: 100 } } }").groups;
    assert_eq!(read_again(&groups), unplaced(&groups));
}

#[test]
fn f66_weight_of_a_device_without_group_is_read_as_it_was_written() {
    let device = new_device("d", &[("null", "512"), ("weight", "200")]).expect("sound").0;
    assert_eq!(device_again(&device), device);
}

#[test]
fn f66_burst_length_without_a_burst_is_read_as_it_was_written() {
    // A burst length up to 1 s without a burst is allowed and means nothing, with a warning.
    let groups = config("groups: { g: { limits: { iops: 100, iops-max-length: 500ms } } }").groups;
    assert_eq!(read_again(&groups), unplaced(&groups));
}

#[test]
fn f66_charge_of_a_group_that_has_moved_is_read_as_it_was_written() {
    // The backend decides on write-zeroes of `g`; the new parent has an entry for them, which must
    // not be inherited.
    let file = config("groups: { p: { charge: { write-zeroes: free } }, g: { charge: { flush: op } } }");
    let [above, group] = &file.groups[..] else { panic!("two groups") };
    let moved = change_group(group, &[("parent", "p")]).expect("sound").0;
    assert_eq!(moved.charges.expect("it says some").write_zeroes, None);
    let groups = [above.clone(), moved];
    assert_eq!(read_again(&groups), unplaced(&groups));
}

#[test]
fn groups_by_default_are_written_as_short_as_in_a_file() {
    // A file may hold as many values as the reader accepts; its record must not hold more.
    let written = write_groups(&config("groups: { g: {}, h: {} }").groups);
    assert_eq!(written, "{\"version\": 1, \"groups\": {\"g\": {}, \"h\": {}}}");
}

fn limits() -> impl Strategy<Value = Limits> {
    let limit = (0..2000_u64, 0..3_u64, 1..5_000_000_000_u64).prop_map(|(avg, burst, length)| Limit {
        avg,
        max: if avg > 0 && burst > 0 { avg + burst } else { 0 },
        burst_length_ns: if avg > 0 && burst > 0 { length } else { SECOND_NS },
    });
    (proptest::collection::vec(limit, 6), 0..2_u64).prop_map(|(six, size)| {
        let with = |all: Limits, (kind, limit)| all.with(kind, limit);
        let mut limits = LimitKind::ALL.into_iter().zip(six).fold(Limits::UNLIMITED, with);
        limits.iops_size = size * 4096;
        if !limits.violations().is_empty() {
            limits.iops_size = 0;
        }
        limits
    })
}

fn charges() -> impl Strategy<Value = Option<ChargeTable>> {
    let charge = || proptest::sample::select(vec![Charge::Free, Charge::Op, Charge::Bytes]);
    let table = (charge(), charge(), proptest::option::of(charge()), charge(), charge()).prop_map(
        |(read, write, write_zeroes, discard, flush)| ChargeTable { read, write, write_zeroes, discard, flush },
    );
    proptest::option::of(table)
}

/// Up to five groups in trees; each may be the parent of later ones.
fn groups() -> impl Strategy<Value = Vec<Group>> {
    let group = (any::<proptest::sample::Index>(), any::<bool>(), 1..=10_000_u32, limits(), charges());
    proptest::collection::vec(group, 0..5).prop_map(|groups| {
        let mut all: Vec<Group> = Vec::new();
        for (n, (parent, is_below, weight, limits, charges)) in groups.into_iter().enumerate() {
            let parent = (is_below && n > 0).then(|| parent.get(&all).name.clone());
            all.push(Group { name: format!("g{n}"), parent, weight, limits, charges, line: 0 });
        }
        all
    })
}

/// Settings of a device, as `add` takes them.
fn device_settings() -> impl Strategy<Value = Vec<(&'static str, String)>> {
    let words = |all: &'static [&'static str]| proptest::sample::select(all.to_vec());
    let maybe = |key: &'static str, all: &'static [&'static str]| {
        proptest::option::of(words(all)).prop_map(move |word| word.map(|word| (key, word.to_owned())))
    };
    let backend = words(&["memory=1MiB", "null=1TiB", "file=/srv/a b\\\"c.img", "block=/dev/sda"]);
    let of_file =
        (maybe("size", &["4096", "1GiB"]), maybe("direct", &["true", "false", "auto"]), maybe("shared", &["true"]));
    let own = (
        maybe("id", &["0", "7", "1000000"]),
        maybe("group", &["g", "none"]),
        maybe("weight", &["1", "100", "200", "10000"]),
        maybe("queues", &["1", "4096"]),
        maybe("depth", &["1", "128"]),
        maybe("block-size", &["512", "4096"]),
        maybe("read-only", &["true", "false"]),
        maybe("on-stop", &["remove", "keep"]),
        maybe("zero-copy", &["auto", "off"]),
        (maybe("cpus", &["0-3,8", "all"]), maybe("required", &["true", "false"])),
    );
    (backend, of_file, own, limits()).prop_map(|(backend, of_file, own, limits)| {
        let (kind, value) = backend.split_once('=').expect("key=value");
        let (size, direct, shared) = of_file;
        let (size, has_path) = (size.filter(|_| kind == "file"), kind == "file" || kind == "block");
        let (id, group, weight, queues, depth, block, read_only, stop, copy, (cpus, required)) = own;
        let stop = stop.filter(|_| kind != "memory");
        let paths = [direct, shared].map(|word| word.filter(|_| has_path));
        let rest = [id, group, weight, queues, depth, block, read_only, stop, copy, cpus, required];
        let mut settings = vec![(kind, value.to_owned())];
        settings.extend(size.into_iter().chain(paths.into_iter().flatten()).chain(rest.into_iter().flatten()));
        for kind in LimitKind::ALL {
            let limit = limits.get(kind);
            settings.push((kind.name(), limit.avg.to_string()));
        }
        settings
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn f66_groups_written_down_are_read_as_the_same_groups(groups in groups()) {
        prop_assert_eq!(read_again(&groups), groups);
    }

    #[test]
    fn f66_devices_written_down_are_read_as_the_same_device(settings in device_settings(), limits in limits()) {
        let pairs: Vec<(&str, &str)> = settings.iter().map(|(key, value)| (*key, value.as_str())).collect();
        let read = new_device("d", &pairs).unwrap_or_else(|faults| panic!("{settings:?}: {faults:?}")).0;
        let device = Device { limits, ..read };
        prop_assert_eq!(device_again(&device), device);
    }
}
