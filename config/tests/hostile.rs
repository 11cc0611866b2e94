//! No input makes the reader panic, take long or answer at length: examples with flipped and
//! missing bytes, and megabytes of text that is hard on a YAML parser.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use proptest::prelude::*;
use ublk_throttle_config::{FILE_BYTES_MAX, parse, warning_lines};

/// The shipped program promises one second for the largest file. An unoptimised build takes some
/// ten times as long, so it gets a quarter of the size and three times the time.
const LIMIT: Duration = Duration::from_secs(if cfg!(debug_assertions) { 3 } else { 1 });
const SIZE: usize = FILE_BYTES_MAX as usize / if cfg!(debug_assertions) { 4 } else { 1 };

fn examples() -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut paths: Vec<_> =
        fs::read_dir(directory).expect("readable").map(|entry| entry.expect("an entry").path()).collect();
    paths.retain(|path| path.is_file());
    paths.sort();
    paths.iter().map(|path| fs::read(path).expect("readable")).collect()
}

/// The CPU time of this thread. Parsing is pure and stays on its thread, so load on the machine
/// does not count; a wall clock sometimes fails on a busy machine.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a thread has a clock").into()
}

/// Parses `text`, and checks the answer against the promises.
fn survive(text: &[u8]) -> Duration {
    let start = cpu_time();
    let said = match parse("hostile.yaml", text) {
        Ok((config, warnings)) => {
            let _ = config.describe();
            warning_lines(&warnings).join("\n")
        }
        Err(errors) => errors.to_string(),
    };
    let took = cpu_time() - start;
    assert!(said.lines().count() <= 20, "{} lines:\n{said}", said.lines().count());
    assert!(said.lines().all(|line| line.chars().count() <= 500), "a long line:\n{said}");
    took
}

#[test]
fn every_cut_of_every_example_is_survived() {
    for text in examples() {
        for length in 0..text.len() {
            survive(&text[..length]);
        }
    }
}

proptest! {
    // A failure prints its input; integration tests have no file for failing inputs.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes_are_survived(
        which in 0usize..100,
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let examples = examples();
        let mut text = examples[which % examples.len()].clone();
        for (at, byte) in flips {
            let at = at.index(text.len());
            text[at] = byte;
        }
        prop_assert!(survive(&text) < LIMIT);
    }

    #[test]
    fn text_of_yaml_characters_is_survived(text in "[a-c0-9:,#&*!|>'\"%@`{}\\[\\]?\\- \n\t]{0,200}") {
        prop_assert!(survive(text.as_bytes()) < LIMIT);
        let nested = format!("version: 1\ndevices:\n  {text}");
        prop_assert!(survive(nested.as_bytes()) < LIMIT);
    }
}

#[test]
fn a_megabyte_of_anything_takes_no_longer_than_promised() {
    // Each part is repeated up to the size limit; the first parts kept the parser alone busy for
    // over a minute.
    let mut slow = Vec::new();
    for part in [
        "[",
        "{",
        "{a: ",
        "[a, ",
        "[?",
        "[\"]\",",
        "['',",
        "- ",
        "? ",
        "-\n",
        "?\n",
        "a:\n",
        "a: b\n",
        "k: [\n",
        "'",
        "\"",
        "|\n",
        "&a ",
        "*a ",
        "!a ",
        "#\n",
        "[]",
        "{}",
        ",",
        "a",
        "a ",
        "\n",
        "\t",
        "---\n",
        "%TAG !a! b\n",
        "\u{85}",
        "é",
        "\0",
        "\u{feff}",
        "]",
        "}\n",
        ": ",
        ":\n",
        "<<: ",
        "...\n",
        "\r",
        "' \"",
        "!<]>[",
    ] {
        for head in ["", "version: 1\ndevices:\n  "] {
            let text = format!("{head}{}", part.repeat((SIZE - head.len()) / part.len()));
            let took = survive(text.as_bytes());
            if took > LIMIT {
                slow.push(format!("{head:?} {part:?}: {took:?}"));
            }
        }
    }
    for (name, text) in built() {
        // Cut at a line end: a broken line is a YAML error, and no code behind the parser would
        // run.
        let fits = &text[..text.floor_char_boundary(SIZE)];
        let end = if fits.len() < text.len() { fits.rfind('\n').unwrap_or(fits.len()) } else { fits.len() };
        let took = survive(&text.as_bytes()[..end]);
        if took > LIMIT {
            slow.push(format!("{name}: {took:?}"));
        }
    }
    assert!(slow.is_empty(), "slower than {LIMIT:?}:\n{}", slow.join("\n"));
}

/// The most groups with parents that fit.
const GROUPS: u32 = SIZE as u32 / 26;

/// Attacks that are more than a repeated part.
fn built() -> Vec<(&'static str, String)> {
    let many = |line: &dyn Fn(u32) -> String| (0..60_000).map(line).collect::<String>();
    let device = |n: u32| format!(" v{n}: {{backend: {{null: 512}}, group: g{n}}}\n");
    let parents = |parent: &dyn Fn(u32) -> u32| {
        let of = |n: u32| format!(" g{n}: {{parent: g{}}}\n", parent(n));
        format!("version: 1\ngroups:\n g{GROUPS}: {{}}\n{}", (0..GROUPS).map(of).collect::<String>())
    };
    vec![
        ("unknown groups", format!("version: 1\ngroups: {{}}\ndevices:\n{}", many(&device))),
        ("one chain of groups", parents(&|n| n + 1)),
        ("one cycle of groups", parents(&|n| (n + 1) % GROUPS)),
        ("many cycles", parents(&|n| n ^ 1)),
        ("unknown parents", parents(&|n| n + GROUPS + 1)),
        ("one wide group", parents(&|_| GROUPS)),
        ("unknown keys", format!("version: 1\n{}", many(&|n| format!("devicez{n}: 1\n")))),
        ("equal keys", many(&|_| "a: 1\n".to_owned())),
        ("warnings", format!("version: 1\ngroups:\n{}", many(&|n| format!(" g{n}: {{limits: {{iops: 0}}}}\n")))),
        ("directives", many(&|n| format!("%TAG !a{n}! b\n"))),
        ("anchors", format!("[{}", many(&|n| format!("&a{n} x,")))),
        ("one list, used often", format!("a: &a [{}]\nb: [{}]\n", "1,".repeat(100_000), "*a,".repeat(100_000))),
        ("long key over a list", format!("? {}\n: [{}]\n", "k".repeat(400_000), "1,".repeat(200_000))),
        ("128-character keys", format!("{}: [{}]\n", "k".repeat(128), "1,".repeat(400_000))),
        ("long name of a group", format!("version: 1\ndevices: {{ a: {{ group: {} }} }}\n", "g".repeat(1_000_000))),
        ("long text", format!("version: 1\ndevices: {{ a: {{ backend: {{ file: {} }} }} }}\n", "f/".repeat(500_000))),
        ("long number", format!("version: 1\ngroups: {{ a: {{ limits: {{ iops: {} }} }} }}\n", "9".repeat(1_000_000))),
        ("indents", (0..1400).map(|n| " ".repeat(n) + "a:\n").collect()),
    ]
}

#[test]
fn more_than_the_limit_is_not_parsed() {
    let errors = parse("big.yaml", &vec![b'a'; FILE_BYTES_MAX as usize + 1]).expect_err("too large");
    assert!(errors.to_string().starts_with("error[E-CONFIG]: big.yaml: is larger than 1 MiB"), "{errors}");
}
