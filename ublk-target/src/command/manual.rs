//! `man` and `completions`: generated from the definitions of the flags, so both are always
//! current.

use std::io::{self, Write};

use clap::CommandFactory;
use clap::error::ErrorKind;
use clap_complete::Shell;
use ublk_throttle_config::nearest;

use crate::error::{Class, OrFail, Outcome};
use crate::flags::Flags;

/// The page for programs that talk to the daemon. It cannot be generated from flags.
const PROTOCOL: &str = include_str!("../../man/ublk-throttle-protocol.7");

/// Prints the manual page of a command, or of the program.
pub fn page(command: Option<&str>) -> Outcome<()> {
    if command == Some("protocol") {
        return print(PROTOCOL.as_bytes());
    }
    let mut all = Flags::command();
    // Gives the subcommands their full names.
    all.build();
    let about = command.map_or(Some(&all), |name| all.find_subcommand(name)).filter(|about| !about.is_hide_set());
    let Some(about) = about.cloned() else { unknown(all, command.unwrap_or_default()) };
    let title = about.get_display_name().unwrap_or(about.get_name()).to_owned();
    let mut page = Vec::new();
    clap_mangen::Man::new(about).title(title).render(&mut page).or_fail(Class::Failed, "cannot write the page")?;
    print(&page)
}

/// Exits with the message and exit code of a usage error.
fn unknown(mut all: clap::Command, name: &str) -> ! {
    let known = || all.get_subcommands().filter(|known| !known.is_hide_set()).map(clap::Command::get_name);
    let cure = match nearest(name, known()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("there are: {}", known().collect::<Vec<_>>().join(", ")),
    };
    all.error(ErrorKind::InvalidValue, format!("no command {name:?}; {cure}")).exit()
}

/// Prints the completions for a shell.
pub fn completions(shell: Shell) -> Outcome<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Flags::command(), "ublk-throttle", &mut script);
    print(&script)
}

/// Writes to stdout. A reader that has closed it is no failure.
fn print(text: &[u8]) -> Outcome<()> {
    match io::stdout().write_all(text) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome.or_fail(Class::Failed, "cannot write to stdout"),
    }
}
