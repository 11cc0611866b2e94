//! A set of small numbers as the 1 bits of a word.

/// The indexes of the 1 bits, ascending.
pub(crate) fn ones(word: impl Into<u64>) -> impl Iterator<Item = usize> {
    let mut word = word.into();
    std::iter::from_fn(move || {
        let place = (word != 0).then(|| word.trailing_zeros() as usize)?;
        word &= word - 1;
        Some(place)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_one_is_told_once_and_in_order() {
        for byte in 0..=u8::MAX {
            let told: Vec<usize> = ones(byte).collect();
            assert!(told.is_sorted());
            assert_eq!(told.len(), byte.count_ones() as usize);
            assert_eq!(told.iter().fold(0, |byte, place| byte | 1 << place), byte);
        }
    }
}
