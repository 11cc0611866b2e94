//! Detects spells in which the queue thread preempts its clients for each single request.
//!
//! ```text
//!   answers of a turn   32  31  1  1  1  1  1  1  1  17 ─► yield   32  32 …
//!                               └── the spell ───────┘
//! ```
//!
//! The scheduler (EEVDF) preserves the lag of a thread that falls asleep, and a queue thread gains
//! lag whenever it has to wait for a CPU that its clients are on. Woken by a client, it preempts
//! that client at once (Linux 7.3: a waker that has had its share is preempted). The client sends
//! one request, is preempted, gets the answer, sends the next request, and each request costs two
//! context switches until the lag is used up. A thread that yields gives its lag up.
//!
//! The queue thread yields only after such a spell, and only once, right after a turn with many
//! answers: clients on different CPUs do not wait for it then, and an unrelated thread that is busy
//! on its CPU gets one turn.

/// At most so many answers make a turn a short one.
const FEW: u32 = 2;
/// Number of short turns between two turns of [`MANY`] that are a spell.
const SPELL: u32 = 4;
/// Answers of a turn that ends a spell: its clients can send without being preempted, and none
/// waits for a single answer.
const MANY: u32 = 16;

/// The short turns since the last turn of [`MANY`].
#[derive(Debug, Default)]
pub struct Spell {
    short_turns: u32,
}

impl Spell {
    /// Counts a turn by the number of its answers. Returns whether the thread should yield after
    /// it.
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
