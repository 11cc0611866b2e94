//! The difference of two configurations leads from the first to the second, in an order that can be
//! carried out, and prints its changes.

use std::collections::BTreeMap;

use proptest::prelude::*;
use throttle_core::charge::{Charge, ChargeTable};
use throttle_core::limits::{Limit, LimitKind, Limits};
use ublk_throttle_config::{
    Backend, Config, Device, Direct, Group, OnCrash, OnStop, Plan, Resize, ZeroCopy, difference, parse,
};

fn config(body: &str) -> Config {
    parse("/etc/new.yaml", format!("version: 1\n{body}").as_bytes()).unwrap_or_else(|errors| panic!("{errors}")).0
}

fn plan(from: &str, to: &str) -> Plan {
    difference(&config(from), &config(to))
}

fn check(from: &str, to: &str, expected: &[&str]) {
    assert_eq!(plan(from, to).lines(), expected, "from\n{from}to\n{to}");
}

#[test]
fn plan_is_told_in_the_words_of_the_file() {
    let from = "groups:\n  \
                  old: {}\n  \
                  rack: {}\n  \
                  tenant-a: { parent: rack, limits: { iops: 500 } }\n\
                devices:\n  \
                  vol1: { backend: { file: /srv/vol1.img, size: 20GiB }, group: rack }\n  \
                  vol2: { backend: { memory: 1MiB }, group: old }\n";
    let to = "groups:\n  \
                rack: {}\n  \
                tenant-a: { parent: rack, limits: { iops: 1000 }, weight: 200 }\n\
              devices:\n  \
                vol1: { backend: { file: /srv/vol1.img, size: 40GiB }, group: tenant-a }\n  \
                vol9: { backend: { file: vol9.img, size: 1GiB }, group: rack, limits: { bps-read: 10MiB } }\n";
    check(
        from,
        to,
        &[
            "group tenant-a: iops-total 500 → 1000, weight 100 → 200",
            "group old: removed",
            "device vol1: group rack → tenant-a, size 20GiB → 40GiB",
            "device vol9: added (file /etc/vol9.img, 1GiB, group rack, bps-read 10MiB/s)",
            "device vol2: removed",
        ],
    );
    check(from, from, &["nothing changes"]);
    assert_eq!(plan(from, from).to_string(), "nothing changes");
}

#[test]
fn every_key_that_can_change_is_told() {
    check(
        "groups: { g: { limits: { iops: 5, iops-max: 10, iops-size: 4KiB, bps: 1k } }, h: {} }\n",
        "limits: { memory: 1GiB }\ncontrol: { group: disk }\n\
         groups:\n  \
           g: { parent: h, limits: { iops: 5, iops-max: 10, iops-max-length: 1.5s }, charge: { flush: op } }\n  \
           h: {}\n  \
           i: { parent: g, weight: 7, limits: { iops: 1 } }\n",
        &[
            "limits: memory no bound → 1GiB",
            "control: group none → disk",
            "group i: added (parent g, iops-total 1, weight 7)",
            "group g: parent none → h, bps-total 1kB/s → unlimited, iops-total-max-length 1s → 1.5s, \
             iops-size 4KiB → none, charge as above it → {flush: op}",
        ],
    );
}

#[test]
fn what_the_new_file_leaves_open_stays_as_it_is() {
    // The daemon knows the id and the size of a running device; `create` concerns a file that
    // exists by now.
    let from = "devices: { a: { backend: { file: /a, size: 1MiB, create: true }, id: 3 } }\n";
    check(from, "devices: { a: { backend: { file: /a } } }\n", &["nothing changes"]);
    check(from, "devices: { a: { backend: { file: /a }, id: auto } }\n", &["nothing changes"]);
    let whole = "devices: { a: { backend: { file: /a } } }\n";
    check(
        whole,
        "devices: { a: { backend: { file: /a, size: 1MiB } } }\n",
        &["device a: size that of the file → 1MiB"],
    );
}

#[test]
fn what_a_device_was_made_with_is_refused_with_its_line_and_a_way_out() {
    let from = "devices: { a: { backend: { file: /a }, id: 3 }, b: { backend: { memory: 1MiB } } }\n";
    let to = "devices:\n  \
                a: { backend: { block: /b, direct: true, shared: true }, id: 4, queues: 2, depth: 64, block-size: 512, read-only: true, zero-copy: off, cpus: [2, 0-1] }\n  \
                b: { backend: { \"null\": 2MiB }, id: 9 }\n";
    let plan = plan(from, to);
    assert_eq!(
        plan.lines(),
        [
            "device a (line 3): backend file /a → block /b, direct auto → true, shared false → true, id 3 → 4, \
             queues 1 → 2, depth 128 → 64, block-size that of the backend → 512, read-only false → true, zero-copy auto → off, cpus all → 0-2 \
             cannot change while it runs; remove the device and add it again: `ublk-throttle del a`, then `reload`; or put back what \
             it has",
            "device b (line 4): backend memory → null, id auto → 9, on-crash fail → requeue, zero-copy auto → off cannot change while it runs; remove the device and \
             add it again: `ublk-throttle del b`, then `reload`; or put back what it has",
        ]
    );
    assert_eq!(plan.device_changes, []);
}

#[test]
fn f87_nothing_of_a_device_that_waits_is_fixed() {
    // Keys that are refused for a running device, and keys that a running device keeps: `create`, an open id or size.
    let remade = |from: &str, to: &str| {
        let of = |body: &str| config(&format!("groups: {{ g: {{}} }}\ndevices: {{ a: {{ {body} }} }}\n"));
        let (from, to) = (of(from), of(to));
        let mut plan = difference(&from, &to);
        plan.remake(&from.devices[0], &to.devices[0]);
        assert_eq!((&plan.refusals, plan.shrinking().count()), (&Vec::new(), 0));
        plan.lines().join("\n")
    };
    let waits = "device a, which waits for its backend:";
    let file = "backend: { file: /a, size: 2MiB }";
    assert_eq!(
        remade(&format!("{file}, queues: 2"), "backend: { block: /b }, group: g"),
        format!(
            "device a: group none → g\n{waits} backend file /a → block /b, direct auto → true, queues 2 → 1, size 2MiB → that of \
             the backend"
        )
    );
    assert_eq!(
        remade(&format!("{file}, id: 3"), "backend: { file: /a, size: 1MiB, create: true }"),
        format!("{waits} size 2MiB → 1MiB, create false → true, id 3 → auto")
    );
    assert_eq!(
        remade("backend: { file: /a, direct: true }", "backend: { file: /a }"),
        format!("{waits} direct true → auto")
    );
    assert_eq!(remade(file, &format!("{file}, limits: {{ iops: 5 }}")), "device a: iops-total unlimited → 5");
    assert_eq!(remade(file, &format!("{file}, required: true")), "nothing changes");
}

#[test]
fn f47_a_group_goes_in_the_reload_that_moves_all_its_members() {
    // A removal of the group alone would be refused; children are removed before their parent.
    let member = |group: &str| format!("devices: {{ a: {{ backend: {{ memory: 1MiB }}, group: {group} }} }}\n");
    let from = format!("groups: {{ low: {{ parent: high }}, high: {{}} }}\n{}", member("low"));
    let plan = plan(&from, &format!("groups: {{ new: {{}} }}\n{}", member("new")));
    assert_eq!(plan.group_removals, ["low", "high"]);
    assert_eq!(
        plan.lines(),
        ["group new: added", "group low: removed", "group high: removed", "device a: group low → new"]
    );
}

#[test]
fn parent_and_child_may_change_places() {
    let (from, to) = ("groups: { a: { parent: b }, b: {} }\n", "groups: { a: {}, b: { parent: a } }\n");
    check(from, to, &["group a: parent b → none", "group b: parent none → a"]);
}

/// Carries out a plan step by step, as the daemon does; panics if a step is impossible.
fn carry_out(plan: &Plan, on: &Config) -> Config {
    let mut groups: BTreeMap<String, Group> = on.groups.iter().map(|g| (g.name.clone(), g.clone())).collect();
    let mut devices: BTreeMap<String, Device> = on.devices.iter().map(|d| (d.name.clone(), d.clone())).collect();
    for group in &plan.group_additions {
        assert!(group.parent.iter().all(|parent| groups.contains_key(parent)), "{} before its parent", group.name);
        assert!(groups.insert(group.name.clone(), group.clone()).is_none(), "{} twice", group.name);
    }
    for name in &plan.device_removals {
        devices.remove(name).expect("a device that there is");
    }
    for change in &plan.group_changes {
        let group = groups.get_mut(&change.name).expect("a group that there is");
        set(&mut group.limits, change.limits.map(|c| (c.from, c.to)));
        set(&mut group.weight, change.weight.map(|c| (c.from, c.to)));
        set(&mut group.parent, change.parent.clone().map(|c| (c.from, c.to)));
        set(&mut group.charges, change.charges.map(|c| (c.from, c.to)));
    }
    for change in &plan.device_changes {
        let device = devices.get_mut(&change.name).expect("a device that there is");
        set(&mut device.limits, change.limits.map(|c| (c.from, c.to)));
        set(&mut device.weight, change.weight.map(|c| (c.from, c.to)));
        set(&mut device.group, change.group.clone().map(|c| (c.from, c.to)));
        if let Some(resize) = change.size {
            assert_eq!(device.backend.size(), resize.from);
            match &mut device.backend {
                Backend::File { size, .. } => *size = Some(resize.to),
                Backend::Memory { size } | Backend::Null { size } => *size = resize.to,
                Backend::Block { .. } => panic!("a block device is resized"),
            }
        }
    }
    for device in &plan.device_additions {
        assert!(device.group.iter().all(|group| groups.contains_key(group)));
        assert!(devices.insert(device.name.clone(), device.clone()).is_none(), "{} twice", device.name);
    }
    for name in &plan.group_removals {
        groups.remove(name).expect("a group that there is");
        assert!(groups.values().all(|group| group.parent.as_ref() != Some(name)), "{name} before its children");
        assert!(devices.values().all(|device| device.group.as_ref() != Some(name)), "{name} is in use");
    }
    let mut config =
        Config { groups: groups.into_values().collect(), devices: devices.into_values().collect(), ..on.clone() };
    set(&mut config.memory_max, plan.memory_max.map(|c| (c.from, c.to)));
    set(&mut config.readers, plan.readers.clone().map(|c| (c.from, c.to)));
    config
}

fn set<T: PartialEq + std::fmt::Debug>(value: &mut T, change: Option<(T, T)>) {
    if let Some((from, to)) = change {
        assert_eq!(*value, from);
        assert_ne!(from, to, "no change");
        *value = to;
    }
}

/// Sorts by name: a plan keeps neither the order nor the lines of the file.
fn sorted(mut config: Config) -> Config {
    config.groups.sort_by(|a, b| a.name.cmp(&b.name));
    config.devices.sort_by(|a, b| a.name.cmp(&b.name));
    config
}

fn limits() -> impl Strategy<Value = Limits> {
    prop_oneof![
        Just(Limits::UNLIMITED),
        (1..4_u64).prop_map(|avg| Limits::UNLIMITED.with(LimitKind::IopsTotal, Limit::average(avg))),
        (1..4_u64).prop_map(|avg| Limits::UNLIMITED.with(LimitKind::BpsRead, Limit::average(avg))),
    ]
}

fn charges() -> impl Strategy<Value = Option<ChargeTable>> {
    prop_oneof![Just(None), Just(Some(ChargeTable { flush: Charge::Op, ..ChargeTable::DEFAULT }))]
}

/// Up to six groups in trees and up to five devices, of few names, in any order.
fn any_config() -> impl Strategy<Value = Config> {
    let names =
        |names: &'static [&'static str]| proptest::sample::subsequence(names.to_vec(), 0..=names.len()).prop_shuffle();
    let group = (any::<proptest::sample::Index>(), any::<bool>(), 1..4_u32, limits(), charges());
    let device = (any::<proptest::sample::Index>(), any::<bool>(), 1..4_u32, limits(), 0..3_u32, 1..4_u64);
    (
        names(&["a", "b", "c", "d", "e", "f"]),
        proptest::collection::vec(group, 6),
        names(&["v", "w", "x", "y", "z"]),
        proptest::collection::vec(device, 5),
        proptest::option::of(1..3_u64),
        proptest::option::of("[ab]"),
        any::<bool>(),
    )
        .prop_map(|(group_names, groups, device_names, devices, memory_max, readers, is_reversed)| {
            let mut config = Config { memory_max, readers, ..Config::default() };
            for (name, (parent, is_below, weight, limits, charges)) in group_names.iter().zip(groups) {
                let above: Vec<&str> = config.groups.iter().map(|group| group.name.as_str()).collect();
                let parent = (is_below && !above.is_empty()).then(|| (*parent.get(&above)).to_owned());
                config.groups.push(Group { name: (*name).to_owned(), parent, weight, limits, charges, line: 0 });
            }
            for (name, (group, is_in, weight, limits, kind, size)) in device_names.iter().zip(devices) {
                let group = (is_in && !group_names.is_empty()).then(|| (*group.get(&group_names)).to_owned());
                let path = format!("/{name}").into();
                // A single kind for each name, so that no change is refused.
                let backend = match name.len() + usize::from(name.as_bytes()[0]) {
                    n if n % 3 == 0 => Backend::Memory { size },
                    n if n % 3 == 1 => Backend::Null { size },
                    _ => {
                        let size = (kind > 0).then_some(size);
                        Backend::File { path, size, create: kind == 1, direct: Direct::Auto, shared: false }
                    }
                };
                config.devices.push(Device {
                    name: (*name).to_owned(),
                    id: None,
                    backend,
                    group,
                    weight,
                    limits,
                    queues: 1,
                    depth: 128,
                    block_size: None,
                    read_only: false,
                    on_crash: OnCrash::default(),
                    on_stop: OnStop::default(),
                    zero_copy: ZeroCopy::default(),
                    cpus: None,
                    required: false,
                    line: 0,
                });
            }
            if is_reversed {
                config.groups.reverse();
            }
            config
        })
}

/// `to`, with settings that it leaves open filled in from `from`.
fn completed(from: &Config, mut to: Config) -> Config {
    for device in &mut to.devices {
        let before = from.device(&device.name);
        if let (Backend::File { size, create, .. }, Some(Backend::File { size: old, create: made, .. })) =
            (&mut device.backend, before.map(|before| &before.backend))
        {
            *size = size.or(*old);
            *create = *made;
        }
    }
    to
}

#[test]
fn f79_devices_that_would_become_smaller_are_told_with_both_sizes() {
    // A device that grows, a device of unknown size, and a device with an open size do not shrink.
    let of = |a: &str, b: &str, c: &str| {
        config(&format!(
            "devices: {{ a: {{ backend: {{ file: /a{a} }} }}, b: {{ backend: {{ memory: {b} }} }}, c: {{ backend: {{ file: /c{c} }} }} }}\n"
        ))
    };
    let plan = difference(&of(", size: 128MiB", "1MiB", ""), &of(", size: 64MiB", "2MiB", ", size: 1MiB"));
    let shrinking: Vec<_> = plan.shrinking().map(|(name, size)| (name, size.from, size.to)).collect();
    assert_eq!(shrinking, [("a", Some(128 << 20), 64 << 20)]);
    let plan = difference(&of(", size: 128MiB", "2MiB", ""), &of("", "1MiB", ""));
    assert_eq!(plan.shrinking().map(|(name, _)| name).collect::<Vec<_>>(), ["b"]);
}

#[test]
fn f80_a_size_that_the_configuration_leaves_open_joins_the_plan_in_its_order() {
    let of = |weight: u32| {
        config(&format!(
            "groups: {{ g: {{}} }}\ndevices: {{ a: {{ backend: {{ block: /dev/a }} }}, \
             b: {{ backend: {{ file: /b }}, group: g, weight: {weight} }}, c: {{ backend: {{ block: /dev/c }} }} }}\n"
        ))
    };
    let (from, to) = (of(100), of(200));
    let mut plan = difference(&from, &to);
    for name in ["c", "b", "a"] {
        plan.resize(&to, name, Resize { from: Some(8 << 20), to: 16 << 20 });
    }
    let grown = "size 8MiB → 16MiB";
    assert_eq!(
        plan.lines(),
        [format!("device a: {grown}"), format!("device b: weight 100 → 200, {grown}"), format!("device c: {grown}")]
    );
}

#[test]
fn f68_direct_that_a_file_leaves_open_is_content_with_what_the_device_has() {
    // Also for a device made before `auto` existed: otherwise no reload would pass until the device
    // is made anew.
    let file = |direct: &str| config(&format!("devices: {{ v: {{ backend: {{ file: /a{direct} }} }} }}\n"));
    for before in [", direct: true", ", direct: false", ""] {
        assert!(difference(&file(before), &file("")).is_empty(), "{before}");
    }
    let refused = difference(&file(", direct: false"), &file(", direct: true")).refusals;
    assert!(refused[0].to_string().contains("direct false → true"), "{}", refused[0]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn plan_leads_from_the_one_configuration_to_the_other(from in any_config(), to in any_config()) {
        let plan = difference(&from, &to);
        prop_assert_eq!(&plan.refusals, &[]);
        let outcome = carry_out(&plan, &from);
        prop_assert_eq!(sorted(outcome.clone()), sorted(completed(&from, to.clone())));
        prop_assert!(difference(&outcome, &to).is_empty(), "a second time finds more to do");
        prop_assert_eq!(plan.is_empty(), plan.lines() == ["nothing changes"]);
        prop_assert!(plan.lines().iter().all(|line| !line.ends_with(": ")), "a line says nothing: {}", plan);
    }

    #[test]
    fn configuration_does_not_differ_from_itself(config in any_config()) {
        prop_assert!(difference(&config, &config).is_empty());
    }
}
