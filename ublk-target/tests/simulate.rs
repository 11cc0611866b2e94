//! `ublk-throttle simulate`, `man` and `completions` as a user runs them. The tests need neither
//! root nor ublk.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_ublk-throttle"))
}

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/examples").join(name)
}

fn simulate(config: &str, trace: &str) -> Command {
    let mut command = binary();
    command.arg("simulate").arg(example(config)).arg("--trace").arg(example(trace));
    command
}

fn run(command: &mut Command) -> Output {
    command.output().expect("the binary runs")
}

fn succeed(command: &mut Command) -> String {
    let output = run(command);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn lines(output: &str) -> Vec<Value> {
    output.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[test]
fn bursts_go_as_the_readme_of_the_traces_says() {
    let went = lines(&succeed(&mut simulate("burst.yaml", "traces/burst.jsonl")));
    let count = |device: &str, seconds: u64| {
        let went = went.iter().filter(|line| line["device"] == device);
        went.filter(|line| line["t"].as_u64() <= Some(seconds * 1_000_000_000)).count()
    };
    assert_eq!([0, 1, 4].map(|seconds| count("bursting", seconds)), [8, 78, 288]);
    assert_eq!(count("pool", 0), 2001);
    assert_eq!(count("cloud", 0), 13);
    assert!(went.is_sorted_by_key(|line| line["t"].as_u64()));
}

#[test]
fn two_devices_share_by_bytes_and_the_summary_says_so() {
    let facts = succeed(simulate("fairness.yaml", "traces/fairness.jsonl").args(["--summary", "--json"]));
    let facts: Value = serde_json::from_str(&facts).expect("JSON");
    // 100 MiB at 10 MiB/s, minus 1 MiB of saved credit; the last 4 KiB do not wait.
    assert_eq!(facts["span_ns"], 9_900_000_000_u64 - 390_625);
    assert_eq!(facts["total"]["bytes"], 100 << 20);
    for device in facts["devices"].as_array().expect("two devices") {
        assert_eq!(device["bytes"], 50 << 20);
        let at_limit = device["at_limit_ns"].as_u64().expect("a number");
        assert!((9_700_000_000..=9_900_000_000).contains(&at_limit), "{device}");
    }
    let table = succeed(simulate("fairness.yaml", "traces/fairness.jsonl").arg("--summary"));
    assert!(table.lines().any(|line| line.starts_with("group shared     13600  100.0")), "{table}");
}

#[test]
fn a_raise_and_a_removal_take_effect_at_once() {
    let went = lines(&succeed(&mut simulate("fairness.yaml", "traces/raise.jsonl")));
    let at = |from: u64, to: u64| {
        went.iter().filter(|line| (from..to).contains(&line["t"].as_u64().expect("a number"))).count()
    };
    // A write of 1 MiB goes each 100 ms before the raise, each 10 ms after it.
    assert_eq!(at(500_000_000, 1_000_000_000), 5);
    assert_eq!(at(1_000_000_000, 1_100_000_000), 10);
    assert_eq!(at(2_000_000_000, 2_000_000_001), 5);
    assert_eq!(went.last().expect("a flush")["wait"], 0);
}

#[test]
fn a_trace_may_come_through_a_pipe_and_its_faults_have_a_place() {
    let mut command = binary();
    command.arg("simulate").arg(example("fairness.yaml")).args(["--trace", "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the binary runs");
    let mut stdin = child.stdin.take().expect("piped");
    stdin
        .write_all(b"{\"t\":7,\"device\":\"small\",\"op\":\"read\",\"bytes\":512}\n{\"t\":8,\"del\":\"smal\"}\n")
        .unwrap();
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "error[E-TRACE]: stdin:2: no device \"smal\" in the configuration; did you mean `small`?\n"
    );
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 1);
}

#[test]
fn a_missing_trace_and_a_bad_configuration_end_with_3() {
    let output = run(&mut simulate("fairness.yaml", "traces/none.jsonl"));
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).ends_with("no such file or directory; check the path\n"));
    assert_eq!(run(&mut simulate("traces/README.md", "traces/raise.jsonl")).status.code(), Some(3));
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let mut child = simulate("fairness.yaml", "traces/fairness.jsonl").stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::with_capacity(64, child.stdout.take().expect("piped")).read_line(&mut line).unwrap();
    assert!(line.starts_with("{\"t\":0,"));
    assert!(child.wait().expect("it ends").success());
}

#[test]
fn pages_and_completions_come_from_the_flags() {
    let page = succeed(binary().args(["man", "simulate"]));
    assert!(page.starts_with(".ie") && page.contains(".TH ublk-throttle-simulate 1"), "{page}");
    assert!(succeed(binary().arg("man")).contains("ublk\\-throttle\\-simulate(1)"));
    assert!(succeed(binary().args(["completions", "zsh"])).contains("simulate"));
    let output = run(binary().args(["man", "simulat"]));
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("did you mean `simulate`?"));
}
