//! All tests of the crate's public face, in one program: linked once, and run with all of the host's CPUs.

mod broken;
mod examples;
mod faults;
mod hostile;
mod load;
mod plan;
mod settings;
mod trees;
mod warnings;
mod written;
