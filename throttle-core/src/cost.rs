//! What a request is, and what it costs: which buckets it is charged to, and how much.

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
    WriteZeroes {
        /// The backend has no cheaper way than writing the zeros.
        as_data: bool,
    },
}

impl Operation {
    /// Whose buckets it belongs to.
    pub const fn direction(self) -> Direction {
        match self {
            Self::Read => Direction::Read,
            Self::Write | Self::Flush | Self::Discard | Self::WriteZeroes { .. } => Direction::Write,
        }
    }
}

/// The charge of one request ([`crate::charge::ChargeTable::cost`]).
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
    /// Whether no bucket is charged, so that nothing can make the request wait.
    pub const fn is_free(&self) -> bool {
        !self.is_operation && self.bytes == 0
    }
}
