//! What in the guest's kernel log is trouble: a test that passed while the kernel complained has not passed.

/// Written to the log by `guest.sh` when the command starts: what a boot logs is not the command's doing.
const START: &str = "guest: command starts";

/// Beginnings of the kernel's complaints, as they stand after the time stamp.
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

/// What follows a complaint: registers, and how it came to that.
const TRACE: usize = 50;

/// The lines that complain, in order.
pub fn trouble(log: &str) -> Vec<&str> {
    since_start(log).filter(|line| complains(message(line))).collect()
}

/// The first complaint with what the kernel says about it. The others mostly follow from it.
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
    // "rcu: INFO: …", "block ublkb0: …": a prefix names the part of the kernel; complaints have none, except this one.
    rest.strip_prefix("watchdog: ").unwrap_or(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hung_task_and_warning_are_found_with_their_lines() {
        // The two that a wrong removal of a ublk device shows first.
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
        // Emulated hardware makes the kernel complain before anything of ours runs.
        assert!(trouble("[    0.1] WARNING: CPU: 0 PID: 0 at x\n[    1.0] guest: command starts\n").is_empty());
    }

    #[test]
    fn messages_that_only_mention_trouble_are_none() {
        // A module that is called so, a command line that is echoed.
        assert!(trouble("[    1.0] Kernel command line: oops=panic\n[    1.0] foo: BUG: in a message\n").is_empty());
    }
}
