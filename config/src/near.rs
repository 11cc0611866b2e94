//! "Did you mean …?": the known word that differs least from the one that was written.

/// Longer words are no misspelling of a known word, and a comparison takes time in proportion to
/// their length.
const WORD_BYTES_MAX: usize = 256;

/// The nearest known word, if a misspelling explains the difference: one edit per three letters.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > WORD_BYTES_MAX {
        return None;
    }
    let folded: Vec<char> = word.to_lowercase().chars().collect();
    known
        .into_iter()
        .map(|candidate| (distance(&folded, &candidate.to_lowercase().chars().collect::<Vec<_>>()), candidate))
        .filter(|&(distance, candidate)| distance <= candidate.chars().count().max(folded.len()).div_ceil(3))
        .min_by_key(|&(distance, _)| distance)
        .filter(|&(distance, candidate)| distance < candidate.chars().count())
        .map(|(_, candidate)| candidate)
}

/// Damerau-Levenshtein distance (an adjacent swap counts once, no character is edited twice).
fn distance(a: &[char], b: &[char]) -> usize {
    // Three rows of the table: the row being filled, the row above it, and the next one above for
    // swaps.
    let mut above2: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let substitution = above[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = substitution.min(above[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(above2[j - 2] + 1);
            }
        }
        above2 = std::mem::replace(&mut above, row);
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_recognised_and_strangers_are_not() {
        let known = ["backend", "group", "limits", "queues", "iops-total", "k"];
        for (word, expected) in [
            ("bakend", Some("backend")),
            ("gruop", Some("group")),
            ("limit", Some("limits")),
            ("Queues", Some("queues")),
            ("iops-totl", Some("iops-total")),
            ("colour", None),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, known), expected, "{word}");
        }
    }

    #[test]
    fn a_swap_is_one_edit() {
        let chars = |text: &str| text.chars().collect::<Vec<_>>();
        assert_eq!(distance(&chars("gruop"), &chars("group")), 1);
        assert_eq!(distance(&chars("kitten"), &chars("sitting")), 3);
    }
}
