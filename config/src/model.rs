//! What a configuration says once it has been read and found sound: resolved values, no YAML and no defaults left.
//!
//! Everything here is plain data. Lines are kept so that a later refusal (a path that does not open, an id that is
//! taken) can still name the place in the file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use throttle_core::charge::ChargeTable;
use throttle_core::limits::Limits;

use crate::cpus::Cpus;

/// A whole configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The groups, in file order.
    pub groups: Vec<Group>,
    /// The devices, in file order. May be empty.
    pub devices: Vec<Device>,
    /// What all devices together may take of the daemon's memory, in bytes; [`Self::memory_bytes`] is not above it. `None` = no
    /// bound.
    pub memory_max: Option<u64>,
    /// The Unix group, by name or number, that may use the commands which only read. `None` = nobody but root.
    pub readers: Option<String>,
}

impl Config {
    /// The group of that name.
    pub fn group(&self, name: &str) -> Option<&Group> {
        self.groups.iter().find(|group| group.name == name)
    }

    /// The groups, each after the one above it; otherwise in file order.
    pub fn groups_parents_first(&self) -> Vec<&Group> {
        let parents: BTreeMap<&str, Option<&str>> =
            self.groups.iter().map(|group| (group.name.as_str(), group.parent.as_deref())).collect();
        let above = |group: &&Group| {
            let parent = |name: &&str| parents.get(name).copied().flatten();
            // Bounded, in case somebody makes a configuration by hand that goes round.
            std::iter::successors(group.parent.as_deref(), parent).take(throttle_core::tree::DEPTH_MAX).count()
        };
        let mut groups: Vec<&Group> = self.groups.iter().collect();
        groups.sort_by_key(above);
        groups
    }

    /// The device of that name.
    pub fn device(&self, name: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.name == name)
    }

    /// What the buffers of all devices take.
    pub fn buffer_bytes(&self) -> u64 {
        // At most 2^12 x 2^12 x 2^19 each: below 2^63 for a million of them, which is more than there are ids.
        self.devices.iter().map(Device::buffer_bytes).sum()
    }

    /// What all devices take: their buffers, and the bytes of those of memory.
    pub fn memory_bytes(&self) -> u64 {
        self.devices.iter().map(Device::memory_bytes).fold(0, u64::saturating_add)
    }

    /// The devices in the group itself, not in groups below it, in file order.
    pub fn members<'a>(&'a self, group: &'a str) -> impl Iterator<Item = &'a Device> {
        self.devices.iter().filter(move |device| device.group.as_deref() == Some(group))
    }
}

/// Limits that several devices and groups share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// `[A-Za-z0-9_.-]`, 1 to 64 characters, no leading dot or dash.
    pub name: String,
    /// A group of this configuration, whose limits hold as well. The groups form trees, of at most
    /// [`throttle_core::tree::DEPTH_MAX`] levels.
    pub parent: Option<String>,
    /// Its share of what the parent allows, against the others in it; 1 to [`throttle_core::share::WEIGHT_MAX`].
    pub weight: u32,
    /// Shared by all devices in it and below it together. Sound: [`Limits::violations`] is empty.
    pub limits: Limits,
    /// What operations count as in it and below it, already with what it leaves to its parent. `None`: it says nothing,
    /// and all is as in the parent, or by default.
    pub charges: Option<ChargeTable>,
    /// Where the group begins in its file, from 1.
    pub line: u32,
}

/// One block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// `[A-Za-z0-9_.-]`, 1 to 64 characters, no leading dot or dash; unique.
    pub name: String,
    /// The N of `/dev/ublkbN`; unique, below 2^20. `None` = the first free one.
    pub id: Option<u32>,
    /// Where its bytes are.
    pub backend: Backend,
    /// A group of this configuration.
    pub group: Option<String>,
    /// Its share of what the group allows, against the others in it; 1 to [`throttle_core::share::WEIGHT_MAX`].
    pub weight: u32,
    /// Its own limits, besides the group's. Sound: [`Limits::violations`] is empty.
    pub limits: Limits,
    /// Queues, each with a thread and a ring of its own; 1 to [`QUEUES_MAX`].
    pub queues: u16,
    /// Requests a queue takes at the same time; 1 to [`DEPTH_MAX`].
    pub depth: u16,
    /// The logical block in bytes, 512 or 4096: requests start and end on a multiple of it, and so does the size. `None` =
    /// what the backend wants.
    pub block_size: Option<u32>,
    /// Whether writes are refused by the kernel.
    pub read_only: bool,
    /// What becomes of requests in flight when the daemon dies.
    pub on_crash: OnCrash,
    /// What SIGTERM does with the device.
    pub on_stop: OnStop,
    /// Whether its requests go without a copy between the kernel and the daemon. Null has none: [`ZeroCopy::Off`].
    pub zero_copy: ZeroCopy,
    /// The CPUs that its queue threads may run on; `None` = all.
    pub cpus: Option<Cpus>,
    /// Where the device begins in its file, from 1.
    pub line: u32,
}

impl Device {
    /// What its buffers take: one of the largest request for each that it takes at the same time.
    pub fn buffer_bytes(&self) -> u64 {
        u64::from(self.queues) * u64::from(self.depth) * u64::from(REQUEST_BYTES_MAX)
    }

    /// What it takes of the daemon's memory when it is full: its buffers, and its bytes if they are in memory.
    pub fn memory_bytes(&self) -> u64 {
        self.buffer_bytes().saturating_add(self.own_bytes())
    }

    /// Its bytes if they are in memory.
    pub(crate) fn own_bytes(&self) -> u64 {
        match self.backend {
            Backend::Memory { size } => size,
            Backend::File { .. } | Backend::Block { .. } | Backend::Null { .. } => 0,
        }
    }
}

/// The largest request that a device takes; the kernel splits what is larger.
pub const REQUEST_BYTES_MAX: u32 = 512 << 10;

/// The kernel's `UBLK_MAX_NR_QUEUES`.
pub const QUEUES_MAX: u16 = 4096;

/// The kernel's `UBLK_MAX_QUEUE_DEPTH`.
pub const DEPTH_MAX: u16 = 4096;

/// Device ids are minor numbers: 20 bits.
pub const ID_MAX: u32 = (1 << 20) - 1;

/// The unit of every size: the kernel counts a disk in sectors of 512 bytes.
pub const SECTOR: u64 = 512;

/// Where the bytes of a device are. Sizes are multiples of [`SECTOR`], above 0 and below 2^63.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A regular file.
    File {
        /// Absolute, or relative to the directory of the configuration; already joined with it.
        path: PathBuf,
        /// The size of the device; `None` = the size that the file has.
        size: Option<u64>,
        /// Make the file, of `size`, if there is none. `size` is then given.
        create: bool,
        /// Whether to go around the page cache (`O_DIRECT`).
        direct: Direct,
        /// Other devices that say the same may write to it too: what keeps their data apart is above them (a cluster
        /// file system, say).
        shared: bool,
    },
    /// Another block device, in its whole size.
    Block {
        /// As for a file.
        path: PathBuf,
        /// As for a file, but [`Direct::On`] by default: a block device always has it, and a failed write is told to its writer.
        direct: Direct,
        /// As for a file.
        shared: bool,
    },
    /// Memory of the daemon, empty at start, gone at the end.
    Memory {
        /// The size of the device.
        size: u64,
    },
    /// Reads give zeroes, writes vanish.
    Null {
        /// The size of the device.
        size: u64,
    },
}

impl Backend {
    /// The file or block device behind it.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File { path, .. } | Self::Block { path, .. } => Some(path),
            Self::Memory { .. } | Self::Null { .. } => None,
        }
    }

    /// Whether other devices may write to the same bytes.
    pub const fn is_shared(&self) -> bool {
        matches!(self, Self::File { shared: true, .. } | Self::Block { shared: true, .. })
    }

    /// Settles `direct` where the description leaves it open.
    pub fn settle_direct(&mut self, is_direct: bool) {
        if let Self::File { direct, .. } | Self::Block { direct, .. } = self
            && *direct == Direct::Auto
        {
            *direct = is_direct.into();
        }
    }

    /// Whether to go around the page cache; `None` where there is none.
    pub const fn direct(&self) -> Option<Direct> {
        match self {
            Self::File { direct, .. } | Self::Block { direct, .. } => Some(*direct),
            Self::Memory { .. } | Self::Null { .. } => None,
        }
    }

    /// Whether it can work on the pages of a request where they are in the kernel.
    pub const fn has_zero_copy(&self) -> bool {
        !matches!(self, Self::Null { .. })
    }

    /// The size, where it is given.
    pub const fn size(&self) -> Option<u64> {
        match self {
            Self::File { size, .. } => *size,
            Self::Block { .. } => None,
            Self::Memory { size } | Self::Null { size } => Some(*size),
        }
    }

    /// The kind, by its key in the configuration.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::File { .. } => "file",
            Self::Block { .. } => "block",
            Self::Memory { .. } => "memory",
            Self::Null { .. } => "null",
        }
    }
}

/// Whether a file or block device is opened with `O_DIRECT`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direct {
    /// Where the file system has it, in blocks not larger than those of the device.
    #[default]
    Auto,
    /// Always; a backend without it cannot serve the device.
    On,
    /// Never: through the page cache.
    Off,
}

impl Direct {
    /// As in the configuration.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::On => "true",
            Self::Off => "false",
        }
    }
}

impl From<bool> for Direct {
    fn from(is_direct: bool) -> Self {
        if is_direct { Self::On } else { Self::Off }
    }
}

/// What becomes of requests in flight when the daemon dies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCrash {
    /// They wait, as do new ones, and the next daemon serves them: a pause, not an error.
    #[default]
    Requeue,
    /// They end with an I/O error, and the device with them. What a device of memory does, said or not: its bytes die with the
    /// daemon.
    Fail,
}

impl OnCrash {
    /// As in the configuration.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Requeue => "requeue",
            Self::Fail => "fail",
        }
    }
}

/// What SIGTERM does with a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnStop {
    /// It is removed.
    #[default]
    Remove,
    /// Its disk stays, requests wait, and the next daemon serves it. Only with [`OnCrash::Requeue`].
    Keep,
}

impl OnStop {
    /// As in the configuration.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Remove => "remove",
            Self::Keep => "keep",
        }
    }
}

/// Whether the backend works on the pages of a request where they are in the kernel, or on a copy of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroCopy {
    /// Where kernel and backend have it and it is the faster way.
    #[default]
    Auto,
    /// Always; a kernel without it cannot serve the device.
    On,
    /// Never. What a device of memory or null does, said or not: there is no other end that could take the pages.
    Off,
}

impl ZeroCopy {
    /// All of them, the default first.
    pub const ALL: [Self; 3] = [Self::Auto, Self::On, Self::Off];

    /// As in the configuration.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        }
    }
}
