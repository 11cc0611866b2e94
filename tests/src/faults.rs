//! Compares `FAULTS.md` with the sources: each test named there exists, and each numbered test is
//! named there.

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fs;
    use std::path::{Path, PathBuf};

    /// A row of the table: its tests, each with its file, or no tests and the word `later`.
    struct Row {
        number: u32,
        tests: Vec<(PathBuf, String)>,
        is_later: bool,
    }

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
    }

    fn rows() -> Vec<Row> {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("FAULTS.md")).unwrap();
        text.lines().filter_map(row).collect()
    }

    /// Parses a line `| number | fault | expected | tests |`; `None` for lines outside the tables.
    fn row(line: &str) -> Option<Row> {
        let cells: Vec<&str> = line.strip_prefix('|')?.strip_suffix('|')?.split('|').map(str::trim).collect();
        let number = cells.first()?.parse().ok()?;
        let shown = cells.last()?;
        let mut file = PathBuf::new();
        let mut tests = Vec::new();
        // Every second piece between backticks is code: a file, or a test in the file named last.
        for word in shown.split('`').skip(1).step_by(2) {
            if word.ends_with(".rs") {
                file = word.into();
            } else {
                tests.push((file.clone(), word.to_owned()));
            }
        }
        Some(Row { number, tests, is_later: shown.starts_with("later") })
    }

    /// Functions of the workspace with a number of a row at the beginning of the name, and their
    /// files.
    fn numbered_tests() -> BTreeMap<String, PathBuf> {
        let mut found = BTreeMap::new();
        for part in ["config", "tests", "throttle-core", "tools", "ublk-target"] {
            look(&root().join(part), Path::new(part), &mut found);
        }
        found
    }

    fn look(folder: &Path, shown_as: &Path, found: &mut BTreeMap<String, PathBuf>) {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let (path, shown_as) = (entry.path(), shown_as.join(entry.file_name()));
            if path.is_dir() {
                look(&path, &shown_as, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let names = text.split("fn ").skip(1).filter_map(|rest| rest.split('(').next());
                for name in names.filter(|name| number(name).is_some()) {
                    found.insert(name.to_owned(), shown_as.clone());
                }
            }
        }
    }

    /// The number in a test's name: 21 for `f21_an_error_…`.
    fn number(name: &str) -> Option<u32> {
        let (digits, rest) = name.strip_prefix('f')?.split_at_checked(2)?;
        (rest.starts_with('_') && rest.len() > 1).then_some(())?;
        digits.parse().ok()
    }

    #[test]
    fn every_fault_is_shown_by_a_test_that_exists() {
        // Each test is in the file that the row names, and its name begins with the row's number; a
        // row without tests says `later`.
        let found = numbered_tests();
        let mut wrong = Vec::new();
        for Row { number: row, tests, is_later } in rows() {
            if tests.is_empty() != is_later {
                wrong.push(format!("{row}: tests, or the word `later`"));
            }
            for (file, test) in tests {
                if number(&test) != Some(row) {
                    wrong.push(format!("{row}: {test} is not numbered after it"));
                }
                if found.get(&test) != Some(&file) {
                    wrong.push(format!("{row}: {test} is not in {}", file.display()));
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn every_test_with_a_number_is_in_the_table() {
        // A numbered test outside the table would be missing from the overview of covered faults.
        let named: BTreeSet<String> = rows().into_iter().flat_map(|row| row.tests).map(|(_, test)| test).collect();
        let missing: Vec<_> = numbered_tests().into_keys().filter(|test| !named.contains(test)).collect();
        assert!(missing.is_empty(), "not in FAULTS.md: {missing:?}");
    }

    #[test]
    fn rows_are_numbered_without_a_gap() {
        // Row numbers are permanent: test names contain them. They run from 1 without a gap.
        let numbers: Vec<u32> = rows().iter().map(|row| row.number).collect();
        assert_eq!(numbers, (1..).take(numbers.len()).collect::<Vec<u32>>());
    }
}
