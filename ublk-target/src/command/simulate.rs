//! `simulate`: opens the files for a simulation and prints its result.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter};
use std::path::Path;

use super::{load, say, say_json};
use crate::error::Outcome;
use crate::simulate;
use crate::simulate::trace::unreadable;

/// Large enough that the cost of system calls is negligible.
const BUFFER_BYTES: usize = 1 << 18;

/// Plays the trace against the configuration.
pub fn run(config: &Path, trace: &Path, is_summary: bool, json: bool) -> Outcome<()> {
    let config = load(config)?;
    let (name, input): (String, Box<dyn BufRead>) = if trace == Path::new("-") {
        ("stdin".to_owned(), Box::new(BufReader::with_capacity(BUFFER_BYTES, io::stdin())))
    } else {
        let name = trace.display().to_string();
        let file = File::open(trace).map_err(|error| unreadable(&name, "open", &error))?;
        (name, Box::new(BufReader::with_capacity(BUFFER_BYTES, file)))
    };
    if !is_summary {
        let output = BufWriter::with_capacity(BUFFER_BYTES, io::stdout().lock());
        return simulate::lines(&config, &name, input, output);
    }
    let facts = simulate::summary(&config, &name, input)?.facts();
    if json {
        say_json(&facts);
    } else {
        say(facts.to_string().trim_end());
    }
    Ok(())
}
