//! Claims of commands on the names of devices and groups, held while a command waits.
//!
//! ```text
//!   reload  g, vol1, vol2   claimed ───────────────────────► dropped
//!   set     vol1                        E-CONFLICT
//!   set     vol7                        done
//! ```
//!
//! A second command on a claimed name is refused at once, never queued: its user knows better than
//! the daemon whether to repeat it.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use crate::error::{Class, Failure, Outcome};

/// The name of a device or of a group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    Device(String),
    Group(String),
}

impl Name {
    pub fn device(name: &str) -> Self {
        Self::Device(name.to_owned())
    }

    pub fn group(name: &str) -> Self {
        Self::Group(name.to_owned())
    }
}

/// All claims of the daemon.
#[derive(Default)]
pub struct Claims {
    names: Rc<RefCell<BTreeSet<Name>>>,
}

/// The claim of one command on some names, until dropped.
#[derive(Debug)]
pub struct Claim {
    all: Rc<RefCell<BTreeSet<Name>>>,
    names: Vec<Name>,
}

impl Claims {
    /// Fails with E-CONFLICT if a command has claimed one of `names`.
    pub fn expect_free(&self, names: &[Name]) -> Outcome<()> {
        let claimed = self.names.borrow();
        let what = match names.iter().find(|name| claimed.contains(name)) {
            None => return Ok(()),
            Some(Name::Device(name)) => format!("device {name:?}"),
            Some(Name::Group(name)) => format!("group {name:?}"),
        };
        Err(Failure::new(Class::Conflict, format!("another command works on {what}; try again when it is done")))
    }

    /// Claims all of `names`, or none of them.
    pub fn claim(&self, names: Vec<Name>) -> Outcome<Claim> {
        self.expect_free(&names)?;
        self.names.borrow_mut().extend(names.iter().cloned());
        Ok(Claim { all: Rc::clone(&self.names), names })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.all.borrow_mut().retain(|name| !self.names.contains(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_second_is_refused_until_the_first_is_done() {
        // A refused claim claims none of its names. A device and a group may have equal names.
        let claims = Claims::default();
        let first = claims.claim(vec![Name::device("a"), Name::group("g")]).unwrap();
        let refused = claims.claim(vec![Name::device("b"), Name::group("g")]).unwrap_err();
        assert_eq!(refused.class, Class::Conflict);
        assert!(claims.expect_free(&[Name::device("b"), Name::group("a")]).is_ok());
        drop(first);
        assert!(claims.claim(vec![Name::device("a"), Name::group("g")]).is_ok());
    }
}
