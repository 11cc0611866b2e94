//! The kinds of requests, and their costs: the buckets that are charged, and the units.

use crate::limits::LimitKind;

/// The direction of a request: it selects the read or the write buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Data flows to the client.
    Read,
    /// Data, or an order to discard data, flows from the client.
    Write,
}

impl Direction {
    /// Both directions, in index order.
    pub const ALL: [Self; 2] = [Self::Read, Self::Write];
}

/// An operation of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Read a range.
    Read,
    /// Write a range.
    Write,
    /// Make completed writes durable.
    Flush,
    /// Discard the data of a range.
    Discard,
    /// Make a range read as zeros.
    WriteZeroes {
        /// The backend has no cheaper way than to write the zeros.
        as_data: bool,
    },
}

impl Operation {
    /// The direction of the buckets that count the operation.
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
    /// The direction of the buckets that are charged besides the totals.
    pub direction: Direction,
    /// Whether the request counts as an operation (or as several, by `iops-size`).
    pub is_operation: bool,
    /// Bytes charged to the bps buckets.
    pub bytes: u64,
}

impl Cost {
    /// Whether a limit of this kind, if it is set, is charged for the request.
    pub const fn is_charged_to(&self, kind: LimitKind) -> bool {
        let is_of_direction = match kind {
            LimitKind::BpsTotal | LimitKind::IopsTotal => true,
            LimitKind::BpsRead | LimitKind::IopsRead => matches!(self.direction, Direction::Read),
            LimitKind::BpsWrite | LimitKind::IopsWrite => matches!(self.direction, Direction::Write),
        };
        is_of_direction && if kind.is_iops() { self.is_operation } else { self.bytes > 0 }
    }

    /// Whether the same limits are charged for both requests.
    pub const fn has_limits_of(&self, other: &Self) -> bool {
        self.direction as u8 == other.direction as u8
            && self.is_operation == other.is_operation
            && (self.bytes > 0) == (other.bytes > 0)
    }

    /// Whether no bucket is charged, so the request never waits.
    pub const fn is_free(&self) -> bool {
        !self.is_operation && self.bytes == 0
    }
}
