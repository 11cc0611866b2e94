//! Every broken file of `tests/broken` gives exactly the text beside it: place, finding, cure.
//!
//! `UPDATE_EXPECT=1 cargo test -p ublk-throttle-config --test config broken` writes the texts anew;
//! read the difference. The files are bytes, and some are no text at all; `.gitattributes` keeps
//! git from changing them.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs};

use nix::time::{ClockId, clock_gettime};
use ublk_throttle_config::parse;

fn files() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/broken");
    let entries = fs::read_dir(directory).expect("tests/broken is readable");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    files
}

fn answer(path: &Path) -> String {
    let name = path.file_name().and_then(|name| name.to_str()).expect("a plain name");
    let text = fs::read(path).expect("readable");
    match parse(name, &text) {
        Ok((config, _)) => panic!("{name} is accepted: {config:?}"),
        Err(errors) => format!("{errors}\n"),
    }
}

#[test]
fn f35_every_broken_file_gives_its_expected_error() {
    // Bad YAML, bad values and bad references, each with its place and a cure. The end-to-end suite
    // gives the same files to the command line and expects exit 3 for each.
    let mut wrong = Vec::new();
    for path in files() {
        let (found, expected_path) = (answer(&path), path.with_extension("expected"));
        if env::var_os("UPDATE_EXPECT").is_some() {
            fs::write(&expected_path, &found).expect("writable");
        }
        let expected = fs::read_to_string(&expected_path).unwrap_or_default();
        if found != expected {
            wrong.push(format!("--- {}\nexpected:\n{expected}found:\n{found}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(files().len() >= 90, "only {} broken files are left", files().len());
}

#[test]
fn every_error_is_short_located_and_soon() {
    // The text fits a terminal, and its first line has the place, for every file.
    for path in files() {
        // The CPU time of this thread alone, so that load on the machine does not count.
        let cpu_time = || -> Duration { clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a clock").into() };
        let start = cpu_time();
        let text = answer(&path);
        let took = cpu_time() - start;
        assert!(took < Duration::from_secs(1), "{}: {took:?}", path.display());
        assert!(text.lines().count() <= 20, "{} lines:\n{text}", text.lines().count());
        for line in text.lines() {
            assert!(line.chars().count() <= 400, "too long: {line}");
            assert!(!line.chars().any(char::is_control), "control characters: {line:?}");
        }
        let head = text.lines().next().expect("a line");
        let place = head.split(": ").nth(1).expect("a place");
        let numbers: Vec<&str> = place.rsplitn(3, ':').collect();
        assert!(numbers.len() == 3 && numbers[..2].iter().all(|n| n.parse::<u32>().is_ok()), "no place: {head}");
    }
}
