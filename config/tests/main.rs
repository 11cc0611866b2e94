//! All tests of the crate's public interface, in one program: linked once, and run on all CPUs of
//! the host.

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
