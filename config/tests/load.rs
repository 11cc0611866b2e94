//! A path may lead to any kind of file. Reading it ends soon, and the answer names the path.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use ublk_throttle_config::load;

/// A directory of a single test, removed at its end.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ublk-throttle-config-{test}-{}", process::id()));
        fs::create_dir(&path).expect("a new directory");
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn refusal(path: &Path) -> String {
    let text = load(path).expect_err("should be refused").to_string();
    let head = format!("error[E-CONFIG]: {}: ", path.display());
    text.strip_prefix(&head).unwrap_or_else(|| panic!("{text} does not name {}", path.display())).to_owned()
}

#[test]
fn what_is_no_regular_file_is_refused_at_once() {
    // A FIFO without a writer would block an ordinary open for ever; /dev/zero has no end.
    let directory = Directory::new("kinds");
    let fifo = directory.0.join("fifo");
    mkfifo(&fifo, Mode::S_IRUSR).expect("a FIFO");
    assert!(refusal(&fifo).starts_with("is a FIFO"));
    assert!(refusal(Path::new("/dev/zero")).starts_with("is a character device"));
    assert!(refusal(&directory.0).starts_with("is a directory"));
}

#[test]
fn path_that_leads_nowhere_is_named() {
    let directory = Directory::new("nowhere");
    let link = directory.0.join("loop");
    symlink("loop", &link).expect("a symlink");
    assert!(refusal(&link).starts_with("cannot open it: "));
    let missing = refusal(&directory.0.join("missing.yaml"));
    assert_eq!(missing.lines().next(), Some("cannot open it: no such file or directory"));
}

#[test]
fn large_file_is_not_taken_into_memory() {
    // 1 TiB, sparse.
    let directory = Directory::new("large");
    let path = directory.0.join("large.yaml");
    fs::File::create(&path).and_then(|file| file.set_len(1 << 40)).expect("a sparse file");
    assert!(refusal(&path).starts_with("is larger than 1 MiB"));
}

#[test]
fn symlink_to_a_configuration_is_followed() {
    // /etc often links to the real configuration; relative paths start at the link.
    let directory = Directory::new("link");
    let (file, link) = (directory.0.join("real.yaml"), directory.0.join("link.yaml"));
    fs::write(&file, "version: 1\ndevices: { a: { backend: { file: a.img } } }\n").expect("writable");
    symlink(&file, &link).expect("a symlink");
    let (config, _) = load(&link).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(config.devices[0].backend.path(), Some(directory.0.join("a.img").as_path()));
}
