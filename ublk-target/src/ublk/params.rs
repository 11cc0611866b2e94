//! The kernel's parameters of a disk.
//!
//! ```text
//!   Geometry (of a backend)          ublk_params
//!     size ───────────────────────►  dev_sectors     cut to whole logical blocks
//!     logical, physical ──────────►  *_bs_shift
//!     hints ──────────────────────►  io_min_shift, io_opt_shift, ROTATIONAL
//!     cache ──────────────────────►  VOLATILE_CACHE | FUA: flushes arrive, writes may carry FUA
//!     discard, write-zeroes ──────►  PARAM_TYPE_DISCARD
//!     memory alignment ───────────►  PARAM_TYPE_DMA_ALIGN, where the client's own pages go to the backend
//! ```

use libublk::sys;

use super::Transfer;

/// The properties of a backend that a disk on top of it has to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes.
    pub size: u64,
    /// The smallest unit of a request, in bytes: a power of two, 512 to 4096.
    pub logical_block: u32,
    /// The unit that the backend handles best, in bytes: a power of two, not below the logical
    /// block.
    pub physical_block: u32,
    /// The alignment of memory for the backend, in bytes: a power of two, at most a page. The
    /// daemon's own buffers always have it.
    pub memory_alignment: u32,
    /// Whether writes are refused.
    pub is_read_only: bool,
    /// Whether a completed write may still be lost with the power, so that flushes and FUA are
    /// needed.
    pub has_volatile_cache: bool,
    /// The discards that the backend can do, with their unit; `None` if it cannot discard.
    pub discard: Option<Discard>,
    /// The most bytes that one write-zeroes may cover; 0 = the kernel writes zeros itself.
    pub write_zeroes_bytes_max: u64,
    /// The shape of requests that suits the backend.
    pub hints: Hints,
}

/// Hints of a backend for the users of a disk on it. The disk accepts every request regardless of
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hints {
    /// `minimum_io_size`: the smallest request without a penalty, in bytes, such as the chunk of a
    /// RAID; 0 = unknown.
    pub io_min: u32,
    /// `optimal_io_size`, in bytes, such as the full stripe of a RAID; 0 = unknown.
    pub io_opt: u32,
    /// Whether a seek takes time.
    pub is_rotational: bool,
}

impl Hints {
    /// All hints unknown.
    pub const NONE: Self = Self { io_min: 0, io_opt: 0, is_rotational: false };
}

/// The discards of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard {
    /// Bytes; a power of two.
    pub granularity: u32,
    /// The most bytes that one discard may cover.
    pub bytes_max: u64,
}

/// `struct ublk_params`, up to `dma` of Linux 6.16; libublk's ends before `dma`. An older kernel
/// reads the part that it knows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Params {
    pub(super) len: u32,
    /// The parts below that are valid, `UBLK_PARAM_TYPE_*`.
    pub(super) types: u32,
    pub(super) basic: sys::ublk_param_basic,
    pub(super) discard: sys::ublk_param_discard,
    pub(super) devt: sys::ublk_param_devt,
    pub(super) zoned: sys::ublk_param_zoned,
    /// `dma.alignment`, a mask.
    pub(super) dma_alignment: u32,
    /// `dma.pad`, and padding of the length to a multiple of 8.
    pub(super) padding: [u32; 2],
}

/// The smallest and the largest logical block that the driver accepts.
pub const LOGICAL_BLOCKS: std::ops::RangeInclusive<u32> = 512..=4096;

impl Geometry {
    /// The size in whole logical blocks.
    pub const fn usable_size(&self) -> u64 {
        self.size - self.size % self.logical_block as u64
    }

    /// The parameters for SET_PARAMS. `request_bytes_max` is the longest read or write.
    pub fn params(&self, request_bytes_max: u32, transfer: Transfer) -> Params {
        debug_assert!(self.logical_block.is_power_of_two() && LOGICAL_BLOCKS.contains(&self.logical_block));
        debug_assert!(self.physical_block.is_power_of_two() && self.physical_block >= self.logical_block);
        let mut attributes = 0;
        if self.is_read_only {
            attributes |= sys::UBLK_ATTR_READ_ONLY;
        }
        if self.has_volatile_cache {
            attributes |= sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;
        }
        if self.hints.is_rotational {
            attributes |= sys::UBLK_ATTR_ROTATIONAL;
        }
        let physical_shift = self.physical_block.trailing_zeros() as u8;
        let io_min_shift = shift(self.hints.io_min, physical_shift);
        let mut params = Params {
            types: sys::UBLK_PARAM_TYPE_BASIC,
            basic: sys::ublk_param_basic {
                attrs: attributes,
                logical_bs_shift: self.logical_block.trailing_zeros() as u8,
                physical_bs_shift: physical_shift,
                io_min_shift,
                io_opt_shift: shift(self.hints.io_opt, io_min_shift),
                max_sectors: request_bytes_max / 512,
                dev_sectors: self.usable_size() / 512,
                ..Default::default()
            },
            ..Default::default()
        };
        // The block layer requires 512 of every disk anyway.
        if transfer == Transfer::Registered && self.memory_alignment > 512 {
            params.types |= sys::UBLK_PARAM_TYPE_DMA_ALIGN;
            params.dma_alignment = self.memory_alignment - 1;
        }
        if !self.is_read_only && (self.discard.is_some() || self.write_zeroes_bytes_max > 0) {
            params.types |= sys::UBLK_PARAM_TYPE_DISCARD;
            params.discard = sys::ublk_param_discard {
                // The driver refuses a granularity of 0 even where only write-zeroes is offered.
                discard_granularity: self.discard.map_or(self.logical_block, |discard| discard.granularity),
                max_discard_sectors: self.discard.map_or(0, |discard| sectors(discard.bytes_max, self.logical_block)),
                max_write_zeroes_sectors: sectors(self.write_zeroes_bytes_max, self.logical_block),
                max_discard_segments: 1,
                ..Default::default()
            };
        }
        params
    }
}

/// A disk as GET_PARAMS describes it to its users.
pub struct Disk(pub(super) Params);

impl Disk {
    /// Bytes.
    pub const fn size(&self) -> u64 {
        self.0.basic.dev_sectors * 512
    }

    /// The reasons, in words, why a backend of that shape cannot serve the disk: a property of the
    /// backend and that of the disk each. Empty if it can.
    pub fn misfits(&self, geometry: &Geometry) -> Vec<String> {
        let disk = &self.0.basic;
        let own = geometry.params(disk.max_sectors * 512, Transfer::Copied).basic;
        let has = |attribute: u32| own.attrs & !disk.attrs & attribute != 0;
        let mut misfits = Vec::new();
        if own.dev_sectors < disk.dev_sectors {
            misfits.push(format!("{} bytes, and the disk has {}", own.dev_sectors * 512, self.size()));
        }
        if own.logical_bs_shift > disk.logical_bs_shift {
            let [own, disk] = [own.logical_bs_shift, disk.logical_bs_shift].map(|shift| 1u64 << shift);
            misfits.push(format!("blocks of {own} bytes, and the disk of {disk}"));
        }
        if has(sys::UBLK_ATTR_VOLATILE_CACHE) {
            misfits.push("a volatile cache, and the disk none".to_owned());
        }
        if has(sys::UBLK_ATTR_READ_ONLY) {
            misfits.push("no right to be written, and the disk has".to_owned());
        }
        misfits
    }
}

/// The largest power of two that divides a hint, as a shift, and at least `least`: requests aligned
/// to a part of a stripe are still aligned to its chunks. `least` for 0, an unknown hint.
fn shift(bytes: u32, least: u8) -> u8 {
    if bytes == 0 { least } else { least.max(bytes.trailing_zeros() as u8) }
}

/// Bytes as a 32-bit count of sectors, cut to whole blocks.
fn sectors(bytes: u64, block: u32) -> u32 {
    let bytes = bytes.min(u64::from(u32::MAX) * 512);
    ((bytes - bytes % u64::from(block)) / 512) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Geometry = Geometry {
        size: 1 << 30,
        logical_block: 512,
        physical_block: 4096,
        memory_alignment: 4096,
        is_read_only: false,
        has_volatile_cache: true,
        discard: Some(Discard { granularity: 4096, bytes_max: u64::MAX }),
        write_zeroes_bytes_max: 1 << 20,
        hints: Hints::NONE,
    };

    #[test]
    fn a_disk_ends_with_its_last_whole_block() {
        // The driver does not check this; a partial block at the end would fail each request to it.
        let geometry = Geometry { size: 10_000, logical_block: 4096, ..PLAIN };
        assert_eq!(geometry.params(1 << 19, Transfer::Copied).basic.dev_sectors, 16);
    }

    #[test]
    fn a_volatile_cache_offers_flush_and_fua() {
        // Without VOLATILE_CACHE no flush is ever sent, and every completed write would have to be
        // durable.
        let with = PLAIN.params(1 << 19, Transfer::Copied).basic.attrs;
        assert_eq!(with, sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA);
        let without = Geometry { has_volatile_cache: false, ..PLAIN };
        assert_eq!(without.params(1 << 19, Transfer::Copied).basic.attrs, 0);
    }

    #[test]
    fn a_discard_limit_beyond_32_bits_is_cut_to_whole_blocks() {
        // 2^32 - 1 sectors is not a multiple of a 4096-byte block.
        let geometry = Geometry { logical_block: 4096, ..PLAIN };
        assert_eq!(geometry.params(1 << 19, Transfer::Copied).discard.max_discard_sectors, u32::MAX - 7);
    }

    #[test]
    fn f81_hints_are_powers_of_two_not_below_the_physical_block() {
        // The driver accepts shifts only.
        let shifts = |io_min, io_opt| {
            let hints = Hints { io_min, io_opt, is_rotational: false };
            let basic = Geometry { hints, ..PLAIN }.params(1 << 19, Transfer::Copied).basic;
            (basic.io_min_shift, basic.io_opt_shift)
        };
        // Unknown, or smaller than the block: the physical block counts.
        assert_eq!([shifts(0, 0), shifts(512, 512), shifts(512, 0)], [(12, 12); 3]);
        // RAID 0 of two disks; RAID 5 of four, whose full stripe is three chunks.
        assert_eq!([shifts(65_536, 131_072), shifts(65_536, 196_608)], [(16, 17), (16, 16)]);
        // A chunk without an optimum; 65535 sectors, as USB bridges report; the largest values.
        assert_eq!([shifts(65_536, 0), shifts(512, 65_535 * 512)], [(16, 16), (12, 12)]);
        assert_eq!(shifts(u32::MAX, 1 << 31), (12, 31));
    }

    #[test]
    fn f81_a_disk_turns_if_its_backend_does() {
        let hints = Hints { is_rotational: true, ..Hints::NONE };
        let of = |hints| Geometry { hints, ..PLAIN }.params(1 << 19, Transfer::Copied).basic.attrs;
        assert_eq!(of(hints) ^ of(Hints::NONE), sys::UBLK_ATTR_ROTATIONAL);
    }

    #[test]
    fn pages_of_the_client_are_aligned_as_the_backend_wants_them() {
        // Otherwise O_DIRECT would refuse requests that the disk has accepted. Where data is
        // copied, the backend gets the daemon's own buffer.
        let params = |transfer| PLAIN.params(1 << 19, transfer);
        assert_eq!(params(Transfer::Registered).dma_alignment, 4095);
        assert_ne!(params(Transfer::Registered).types & sys::UBLK_PARAM_TYPE_DMA_ALIGN, 0);
        assert_eq!(params(Transfer::Copied).types & sys::UBLK_PARAM_TYPE_DMA_ALIGN, 0);
    }

    #[test]
    fn a_read_only_disk_offers_no_discard() {
        let params = Geometry { is_read_only: true, ..PLAIN }.params(1 << 19, Transfer::Copied);
        assert_eq!(params.types, sys::UBLK_PARAM_TYPE_BASIC);
        assert_eq!(params.basic.attrs & sys::UBLK_ATTR_READ_ONLY, sys::UBLK_ATTR_READ_ONLY);
    }

    #[test]
    fn a_backend_that_the_disk_does_not_fit_in_is_told() {
        // Smaller, with larger blocks, read-only: each would cause errors for users without fault.
        // A larger backend fits.
        let disk = Disk(PLAIN.params(1 << 19, Transfer::Copied));
        assert_eq!(disk.misfits(&PLAIN), [""; 0]);
        assert_eq!(disk.misfits(&Geometry { size: 2 << 30, ..PLAIN }), [""; 0]);
        for (now, word) in [
            (Geometry { size: 1 << 19, ..PLAIN }, "524288 bytes, and the disk has 1073741824"),
            (Geometry { logical_block: 4096, ..PLAIN }, "blocks of 4096"),
            (Geometry { is_read_only: true, ..PLAIN }, "no right to be written"),
        ] {
            let told = disk.misfits(&now);
            assert!(told.len() == 1 && told[0].contains(word), "{told:?}");
        }
    }

    #[test]
    fn write_zeroes_alone_still_names_a_granularity() {
        // A granularity of 0 with PARAM_TYPE_DISCARD is refused by the driver.
        let params = Geometry { discard: None, ..PLAIN }.params(1 << 19, Transfer::Copied);
        assert_eq!(params.discard.discard_granularity, 512);
        assert_eq!(params.discard.max_discard_sectors, 0);
        assert_eq!(params.discard.max_write_zeroes_sectors, 2048);
    }
}
