//! Groups in trees: their parents, weights and charges in the model, and their description.

use throttle_core::charge::{Charge, ChargeTable};
use throttle_core::tree::DEPTH_MAX;
use ublk_throttle_config::{Config, parse};

fn config(body: &str) -> Config {
    parse("tree.yaml", format!("version: 1\n{body}").as_bytes()).unwrap_or_else(|errors| panic!("{errors}")).0
}

#[test]
fn parents_come_first_wherever_they_stand_in_the_file() {
    // The daemon makes the groups in this order, and needs each parent before its children.
    let config = config("groups: { d: { parent: c }, b: { parent: a }, c: { parent: b }, a: {}, e: { parent: a } }\n");
    let names: Vec<&str> = config.groups_parents_first().iter().map(|group| group.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "e", "c", "d"]);
}

#[test]
fn a_chain_as_long_as_the_core_takes_is_accepted() {
    // One side of the border; broken/parents-too-deep.yaml is the opposite side.
    let chain: String = (1..DEPTH_MAX).map(|n| format!("  g{n}: {{ parent: g{} }}\n", n - 1)).collect();
    let config = config(&format!("groups:\n{chain}  g0: {{}}\n"));
    assert_eq!(config.groups.len(), DEPTH_MAX);
}

#[test]
fn weights_are_100_unless_said() {
    let config = config(
        "groups: { rack: {}, t: { parent: rack, weight: 1 } }\n\
         devices:\n  a: { backend: { memory: 1MiB } }\n  \
         b: { backend: { memory: 1MiB }, group: rack, weight: 10000 }\n",
    );
    let groups: Vec<u32> = config.groups.iter().map(|group| group.weight).collect();
    let devices: Vec<u32> = config.devices.iter().map(|device| device.weight).collect();
    assert_eq!((groups, devices), (vec![100, 1], vec![100, 10_000]));
}

#[test]
fn a_group_leaves_to_its_parent_what_it_does_not_say() {
    // Charges are inherited per operation, over any number of levels; a group without entries has
    // no table of its own.
    let config = config(
        "groups:\n  low: { parent: silent, charge: { discard: bytes, flush: free } }\n  \
         silent: { parent: top, charge: {} }\n  top: { charge: { flush: op, write_zeroes: bytes } }\n",
    );
    let charges = |name: &str| config.group(name).expect("the group").charges;
    let top = ChargeTable { flush: Charge::Op, write_zeroes: Some(Charge::Bytes), ..ChargeTable::DEFAULT };
    assert_eq!(charges("top"), Some(top));
    assert_eq!(charges("silent"), None);
    assert_eq!(charges("low"), Some(ChargeTable { discard: Charge::Bytes, flush: Charge::Free, ..top }));
}

#[test]
fn every_word_of_a_charge_is_understood() {
    let config =
        config("groups: { g: { charge: { read: op, write: free, write-zeroes: free, discard: op, flush: bytes } } }\n");
    let expected = ChargeTable {
        read: Charge::Op,
        write: Charge::Free,
        write_zeroes: Some(Charge::Free),
        discard: Charge::Op,
        flush: Charge::Bytes,
    };
    assert_eq!(config.groups[0].charges, Some(expected));
}

#[test]
fn description_tells_place_share_and_charges() {
    let config = config(
        "groups:\n  \
           tenant: { parent: rack, weight: 200, charge: { flush: free, discard: bytes } }\n  \
           rack: { limits: { iops: 100 }, charge: { flush: op, read: bytes } }\n\
         devices:\n  \
           a: { backend: { memory: 1MiB }, group: tenant, limits: { iops: 10 } }\n  \
           b: { backend: { memory: 1MiB }, group: rack, weight: 50 }\n  \
           c: { backend: { memory: 1MiB }, group: rack, weight: 10, limits: { iops: 10 } }\n",
    );
    let device = "memory, 1 MiB (1 MB), read and write, 1 queue of 128 requests";
    let ten = "  reads and writes together: 10 operations/s; after a rest 2 at once (a tenth of a second, and one)\n";
    assert_eq!(
        config.describe(),
        format!(
            "group tenant: a\n  \
               what group rack allows, 76.9 % of it while all in it are busy (weight 200 of 260)\n  \
               discards count as an operation and their bytes\n  \
               flushes are free: they never wait\n\
             group rack: group tenant, b, c, all together\n  \
               reads and writes together: 100 operations/s; after a rest 11 at once (a tenth of a second, and one)\n  \
               flushes count as an operation without bytes\n\
             device a: {device}\n  \
               what group tenant allows, and besides it\n{ten}\
             device b: {device}\n  \
               what group rack allows, 19.2 % of it while all in it are busy (weight 50 of 260)\n\
             device c: {device}\n  \
               what group rack allows, 3.8 % of it while all in it are busy (weight 10 of 260), and besides it\n{ten}"
        )
    );
}

#[test]
fn description_tells_who_may_ask_and_how_a_device_is_cut() {
    let config = config(
        "control: { group: 1000 }\ndevices:\n  \
           a: { backend: { block: /dev/sda, shared: true }, id: auto, block-size: 4096 }\n",
    );
    assert_eq!((config.readers.as_deref(), config.devices[0].id), (Some("1000"), None));
    assert_eq!(
        config.describe(),
        "control: root changes; group 1000 may use the commands that only read\n\
         device a: block device /dev/sda, direct I/O, shared with other writers, read and write, blocks of 4096 bytes, \
         1 queue of 128 requests\n  no limit\n"
    );
}
