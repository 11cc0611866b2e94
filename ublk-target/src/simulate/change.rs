//! Limits and place changed in one go.
//!
//! ```text
//!   own limit lower, group higher     limit first, then place      Either way nothing goes in between
//!   own limit higher, group lower     place first, then limit      that may go neither before nor after.
//! ```

use throttle_core::limits::{LimitKind, Limits};
use throttle_core::tree::BadParent;
use ublk_throttle_config::{Fault, change_limits};

use super::set::Set;

/// Limits before and after a [`Set`].
pub(super) struct Change {
    before: Limits,
    pub after: Limits,
    is_named: bool,
}

impl Change {
    /// The change of limits `before`; or what is wrong with it.
    pub fn new(before: &Limits, set: &Set) -> Result<Self, String> {
        let after = change_limits(before, &set.limits()).map_err(|faults| said(&faults))?;
        Ok(Self { before: *before, after, is_named: set.has_limits() })
    }

    /// What tightens comes first, so that nothing goes in between that may go neither before nor after. A place that is
    /// refused leaves everything as it was.
    pub fn make(&self, limit: impl Fn(&Limits), place: impl FnOnce() -> Result<(), BadParent>) -> Result<(), String> {
        let tightens = self.is_named && LimitKind::ALL.into_iter().any(|kind| self.tightens(kind));
        if tightens {
            limit(&self.after);
        }
        if let Err(bad) = place() {
            if tightens {
                limit(&self.before);
            }
            return Err(format!("{bad}; name another parent, or null for none"));
        }
        if self.is_named && !tightens {
            limit(&self.after);
        }
        Ok(())
    }

    fn tightens(&self, kind: LimitKind) -> bool {
        let (before, after) = (self.before.get(kind), self.after.get(kind));
        !after.is_unlimited() && (before.is_unlimited() || after.avg < before.avg)
    }
}

fn said(faults: &[Fault]) -> String {
    let one = |fault: &Fault| match fault.path.as_str() {
        "" => format!("limits: {}; {}", fault.found, fault.cure),
        path => format!("limits.{path}: {}; {}", fault.found, fault.cure),
    };
    faults.iter().map(one).collect::<Vec<_>>().join("; ")
}
