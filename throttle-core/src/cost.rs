//! What a request costs: which buckets it is charged to, and how much.
//!
//! | operation    | operations | bytes                          | direction |
//! |--------------|------------|--------------------------------|-----------|
//! | read         | 1          | its length                     | read      |
//! | write        | 1          | its length                     | write     |
//! | write-zeroes | 1          | what the backend really writes | write     |
//! | discard      | 1          | 0                              | write     |
//! | flush        | 0          | 0                              | write     |
//!
//! A request waits only for buckets it is charged to: a discard does not wait for a bytes limit, a flush for nothing.

/// Which of the read and write buckets a request belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Data flows to the client.
    Read,
    /// Data, or the order to forget some, flows from the client.
    Write,
}

impl Direction {
    /// Both, in index order.
    pub const ALL: [Self; 2] = [Self::Read, Self::Write];

    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Read => Self::Write,
            Self::Write => Self::Read,
        }
    }
}

/// What a client may ask of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Read a range.
    Read,
    /// Write a range.
    Write,
    /// Make completed writes durable.
    Flush,
    /// Forget a range.
    Discard,
    /// Make a range read as zeros.
    WriteZeroes,
}

/// The charge of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Whose buckets are charged beside the totals.
    pub direction: Direction,
    /// Whether it counts as an operation (or as several, by `iops-size`).
    pub is_operation: bool,
    /// Bytes charged to the bps buckets.
    pub bytes: u64,
}

impl Cost {
    /// The charge of `operation` by the table in the module's head.
    ///
    /// `bytes` is the length of the data that moves between daemon and backend: for write-zeroes, 0 where the backend
    /// has a cheaper way than writing zeros.
    pub const fn of(operation: Operation, bytes: u64) -> Self {
        let (direction, is_operation, bytes) = match operation {
            Operation::Read => (Direction::Read, true, bytes),
            Operation::Write | Operation::WriteZeroes => (Direction::Write, true, bytes),
            Operation::Discard => (Direction::Write, true, 0),
            Operation::Flush => (Direction::Write, false, 0),
        };
        Self { direction, is_operation, bytes }
    }

    /// Whether no bucket is charged, so that nothing can make the request wait.
    pub const fn is_free(&self) -> bool {
        !self.is_operation && self.bytes == 0
    }
}
