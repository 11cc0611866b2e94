//! `charge`, of a group: the charge of each operation for the devices below it.
//!
//! ```text
//!   rack     charge: { flush: op }          reads bytes, …, discards op,    flushes op
//!   tenant   charge: { discard: bytes }     reads bytes, …, discards bytes, flushes op     inherits from the rack
//! ```
//!
//! The core knows whole tables only, so entries that a group leaves out are filled in here, from
//! the top down.

use throttle_core::charge::{Charge, ChargeTable};

use crate::fields::{Fields, Item, Notes};

const KEYS: [&str; 5] = ["read", "write", "write-zeroes", "discard", "flush"];
const CHARGES: [(&str, Charge); 3] = [("free", Charge::Free), ("op", Charge::Op), ("bytes", Charge::Bytes)];

/// The entries that a group itself gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    read: Option<Charge>,
    write: Option<Charge>,
    /// `Some(None)`: `auto`.
    write_zeroes: Option<Option<Charge>>,
    discard: Option<Charge>,
    flush: Option<Charge>,
}

impl Said {
    /// The table of the group over the inherited one; `None` if the group gives no entry and
    /// inherits the table of its parent.
    pub(super) fn over(&self, inherited: &ChargeTable) -> Option<ChargeTable> {
        (*self != Self::default()).then(|| ChargeTable {
            read: self.read.unwrap_or(inherited.read),
            write: self.write.unwrap_or(inherited.write),
            write_zeroes: self.write_zeroes.unwrap_or(inherited.write_zeroes),
            discard: self.discard.unwrap_or(inherited.discard),
            flush: self.flush.unwrap_or(inherited.flush),
        })
    }
}

pub(super) fn read(item: &Item<'_>, notes: &mut Notes) -> Said {
    let Some(mut fields) = Fields::of(item, notes) else { return Said::default() };
    let write_zeroes = fields.take("write-zeroes").and_then(|item| read_zeroes(&item, notes));
    let mut charge = |operation: &str| fields.take(operation)?.word(notes, &CHARGES, &[]);
    let said = Said {
        read: charge("read"),
        write: charge("write"),
        write_zeroes,
        discard: charge("discard"),
        flush: charge("flush"),
    };
    fields.finish(notes, &KEYS, &[]);
    said
}

/// The charge of write-zeroes, or `auto`: decided by the backend, for any table of the parent.
fn read_zeroes(item: &Item<'_>, notes: &mut Notes) -> Option<Option<Charge>> {
    let [free, op, bytes] = CHARGES.map(|(word, charge)| (word, Some(charge)));
    item.word(notes, &[free, op, bytes, ("auto", None)], &[])
}
