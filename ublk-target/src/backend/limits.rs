//! The queue limits of a block device, from sysfs (`Documentation/ABI/stable/sysfs-block`).

use crate::ublk::params::{Discard, Hints};

/// The limits and hints of a request queue.
#[derive(Debug, PartialEq, Eq)]
pub struct Limits {
    /// The discards that the device can do; `None` if it cannot discard.
    pub discard: Option<Discard>,
    /// The most bytes that one write-zeroes may cover; 0 if the device has no write-zeroes.
    pub write_zeroes_bytes_max: u64,
    /// The alignment of memory for direct I/O, in bytes.
    pub memory_alignment: u32,
    /// The shape of requests that suits the device.
    pub hints: Hints,
    /// Whether the pages of a write must not change until it is done: the disk reads them more than
    /// once, as for a checksum or a parity.
    pub needs_stable_pages: bool,
    /// The model of a zoned disk, like `host-managed`; `None` for a disk without zones.
    pub zones: Option<String>,
}

impl Limits {
    /// The limits of the block device with this number, `major:minor`. An attribute that sysfs does not
    /// have counts as 0.
    pub fn of(device: &str) -> Self {
        let base = format!("/sys/dev/block/{device}");
        let text = |name: &str| {
            // A partition shares the queue of its disk, which is one directory up.
            let text = std::fs::read_to_string(format!("{base}/queue/{name}"))
                .or_else(|_| std::fs::read_to_string(format!("{base}/../queue/{name}")));
            text.map(|text| text.trim().to_owned()).unwrap_or_default()
        };
        let number = |name: &str| text(name).parse::<u64>().unwrap_or(0);
        let bytes = |name: &str| u32::try_from(number(name)).unwrap_or(0);
        Self {
            discard: Self::discard(number("discard_granularity"), number("discard_max_bytes")),
            write_zeroes_bytes_max: number("write_zeroes_max_bytes"),
            // sysfs has the alignment as a mask: alignment - 1.
            memory_alignment: number("dma_alignment") as u32 + 1,
            hints: Hints {
                io_min: bytes("minimum_io_size"),
                io_opt: bytes("optimal_io_size"),
                is_rotational: number("rotational") == 1,
            },
            needs_stable_pages: number("stable_writes") == 1,
            zones: Some(text("zoned")).filter(|model| !["", "none"].contains(&model.as_str())),
        }
    }

    fn discard(granularity: u64, discard_bytes_max: u64) -> Option<Discard> {
        let granularity = u32::try_from(granularity).ok().filter(|bytes| bytes.is_power_of_two());
        granularity
            .filter(|_| discard_bytes_max > 0)
            .map(|granularity| Discard { granularity, bytes_max: discard_bytes_max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_discard_offers_none() {
        // Many devices that cannot discard report a granularity; `discard_max_bytes` = 0 decides.
        assert_eq!(Limits::discard(512, 0), None);
        assert_eq!(Limits::discard(4096, 1 << 20), Some(Discard { granularity: 4096, bytes_max: 1 << 20 }));
    }

    #[test]
    fn a_granularity_that_is_no_power_of_two_is_not_passed_on() {
        // Thin provisioning with chunks of 192 KiB: the block layer above a ublk device could not work with that
        // granularity.
        assert_eq!(Limits::discard(196_608, 1 << 20), None);
    }
}
