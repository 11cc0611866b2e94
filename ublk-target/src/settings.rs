//! Settings that a client sends under the keys of the configuration, such as
//! `{"iops-total": 500, "bps-read": "10MiB/s"}`.
//!
//! The parser of the configuration file reads the values, so they are kept as text: a number as its
//! digits, a boolean as its word, null as `none`.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde::ser::{Serialize, Serializer};

use crate::error::{Class, Failure, Outcome};

/// Bound on the settings of one command, above the number of keys.
const PAIRS_MAX: usize = 100;

/// Keys and values; each key once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings(pub Vec<(String, String)>);

impl Settings {
    /// Settings from a command line, where a key may occur twice.
    pub fn unique(pairs: Vec<(String, String)>) -> Outcome<Self> {
        let twice = pairs.iter().zip(0..).find(|((key, _), n)| pairs[..*n].iter().any(|(other, _)| other == key));
        match twice {
            Some(((key, _), _)) => Err(Failure::new(Class::Config, format!("{key} is given twice; keep one"))),
            None => Ok(Self(pairs)),
        }
    }

    /// The settings as borrowed text.
    pub fn pairs(&self) -> Vec<(&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
    }
}

impl Serialize for Settings {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

impl<'de> Deserialize<'de> for Settings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Pairs)
    }
}

struct Pairs;

impl<'de> Visitor<'de> for Pairs {
    type Value = Settings;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of keys and plain values")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Settings, A::Error> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        while let Some((key, Word(value))) = map.next_entry::<String, Word>()? {
            // No command has so many keys.
            if pairs.len() == PAIRS_MAX {
                return Err(A::Error::custom(format_args!("more than {PAIRS_MAX} keys")));
            }
            pairs.push((key, value));
        }
        Ok(Settings(pairs))
    }
}

/// A plain value as text.
struct Word(String);

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AsText).map(Self)
    }
}

struct AsText;

impl Visitor<'_> for AsText {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a number, true, false or null")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_bool<E: Error>(self, is: bool) -> Result<String, E> {
        Ok(is.to_string())
    }

    fn visit_unit<E: Error>(self) -> Result<String, E> {
        Ok("none".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_given_twice_is_refused() {
        // In JSON, one of the two values would be lost silently.
        let pairs = |text: &str| text.split(' ').map(|pair| (pair.to_owned(), "1".to_owned())).collect();
        assert!(Settings::unique(pairs("iops bps")).is_ok());
        assert_eq!(Settings::unique(pairs("iops bps iops")).unwrap_err().message, "iops is given twice; keep one");
    }
}
