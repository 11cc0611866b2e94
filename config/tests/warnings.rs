//! Allowed but odd settings give a warning with its place, and are accepted.

use ublk_throttle_config::{parse, warning_lines};

fn check(text: &str, expected: &[&str]) {
    let (_, warnings) = parse("w.yaml", text.as_bytes()).unwrap_or_else(|errors| panic!("{errors}"));
    let found: Vec<String> =
        warnings.iter().map(|w| w.to_string().split_once(':').expect("a file").1.to_owned()).collect();
    assert_eq!(found, expected);
}

fn device(body: &str) -> String {
    format!("version: 1\ndevices:\n  vol0:\n    backend: {{ memory: 1MiB }}\n{body}")
}

#[test]
fn zero_is_no_limit_and_said() {
    check(
        &device("    limits: { iops: 0 }\n"),
        &["5:21: devices.vol0.limits.iops-total: 0 means no limit; write `unlimited`, or remove the key, to say so"],
    );
    check(&device("    limits: { iops: unlimited, bps: max }\n"), &[]);
}

#[test]
fn long_hold_is_reckoned_from_all_requests_that_fit() {
    // 128 requests at 1 a second; 2 x 128 x 128 KiB at 1 MiB/s are 32 s, 1 x 128 only 16 s.
    check(
        &device("    limits: { iops: 1 }\n"),
        &["3:3: devices.vol0: the last of 128 requests at once waits 128 s at this rate; a lower depth bounds that"],
    );
    check(
        &device("    queues: 2\n    limits: { bps: 1MiB }\n"),
        &[
            "3:3: devices.vol0: the last of 256 requests of 128 KiB at once waits 32 s at this rate; a lower depth bounds that",
        ],
    );
    check(&device("    limits: { bps: 1MiB }\n"), &[]);
    check(&device("    depth: 30\n    limits: { iops: 1 }\n"), &[]);
}

#[test]
fn group_holds_the_requests_of_all_its_members() {
    // 2 x 128 at 5 a second are 51 s; each device alone would be 25 s.
    check(
        "version: 1\ngroups:\n  g: { limits: { iops: 5 } }\ndevices:\n  a: { backend: { memory: 1MiB }, group: g }\n  \
         b: { backend: { memory: 1MiB }, group: g }\n",
        &["3:3: groups.g: the last of 256 requests at once waits 51 s at this rate; a lower depth bounds that"],
    );
}

#[test]
fn what_serves_nobody_is_said() {
    check("version: 1\n", &["1:1: devices: no devices: nothing will be served"]);
    check(
        "version: 1\ndevices:\n  a: { backend: { memory: 1MiB } }\ngroups:\n  g: {}\n",
        &["5:3: groups.g: no device is in this group"],
    );
    check(
        &device("    limits: { iops: 500, iops-max-length: 0.5 }\n"),
        &[
            "5:26: devices.vol0.limits.iops-total-max-length: a burst length without a burst rate changes nothing; add `-max`",
        ],
    );
}

#[test]
fn reader_beside_a_writer_that_shares_is_allowed_and_said() {
    check(
        "version: 1\ndevices:\n  a: { backend: { block: /dev/sda, shared: true } }\n  b: { backend: { block: /dev//sda }, \
         read-only: true }\n",
        &["4:26: devices.b.backend.block: device a (line 3) has the same path, and one of the two writes to it"],
    );
}

#[test]
fn many_warnings_are_counted() {
    let keys: String =
        (0..30).map(|n| format!("  v{n}: {{ backend: {{ memory: 1MiB }}, limits: {{ iops: 0 }} }}\n")).collect();
    let (_, warnings) = parse("w.yaml", format!("version: 1\ndevices:\n{keys}").as_bytes()).expect("accepted");
    let lines = warning_lines(&warnings);
    assert_eq!((warnings.len(), lines.len()), (30, 11));
    assert!(lines[0].starts_with("w.yaml:3:52: devices.v0.limits.iops-total: 0 means"), "{lines:?}");
    assert_eq!(lines[10], "and 20 more");
}

#[test]
fn weight_that_shares_with_nobody_is_said() {
    // Without a group above, a weight has no share to set.
    check(
        &device("    weight: 200\n"),
        &["5:5: devices.vol0.weight: a weight without `group` changes nothing: it is a share of what a group allows"],
    );
    check(
        "version: 1\ngroups:\n  g: { weight: 50 }\ndevices:\n  a: { backend: { memory: 1MiB }, group: g, weight: 10 }\n",
        &["3:8: groups.g.weight: a weight without `parent` changes nothing: it is a share of what a group allows"],
    );
}

#[test]
fn group_holds_the_requests_of_all_groups_below_it() {
    // Two devices of 128 in two tenants wait for the rack: 51 s; the tenants have no limits of their own.
    check(
        "version: 1\ngroups:\n  t: { parent: rack }\n  u: { parent: rack }\n  rack: { limits: { iops: 5 } }\n  \
         empty: { parent: rack }\ndevices:\n  a: { backend: { memory: 1MiB }, group: t }\n  \
         b: { backend: { memory: 1MiB }, group: u }\n",
        &[
            "5:3: groups.rack: the last of 256 requests at once waits 51 s at this rate; a lower depth bounds that",
            "6:3: groups.empty: no device is in this group",
        ],
    );
}
