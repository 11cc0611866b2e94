//! Finds remains of a daemon: ublk devices, stable names, processes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::Result;

/// All present devices, stable names and processes of `binary`, by name. Devices of unrelated
/// programs are among them, so callers compare two results.
pub fn look(binary: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/dev")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("ublkb") || name.starts_with("ublkc") {
            found.insert(format!("/dev/{name}"));
        }
    }
    for entry in fs::read_dir("/dev/ublk-throttle").into_iter().flatten().flatten() {
        found.insert(entry.path().display().to_string());
    }
    for entry in fs::read_dir("/proc")?.flatten() {
        // An unreadable link is not the daemon's: the process may not be read, or has ended.
        if fs::read_link(entry.path().join("exe")).is_ok_and(|program| program == binary) {
            found.insert(format!("process {}", entry.file_name().to_string_lossy()));
        }
    }
    Ok(found)
}

/// Entries in `now` that are not in `before`.
pub fn since(before: &BTreeSet<String>, now: &BTreeSet<String>) -> Vec<String> {
    now.difference(before).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_were_there_before_are_not_left_behind() {
        // The host may have ublk devices of its own.
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<String>>();
        let left = since(&set(&["/dev/ublkb0"]), &set(&["/dev/ublkb0", "/dev/ublkb7", "process 12"]));
        assert_eq!(left, ["/dev/ublkb7", "process 12"]);
    }
}
