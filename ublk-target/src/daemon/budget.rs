//! Memory that all clients share: what they have sent of lines without an end, and long answers that they do not read.
//!
//! A client takes a loan and gives it back when it goes, at the latest. Those who may only look can have half of it, so that
//! they cannot lock out those who may change something.

use std::cell::Cell;

use super::peers::Right;

/// Bytes for all clients together.
pub struct Budget {
    whole: usize,
    left: Cell<usize>,
}

/// What one client has of it.
pub struct Loan<'a> {
    budget: &'a Budget,
    right: Right,
    bytes: usize,
}

impl Budget {
    pub fn new(bytes: usize) -> Self {
        Self { whole: bytes, left: Cell::new(bytes) }
    }

    /// A loan of nothing, to grow and shrink.
    pub fn loan(&self, right: Right) -> Loan<'_> {
        Loan { budget: self, right, bytes: 0 }
    }

    #[cfg(test)]
    pub fn is_whole(&self) -> bool {
        self.left.get() == self.whole
    }
}

impl Loan<'_> {
    /// Makes it that large; false, and as it was, if there is not so much. It can always shrink.
    pub fn set(&mut self, bytes: usize) -> bool {
        let left = self.budget.left.get() + self.bytes;
        let reserve = if self.right == Right::Change { 0 } else { self.budget.whole / 2 };
        let is_granted = bytes <= self.bytes || bytes.saturating_add(reserve) <= left;
        if is_granted {
            self.budget.left.set(left - bytes);
            self.bytes = bytes;
        }
        is_granted
    }
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_leave_half_and_everything_comes_back() {
        let budget = Budget::new(100);
        let (mut reader, mut root) = (budget.loan(Right::Read), budget.loan(Right::Change));
        assert!(reader.set(50) && !reader.set(51));
        assert!(root.set(50) && !root.set(51));
        // Nothing is left, and giving back is never refused.
        assert!(reader.set(49) && !reader.set(50));
        drop((reader, root));
        assert!(budget.is_whole());
    }
}
