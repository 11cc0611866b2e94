//! What this process may do, by the numbers of `<linux/capability.h>`.

/// Makes block devices.
pub const CAP_SYS_ADMIN: u32 = 21;
/// Locks memory.
pub const CAP_IPC_LOCK: u32 = 14;

/// Whether the process may use a capability now.
pub fn has_capability(number: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    effective(&status).is_some_and(|bits| bits & (1 << number) != 0)
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_from_the_effective_set() {
        let status = "Name:\tx\nCapPrm:\t000001ffffffffff\nCapEff:\t0000000000204000\n";
        let bits = effective(status).unwrap();
        assert_eq!(bits, 1 << CAP_SYS_ADMIN | 1 << CAP_IPC_LOCK);
        assert_eq!(effective("nothing"), None);
    }
}
