//! Changes under load: limits, weights, places and levels.

use slotmap::SecondaryMap;

use super::options::Change;
use super::{Groups, Mode};
use crate::ids::{GroupId, MemberId, NodeId};
use crate::limiter::Level;
use crate::planted::{Fault, planted};
use crate::time::Time;
use crate::tree::BadParent;

impl Groups {
    /// Makes all changes in one step, under load. Deadlines of waiting requests are computed anew
    /// at the end, and no request is dispatched between two changes. Returns `Err`, and changes
    /// nothing, if a group would get a parent that it cannot have. The last of two changes to the
    /// same setting counts; groups may swap places.
    pub fn apply(&mut self, changes: &[Change], now: Time) -> Result<(), BadParent> {
        let now = self.see(now);
        let mut places: SecondaryMap<NodeId, Option<NodeId>> = SecondaryMap::new();
        places.extend(changes.iter().filter_map(|change| Some((change.node(), change.parent()?))));
        self.tree.check_parents(&places)?;
        places.retain(|node, parent| self.tree.parent(node) != *parent);
        let roots_before: Vec<NodeId> = changes.iter().map(|change| self.tree.root(change.node())).collect();
        // Detach every node that moves before attaching any, so that groups can swap places.
        for node in places.keys() {
            self.tree.set_parent(node, None, now);
        }
        for (node, parent) in &places {
            self.tree.set_parent(node, *parent, now);
            if planted(Fault::ApplyInSteps) {
                self.let_go_due(self.tree.root(node), None, now);
            }
        }
        for change in changes {
            match *change {
                Change::GroupLimits(GroupId(node), ref limits) | Change::MemberLimits(MemberId(node), ref limits) => {
                    self.tree.set_limits(node, limits, now);
                }
                Change::GroupWeight(GroupId(node), weight) | Change::MemberWeight(MemberId(node), weight) => {
                    self.tree.set_weight(node, weight);
                }
                Change::GroupCharges(GroupId(node), charges) => self.tree.set_charges(node, charges),
                Change::GroupParent(..) => {}
                Change::MemberGroup(MemberId(node), _) => {
                    if planted(Fault::MoveEndsDrain) {
                        self.members[node].mode = Mode::Live;
                    }
                }
            }
        }
        let roots_after = changes.iter().map(|change| self.tree.root(change.node()));
        let mut roots: Vec<NodeId> = roots_before.into_iter().chain(roots_after).collect();
        roots.sort_unstable();
        roots.dedup();
        for root in roots {
            if self.tree.root(root) == root {
                self.let_go_due(root, None, now);
            } else {
                // A former root that is now below a parent: its waiting requests are armed in the
                // tree it joined.
                self.armed.remove(root);
            }
        }
        Ok(())
    }

    /// Resumes a group at the levels that an earlier process noted.
    pub fn resume_group(&mut self, group: GroupId, levels: &[Level], elapsed_ns: u64, now: Time) {
        self.resume(group.0, levels, elapsed_ns, now);
    }

    /// Resumes a member at the levels that an earlier process noted.
    pub fn resume_member(&mut self, member: MemberId, levels: &[Level], elapsed_ns: u64, now: Time) {
        self.resume(member.0, levels, elapsed_ns, now);
    }

    fn resume(&mut self, node: NodeId, levels: &[Level], elapsed_ns: u64, now: Time) {
        let now = self.see(now);
        self.tree.resume(node, levels, elapsed_ns, now);
        let root = self.tree.root(node);
        // Requests that already wait get new deadlines.
        self.let_go_due(root, None, now);
    }
}
