//! Amounts as users write them: `125MiB/s`, `10k`, `20 GiB`, `1.5s`.
//!
//! ```text
//!   125 MiB /s
//!    │   │   └ optional, where a rate is meant
//!    │   └ k M G T = 1000s (`K` is `k`), Ki Mi Gi Ti = 1024s; B optional, where bytes are meant
//!    └ a whole number, also as 1e6, 1.5e+03 or 1000.0
//! ```
//!
//! Bits are refused: a rate that is off by a factor of eight is hard to notice. Fractions and
//! numbers in a base other than ten are refused too, except fractions of times (`0.5s`), which are
//! exact to the nanosecond.
//!
//! Programs write exponents: Helm reads every number as floating point and writes `1e+06` for
//! 1000000, and JSON writers write `1000000.0`. The digits are shifted as text, so the number is
//! exact or refused.
//!
//! The reverse is here too: [`exact_bytes`] and [`exact_seconds`] write text that these functions
//! read, and [`Bytes`] shows an amount in both kinds of unit for a reader.

use std::fmt;

use crate::fault::shown;
use crate::near::nearest;

/// The unit of an amount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A size.
    Bytes,
    /// A rate of `bps-…` limits.
    BytesPerSecond,
    /// A rate of `iops-…` limits.
    OperationsPerSecond,
}

/// The reason why a text is no amount, and the cure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The finding, with the text itself.
    pub found: String,
    /// The texts that would be accepted.
    pub cure: String,
}

impl Refusal {
    fn new(found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { found: found.into(), cure: cure.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.found, self.cure)
    }
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// Prefixes and their factors; the canonical spelling comes first.
const PREFIXES: [(&str, u64); 10] = [
    ("", 1),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("Ki", KIB),
    ("Mi", MIB),
    ("Gi", GIB),
    ("Ti", TIB),
    ("K", 1_000),
];

/// A larger exponent makes any number too large, or any fraction too fine.
const EXPONENT_MAX: i64 = 1_000_000;

/// The most zeroes that an exponent adds: more than the digits of the largest 64-bit number.
const DIGITS_MAX: i64 = 40;

/// Suffixes of times and their factors in nanoseconds.
const TIMES: [(&str, u64); 8] = [
    ("", 1_000_000_000),
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Reads an amount.
pub fn parse(text: &str, unit: Unit) -> Result<u64, Refusal> {
    let (number, suffix) = split_number(text, examples(unit))?;
    let factor = factor(text, suffix, unit)?;
    if !number.fraction.is_empty() {
        let cure = format!("write a whole number, with a smaller unit if need be; {}", examples(unit));
        return Err(Refusal::new(format!("{} is a fraction", quoted(text)), cure));
    }
    number.whole().and_then(|number| number.checked_mul(factor)).ok_or_else(|| {
        Refusal::new(format!("{} is above {}", quoted(text), u64::MAX), "no amount is that large; check the unit")
    })
}

/// Reads a time, in nanoseconds.
pub fn parse_seconds(text: &str) -> Result<u64, Refusal> {
    const EXAMPLES: &str = "allowed: seconds, or a number with ns us ms s m h, like 60, 1.5s, 500ms";
    let (number, suffix) = split_number(text, EXAMPLES)?;
    let Some(&(_, factor)) = TIMES.iter().find(|(name, _)| *name == suffix || suffix == "μs" && *name == "µs") else {
        return Err(unknown_unit(text, suffix, TIMES.iter().map(|(name, _)| *name), EXAMPLES));
    };
    let fraction = &number.fraction;
    // 18 digits of a fraction and the largest factor (3.6 * 10^12) fit 128 bits with room to spare.
    if fraction.len() > 18 {
        return Err(Refusal::new(format!("{} has too many digits", quoted(text)), "a nanosecond is the smallest step"));
    }
    let scale = 10u128.pow(fraction.len() as u32);
    let parts = fraction.parse::<u128>().unwrap_or(0) * u128::from(factor);
    if !parts.is_multiple_of(scale) {
        return Err(Refusal::new(
            format!("{} is no whole number of nanoseconds", quoted(text)),
            "a nanosecond is the smallest step",
        ));
    }
    let whole = number.whole().map(u128::from);
    let total = whole.map(|whole| whole * u128::from(factor) + parts / scale);
    total.and_then(|total| u64::try_from(total).ok()).ok_or_else(|| {
        Refusal::new(format!("{} is above 584 years", quoted(text)), "no time is that long; check the unit")
    })
}

/// Reads a plain whole number, as for a count of queues.
pub fn parse_count(text: &str) -> Result<u64, Refusal> {
    const EXAMPLES: &str = "allowed: a plain whole number";
    let (number, suffix) = split_number(text, EXAMPLES)?;
    if !suffix.is_empty() || !number.fraction.is_empty() {
        return Err(Refusal::new(format!("{} is no plain whole number", quoted(text)), EXAMPLES));
    }
    number.whole().ok_or_else(|| Refusal::new(format!("{} is too large", quoted(text)), EXAMPLES))
}

fn examples(unit: Unit) -> &'static str {
    match unit {
        Unit::Bytes => "allowed: bytes, or a number with k M G T (1000s) or Ki Mi Gi Ti (1024s), like 20GiB",
        Unit::BytesPerSecond => {
            "allowed: bytes a second, with k M G T (1000s) or Ki Mi Gi Ti (1024s), like 125MiB/s; or `unlimited`"
        }
        Unit::OperationsPerSecond => {
            "allowed: operations a second, with k M G T (1000s) or Ki Mi Gi Ti (1024s), like 500 or 10k; or `unlimited`"
        }
    }
}

fn quoted(text: &str) -> String {
    format!("{:?}", shown(text, 40))
}

/// A decimal number with its exponent applied.
struct Decimal {
    /// The digits before the point, without leading zeroes.
    whole: String,
    /// The digits behind the point, without trailing zeroes.
    fraction: String,
}

impl Decimal {
    /// `digits`, with at most one point between them, times ten to the power of `exponent`.
    fn new(digits: &str, exponent: i64) -> Self {
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let all = format!("{whole}{fraction}");
        let significant = all.trim_start_matches('0');
        // The position of the point, counted from the first non-zero digit.
        let point = whole.len() as i64 - (all.len() - significant.len()) as i64 + exponent;
        let significant = significant.trim_end_matches('0');
        if significant.is_empty() {
            return Self { whole: String::new(), fraction: String::new() };
        }
        let zeroes = |count: i64| "0".repeat(count.clamp(0, DIGITS_MAX) as usize);
        let (before, behind) = significant.split_at(point.clamp(0, significant.len() as i64) as usize);
        Self {
            whole: format!("{before}{}", zeroes(point - significant.len() as i64)),
            fraction: if behind.is_empty() { String::new() } else { format!("{}{behind}", zeroes(-point)) },
        }
    }

    /// The part before the point; `None` above 64 bits.
    fn whole(&self) -> Option<u64> {
        if self.whole.is_empty() { Some(0) } else { self.whole.parse().ok() }
    }
}

/// Splits a text into a number and its suffix. Refuses notations with a known wrong meaning by
/// name.
fn split_number<'a>(text: &'a str, examples: &str) -> Result<(Decimal, &'a str), Refusal> {
    let trimmed = text.trim();
    let refuse = |what: &str, cure: &str| Err(Refusal::new(format!("{} {what}", quoted(text)), cure));
    if trimmed.is_empty() {
        return refuse("is empty", examples);
    }
    if trimmed.starts_with(['-', '−']) {
        return refuse("is negative", examples);
    }
    let end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (digits, suffix) = (&trimmed[..end], trimmed[end..].trim_start());
    let glued = trimmed[end..].chars().next();
    if digits.is_empty() || digits.starts_with('.') {
        return match trimmed.trim_start_matches(['.', '+']).to_ascii_lowercase().as_str() {
            "inf" | "infinity" => refuse("is not a number", "write `unlimited` for no limit"),
            _ => refuse("is not a number", examples),
        };
    }
    if matches!(glued, Some('_' | ',' | '\'')) {
        return refuse("has separators between its digits", "write the digits without them: 1000");
    }
    if matches!(glued, Some('x' | 'X' | 'o' | 'O'))
        || (digits.len() > 1 && digits.starts_with('0') && !digits[1..].starts_with('.'))
    {
        return refuse("may be meant in another base", "write it in decimal, without a leading 0");
    }
    if digits.ends_with('.') || digits.matches('.').count() > 1 {
        return refuse("is not a number", examples);
    }
    let (exponent, suffix) = match split_exponent(&trimmed[end..]) {
        Some((exponent, rest)) => (exponent, rest.trim_start()),
        None => (0, suffix),
    };
    if suffix.starts_with(|c: char| c.is_ascii_digit()) {
        return refuse("is more than one number", examples);
    }
    Ok((Decimal::new(digits, exponent), suffix))
}

/// The exponent at the start of `text` (`e6`, `E+06`, `e-3`), and the rest after it.
fn split_exponent(text: &str) -> Option<(i64, &str)> {
    let power = text.strip_prefix(['e', 'E'])?;
    let (sign, digits) = match power.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, power.strip_prefix('+').unwrap_or(power)),
    };
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    if end == 0 {
        return None;
    }
    // An exponent of more digits than 64 bits hold exceeds every accepted number.
    let power = digits[..end].parse().unwrap_or(EXPONENT_MAX).min(EXPONENT_MAX);
    Some((sign * power, &digits[end..]))
}

/// The factor of a suffix such as `MiB/s`.
fn factor(text: &str, suffix: &str, unit: Unit) -> Result<u64, Refusal> {
    let name = match suffix.strip_suffix("/s").map(str::trim_end) {
        Some(_) if unit == Unit::Bytes => {
            return Err(Refusal::new(format!("{} is a rate", quoted(text)), "a size is meant; leave out the `/s`"));
        }
        Some(name) => name,
        None => suffix,
    };
    let prefix = name.strip_suffix('B').unwrap_or(name);
    if let Some(&(_, factor)) = PREFIXES.iter().find(|(known, _)| *known == prefix) {
        if prefix.len() < name.len() && unit == Unit::OperationsPerSecond {
            return Err(Refusal::new(
                format!("{} counts bytes", quoted(text)),
                "operations are meant; leave out the `B`, or use a bps limit",
            ));
        }
        return Ok(factor);
    }
    let lower = name.to_ascii_lowercase();
    if lower.contains("bit") || (lower.ends_with("bps") && unit != Unit::OperationsPerSecond) || ends_in_bits(name) {
        return Err(Refusal::new(
            format!("{} counts bits", quoted(text)),
            "bytes are meant: divide by 8 and write B, like 125MB/s for 1000 Mbit/s",
        ));
    }
    // `m` is a thousandth and `g` a gram, so the suggestion is the capital.
    Err(unknown_unit(text, name, PREFIXES.iter().map(|(known, _)| *known), examples(unit)))
}

/// A prefix followed by a lower-case b: `Mb`, `kb`, `Gib`.
fn ends_in_bits(name: &str) -> bool {
    name.strip_suffix('b').is_some_and(|prefix| PREFIXES.iter().any(|(known, _)| *known == prefix))
}

fn unknown_unit<'a>(text: &str, name: &str, known: impl Iterator<Item = &'a str>, examples: &str) -> Refusal {
    let found = format!("{} has the unknown unit {}", quoted(text), quoted(name));
    let bare = name.strip_suffix(['B', 'b']).unwrap_or(name);
    let units: Vec<&str> = known.collect();
    let same_letters = units.iter().find(|unit| !bare.is_empty() && unit.eq_ignore_ascii_case(bare));
    match same_letters.copied().or_else(|| nearest(name, units)) {
        Some(unit) => Refusal::new(found, format!("did you mean `{unit}`? {examples}")),
        None => Refusal::new(found, examples),
    }
}

/// The shortest text that [`parse`] reads as exactly this amount: `125MiB`, `80MB`, `4097B`.
pub fn exact_bytes(amount: u64) -> String {
    let (number, prefix) = shortest(amount);
    format!("{number}{prefix}B")
}

/// As [`exact_bytes`], in 1000s only and without `B`: operations are not counted in 1024s.
pub fn exact_operations(amount: u64) -> String {
    let (prefix, factor) = largest_factor(amount, &PREFIXES[..5]);
    format!("{}{prefix}", amount / factor)
}

/// A time as [`parse_seconds`] reads it: `60s`, `0.5s`.
pub fn exact_seconds(ns: u64) -> String {
    let (whole, fraction) = (ns / 1_000_000_000, ns % 1_000_000_000);
    match fraction {
        0 => format!("{whole}s"),
        _ => format!("{whole}.{}s", format!("{fraction:09}").trim_end_matches('0')),
    }
}

fn largest_factor(amount: u64, prefixes: &[(&'static str, u64)]) -> (&'static str, u64) {
    let dividing = prefixes.iter().filter(|(_, factor)| amount > 0 && amount.is_multiple_of(*factor));
    dividing.max_by_key(|(_, factor)| *factor).copied().unwrap_or(("", 1))
}

/// The number and prefix with the fewest digits, without loss.
fn shortest(amount: u64) -> (u64, &'static str) {
    let (prefix, factor) = largest_factor(amount, &PREFIXES[..9]);
    let (decimal, decimal_factor) = largest_factor(amount, &PREFIXES[..5]);
    // 128,000 divides by 1000 and by 1024: prefer `128k` over `125Ki`. Otherwise the larger factor
    // decides.
    if amount / decimal_factor <= amount / factor {
        (amount / decimal_factor, decimal)
    } else {
        (amount / factor, prefix)
    }
}

/// Shows bytes in both kinds of unit: `125 MiB (131.1 MB)`, `80 MB (76.3 MiB)`, `512 B`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

/// As [`Bytes`], for a rate: `125 MiB/s (131.1 MB/s)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BytesPerSecond(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_in_both_units(f, self.0, "B")
    }
}

impl fmt::Display for BytesPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_in_both_units(f, self.0, "B/s")
    }
}

fn write_in_both_units(f: &mut fmt::Formatter<'_>, amount: u64, unit: &str) -> fmt::Result {
    let (number, prefix) = shortest(amount);
    write!(f, "{number} {prefix}{unit}")?;
    let mut others = Vec::new();
    if !PREFIXES[1..5].iter().any(|(decimal, _)| *decimal == prefix) {
        others.extend(approximate(amount, &PREFIXES[1..5]));
    }
    if !prefix.ends_with('i') {
        others.extend(approximate(amount, &PREFIXES[5..9]));
    }
    let others: Vec<String> = others.into_iter().map(|text| format!("{text}{unit}")).collect();
    if others.is_empty() { Ok(()) } else { write!(f, " ({})", others.join(", ")) }
}

/// In the largest unit that leaves at least 1, with one decimal.
fn approximate(amount: u64, prefixes: &[(&'static str, u64)]) -> Option<String> {
    let (prefix, factor) = prefixes.iter().rev().find(|(_, factor)| amount >= *factor)?;
    let tenths = (u128::from(amount) * 10 + u128::from(*factor) / 2) / u128::from(*factor);
    match tenths % 10 {
        0 => Some(format!("{} {prefix}", tenths / 10)),
        tenth => Some(format!("{}.{tenth} {prefix}", tenths / 10)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn units_mean_what_they_say() {
        // k is 1000 and Ki is 1024, with and without B, /s and a blank.
        for (text, amount) in [
            ("0", 0),
            ("4096", 4096),
            ("512B", 512),
            ("10k", 10_000),
            ("10K", 10_000),
            ("10Ki", 10_240),
            ("250 MB/s", 250_000_000),
            ("125MiB/s", 131_072_000),
            ("2GB /s", 2_000_000_000),
            ("1TiB", 1 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text, Unit::BytesPerSecond), Ok(amount), "{text}");
        }
        assert_eq!(parse("10k/s", Unit::OperationsPerSecond), Ok(10_000));
        assert_eq!(parse("20GiB", Unit::Bytes), Ok(20 << 30));
    }

    #[test]
    fn f67_numbers_as_programs_write_them_are_taken_if_they_are_whole() {
        // Helm makes 1e+06 of a million; JSON writers put a point behind a whole number.
        for (text, amount) in [
            ("1e+06", 1_000_000),
            ("1e6", 1_000_000),
            ("1.5e3", 1_500),
            ("1.048576e+06", 1 << 20),
            ("1.5E3 KiB/s", 1_500 << 10),
            ("10e-1", 1),
            ("0.5e1", 5),
            ("1000.0", 1_000),
            ("0e99999999999999999999", 0),
            ("0.0", 0),
            ("1.8446744073709551615e19", u64::MAX),
        ] {
            assert_eq!(parse(text, Unit::BytesPerSecond), Ok(amount), "{text}");
        }
        assert_eq!(parse_count("1e+06"), Ok(1_000_000));
        assert_eq!(parse_seconds("6e+01"), Ok(60_000_000_000));
        assert_eq!(parse_seconds("1.5e-3s"), Ok(1_500_000));
    }

    #[test]
    fn f67_an_exponent_that_leaves_a_fraction_or_too_much_is_refused() {
        // Nothing is rounded.
        for (text, what) in [
            ("1e-1", "is a fraction"),
            ("1.2345e3", "is a fraction"),
            ("1e-99999999999999999999", "is a fraction"),
            ("1e400", "is above"),
            ("1e99999999999999999999", "is above"),
            ("1.8446744073709551616e19", "is above"),
            ("1e", "unknown unit"),
            ("1e+", "unknown unit"),
            ("1e5 5", "more than one number"),
            ("1e5.5", "unknown unit"),
        ] {
            let refusal = parse(text, Unit::BytesPerSecond).expect_err(text);
            assert!(refusal.found.contains(what), "{text}: {refusal}");
        }
        assert!(parse_count("1e-1").expect_err("a fraction").found.contains("no plain whole number"));
        assert!(parse_count("1e99").expect_err("too large").found.contains("too large"));
        assert!(parse_seconds("1e-10").is_err());
        assert!(parse_seconds("1e-99999999999999999999").is_err());
        assert!(parse_seconds("1e30").is_err());
    }

    #[test]
    fn what_could_be_misread_is_refused_by_name() {
        for (text, what) in [
            ("", "is empty"),
            ("-0", "is negative"),
            ("-5", "is negative"),
            ("1.5G", "is a fraction"),
            ("nan", "is not a number"),
            (".inf", "is not a number"),
            ("0x10", "another base"),
            ("010", "another base"),
            ("1_000", "separators"),
            ("1,000", "separators"),
            ("10 20", "more than one number"),
            ("10 parrots", "unknown unit"),
            ("18446744073709551616", "is above"),
            ("99999999999999999999999999999999999999999999", "is above"),
            ("18446744073709551615k", "is above"),
            ("100Mbit", "counts bits"),
            ("100Mbit/s", "counts bits"),
            ("100Mb", "counts bits"),
            ("100Mib", "counts bits"),
            ("100Mbps", "counts bits"),
            ("true", "is not a number"),
            ("2024-01-01", "unknown unit"),
            ("五", "is not a number"),
            ("1.", "is not a number"),
            ("1.2.3", "is not a number"),
        ] {
            let refusal = parse(text, Unit::BytesPerSecond).expect_err(text);
            assert!(refusal.found.contains(what), "{text}: {refusal}");
        }
        assert!(parse("1MB/s", Unit::Bytes).expect_err("a rate").found.contains("is a rate"));
        assert!(parse("1MB", Unit::OperationsPerSecond).expect_err("bytes").found.contains("counts bytes"));
    }

    #[test]
    fn unknown_unit_suggests_the_nearest() {
        for (text, suggestion) in [("10m", "`M`"), ("10mb", "`M`"), ("10mib", "`Mi`"), ("5gB", "`G`")] {
            let refusal = parse(text, Unit::Bytes).expect_err(text);
            assert!(refusal.cure.contains(suggestion) || refusal.found.contains("bits"), "{text}: {refusal}");
        }
        assert!(parse_seconds("5sec").is_err());
        assert!(parse_seconds("5S").expect_err("capital").cure.contains("`s`"));
    }

    #[test]
    fn times_take_fractions_and_are_exact() {
        for (text, ns) in [
            ("60", 60_000_000_000),
            ("60s", 60_000_000_000),
            ("1.5", 1_500_000_000),
            ("0.1s", 100_000_000),
            ("500ms", 500_000_000),
            ("2us", 2_000),
            ("1.2µs", 1_200),
            ("1ns", 1),
            ("1.50m", 90_000_000_000),
            ("1h", 3_600_000_000_000),
            ("4294967300", 4_294_967_300_000_000_000),
            ("0", 0),
        ] {
            assert_eq!(parse_seconds(text), Ok(ns), "{text}");
        }
        for text in ["0.5ns", "-1s", "", "1e11", "99999999999h", "0.0000000001", "1.0000000000000000000001", "s", "1d"]
        {
            assert!(parse_seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bytes_are_shown_in_both_units() {
        for (amount, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (131_072_000, "125 MiB (131.1 MB)"),
            (2_000_000_000, "2 GB (1.9 GiB)"),
            (80_000_000, "80 MB (76.3 MiB)"),
            (262_144, "256 KiB (262.1 kB)"),
            (1_001, "1001 B (1 kB)"),
            (123_456_789, "123456789 B (123.5 MB, 117.7 MiB)"),
        ] {
            assert_eq!(Bytes(amount).to_string(), text);
        }
    }

    proptest! {
        #[test]
        fn what_is_written_back_reads_as_the_same(amount: u64, scaled in 0u64..5000, shift in 0u32..50) {
            for amount in [amount, scaled << shift, scaled.saturating_mul(10u64.pow(shift % 16))] {
                prop_assert_eq!(parse(&exact_bytes(amount), Unit::Bytes), Ok(amount));
                prop_assert_eq!(parse(&exact_operations(amount), Unit::OperationsPerSecond), Ok(amount));
                prop_assert_eq!(parse_seconds(&exact_seconds(amount)), Ok(amount));
            }
        }

        #[test]
        fn an_exponent_shifts_the_point_and_no_more(digits in 0u64..1_000_000, exponent in 0usize..12, point in 0usize..7) {
            // However a number is split into digits and exponent, it is the same number.
            let all = format!("{digits:07}");
            let (whole, fraction) = all.split_at(7 - point);
            let text = format!("0{whole}.{fraction}0e{}", exponent + point);
            let text = text.trim_start_matches('0');
            let text = if text.starts_with('.') { format!("0{text}") } else { text.to_owned() };
            prop_assert_eq!(parse(&text, Unit::Bytes), Ok(digits * 10u64.pow(exponent as u32)), "{}", text);
        }

        #[test]
        fn no_text_panics(text in ".{0,40}", number in "[0-9.eE+-]{0,30}( )?[a-zA-Zµ/]{0,6}") {
            for text in [&text, &number] {
                for unit in [Unit::Bytes, Unit::BytesPerSecond, Unit::OperationsPerSecond] {
                    let _ = parse(text, unit);
                }
                let _ = parse_seconds(text);
                let _ = parse_count(text);
            }
        }
    }
}
