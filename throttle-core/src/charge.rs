//! The charge table: the cost of each operation.
//!
//! | operation                      | default        | direction |
//! |--------------------------------|----------------|-----------|
//! | read, write                    | `bytes`        | its own   |
//! | write-zeroes, written as data  | `bytes`        | write     |
//! | write-zeroes by a cheaper way  | `op`           | write     |
//! | discard                        | `op`           | write     |
//! | flush                          | `free`         | write     |
//!
//! A group may replace entries for its devices.
//!
//! A request waits for the buckets it is charged to, and behind the held requests of its device and
//! direction that arrived before it. Under a limit of 1 MB/s, a discard that arrives after four
//! writes of 1 MiB waits for 3 s, although no byte of it is charged. Only a free request overtakes.

use crate::cost::{Cost, Operation};

/// The charge of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Charge {
    /// No charge: the request never waits.
    Free,
    /// An operation, no bytes.
    Op,
    /// An operation and the bytes of its range.
    Bytes,
}

/// The charge of each operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChargeTable {
    /// For reads.
    pub read: Charge,
    /// For writes.
    pub write: Charge,
    /// For write-zeroes. `None`: `bytes` if the backend writes zeros as data, otherwise `op`.
    pub write_zeroes: Option<Charge>,
    /// For discards.
    pub discard: Charge,
    /// For flushes.
    pub flush: Charge,
}

impl ChargeTable {
    /// The table in the module's head.
    pub const DEFAULT: Self = Self {
        read: Charge::Bytes,
        write: Charge::Bytes,
        write_zeroes: None,
        discard: Charge::Op,
        flush: Charge::Free,
    };

    /// The cost of an `operation` on a range of `bytes`.
    pub fn cost(&self, operation: Operation, bytes: u64) -> Cost {
        let charge = match operation {
            Operation::Read => self.read,
            Operation::Write => self.write,
            Operation::WriteZeroes { as_data } => {
                self.write_zeroes.unwrap_or(if as_data { Charge::Bytes } else { Charge::Op })
            }
            Operation::Discard => self.discard,
            Operation::Flush => self.flush,
        };
        Cost {
            direction: operation.direction(),
            is_operation: charge != Charge::Free,
            bytes: if charge == Charge::Bytes { bytes } else { 0 },
        }
    }
}

impl Default for ChargeTable {
    fn default() -> Self {
        Self::DEFAULT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_charge_as_the_table_says() {
        let charged = |operation| {
            let cost = ChargeTable::DEFAULT.cost(operation, 65_536);
            (cost.is_operation, cost.bytes)
        };
        assert_eq!(charged(Operation::Read), (true, 65_536));
        assert_eq!(charged(Operation::Write), (true, 65_536));
        assert_eq!(charged(Operation::WriteZeroes { as_data: true }), (true, 65_536));
        assert_eq!(charged(Operation::WriteZeroes { as_data: false }), (true, 0));
        assert_eq!(charged(Operation::Discard), (true, 0));
        assert!(ChargeTable::DEFAULT.cost(Operation::Flush, 0).is_free());
    }

    #[test]
    fn table_may_say_otherwise() {
        let table = ChargeTable {
            discard: Charge::Bytes,
            flush: Charge::Op,
            write_zeroes: Some(Charge::Bytes),
            ..ChargeTable::DEFAULT
        };
        assert_eq!(table.cost(Operation::Discard, 1 << 40).bytes, 1 << 40);
        assert_eq!(table.cost(Operation::WriteZeroes { as_data: false }, 4096).bytes, 4096);
        assert!(table.cost(Operation::Flush, 0).is_operation);
    }
}
