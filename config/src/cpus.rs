//! A set of CPUs, in the notation of the kernel.
//!
//! ```text
//!   "0-3,8"  ⇄  { 0, 1, 2, 3, 8 }        as in /sys/devices/system/cpu/online and Cpus_allowed_list
//!   "3, 1-2, 2"  ─►  "1-3"               order, blanks and repetitions do not matter
//! ```
//!
//! This module does not know the CPUs of the host.

use std::fmt;

use crate::fault::shown;
use crate::quantity::{Refusal, parse_count};

/// The highest CPU number: the size of a thread's mask in the C library, less 1.
pub const CPU_MAX: u16 = 1023;

const WORDS: usize = (CPU_MAX as usize + 1) / 64;
const EXAMPLES: &str = "allowed: CPUs from 0 to 1023 and ranges of them, like \"0-3,8\"";

/// At least one CPU. Sets are equal if they hold the same CPUs, regardless of `line`.
#[derive(Clone, Copy)]
pub struct Cpus {
    bits: [u64; WORDS],
    /// The line in the file, from 1; 0 outside files.
    pub line: u32,
}

impl Cpus {
    /// Reads a list of numbers and ranges.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let mut bits = [0; WORDS];
        for part in text.split(',') {
            for cpu in parse_part(part.trim(), text)? {
                bits[usize::from(cpu / 64)] |= 1 << (cpu % 64);
            }
        }
        Ok(Self { bits, line: 0 })
    }

    /// The union of both sets; the line is that of `self`.
    #[must_use]
    pub(crate) fn with(mut self, more: &Self) -> Self {
        self.bits.iter_mut().zip(more.bits).for_each(|(bits, more)| *bits |= more);
        self
    }

    /// Whether the set has the CPU.
    pub fn contains(&self, cpu: u16) -> bool {
        self.bits.get(usize::from(cpu / 64)).is_some_and(|bits| bits & (1 << (cpu % 64)) != 0)
    }

    /// The CPUs of the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u16> {
        (0..=CPU_MAX).filter(|&cpu| self.contains(cpu))
    }

    /// The CPUs of the set for which `wanted` is true; `None` if there is none.
    pub fn filter(&self, wanted: impl Fn(u16) -> bool) -> Option<Self> {
        let mut kept = Self { bits: [0; WORDS], line: self.line };
        for cpu in self.iter().filter(|&cpu| wanted(cpu)) {
            kept.bits[usize::from(cpu / 64)] |= 1 << (cpu % 64);
        }
        (kept.bits != [0; WORDS]).then_some(kept)
    }
}

/// The CPUs of `3` or `1-3`. `whole` is for the message.
fn parse_part(part: &str, whole: &str) -> Result<std::ops::RangeInclusive<u16>, Refusal> {
    let (first, last) = match part.split_once('-') {
        // A part that begins with a dash is a negative number.
        Some((first, last)) if !first.is_empty() => (first, last),
        _ => (part, part),
    };
    let refusal = |found: String| Refusal { found, cure: EXAMPLES.to_owned() };
    if first.trim().is_empty() || last.trim().is_empty() {
        return Err(refusal(format!("{:?} lacks a number", shown(whole, 40))));
    }
    let number = |text: &str| {
        let number = parse_count(text).map_err(|fault| refusal(fault.found))?;
        let cpu = u16::try_from(number).ok().filter(|cpu| *cpu <= CPU_MAX);
        cpu.ok_or_else(|| refusal(format!("{number} is no CPU")))
    };
    let (first, last) = (number(first)?, number(last)?);
    if first > last {
        return Err(Refusal {
            found: format!("{first}-{last} runs backwards"),
            cure: format!("write the smaller number first: {last}-{first}"),
        });
    }
    Ok(first..=last)
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let begins = self.iter().filter(|&cpu| cpu == 0 || !self.contains(cpu - 1));
        for (n, first) in begins.enumerate() {
            let comma = if n > 0 { "," } else { "" };
            let last = (first..=CPU_MAX).take_while(|&cpu| self.contains(cpu)).last().unwrap_or(first);
            write!(f, "{comma}{first}")?;
            if last > first {
                write!(f, "-{last}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cpus({self}, line {})", self.line)
    }
}

impl PartialEq for Cpus {
    fn eq(&self, other: &Self) -> bool {
        self.bits == other.bits
    }
}

impl Eq for Cpus {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_list_is_read_as_the_kernel_reads_it_and_written_as_it_writes_it() {
        for (text, written) in [
            ("0", "0"),
            ("0-3,8", "0-3,8"),
            ("8,0-3", "0-3,8"),
            (" 3 , 1 - 2,2 ", "1-3"),
            ("5-5", "5"),
            ("63,64", "63-64"),
            ("0-1023", "0-1023"),
            ("1022,1023,1", "1,1022-1023"),
        ] {
            assert_eq!(Cpus::parse(text).expect(text).to_string(), written, "{text:?}");
        }
    }

    #[test]
    fn what_is_no_list_is_refused_with_what_is_wrong_in_it() {
        for (text, found) in [
            ("", "\"\" lacks a number"),
            ("0,,1", "\"0,,1\" lacks a number"),
            ("0,", "\"0,\" lacks a number"),
            ("3-", "\"3-\" lacks a number"),
            ("-1", "\"-1\" is negative"),
            ("3-1", "3-1 runs backwards"),
            ("1024", "1024 is no CPU"),
            ("0-70000", "70000 is no CPU"),
            ("99999999999999999999", "\"99999999999999999999\" is too large"),
            ("0-7:2/4", "\"7:2/4\" is no plain whole number"),
            ("0x3", "\"0x3\" may be meant in another base"),
            ("0-3 8", "\"3 8\" is more than one number"),
            ("1-2-3", "\"2-3\" is no plain whole number"),
            ("none", "\"none\" is not a number"),
        ] {
            assert_eq!(Cpus::parse(text).expect_err(text).found, found, "{text:?}");
        }
    }

    #[test]
    fn of_a_filter_that_leaves_nothing_there_is_no_set() {
        let some = Cpus::parse("0-3,8").unwrap();
        assert_eq!(some.filter(|cpu| cpu >= 3).unwrap().to_string(), "3,8");
        assert_eq!(some.filter(|cpu| cpu > 8), None);
        assert!(!some.contains(u16::MAX));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_written_is_read_as_the_same_set(cpus in proptest::collection::btree_set(0..=CPU_MAX, 1..40)) {
            let list: Vec<String> = cpus.iter().rev().map(ToString::to_string).collect();
            let read = Cpus::parse(&list.join(",")).unwrap();
            prop_assert_eq!(read.iter().collect::<Vec<_>>(), cpus.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(Cpus::parse(&read.to_string()).unwrap(), read);
        }
    }
}
