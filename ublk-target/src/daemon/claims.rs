//! Who has the word on what, while a command waits for something.
//!
//! ```text
//!   reload  g, vol1, vol2   claimed ───────────────────────► dropped
//!   set     vol1                        E-CONFLICT
//!   set     vol7                        done
//! ```
//!
//! Nobody is queued: whoever comes second is told at once, and knows what to do better than we do.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use crate::error::{Class, Failure, Outcome};

/// Something with a name.
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

/// All claims.
#[derive(Default)]
pub struct Claims {
    names: Rc<RefCell<BTreeSet<Name>>>,
}

/// The word on some names, until dropped.
#[derive(Debug)]
pub struct Claim {
    all: Rc<RefCell<BTreeSet<Name>>>,
    names: Vec<Name>,
}

impl Claims {
    /// Nobody else has the word on any of these.
    pub fn expect_free(&self, names: &[Name]) -> Outcome<()> {
        let claimed = self.names.borrow();
        let what = match names.iter().find(|name| claimed.contains(name)) {
            None => return Ok(()),
            Some(Name::Device(name)) => format!("device {name:?}"),
            Some(Name::Group(name)) => format!("group {name:?}"),
        };
        Err(Failure::new(Class::Conflict, format!("another command works on {what}; try again when it is done")))
    }

    /// Takes the word on all of them, or on none.
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
        // All or nothing: a refused claim leaves no name behind. A device and a group may have the same name.
        let claims = Claims::default();
        let first = claims.claim(vec![Name::device("a"), Name::group("g")]).unwrap();
        let refused = claims.claim(vec![Name::device("b"), Name::group("g")]).unwrap_err();
        assert_eq!(refused.class, Class::Conflict);
        assert!(claims.expect_free(&[Name::device("b"), Name::group("a")]).is_ok());
        drop(first);
        assert!(claims.claim(vec![Name::device("a"), Name::group("g")]).is_ok());
    }
}
