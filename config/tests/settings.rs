//! The settings of `set` and `add`: the keys, values and rules of a file, one at a time.

use std::fmt::Display;
use std::path::Path;

use proptest::prelude::*;
use throttle_core::limits::LimitKind;
use ublk_throttle_config::{
    Backend, Config, Device, Fault, Group, Warning, change_device, change_group, new_device, new_group, odd_device,
    odd_group, parse, wanted_size,
};

fn pairs(text: &str) -> Vec<(&str, &str)> {
    text.split_whitespace().map(|pair| pair.split_once('=').expect("key=value")).collect()
}

fn config(body: &str) -> Config {
    parse("/etc/f.yaml", format!("version: 1\n{body}").as_bytes()).unwrap_or_else(|errors| panic!("{errors}")).0
}

fn device(name: &str, settings: &str) -> Device {
    new_device(name, &pairs(settings)).unwrap_or_else(|faults| panic!("{}", lines(&faults))).0
}

fn group(name: &str, settings: &str) -> Group {
    new_group(name, &pairs(settings)).unwrap_or_else(|faults| panic!("{}", lines(&faults))).0
}

fn lines(faults: &[impl Display]) -> String {
    faults.iter().map(|fault| fault.to_string()).collect::<Vec<_>>().join("\n")
}

/// The faults, a line each.
fn refused<T>(answer: Result<T, Vec<Fault>>) -> String {
    match answer {
        Ok(_) => panic!("should be refused"),
        Err(faults) => lines(&faults),
    }
}

#[test]
fn device_that_is_added_is_the_device_that_a_file_describes() {
    for (settings, body) in [
        ("memory=1MiB", "backend: { memory: 1MiB }"),
        ("null=1TiB id=auto group=none", "backend: { \"null\": 1TiB }"),
        (
            "file=/srv//a.img size=20GiB create=true direct=true shared=true id=7 queues=2 depth=64 block_size=4096 iops=5 \
             bps_read=1k bps-read-max=2k on-crash=fail zero_copy=on cpus=8,0-3",
            "backend: { file: /srv/a.img, size: 20GiB, create: true, direct: true, shared: true }, id: 7, queues: 2, \
             depth: 64, block-size: 4096, limits: { iops: 5, bps-read: 1k, bps-read-max: 2k }, on-crash: fail, zero-copy: on, cpus: [0, 1, \"2-3\", 8]",
        ),
        (
            "block=/dev/sda read-only=true group=g weight=200",
            "backend: { block: /dev/sda }, read-only: true, group: g, weight: 200",
        ),
    ] {
        let from_file = config(&format!("groups: {{ g: {{}} }}\ndevices: {{ v: {{ {body} }} }}\n"));
        let expected = Device { line: 0, ..from_file.devices[0].clone() };
        assert_eq!(device("v", settings), expected);
    }
}

#[test]
fn device_written_down_is_read_as_the_same_device() {
    // Settings left by a crashed daemon are read by the rules of `add`.
    for settings in [
        "memory=1MiB",
        "null=1TiB group=g weight=7 iops=5 iops-max=60 iops-max-length=1.5s iops-size=4096",
        "file=/srv/a\"b\\c.img size=20GiB create=true direct=true shared=true id=7 queues=2 depth=64 block-size=4096 \
         bps-read=1k bps-read-max=2k on-crash=fail zero-copy=on cpus=0-3,8",
        "block=/dev/sda read-only=true bps=1GiB zero-copy=off",
        "block=/dev/sda",
    ] {
        let before = device("v", settings);
        let written = before.settings();
        let pairs: Vec<(&str, &str)> = written.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(ublk_throttle_config::new_device("v", &pairs).expect(settings).0, before);
    }
}

#[test]
fn groups_written_down_are_read_as_the_same_groups() {
    let before = config(
        "groups: { g: { parent: p, weight: 7, limits: { iops: 5, iops-max: 6, iops-max-length: 90ms } }, \
         p: { charge: { discard: bytes } }, q: { limits: { bps-total: 1GiB/s } } }\n",
    );
    let written = ublk_throttle_config::write_groups(&before.groups);
    let (after, _) = ublk_throttle_config::parse("groups", written.as_bytes()).expect(&written);
    let unplaced =
        |config: &Config| config.groups.iter().map(|group| Group { line: 0, ..group.clone() }).collect::<Vec<_>>();
    assert_eq!(unplaced(&after), unplaced(&before), "{written}");
}

#[test]
fn only_a_device_of_memory_fails_with_its_daemon_unless_told() {
    // Its contents are lost by then: serving zeroes would be worse than an error.
    use ublk_throttle_config::OnCrash;
    let crash = |settings: &str| device("v", settings).on_crash;
    assert_eq!(crash("null=1MiB"), OnCrash::Requeue);
    assert_eq!(crash("null=1MiB on-crash=fail"), OnCrash::Fail);
    assert_eq!(crash("memory=1MiB"), OnCrash::Fail);
    let both = config("defaults: { on-crash: requeue }\ndevices: { m: { backend: { memory: 1MiB } } }\n");
    assert_eq!(both.devices[0].on_crash, OnCrash::Fail);
}

#[test]
fn f87_required_is_said_by_a_device_or_by_the_defaults() {
    let required = |body: &str| config(body).devices.iter().map(|device| device.required).collect::<Vec<_>>();
    let devices = "devices: { a: { backend: { file: /a } }, b: { backend: { file: /b }, required: true }, \
                   c: { backend: { file: /c }, required: false } }\n";
    assert_eq!(required(devices), [false, true, false]);
    assert_eq!(required(&format!("defaults: {{ required: true }}\n{devices}")), [true, true, false]);
    // The backend of a device of memory is never missing.
    let described = |body: &str| config(&format!("devices: {{ a: {{ {body}, required: true }} }}\n")).describe();
    assert!(described("backend: { file: /a }").contains("\n  without its backend the daemon does not start\n"));
    assert!(!described("backend: { memory: 1MiB }").contains("does not start"));
    // Written only if true: an older program does not know the key.
    let is_written = |settings: &str| device("v", settings).settings().iter().any(|(key, _)| key == "required");
    assert!(is_written("file=/a required=true") && !is_written("file=/a required=false"));
}

#[test]
fn f68_direct_is_the_default_of_a_block_device_and_left_open_for_a_file() {
    // A failed write through the page cache is reported only by a later flush.
    use ublk_throttle_config::Direct;
    let direct = |settings: &str| device("v", settings).backend.direct();
    for (settings, expected) in [
        ("block=/b", Direct::On),
        ("block=/b direct=auto", Direct::Auto),
        ("block=/b direct=false", Direct::Off),
        ("file=/f", Direct::Auto),
        ("file=/f direct=auto", Direct::Auto),
        ("file=/f direct=true", Direct::On),
        ("file=/f direct=false", Direct::Off),
    ] {
        assert_eq!(direct(settings), Some(expected), "{settings}");
    }
    assert_eq!(direct("memory=1MiB"), None);
    let refused = refused(new_device("v", &pairs("file=/f direct=maybe")));
    assert_eq!(refused, "direct: \"maybe\" is neither true nor false; allowed: true, false, auto");
}

#[test]
fn f67_what_programs_make_of_a_file_is_read_as_the_file() {
    // PyYAML and Ansible turn `off` and `on` into truth values; Helm writes large numbers with an
    // exponent.
    let written = config(
        "groups: { g: { limits: { iops: 1000000, bps-total: 1048576 } } }\n\
         devices:\n  a: { backend: { file: /a, size: 1073741824 }, group: g, zero-copy: off, id: 1000000, block-size: 4096 }\n  \
         b: { backend: { file: /b }, zero-copy: on }\n",
    );
    let rewritten = config(
        "groups: { g: { limits: { iops: 1e+06, bps-total: 1.048576e+06 } } }\n\
         devices:\n  a: { backend: { file: /a, size: 1.073741824e+09 }, group: g, zero-copy: false, id: 1e+06, block-size: 4.096e+03 }\n  \
         b: { backend: { file: /b }, zero-copy: True }\n",
    );
    assert_eq!(rewritten, written);
    assert_eq!(device("v", "file=/a zero-copy=false iops=1e3"), device("v", "file=/a zero-copy=off iops=1000"));
}

#[test]
fn null_has_no_zero_copy_whatever_the_default_says() {
    // A default concerns the devices that have the choice; an exception for each null device would
    // be a chore.
    use ublk_throttle_config::ZeroCopy;
    let copy = |settings: &str| device("v", settings).zero_copy;
    assert_eq!(copy("file=/a"), ZeroCopy::Auto);
    assert_eq!(copy("block=/a zero_copy=on"), ZeroCopy::On);
    assert_eq!(copy("memory=1MiB"), ZeroCopy::Auto);
    assert_eq!(copy("null=1MiB"), ZeroCopy::Off);
    assert_eq!(copy("null=1MiB zero-copy=auto"), ZeroCopy::Off);
    let three = config(
        "defaults: { zero-copy: on }\ndevices:\n  n: { backend: { null: 1MiB } }\n  f: { backend: { file: /a } }\n  \
         b: { backend: { block: /b }, zero_copy: off }\n",
    );
    let words: Vec<&str> = three.devices.iter().map(|device| device.zero_copy.word()).collect();
    assert_eq!(words, ["off", "on", "off"]);
    let said = three.describe();
    assert_eq!(said.matches("each request is copied between kernel and daemon").count(), 1, "{said}");
    assert_eq!(said.matches("no request is copied between kernel and daemon").count(), 1, "{said}");
}

#[test]
fn cpus_of_a_device_replace_those_of_all_and_know_their_line() {
    // The line is for the error that names a CPU which the host lacks.
    let three = config(
        "defaults:\n  cpus: 0-1\ndevices:\n  a: { backend: { memory: 1MiB } }\n  b: { backend: { memory: 1MiB }, cpus: [3] }\n  \
         c: { backend: { memory: 1MiB }, cpus: all }\n",
    );
    let told = three.devices.iter().map(|device| device.cpus.map(|cpus| (cpus.to_string(), cpus.line)));
    assert_eq!(told.collect::<Vec<_>>(), [Some(("0-1".to_owned(), 3)), Some(("3".to_owned(), 6)), None]);
    assert_eq!(three.describe().matches("served on CPUs").count(), 2, "{}", three.describe());
    assert_eq!(device("v", "memory=1MiB cpus=all").cpus, None);
}

#[test]
fn group_that_is_added_is_the_group_that_a_file_describes() {
    let from_file = config("groups: { p: {}, g: { parent: p, weight: 7, limits: { iops: 5, iops-max: 6 } } }\n");
    let expected = Group { line: 0, ..from_file.groups[1].clone() };
    assert_eq!(group("g", "iops=5 iops-max=6 parent=p weight=7"), expected);
    assert_eq!(group("g", "parent=none").parent, None);
}

#[test]
fn what_is_not_named_stays() {
    let before = device("v", "memory=1MiB group=g weight=5 iops=500 iops-max=600");
    let after = change_device(&before, &pairs("bps-write=1k")).expect("sound").0;
    assert_eq!(after.limits.get(LimitKind::IopsTotal), before.limits.get(LimitKind::IopsTotal));
    assert_eq!(after.limits.get(LimitKind::BpsWrite).avg, 1000);
    assert_eq!(Device { limits: before.limits, ..after }, before);
    assert_eq!(change_device(&before, &[]), Ok((before, Vec::new())));
    let before = group("g", "parent=p weight=5 iops=500");
    assert_eq!(change_group(&before, &[]), Ok((before.clone(), Vec::new())));
    assert_eq!(change_group(&before, &pairs("weight=6")), Ok((Group { weight: 6, ..before }, Vec::new())));
}

#[test]
fn place_and_size_change_by_their_own_keys() {
    let before = device("v", "memory=1MiB group=g");
    let after = change_device(&before, &pairs("group=h weight=10000 size=2MiB iops=unlimited")).expect("sound").0;
    assert_eq!(
        (after.group.as_deref(), after.weight, after.backend),
        (Some("h"), 10_000, Backend::Memory { size: 2 << 20 })
    );
    assert_eq!(change_device(&before, &pairs("group=none")).expect("sound").0.group, None);
    let file = change_device(&device("v", "file=/a"), &pairs("size=1GiB")).expect("sound").0;
    assert_eq!((file.backend.path(), file.backend.size()), (Some(Path::new("/a")), Some(1 << 30)));
    assert_eq!(
        change_device(&device("v", "null=1MiB"), &pairs("size=512")).expect("sound").0.backend.size(),
        Some(512)
    );
    assert_eq!(change_group(&group("g", "parent=p"), &pairs("parent=none")).expect("sound").0.parent, None);
}

#[test]
fn every_fault_is_told_at_once_in_one_line_each() {
    let before = device("v", "memory=1MiB block-size=4096 iops=500");
    for (settings, expected) in [
        ("size=0", "size: a size of 0; allowed: a size like 20GiB, a multiple of 512 above 0 and below 2^63"),
        (
            "size=6k size=1M",
            "size: given twice; keep one\nsize: 6000 is not a multiple of 512; a disk is counted in sectors: write 5632 or 6144",
        ),
        ("size=4608", "size: 4608 is not a multiple of the block-size 4096; write 4096 or 8192"),
        (
            "weight=0 group= iops-max=5",
            "iops-total-max: 5 is below iops-total (500); a burst rate must be at least the average; raise it, or remove \
             it for none\n\
             group: an empty text; allowed: the name of a group, or `none`\n\
             weight: 0 is out of bounds; allowed: a whole number from 1 to 10000",
        ),
        ("queues=2", "queues: cannot change while the device runs; remove the device and add it again"),
        ("read_only=true", "read_only: cannot change while the device runs; remove the device and add it again"),
        ("required=true", "required: cannot be set; change it in the file of the configuration, then `reload`"),
        ("limits=5", "limits: holds several keys; write each of them, like `iops-total=500`"),
        (
            "wieght=5",
            "wieght: unknown key; did you mean `weight`? known keys: weight, group, size, and those of limits, like iops-total",
        ),
        (
            "iops-toal=5",
            "iops-toal: unknown key; did you mean `iops-total`? known keys: weight, group, size, and those of limits, like \
             iops-total",
        ),
    ] {
        assert_eq!(refused(change_device(&before, &pairs(settings))), expected, "{settings}");
    }
    let before = group("g", "");
    for (settings, expected) in [
        ("parent=g", "parent: g would stand below itself; name another group, or `none`"),
        ("charge=op", "charge: cannot be set; change it in the file of the configuration, then `reload`"),
        ("size=1", "size: unknown key; known keys: weight, parent, and those of limits, like iops-total"),
    ] {
        assert_eq!(refused(change_group(&before, &pairs(settings))), expected, "{settings}");
    }
}

#[test]
fn f80_a_size_of_a_device_on_a_block_device_is_read_and_changes_no_description() {
    // The daemon compares the size with the disk behind the device.
    let before = device("v", "block=/dev/sda");
    assert_eq!(change_device(&before, &pairs("size=1GiB")), Ok((before.clone(), Vec::new())));
    assert_eq!(wanted_size(&pairs("size=1GiB")), Some(1 << 30));
    assert_eq!([wanted_size(&pairs("weight=5")), wanted_size(&pairs("size=5"))], [None, None]);
    let odd = refused(change_device(&before, &pairs("size=5")));
    assert!(odd.contains("5 is not a multiple of 512"), "{odd}");
}

#[test]
fn device_that_no_file_could_describe_is_not_added() {
    for (settings, expected) in [
        ("", "no backend; a backend is one of file, block, memory and null: say which, like `file=/srv/vol1.img`"),
        (
            "size=1M",
            "no backend; a backend is one of file, block, memory and null: say which, like `file=/srv/vol1.img`",
        ),
        (
            "file=a.img",
            "file: \"a.img\" is a relative path; allowed: an absolute path; the daemon is in another directory",
        ),
        (
            "file=/a memory=1M",
            "memory: a second backend, besides `file`; a backend is one of file, block, memory and null",
        ),
        ("file=/a create=true", "create: `create` without a size; add `size:`, or remove `create`"),
        (
            "memory=1 id=x",
            "id: \"x\" is not a number; allowed: a whole number from 0 to 1048575, or `auto`\nmemory: 1 is not a multiple of 512; a disk is counted in sectors: write 512",
        ),
        (
            "memory=512 iops-max=5",
            "iops-total-max: 5 without iops-total; a burst rate needs an average to exceed; add `iops-total:`, or remove this",
        ),
        (
            "memory=512 on-crash=requeue",
            "on-crash: `requeue` of a memory backend, whose bytes die with the daemon; allowed: fail",
        ),
        (
            "null=512 zero-copy=on",
            "zero-copy: `on` of a null backend, which takes no pages of the kernel; allowed: auto, off; file, block and \
             memory backends have zero copy",
        ),
        ("memory=512 cpus=3-1", "cpus: 3-1 runs backwards; write the smaller number first: 1-3"),
        ("memory=512 queues=1 queues=2", "queues: given twice; keep one"),
    ] {
        assert_eq!(refused(new_device("v", &pairs(settings))), expected, "{settings}");
    }
    let unknown = refused(new_device("v", &pairs("fiel=/a")));
    assert!(
        unknown.starts_with("fiel: unknown key; did you mean `file`? known keys: file, block, memory"),
        "{unknown}"
    );
}

#[test]
fn what_is_odd_in_a_file_is_odd_in_a_command() {
    // The warning has the key alone: a command has no file and no line.
    let told = |warnings: Vec<Warning>| lines(&warnings);
    let zero = "iops-total: 0 means no limit; write `unlimited`, or remove the key, to say so";
    let alone = "weight: a weight without `group` changes nothing: it is a share of what a group allows";
    let old = device("v", "memory=1MiB iops=5");
    assert_eq!(
        told(new_device("v", &pairs("memory=1MiB iops=0 weight=5")).expect("sound").1),
        format!("{zero}\n{alone}")
    );
    assert_eq!(told(change_device(&old, &pairs("iops=0 weight=5")).expect("sound").1), format!("{zero}\n{alone}"));
    assert_eq!(told(change_device(&old, &pairs("weight=5 group=g iops=unlimited")).expect("sound").1), "");
    let alone = "weight: a weight without `parent` changes nothing: it is a share of what a group allows";
    assert_eq!(told(new_group("g", &pairs("iops=0 weight=5")).expect("sound").1), format!("{zero}\n{alone}"));
    let length = "iops-total-max-length: a burst length without a burst rate changes nothing; add `-max`";
    assert_eq!(told(change_group(&group("g", ""), &pairs("iops=5 iops-max-length=1")).expect("sound").1), length);
}

#[test]
fn what_is_odd_beside_others_is_told_of_each() {
    // The same words as for a file; no words for a sound setting.
    let all = config(
        "groups: { top: { limits: { iops: 5 } }, g: { parent: top }, empty: { limits: { iops: 1 } } }\ndevices:\n  \
         a: { backend: { file: /a, shared: true }, group: g }\n  b: { backend: { file: /a }, read-only: true }\n  \
         c: { backend: { memory: 1MiB }, limits: { iops: 1 } }\n",
    );
    for (told, expected) in [
        (odd_device(&all, "a"), "device b (line 5) has the same path, and one of the two writes to it"),
        (odd_device(&all, "b"), "device a (line 4) has the same path, and one of the two writes to it"),
        (odd_device(&all, "c"), "the last of 128 requests at once waits 128 s at this rate; a lower depth bounds that"),
        (odd_device(&all, "nobody"), ""),
        (odd_group(&all, "top"), ""),
        (odd_group(&all, "empty"), ""),
    ] {
        assert_eq!(lines(&told), expected);
    }
    let mut more = all.clone();
    more.devices.push(device("d", "memory=1MiB group=g depth=64"));
    let expected = "the last of 192 requests at once waits 38 s at this rate; a lower depth bounds that";
    assert_eq!(lines(&odd_group(&more, "top")), expected);
}

#[test]
fn names_are_those_of_a_file() {
    for name in ["", "a b", ".a", "-a", "a/b", &"x".repeat(65)] {
        let text = refused(new_device(name, &pairs("memory=1M")));
        assert!(text.starts_with("name: ") && text.contains("a name has 1 to 64 of"), "{text}");
        assert_eq!(refused(new_group(name, &[])).lines().count(), 1);
    }
    assert_eq!(device("none", "memory=1MiB").name, "none");
    assert_eq!(
        refused(new_group("none", &[])),
        "name: a group called `none`; `group=none` means no group; choose another name"
    );
}

#[test]
fn megabyte_for_a_key_or_value_is_answered_shortly() {
    // A client may send as much in one line; the answer goes back to the client and into a log.
    let long = "x".repeat(1 << 20);
    for (key, value) in [(long.as_str(), "1"), ("weight", &long), ("file", &long), ("iops", &long), ("on-crash", &long)]
    {
        for text in [
            refused(new_device(&long, &[("null", "1MiB"), (key, value)])),
            refused(change_group(&group("g", ""), &[(key, value), ("weight", "0")])),
        ] {
            assert!(text.lines().all(|line| line.chars().count() <= 500), "{} characters", text.len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_setting_makes_it_panic_or_answer_in_two_lines(
        settings in proptest::collection::vec(("(file|null|size|group|weight|id|iops|bps_max|limits|\\PC{0,9})", "(none|0|512|1MiB|[ -~\n]{0,9}|\\PC{0,9})"), 0..6),
    ) {
        let settings: Vec<(&str, &str)> = settings.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let (old_device, old_group) = (device("v", "memory=1MiB iops=5"), group("g", "iops=5"));
        let faults = [
            new_device("v", &settings).err(),
            change_device(&old_device, &settings).err(),
            new_group("g", &settings).err(),
            change_group(&old_group, &settings).err(),
        ];
        for fault in faults.into_iter().flatten().flatten() {
            prop_assert!(!fault.to_string().chars().any(char::is_control), "{:?}", fault.to_string());
        }
    }
}
