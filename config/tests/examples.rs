//! The examples are the documentation of the schema: each is accepted as it stands, and its
//! description matches its comments.

use std::path::{Path, PathBuf};
use std::{env, fs};

use throttle_core::charge::{Charge, ChargeTable};
use throttle_core::limits::{LimitKind, SECOND_NS};
use ublk_throttle_config::{Backend, Config, load, parse};

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")
}

fn example(name: &str) -> Config {
    load(&examples().join(name)).unwrap_or_else(|errors| panic!("{errors}")).0
}

#[test]
fn every_example_is_accepted_without_a_warning() {
    let mut count = 0;
    for entry in fs::read_dir(examples()).expect("readable") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            // Traces for `simulate`, which its own tests cover.
            continue;
        }
        let (config, warnings) = load(&path).unwrap_or_else(|errors| panic!("{errors}"));
        assert_eq!(warnings, [], "{}", path.display());
        assert!(!config.devices.is_empty() && !config.describe().is_empty());
        count += 1;
    }
    assert!(count >= 5, "only {count} examples");
}

#[test]
fn quickstart_is_what_the_demo_expects() {
    // Two memory devices in one group of 1000 operations a second.
    let config = example("quickstart.yaml");
    let names: Vec<&str> = config.members("shared").map(|device| device.name.as_str()).collect();
    assert_eq!(names, ["vol0", "vol1"]);
    assert!(config.devices.iter().all(|device| device.backend == Backend::Memory { size: 256 << 20 }));
    let limits = config.group("shared").expect("the group").limits;
    assert_eq!(limits.get(LimitKind::IopsTotal).avg, 1000);
    assert!(LimitKind::ALL.into_iter().all(|kind| kind == LimitKind::IopsTotal || limits.get(kind).is_unlimited()));
    assert_eq!(
        config.describe(),
        "group shared: vol0, vol1, all together\n\
         \x20 reads and writes together: 1000 operations/s; after a rest 101 at once (a tenth of a second, and one)\n\
         device vol0: memory, 256 MiB (268.4 MB), read and write, 1 queue of 128 requests\n\
         \x20 what group shared allows, 50 % of it while all in it are busy (weight 100 of 200)\n\
         device vol1: memory, 256 MiB (268.4 MB), read and write, 1 queue of 128 requests\n\
         \x20 what group shared allows, 50 % of it while all in it are busy (weight 100 of 200)\n"
    );
}

#[test]
fn reference_shows_every_spelling_of_a_value() {
    let config = example("reference.yaml");
    let limits = config.group("everything").expect("the group").limits;
    let iops = limits.get(LimitKind::IopsTotal);
    assert_eq!((iops.avg, iops.max, iops.burst_length_ns), (3000, 6000, 60 * SECOND_NS));
    assert_eq!(limits.get(LimitKind::IopsRead).burst_length_ns, SECOND_NS / 2);
    assert_eq!(limits.get(LimitKind::IopsWrite).max, 0);
    assert_eq!(limits.get(LimitKind::BpsWrite).burst_length_ns, 2 * SECOND_NS);
    assert_eq!(limits.iops_size, 256 << 10);
    let device = config.device("file-backed").expect("the device");
    assert_eq!((device.id, device.queues, device.depth, device.read_only), (Some(7), 2, 64, false));
    assert_eq!(device.limits.get(LimitKind::IopsTotal).avg, 500);
    assert_eq!(config.device("nowhere").expect("the device").backend, Backend::Null { size: 1 << 40 });
}

#[test]
fn reference_says_the_default_charges() {
    // Every entry is given, so that the file shows the defaults; the core's table leaves
    // write-zeroes to the backend.
    let config = example("reference.yaml");
    let charges = config.group("everything").expect("the group").charges;
    assert_eq!(charges, Some(ChargeTable { write_zeroes: Some(Charge::Op), ..ChargeTable::DEFAULT }));
    let part = config.group("part").expect("the group");
    assert_eq!((part.parent.as_deref(), part.weight, part.charges), (Some("everything"), 200, None));
}

#[test]
fn tenants_have_the_shares_that_the_picture_says() {
    let described = example("tenants.yaml").describe();
    for sentence in [
        "group rack: group tenant-a, group tenant-b, monitor, all together",
        "what group rack allows, 57.1 % of it while all in it are busy (weight 200 of 350), and besides it",
        "what group rack allows, 28.6 % of it while all in it are busy (weight 100 of 350), and besides it",
        "what group rack allows, 14.3 % of it while all in it are busy (weight 50 of 350)\n",
        "what group tenant-a allows, 75 % of it while all in it are busy (weight 300 of 400)\n",
        "flushes count as an operation without bytes",
    ] {
        assert!(described.contains(sentence), "{sentence:?} is not in\n{described}");
    }
}

#[test]
fn relative_path_starts_at_the_directory_of_the_file() {
    // The daemon's directory has no effect; `parse` takes the directory from the name alone.
    let backend = |config: &Config| config.devices[1].backend.path().expect("a path").to_owned();
    assert_eq!(backend(&example("files.yaml")), examples().join("images/vol2.img"));
    let text = fs::read(examples().join("files.yaml")).expect("readable");
    let (config, _) = parse("/etc/ublk/files.yaml", &text).expect("accepted");
    assert_eq!(backend(&config), Path::new("/etc/ublk/images/vol2.img"));
}
