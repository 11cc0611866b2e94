//! Whether the thread has been interrupting its clients, one request at a time.
//!
//! ```text
//!   answers of a turn   32  31  1  1  1  1  1  1  1  17 ─► yield   32  32 …
//!                               └── the spell ───────┘
//! ```
//!
//! The scheduler (EEVDF) lets a thread that falls asleep keep what it was owed, and a queue thread is owed something whenever it had to
//! wait for a processor that its clients are on. Woken by a client, it is then let before it at once (Linux 7.3: who wakes another and
//! has had its share, is preempted): a client sends one request, is interrupted, gets the answer, sends the next one, and each
//! request costs two switches, until nothing is owed. A thread that yields gives up what it is owed.
//!
//! It does so only when it sees such a spell, and then once, with many requests just answered: clients on other processors do
//! not wait for it, and where something else is busy on its own that gets one turn.

/// Answers of a turn that may be one of a spell.
const FEW: u32 = 2;
/// So many of those between two turns of [`MANY`] are one.
const SPELL: u32 = 4;
/// Answers of a turn after which to yield: what its clients send now, they send undisturbed, and nobody waits for a single one.
const MANY: u32 = 16;

/// What has been seen of one.
#[derive(Debug, Default)]
pub struct Spell {
    short_turns: u32,
}

impl Spell {
    /// Notes a turn by the number of its answers; whether to yield after it.
    pub fn is_over(&mut self, answers: u32) -> bool {
        match answers {
            0 => false,
            1..=FEW => {
                self.short_turns = self.short_turns.saturating_add(1);
                false
            }
            MANY.. => std::mem::take(&mut self.short_turns) >= SPELL,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yields(turns: &[u32]) -> Vec<usize> {
        let mut spell = Spell::default();
        turns.iter().enumerate().filter_map(|(at, &answers)| spell.is_over(answers).then_some(at)).collect()
    }

    #[test]
    fn a_spell_is_ended_once_and_by_a_long_turn() {
        assert_eq!(yields(&[32, 1, 2, 0, 1, 7, 1, 16, 32, 31]), [7]);
        assert_eq!(yields(&[1, 1, 1, 1, 32, 1, 1, 1, 1, 32]), [4, 9]);
    }

    #[test]
    fn long_turns_alone_and_short_ones_alone_are_none() {
        for turns in [[32; 100], [1; 100], [8; 100]] {
            assert!(yields(&turns).is_empty(), "{turns:?}");
        }
        assert!(yields(&[1, 1, 1, 32, 1, 1, 1, 32]).is_empty(), "each long turn begins anew");
    }
}
