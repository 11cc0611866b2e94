//! Bounds the memory that all clients take together: for incomplete lines, and for long answers that
//! are not yet read. Each of the two has a budget of its own.
//!
//! A client borrows bytes as a loan, which returns them when it is dropped, at the latest at the end
//! of the client. Clients with [`Right::Read`] leave half of the budget free, so that they cannot lock
//! out clients with [`Right::Change`].

use std::cell::Cell;

use super::peers::Right;

/// A number of bytes for all clients together.
pub struct Budget {
    whole: usize,
    left: Cell<usize>,
}

/// The bytes that one client has borrowed from a budget.
pub struct Loan<'a> {
    budget: &'a Budget,
    right: Right,
    bytes: usize,
}

impl Budget {
    pub fn new(bytes: usize) -> Self {
        Self { whole: bytes, left: Cell::new(bytes) }
    }

    /// A loan of 0 bytes, which [`Loan::set`] changes.
    pub fn loan(&self, right: Right) -> Loan<'_> {
        Loan { budget: self, right, bytes: 0 }
    }

    #[cfg(test)]
    pub fn is_whole(&self) -> bool {
        self.left.get() == self.whole
    }
}

impl Loan<'_> {
    /// Changes the size of the loan to `bytes`. Returns false and leaves the loan as it was if the budget
    /// has too little left. A smaller size is never refused.
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
        // The budget is used up; a loan can still shrink.
        assert!(reader.set(49) && !reader.set(50));
        drop((reader, root));
        assert!(budget.is_whole());
    }
}
