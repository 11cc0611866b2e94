//! Traces against configurations, to the nanosecond.

use serde_json::Value;
use ublk_throttle_config::Config;

use super::{lines, summary};
use crate::error::Class;

/// Devices `a` and `b` in a group `g` with these limits, in YAML's flow style.
fn group(limits: &str) -> Config {
    config(&format!(
        "groups:\n  g: {{ limits: {{ {limits} }} }}\ndevices:\n  a: {{ backend: {{ null: 1MiB }}, group: g }}\n  \
         b: {{ backend: {{ null: 1MiB }}, group: g }}\n"
    ))
}

fn config(text: &str) -> Config {
    let (config, _) = ublk_throttle_config::parse("test.yaml", format!("version: 1\n{text}").as_bytes())
        .unwrap_or_else(|errors| panic!("{errors}"));
    config
}

fn run(config: &Config, trace: &str) -> Result<String, String> {
    let mut output = Vec::new();
    let outcome = lines(config, "t.jsonl", trace.as_bytes(), &mut output);
    outcome.map_err(|failure| {
        assert_eq!((failure.class, failure.class.exit()), (Class::Trace, 3));
        failure.render()
    })?;
    Ok(String::from_utf8(output).expect("JSON is UTF-8"))
}

/// `device@ms` for each request, in the order of dispatch.
fn went(config: &Config, trace: &str) -> Vec<String> {
    let output = run(config, trace).unwrap_or_else(|error| panic!("{error}"));
    let line = |line: &str| {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let [t, arrived, wait] = ["t", "arrived", "wait"].map(|key| line[key].as_u64().expect("a number"));
        assert_eq!(t, arrived + wait);
        format!("{}@{}", line["device"].as_str().expect("a name"), t as f64 / 1e6)
    };
    output.lines().map(line).collect()
}

fn count_by_ms(went: &[String], ms: u64) -> usize {
    let at = |line: &String| line.split_once('@').expect("device@ms").1.parse::<f64>().expect("a number");
    went.iter().filter(|line| at(line) <= ms as f64).count()
}

fn refusal(config: &Config, trace: &str) -> String {
    run(config, trace).expect_err("should be refused")
}

#[test]
fn a_hundred_iops_let_eleven_go_at_once_then_one_each_ten_ms() {
    let trace = r#"{"t":0,"device":"a","op":"read","bytes":4096,"count":15}"#;
    let mut expected = vec!["a@0"; 11];
    expected.extend(["a@10", "a@20", "a@30", "a@40"]);
    assert_eq!(went(&group("iops-total: 100"), trace), expected);
}

#[test]
fn a_line_of_output_is_as_documented() {
    let output =
        run(&group("iops: 1"), "{\"t\":0,\"device\":\"a\",\"op\":\"read\",\"bytes\":4096,\"count\":2}").unwrap();
    assert_eq!(
        output,
        "{\"t\":0,\"device\":\"a\",\"op\":\"read\",\"bytes\":4096,\"arrived\":0,\"wait\":0}\n\
         {\"t\":900000000,\"device\":\"a\",\"op\":\"read\",\"bytes\":4096,\"arrived\":0,\"wait\":900000000}\n"
    );
}

#[test]
fn one_iops_goes_at_0_and_from_0_9_s_on_each_second() {
    let trace = r#"{"t":0,"device":"a","op":"write","bytes":512,"count":4}"#;
    assert_eq!(went(&group("iops-total: 1"), trace), ["a@0", "a@900", "a@1900", "a@2900"]);
}

#[test]
fn bytes_are_waited_for_after_the_request_that_used_them() {
    let trace = r#"{"t":0,"device":"a","op":"read","bytes":4096}
{"t":0,"device":"a","op":"read","bytes":2048,"count":2}"#;
    assert_eq!(went(&group("bps-read: 4096"), trace), ["a@0", "a@900", "a@1400"]);
}

#[test]
fn a_burst_of_four_seconds_is_a_rate() {
    // iops 10, max 70, length 4: 8 at once, 70/s until 4.55 s, then 10/s.
    let config = group("iops-total: 10, iops-total-max: 70, iops-total-max-length: 4s");
    let trace = r#"{"t":0,"device":"a","op":"read","bytes":4096,"count":400}"#;
    let went = went(&config, trace);
    for (ms, count) in [(0, 8), (1_000, 78), (4_000, 288), (8_000, 361)] {
        assert_eq!(count_by_ms(&went, ms), count, "{ms} ms");
    }
}

#[test]
fn a_minute_of_burst_at_2000_then_100() {
    // More than 65,536 requests wait at once: the tags need more than the 16 bits of ublk.
    let config = group("iops-total: 100, iops-total-max: 2000, iops-total-max-length: 60");
    let trace = r#"{"t":0,"device":"a","op":"read","bytes":4096,"count":127000}"#;
    let went = went(&config, trace);
    for (ms, count) in [(0, 201), (60_000, 120_201), (63_158, 126_316), (69_158, 126_916)] {
        assert_eq!(count_by_ms(&went, ms), count, "{ms} ms");
    }
}

#[test]
fn two_devices_take_turns_and_flushes_go_at_once() {
    let trace = r#"{"t":0,"device":"a","op":"write","bytes":4096,"count":4}
{"t":0,"device":"b","op":"discard","bytes":4096,"count":2}
{"t":1000000,"device":"b","op":"flush"}"#;
    let went = went(&group("iops-total: 10"), trace);
    assert_eq!(went[..3], ["a@0", "a@0", "b@1"]);
    let mut rest = went[3..].to_vec();
    assert_eq!(rest.iter().filter(|line| line.starts_with('a')).count(), 2);
    rest.iter_mut().for_each(|line| *line = line.split_once('@').unwrap().1.to_owned());
    assert_eq!(rest, ["100", "200", "300", "400"]);
}

/// The bytes of each device, by name, that went from 1 s to 10 s.
fn bytes_from_1_to_10_s(config: &Config, trace: &str) -> Vec<f64> {
    let mut bytes = vec![0.0; config.devices.len()];
    for line in run(config, trace).expect("a good trace").lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        if (1_000_000_000..10_000_000_000).contains(&line["t"].as_u64().expect("a number")) {
            let number = config.devices.iter().position(|device| line["device"] == device.name.as_str());
            bytes[number.expect("a device")] += line["bytes"].as_f64().expect("a number");
        }
    }
    bytes
}

#[test]
fn a_share_is_equal_in_bytes_whatever_the_request_sizes_and_directions() {
    // Both devices want more than their share of 10 MiB/s, for 10 s; the bar is 1 %.
    let config = group("bps-total: 10MiB/s");
    for (op, large) in [("read", 65_536), ("write", 131_072)] {
        let trace = format!(
            r#"{{"t":0,"device":"a","op":"read","bytes":4096,"count":14000}}
{{"t":0,"device":"b","op":"{op}","bytes":{large},"count":900}}"#
        );
        let bytes = bytes_from_1_to_10_s(&config, &trace);
        let ratio = bytes[0] / bytes[1];
        assert!((0.99..1.01).contains(&ratio), "{ratio} of {bytes:?}");
    }
}

#[test]
fn weights_of_1_2_4_share_bytes_with_mixed_sizes() {
    // The bar is 2 %; each device has more to send than its share of 70 MiB/s over 10 s.
    let mut text = "groups:\n  g: { limits: { bps-total: 70MiB/s } }\ndevices:\n".to_owned();
    let mut trace = String::new();
    for (name, weight, bytes, count) in
        [("a", 100, 131_072, 900), ("b", 200, 16_384, 13_500), ("c", 400, 65_536, 6_500)]
    {
        text += &format!("  {name}: {{ backend: {{ null: 1MiB }}, group: g, weight: {weight} }}\n");
        trace += &format!("{{\"t\":0,\"device\":\"{name}\",\"op\":\"read\",\"bytes\":{bytes},\"count\":{count}}}\n");
    }
    let bytes = bytes_from_1_to_10_s(&config(&text), &trace);
    let each = [bytes[0], bytes[1] / 2.0, bytes[2] / 4.0];
    assert!(each.iter().all(|share| (share / each[0] - 1.0).abs() < 0.02), "{each:?}");
}

#[test]
fn a_raise_lets_go_at_once_and_the_same_limits_again_change_nothing() {
    let trace = |value: &str| {
        format!(
            r#"{{"t":0,"device":"a","op":"write","bytes":1000000,"count":3}}
{{"t":5000000,"set":{{"group":"g","limits":{{"bps-total":{value}}}}}}}"#
        )
    };
    let config = group("bps-total: 1000");
    assert_eq!(went(&config, &trace("1000")), ["a@0", "a@999900", "a@1999900"]);
    assert_eq!(went(&config, &trace("\"unlimited\"")), ["a@0", "a@5", "a@5"]);
    // A full bucket stays full, so the debt (10^6 less the capacity of 100 and the 5 bytes drained
    // by then) is paid at the new rate, a byte each nanosecond.
    assert_eq!(went(&config, &trace("\"1GB/s\""))[1], "a@5.999895");
}

#[test]
fn setting_the_same_limits_a_hundred_times_a_second_gives_nothing_away() {
    // The bar: at most 1000 + capacity + 1 in ten seconds at 100 a second.
    let mut trace = r#"{"t":0,"device":"a","op":"read","bytes":4096,"count":2000}"#.to_owned();
    for n in 1..1000 {
        trace += &format!("\n{{\"t\":{}0000000,\"set\":{{\"group\":\"g\",\"limits\":{{\"iops\":100}}}}}}", n);
    }
    assert_eq!(count_by_ms(&went(&group("iops-total: 100"), &trace), 10_000), 1011);
}

#[test]
fn limits_that_are_not_named_stay() {
    let trace = r#"{"t":0,"set":{"group":"g","limits":{"bps-read":1}}}
{"t":0,"device":"a","op":"write","bytes":4096,"count":3}"#;
    assert_eq!(went(&group("iops-total: 1"), trace), ["a@0", "a@900", "a@1900"]);
}

#[test]
fn a_device_has_limits_and_a_weight_and_moves_between_groups() {
    let two = config(
        "groups:\n  slow: { limits: { iops: 1 } }\n  fast: { limits: { iops: 10 } }\n  top: { limits: { iops: 2 } }\n\
         devices:\n  a: { backend: { null: 1MiB }, group: slow }\n",
    );
    let requests = r#"{"t":0,"device":"a","op":"read","bytes":512,"count":4}"#;
    let with = |set: &str| went(&two, &format!("{requests}\n{{\"t\":500000000,\"set\":{set}}}"));
    assert_eq!(with(r#"{"device":"a","group":"fast"}"#), ["a@0", "a@500", "a@500", "a@600"]);
    assert_eq!(with(r#"{"device":"a","group":null}"#), ["a@0", "a@500", "a@500", "a@500"]);
    assert_eq!(with(r#"{"group":"slow","weight":7,"parent":"top"}"#), ["a@0", "a@900", "a@1900", "a@2900"]);
    // Out of the group and under a limit of its own at once: no request passes unlimited in
    // between, in either direction.
    let own = with(r#"{"device":"a","weight":200,"group":null,"limits":{"iops":2}}"#);
    assert_eq!(own, ["a@0", "a@500", "a@900", "a@1400"]);
    let back = format!(
        "{}\n{requests}\n{}",
        r#"{"t":0,"set":{"device":"a","group":null,"limits":{"iops":2}}}"#,
        r#"{"t":100000000,"set":{"device":"a","group":"slow","limits":{"iops":"unlimited"}}}"#
    );
    assert_eq!(went(&two, &back), ["a@0", "a@100", "a@1000", "a@2000"]);
}

#[test]
fn weights_share_a_group_one_to_two() {
    let weighted = config(
        "groups:\n  g: { limits: { iops: 300 } }\ndevices:\n  a: { backend: { null: 1MiB }, group: g }\n  \
         b: { backend: { null: 1MiB }, group: g, weight: 200 }\n",
    );
    let trace = r#"{"t":0,"device":"a","op":"read","bytes":4096,"count":5000}
{"t":0,"device":"b","op":"read","bytes":65536,"count":5000}"#;
    let went = went(&weighted, trace);
    let of_b = went[300..3000].iter().filter(|line| line.starts_with('b')).count();
    assert!((1790..=1810).contains(&of_b), "{of_b} of 2700");
}

#[test]
fn a_removed_device_lets_go_what_it_holds_and_comes_back_as_configured() {
    let trace = r#"{"t":0,"device":"a","op":"read","bytes":512,"count":3}
{"t":1000000,"del":"a"}
{"t":2000000,"add":"a"}
{"t":3000000,"device":"a","op":"read","bytes":512}"#;
    // The drain dispatches two requests out of turn and charges one of them to the group, which
    // makes a debt of 1.9 s: a removal makes no member wait longer by more than 50 ms, or one
    // request.
    assert_eq!(went(&group("iops-total: 1"), trace), ["a@0", "a@1", "a@1", "a@1900"]);
}

#[test]
fn a_neighbour_goes_on_when_the_device_whose_deadline_counts_is_removed() {
    let trace = r#"{"t":0,"device":"a","op":"read","bytes":512,"count":2}
{"t":0,"device":"b","op":"read","bytes":512,"count":2}
{"t":1000000,"del":"a"}"#;
    assert_eq!(went(&group("iops-total: 1"), trace), ["a@0", "a@1", "b@1900", "b@2900"]);
}

#[test]
fn bad_lines_are_refused_with_their_place_and_a_cure() {
    let config = group("iops-total: 1");
    let first = r#"{"t":5,"device":"a","op":"read","bytes":512}"#;
    for (line, said) in [
        (
            r#"{"t":4,"device":"a","op":"read","bytes":1}"#,
            "t goes back from 5 to 4; a trace is in the order of time: sort it by t",
        ),
        (r#"{"t":6,"device":"A1","op":"read","bytes":1}"#, "no device \"A1\" in the configuration; there are: a, b"),
        (
            r#"{"t":6,"device":"a","op":"raed","bytes":1}"#,
            "\"op\": \"raed\"; did you mean `read`? allowed: read, write, flush, discard, write-zeroes",
        ),
        (r#"{"t":6,"device":"a","bytes":1}"#, "no \"op\"; allowed: read, write, flush, discard, write-zeroes"),
        (r#"{"t":6,"device":"a","op":"read"}"#, "no \"bytes\"; add the length of the request"),
        (
            r#"{"t":6,"device":"a","op":"read","bytes":1,"count":0}"#,
            "\"count\": 0; allowed: 1 to 1000000, or more lines",
        ),
        (
            r#"{"t":6,"device":"a","op":"read","byte":1}"#,
            "the key \"byte\"; did you mean `bytes`? known keys: t, device, op, bytes, count, set, del, add",
        ),
        (r#"{"t":-6,"device":"a"}"#, "\"t\": -6; nanoseconds belong here, a whole number below 2^64"),
        (r#"{"t":6.5,"del":"a"}"#, "\"t\": 6.5; nanoseconds belong here, a whole number below 2^64"),
        (r#"{"device":"a"}"#, "no \"t\"; add the time, nanoseconds from the start"),
        (r#"{"t":6}"#, "nothing happens here; add \"device\" and \"op\", or \"set\", \"del\" or \"add\""),
        (r#"{"t":6,"op":"read"}"#, "a request without a \"device\"; add its name"),
        (r#"{"t":6,"device":"a","del":"b"}"#, "both \"device\" and \"del\"; write one event a line"),
        (r#"{"t":6,"add":"a"}"#, "device \"a\" is there already; `del` it first"),
        (r#"{"t":6,"set":{"limits":{}}}"#, "\"set\" names neither a \"device\" nor a \"group\"; add one"),
        (r#"{"t":6,"set":{"group":"h","limits":{}}}"#, "no group \"h\" in the configuration; there are: g"),
        (
            r#"{"t":6,"set":{"group":"g","weigth":1}}"#,
            "the key \"weigth\" in \"set\"; did you mean `weight`? known keys: group, limits, weight, parent",
        ),
        (
            r#"{"t":6,"set":{"group":"g","weight":0}}"#,
            "\"weight\": 0 in \"set\"; allowed: a whole number from 1 to 10000",
        ),
        (
            r#"{"t":6,"set":{"group":"g","parent":"g"}}"#,
            "a group cannot stand below itself; name another parent, or null for none",
        ),
        (
            r#"{"t":6,"set":{"group":"g","limits":{"iops-total-max":0.5}}}"#,
            "limits.iops-total-max: \"0.5\" is a fraction; write a whole number, with a smaller unit if need be; allowed: operations a second, with k M G T (1000s) or Ki Mi Gi Ti (1024s), like 500 or 10k; or `unlimited`",
        ),
        (
            r#"{"t":6,"set":{"group":"g","limits":{"iops":5,"iops-max":4}}}"#,
            "limits.iops-total-max: 4 is below iops-total (5); a burst rate must be at least the average; raise it, or remove it for none",
        ),
    ] {
        let expected = format!("error[E-TRACE]: t.jsonl:3: {said}");
        assert_eq!(refusal(&config, &format!("{first}\n\n{line}\n")), expected);
    }
    let deleted = format!("{first}\n{{\"t\":6,\"del\":\"a\"}}\n{first}").replace("\"t\":5", "\"t\":6");
    assert_eq!(refusal(&config, &deleted), "error[E-TRACE]: t.jsonl:3: device \"a\" has been deleted; `add` it first");
    assert!(refusal(&config, "{\"t\":1").starts_with("error[E-TRACE]: t.jsonl:1: not JSON, from column 6: EOF while"));
    assert!(refusal(&config, "{\"t\":1,\"t\":2}").starts_with("error[E-TRACE]: t.jsonl:1: duplicate field `t`; "));
    assert!(refusal(&config, &" ".repeat(70_000)).contains("t.jsonl:1: a line of more than 65536 bytes"));
}

#[test]
fn what_went_before_a_bad_line_is_printed() {
    let mut output = Vec::new();
    let trace = "{\"t\":0,\"device\":\"a\",\"op\":\"read\",\"bytes\":4096,\"count\":9}\nwrong";
    lines(&group("iops-total: 1"), "t.jsonl", trace.as_bytes(), &mut output).expect_err("a bad line");
    assert_eq!(output.iter().filter(|byte| **byte == b'\n').count(), 1);
}

#[test]
fn requests_that_would_wait_beyond_the_end_of_the_clock_are_told() {
    let trace = r#"{"t":18446744073709551614,"device":"a","op":"read","bytes":1,"count":3}"#;
    let said = refusal(&group("iops-total: 1"), trace);
    assert!(said.starts_with("error[E-TRACE]: t.jsonl: 2 requests still wait when the clock ends"), "{said}");
    let century = r#"{"t":3155760000000000000,"device":"a","op":"read","bytes":1,"count":2}"#;
    assert_eq!(went(&group("iops-total: 1"), century).len(), 2);
}

#[test]
fn the_same_trace_gives_the_same_lines() {
    // Many devices with equal deadlines, and changes in between.
    let mut text = "groups:\n  g: { limits: { iops: 1000, bps: 5MB/s } }\ndevices:\n".to_owned();
    for n in 0..20 {
        text += &format!("  d{n}: {{ backend: {{ null: 1MiB }}, group: g, limits: {{ iops: 100 }} }}\n");
    }
    let config = config(&text);
    let mut trace = String::new();
    for n in 0..2000_u64 {
        let (t, device, bytes) = (n * 300_000, n * 7 % 20, 512 << (n % 7));
        trace += &format!("{{\"t\":{t},\"device\":\"d{device}\",\"op\":\"write\",\"bytes\":{bytes}}}\n");
        if n % 100 == 99 {
            trace += &format!("{{\"t\":{t},\"set\":{{\"device\":\"d{device}\",\"weight\":{}}}}}\n", n % 1000 + 1);
            trace += &format!("{{\"t\":{t},\"del\":\"d{device}\"}}\n{{\"t\":{t},\"add\":\"d{device}\"}}\n");
        }
    }
    let once = run(&config, &trace).unwrap();
    assert_eq!(once.lines().count(), 2000);
    assert!((0..3).all(|_| run(&config, &trace).unwrap() == once));
}

#[test]
fn a_summary_adds_up() {
    let config = config(
        "groups:\n  top: {}\n  g: { parent: top, limits: { iops: 1 } }\ndevices:\n  \
         a: { backend: { null: 1MiB }, group: g }\n  b: { backend: { null: 1MiB }, group: top }\n",
    );
    // Of a: at 0, 0.9 and 1.9 s; of b: two at once, at 1 s. The last line is at 4 s.
    let trace = r#"{"t":0,"device":"a","op":"read","bytes":1024,"count":3}
{"t":1000000000,"device":"b","op":"write","bytes":512,"count":2}
{"t":4000000000,"device":"b","op":"flush"}"#;
    let facts = summary(&config, "t", trace.as_bytes()).unwrap().facts();
    assert_eq!(facts.span_ns, 4_000_000_000);
    let row = |row: &super::summary::RowFacts| {
        (row.requests, row.bytes, row.requests_per_s, row.bytes_per_s, row.wait_ns.max, row.at_limit_ns)
    };
    let (a, b) = ((3, 3072, Some(0.75), Some(768.0)), (3, 1024, Some(0.75), Some(256.0)));
    assert_eq!(row(&facts.devices[0]), (a.0, a.1, a.2, a.3, 1_900_000_000, 1_900_000_000));
    assert_eq!(row(&facts.devices[1]), (b.0, b.1, b.2, b.3, 0, 0));
    assert_eq!(row(&facts.groups[1]), row(&facts.devices[0]));
    let all = (6, 4096, Some(1.5), Some(1024.0), 1_900_000_000, 1_900_000_000);
    assert_eq!(row(&facts.groups[0]), all);
    assert_eq!(row(&facts.total), all);
    let p50 = facts.devices[0].wait_ns.p50;
    assert!((900_000_000..=903_600_000).contains(&p50), "{p50}");
    assert_eq!(facts.devices[0].wait_ns.p99, 1_900_000_000);
    let table = facts.to_string();
    assert!(table.starts_with("over 4.000 s\n"), "{table}");
    assert!(table.lines().last().unwrap().ends_with("1.900 s (48 %)"), "{table}");
}

#[test]
fn what_waits_while_it_moves_counts_for_both_groups() {
    let config = config(
        "groups:\n  g: { limits: { iops: 1 } }\n  h: { limits: { iops: 1 } }\n\
         devices:\n  a: { backend: { null: 1MiB }, group: g }\n",
    );
    let trace = r#"{"t":0,"device":"a","op":"read","bytes":1024,"count":4}
{"t":500000000,"set":{"device":"a","group":"h"}}"#;
    // In g until 0.5 s; then two go at once in h, which is fresh, and the last at 1.4 s.
    let facts = summary(&config, "t", trace.as_bytes()).unwrap().facts();
    let at_limit = |row: &super::summary::RowFacts| (row.requests, row.at_limit_ns / 1_000_000);
    assert_eq!(facts.groups.iter().map(at_limit).collect::<Vec<_>>(), [(1, 500), (3, 1900)]);
}
