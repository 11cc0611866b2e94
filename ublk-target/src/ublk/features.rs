//! The optional features of the driver, by name, and whether this program uses them.

/// A feature of the driver.
#[derive(Clone, Copy, Debug)]
pub struct Feature {
    /// Its bit in `UBLK_U_CMD_GET_FEATURES`.
    pub bit: u32,
    /// The name behind `UBLK_F_`.
    pub name: &'static str,
    /// The meaning, in plain words.
    pub meaning: &'static str,
    /// Whether devices of this program use it.
    pub is_used: bool,
}

/// The bit of the feature to resize a live device.
pub const UPDATE_SIZE: u32 = 10;
/// The bit of the feature to have the client's pages in the ring's table of buffers.
pub const AUTO_BUF_REG: u32 = 11;
/// The bit of the feature to stop a disk only if it has no opener.
pub const SAFE_STOP_DEV: u32 = 17;
/// The bit of the feature to leave partitions alone.
pub const NO_AUTO_PART_SCAN: u32 = 18;

/// All features known up to Linux 7.3, by bit.
pub const ALL: [Feature; 21] = [
    feature(0, "SUPPORT_ZERO_COPY", "request pages as fixed buffers, by command"),
    feature(1, "URING_CMD_COMP_IN_TASK", "completions in task context (always on)"),
    feature(2, "NEED_GET_DATA", "data of a write is asked for in a second step"),
    used(3, "USER_RECOVERY", "the disk survives the death of its server"),
    used(4, "USER_RECOVERY_REISSUE", "a recovered server gets the requests in flight again"),
    feature(5, "UNPRIVILEGED_DEV", "devices without CAP_SYS_ADMIN"),
    used(6, "CMD_IOCTL_ENCODE", "commands numbered like ioctls (always on)"),
    feature(7, "USER_COPY", "data moved by pread and pwrite"),
    feature(8, "ZONED", "zoned disks"),
    feature(9, "USER_RECOVERY_FAIL_IO", "without a server, requests fail at once"),
    used(UPDATE_SIZE, "UPDATE_SIZE", "resize while in use"),
    used(AUTO_BUF_REG, "AUTO_BUF_REG", "zero copy: request pages as fixed buffers, by itself"),
    feature(12, "QUIESCE", "hand a live device to another server"),
    feature(13, "PER_IO_DAEMON", "several threads for one queue"),
    feature(14, "BUF_REG_OFF_DAEMON", "register buffers from any thread"),
    used(15, "BATCH_IO", "fetch and commit in batches"),
    feature(16, "INTEGRITY", "protection information"),
    used(SAFE_STOP_DEV, "SAFE_STOP_DEV", "stop only if nobody has it open"),
    feature(NO_AUTO_PART_SCAN, "NO_AUTO_PART_SCAN", "no partition scan at start"),
    feature(19, "SHMEM_ZC", "zero copy through shared memory"),
    feature(20, "IO_DESC_SIZE", "larger io descriptors"),
];

const fn feature(bit: u32, name: &'static str, meaning: &'static str) -> Feature {
    Feature { bit, name, meaning, is_used: false }
}

const fn used(bit: u32, name: &'static str, meaning: &'static str) -> Feature {
    Feature { bit, name, meaning, is_used: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bit_stands_in_its_own_place() {
        // The table is indexed by eye; a swapped line would give a wrong answer for two bits.
        for (index, feature) in ALL.iter().enumerate() {
            assert_eq!(feature.bit as usize, index, "{}", feature.name);
        }
    }
}
