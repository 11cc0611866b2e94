//! Finds complaints in the guest's kernel log: a test during which the kernel complained has not
//! passed.

/// Line that `guest.sh` writes to the kernel log when the command starts. Lines before it belong to
/// the boot, not to the command.
const START: &str = "guest: command starts";

/// Prefixes of the kernel's complaints, after the time stamp.
const TROUBLE: [&str; 10] = [
    "WARNING:",
    "BUG:",
    "BUG ",
    "kernel BUG at",
    "Oops",
    "general protection fault",
    "INFO: task ",
    "Kernel panic",
    "list_add corruption",
    "refcount_t:",
];

/// Number of lines shown of a complaint: registers and call trace.
const TRACE: usize = 50;

/// The complaining lines, in order.
pub fn trouble(log: &str) -> Vec<&str> {
    since_start(log).filter(|line| complains(message(line))).collect()
}

/// The first complaint with its trace. Later complaints mostly follow from the first.
pub fn first_trace(log: &str) -> String {
    let lines = since_start(log).skip_while(|line| !complains(message(line)));
    lines.take(TRACE).collect::<Vec<_>>().join("\n")
}

fn since_start(log: &str) -> impl Iterator<Item = &str> {
    log[log.find(START).unwrap_or(0)..].lines()
}

fn complains(message: &str) -> bool {
    TROUBLE.iter().any(|beginning| message.starts_with(beginning))
}

/// `[   12.345678] message` without the stamp.
fn message(line: &str) -> &str {
    let rest = line.strip_prefix('[').and_then(|line| line.split_once("] ")).map_or(line, |(_, rest)| rest);
    // A prefix names a subsystem ("rcu: INFO: …", "block ublkb0: …"). Complaints have no prefix,
    // except those of the watchdog.
    rest.strip_prefix("watchdog: ").unwrap_or(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hung_task_and_warning_are_found_with_their_lines() {
        // A wrong removal of a ublk device shows these two complaints first.
        let log = "[    1.0] guest: command starts\n\
                   [    2.0] EXT4-fs (ublkb0): mounted filesystem\n\
                   [  121.5] INFO: task fio:311 blocked for more than 120 seconds.\n\
                   [  122.0] WARNING: CPU: 1 PID: 12 at block/genhd.c:700 del_gendisk+0x1/0x2\n";
        assert_eq!(trouble(log).len(), 2);
        assert!(trouble(log)[0].contains("fio:311"));
        let trace = first_trace(log);
        assert!(trace.starts_with("[  121.5] INFO: task fio:311") && trace.ends_with("del_gendisk+0x1/0x2"), "{trace}");
    }

    #[test]
    fn warnings_of_the_boot_are_not_the_commands() {
        // The kernel complains about emulated hardware before the command runs.
        assert!(trouble("[    0.1] WARNING: CPU: 0 PID: 0 at x\n[    1.0] guest: command starts\n").is_empty());
    }

    #[test]
    fn messages_that_only_mention_trouble_are_none() {
        // A kernel parameter and a message of a module contain the words.
        assert!(trouble("[    1.0] Kernel command line: oops=panic\n[    1.0] foo: BUG: in a message\n").is_empty());
    }
}
