//! Faults of a configuration, a test per kind: the refused values, both sides of each border, and
//! both lines where two entries conflict. The exact texts are those of `tests/broken`.

use throttle_core::limits::{LimitKind, VALUE_MAX};
use ublk_throttle_config::{Config, REQUEST_BYTES_MAX, parse};

fn read(body: &str) -> Result<Config, String> {
    let answer = parse("f.yaml", format!("version: 1\n{body}").as_bytes());
    answer.map(|(config, _)| config).map_err(|errors| errors.to_string())
}

fn accepted(body: &str) -> Config {
    read(body).unwrap_or_else(|errors| panic!("{body}\n{errors}"))
}

fn refused(body: &str, reasons: &[&str]) {
    let text = read(body).expect_err(body);
    for reason in reasons {
        assert!(text.contains(reason), "{reason:?} is not in\n{text}");
    }
}

fn limits(limits: &str) -> String {
    format!("devices: {{ a: {{ backend: {{ memory: 1MiB }}, limits: {{ {limits} }} }} }}\n")
}

#[test]
fn f08_devices_of_memory_count_under_the_bound() {
    // 64 MiB of buffers each. Both sides of the border; a size above the memory of any machine; a
    // sum above 64 bits.
    let device = |size: &str| format!("devices: {{ m: {{ backend: {{ memory: {size} }} }} }}\n");
    let bound = "limits: { memory: 1GiB }\n";
    let config = accepted(&format!("{bound}{}", device("960MiB")));
    assert_eq!((config.memory_bytes(), config.buffer_bytes()), (1 << 30, 64 << 20));
    assert!(config.describe().starts_with("memory: 1 GiB (1.1 GB) for all devices, of at most 1 GiB (1.1 GB)\n"));
    refused(&format!("{bound}{}", device("983041KiB")), &["f.yaml:2:19: limits.memory: ", "above 1 GiB", "m (line 3)"]);
    refused(
        &format!("{bound}{}", device("100TiB")),
        &["devices of memory 100 TiB", "above 1 GiB", "make a device of memory smaller, first of m (line 3): 100 TiB"],
    );
    let two = "devices:\n  m: { backend: { memory: 9223372036854775296 } }\n  n: { backend: { memory: 9223372036854775296 } }\n";
    refused(&format!("{bound}{two}"), &["above 1 GiB"]);
    accepted(&device("100TiB"));
    // A null device stores nothing, and the contents of a file device are on its disk.
    accepted(&format!(
        "{bound}devices: {{ n: {{ backend: {{ null: 100TiB }} }}, f: {{ backend: {{ file: /f, size: 100TiB }} }} }}\n"
    ));
}

#[test]
fn f08_buffers_above_the_bound_are_refused_with_their_sum() {
    // 2 queues of 64 and one of 128, 512 KiB each: 128 MiB. Both sides of the border, and no bound.
    let devices =
        "devices:\n  a: { backend: { \"null\": 1MiB }, queues: 2, depth: 64 }\n  b: { backend: { \"null\": 1MiB } }\n";
    let config = accepted(&format!("limits: {{ memory: 128MiB }}\n{devices}"));
    assert_eq!(config.memory_max, Some(config.buffer_bytes()));
    assert_eq!(config.buffer_bytes(), 256 * u64::from(REQUEST_BYTES_MAX));
    assert!(
        config.describe().starts_with("memory: 128 MiB (134.2 MB) for all devices, of at most 128 MiB (134.2 MB)\n")
    );
    refused(
        &format!("limits: {{ memory: 127MiB }}\n{devices}"),
        &[
            "f.yaml:2:19: limits.memory: ",
            "take 128 MiB (134.2 MB) (buffers",
            "above 127 MiB",
            "lower depth or queues",
            "or raise this",
        ],
    );
    assert_eq!(accepted(devices).memory_max, None);
}

#[test]
fn f28_second_writer_of_a_path_is_refused_unless_both_share_it() {
    let two = |a: &str, b: &str| format!("devices:\n  a: {{ {a} }}\n  b: {{ {b} }}\n");
    let backend = |path: &str| format!("backend: {{ file: {path} }}");
    let shared = |path: &str| format!("backend: {{ file: {path}, shared: true }}");
    for (a, b) in [(backend("x/./y"), backend("x//y")), (shared("x"), backend("x")), (backend("x"), shared("x"))] {
        refused(&two(&a, &b), &["f.yaml:4:", "device a (line 3) already writes", "`shared: true`"]);
    }
    assert!(accepted(&two(&shared("x"), &shared("x"))).devices.iter().all(|device| device.backend.is_shared()));
    accepted(&two(&backend("x"), &backend("y")));
    let read_only = format!("{}, read-only: true", backend("x"));
    accepted(&two(&read_only, &read_only));
    // A reader may be beside a writer only if the writer is `shared`: the rule of the lock that a
    // device takes at its start.
    refused(&two(&backend("x"), &read_only), &["f.yaml:4:", "device a (line 3) already writes to", "`shared: true`"]);
    refused(&two(&read_only, &backend("x")), &["f.yaml:4:", "device a (line 3) already reads", "`shared: true`"]);
    accepted(&two(&shared("x"), &read_only));
    // The third device is compared with every earlier one, not only with the last.
    let third = format!("{}  c: {{ {} }}\n", two(&shared("x"), &read_only), backend("x"));
    refused(&third, &["f.yaml:5:", "device a (line 3) already writes"]);
}

#[test]
fn f31_size_that_no_disk_has_is_refused_with_those_beside_it() {
    let sized = |size: &str, block: &str| {
        format!("devices: {{ a: {{ backend: {{ memory: {size} }}, block-size: {block} }} }}\n")
    };
    for (size, block) in [("512", "512"), ("4096", "4096"), ("9223372036854775296", "512")] {
        assert_eq!(accepted(&sized(size, block)).devices[0].backend.size(), size.parse().ok());
    }
    refused(&sized("0", "512"), &["a size of 0"]);
    refused(&sized("513", "512"), &["513 is not a multiple of 512", "write 512 or 1024"]);
    refused(&sized("9223372036854775808", "512"), &["not below 2^63"]);
    refused(&sized("4608", "4096"), &["4608 is not a multiple of the block-size 4096", "write 4096 or 8192"]);
    refused(&sized("4096", "2048"), &["\"2048\" is unknown", "allowed: 512, 4096"]);
}

#[test]
fn f36_reference_that_fails_names_both_lines() {
    let devices = |a: &str, b: &str| {
        format!("devices:\n  a: {{ backend: {{ memory: 1MiB }}{a} }}\n  {b}: {{ backend: {{ memory: 1MiB }}{a} }}\n")
    };
    refused(&devices(", id: 7", "b"), &["f.yaml:4:", "7 is already the id of a, line 3"]);
    refused(&devices("", "a"), &["f.yaml:4:", "given twice, first on line 3"]);
    refused(
        &format!("groups:\n  rack: {{}}\n{}", devices(", group: rakc", "b")),
        &["did you mean `rack`?", "from line 3 on"],
    );
    refused(
        "groups:\n  a: { parent: b }\n  b: { parent: a }\n",
        &["f.yaml:3:", "a stands below b, b below a (line 4)"],
    );
}

#[test]
fn f37_limit_of_zero_is_no_limit_and_a_negative_or_empty_one_is_refused() {
    let config = accepted(&limits("iops: 0"));
    assert!(config.devices[0].limits.is_unlimited());
    refused(&limits("iops: -0"), &["\"-0\" is negative"]);
    refused(&limits("iops: \"\""), &["an empty text"]);
}

#[test]
fn f39_limit_is_accepted_up_to_ten_to_the_fifteen() {
    let config = accepted(&limits("bps: 1000000000000000"));
    assert_eq!(config.devices[0].limits.get(LimitKind::BpsTotal).avg, VALUE_MAX);
    refused(&limits("bps: 1000000000000001"), &["above the largest value"]);
    refused(&limits("iops: 18446744073709551615"), &["above the largest value"]);
    refused(&limits("iops: 18446744073709551616"), &["is above 18446744073709551615"]);
    // The product needs more than 64 bits.
    refused(
        &limits("bps: 1, bps-max: 1000000000000000, bps-max-length: 500000h"),
        &["more than 1000000000000000 (10^15) in all"],
    );
    accepted(&limits("bps: 1, bps-max: 500000000000000, bps-max-length: 2s"));
}

#[test]
fn f40_rules_between_limits_are_named() {
    for (broken, reason) in [
        ("iops: 500, iops-max: 499", "499 is below iops-total (500, line 2)"),
        ("iops-max: 5", "5 without iops-total"),
        ("iops: 5, iops-max: 5, iops-max-length: 0", "a burst length of 0"),
        ("iops: 5, iops-max-length: 2s", "2s without iops-total-max"),
        ("bps: 5, iops-size: 4KiB", "counts operations, and no iops limit is set"),
    ] {
        refused(&limits(broken), &[reason]);
    }
    for sound in ["iops: 500, iops-max: 500", "iops: 5, iops-read: 9, bps-write: 1", "iops-read: 5, iops-size: 4KiB"] {
        accepted(&limits(sound));
    }
}
