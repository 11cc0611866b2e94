//! A set of small numbers as the 1 bits of a byte.

/// The indexes of the 1 bits, ascending.
pub(crate) fn ones(mut byte: u8) -> impl Iterator<Item = u8> {
    std::iter::from_fn(move || {
        let place = (byte != 0).then(|| byte.trailing_zeros() as u8)?;
        byte &= byte - 1;
        Some(place)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_one_is_told_once_and_in_order() {
        for byte in 0..=u8::MAX {
            let told: Vec<u8> = ones(byte).collect();
            assert!(told.is_sorted());
            assert_eq!(told.len(), byte.count_ones() as usize);
            assert_eq!(told.iter().fold(0, |byte, place| byte | 1 << place), byte);
        }
    }
}
