//! `charge`, of a group: what operations count as for the devices below it.
//!
//! ```text
//!   rack     charge: { flush: op }          reads bytes, …, discards op,    flushes op
//!   tenant   charge: { discard: bytes }     reads bytes, …, discards bytes, flushes op     as the rack, but for its own
//! ```
//!
//! The core knows whole tables only, so what a group does not say is filled in here, from the top down.

use throttle_core::charge::{Charge, ChargeTable};

use crate::fields::{Fields, Item, Notes};

const KEYS: [&str; 5] = ["read", "write", "write-zeroes", "discard", "flush"];
const CHARGES: [(&str, Charge); 3] = [("free", Charge::Free), ("op", Charge::Op), ("bytes", Charge::Bytes)];

/// What a group says itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    read: Option<Charge>,
    write: Option<Charge>,
    write_zeroes: Option<Charge>,
    discard: Option<Charge>,
    flush: Option<Charge>,
}

impl Said {
    /// The table of the group; `None` if it says nothing and so has that of its parent.
    pub(super) fn over(&self, inherited: &ChargeTable) -> Option<ChargeTable> {
        (*self != Self::default()).then(|| ChargeTable {
            read: self.read.unwrap_or(inherited.read),
            write: self.write.unwrap_or(inherited.write),
            write_zeroes: self.write_zeroes.or(inherited.write_zeroes),
            discard: self.discard.unwrap_or(inherited.discard),
            flush: self.flush.unwrap_or(inherited.flush),
        })
    }
}

pub(super) fn read(item: &Item<'_>, notes: &mut Notes) -> Said {
    let Some(mut fields) = Fields::of(item, notes) else { return Said::default() };
    let mut charge = |operation: &str| fields.take(operation)?.word(notes, &CHARGES, &[]);
    let said = Said {
        read: charge("read"),
        write: charge("write"),
        write_zeroes: charge("write-zeroes"),
        discard: charge("discard"),
        flush: charge("flush"),
    };
    fields.finish(notes, &KEYS, &[]);
    said
}
