//! A configuration that has been read and found sound: resolved values, no YAML and no open
//! defaults.
//!
//! All types are plain data. Lines are kept so that a later refusal (a path that does not open, an
//! id that is taken) can still name the place in the file.

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
    /// The most of the daemon's memory that all devices together may take, in bytes;
    /// [`Self::memory_bytes`] is at most that. `None` = no bound.
    pub memory_max: Option<u64>,
    /// The Unix group, by name or number, that may use the commands which only read. `None` = root
    /// only.
    pub readers: Option<String>,
}

impl Config {
    /// The group of that name.
    pub fn group(&self, name: &str) -> Option<&Group> {
        self.groups.iter().find(|group| group.name == name)
    }

    /// The groups, each after its parent; otherwise in file order.
    pub fn groups_parents_first(&self) -> Vec<&Group> {
        let parents: BTreeMap<&str, Option<&str>> =
            self.groups.iter().map(|group| (group.name.as_str(), group.parent.as_deref())).collect();
        let above = |group: &&Group| {
            let parent = |name: &&str| parents.get(name).copied().flatten();
            // Bounded, in case a configuration made by hand has a cycle.
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

    /// The bytes of the buffers of all devices.
    pub fn buffer_bytes(&self) -> u64 {
        // At most 2^12 x 2^12 x 2^19 = 2^43 bytes a device, so at most 2^63 for the 2^20 ids: no
        // overflow.
        self.devices.iter().map(Device::buffer_bytes).sum()
    }

    /// The memory of all devices in bytes: their buffers, and the contents of memory devices.
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
    /// The parent, a group of this configuration, whose limits hold as well. The groups form trees
    /// of at most [`throttle_core::tree::DEPTH_MAX`] levels.
    /// [`throttle_core::tree::DEPTH_MAX`] levels.
    pub parent: Option<String>,
    /// The share of the group in its parent; 1 to [`throttle_core::share::WEIGHT_MAX`].
    pub weight: u32,
    /// Limits shared by all devices in the group and below it. Sound: [`Limits::violations`] is
    /// empty.
    pub limits: Limits,
    /// The charge of each operation for devices in the group and below it, with inherited entries
    /// filled in. `None`: the group has no entry of its own, and the table is that of the parent,
    /// or the default.
    pub charges: Option<ChargeTable>,
    /// The line at which the group begins in its file, from 1.
    pub line: u32,
}

/// One block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// `[A-Za-z0-9_.-]`, 1 to 64 characters, no leading dot or dash; unique.
    pub name: String,
    /// The N of `/dev/ublkbN`; unique, below 2^20. `None` = the first free one.
    pub id: Option<u32>,
    /// The backend that holds its bytes.
    pub backend: Backend,
    /// The group of the device, which is in this configuration.
    pub group: Option<String>,
    /// The share of the device in its group; 1 to [`throttle_core::share::WEIGHT_MAX`].
    pub weight: u32,
    /// Limits of the device, besides the group's. Sound: [`Limits::violations`] is empty.
    pub limits: Limits,
    /// Queues, each with a thread and a ring of its own; 1 to [`QUEUES_MAX`].
    pub queues: u16,
    /// The requests that a queue takes at the same time; 1 to [`DEPTH_MAX`].
    pub depth: u16,
    /// The logical block size in bytes, 512 or 4096: requests and the size of the device are
    /// multiples of it. `None` = the block size of the backend.
    pub block_size: Option<u32>,
    /// Whether writes are refused by the kernel.
    pub read_only: bool,
    /// Whether requests in flight wait or fail when the daemon dies.
    pub on_crash: OnCrash,
    /// Whether SIGTERM removes or keeps the device.
    pub on_stop: OnStop,
    /// Whether its requests go without a copy between the kernel and the daemon. For null always
    /// [`ZeroCopy::Off`].
    pub zero_copy: ZeroCopy,
    /// The CPUs that its queue threads may run on; `None` = all.
    pub cpus: Option<Cpus>,
    /// Whether a start of the daemon fails without the backend. False: the device waits for its backend.
    pub required: bool,
    /// The line at which the device begins in its file, from 1.
    pub line: u32,
}

impl Device {
    /// The bytes of its buffers: each request in flight has a buffer of the largest size.
    pub fn buffer_bytes(&self) -> u64 {
        u64::from(self.queues) * u64::from(self.depth) * u64::from(REQUEST_BYTES_MAX)
    }

    /// The bytes that the device takes of the daemon's memory when it is full: its buffers, and the
    /// contents of a memory device.
    pub fn memory_bytes(&self) -> u64 {
        self.buffer_bytes().saturating_add(self.own_bytes())
    }

    /// The contents of a memory device, in bytes; 0 for other backends.
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

/// The backend of a device. Sizes are multiples of [`SECTOR`], above 0 and below 2^63.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A regular file.
    File {
        /// Absolute, or relative to the directory of the configuration; already joined with it.
        path: PathBuf,
        /// The size of the device; `None` = the size of the file.
        size: Option<u64>,
        /// Creates the file, of `size`, if it does not exist. Requires a `size`.
        create: bool,
        /// Whether to go around the page cache (`O_DIRECT`).
        direct: Direct,
        /// Further devices that are `shared` may write to the file too: a layer above keeps their
        /// data apart (a cluster file system, for example).
        shared: bool,
    },
    /// A block device, served in its whole size.
    Block {
        /// As for a file.
        path: PathBuf,
        /// As for a file, but [`Direct::On`] by default: a block device always has it, and reports
        /// a failed write to its writer.
        direct: Direct,
        /// As for a file.
        shared: bool,
    },
    /// Memory of the daemon, empty at start, lost at the end.
    Memory {
        /// The size of the device.
        size: u64,
    },
    /// No storage: reads give zeroes, writes are discarded.
    Null {
        /// The size of the device.
        size: u64,
    },
}

impl Backend {
    /// The path of the file or block device; `None` for memory and null.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File { path, .. } | Self::Block { path, .. } => Some(path),
            Self::Memory { .. } | Self::Null { .. } => None,
        }
    }

    /// Whether further devices may write to the same bytes.
    pub const fn is_shared(&self) -> bool {
        matches!(self, Self::File { shared: true, .. } | Self::Block { shared: true, .. })
    }

    /// Settles `direct` if the configuration leaves it open.
    pub fn settle_direct(&mut self, is_direct: bool) {
        if let Self::File { direct, .. } | Self::Block { direct, .. } = self
            && *direct == Direct::Auto
        {
            *direct = is_direct.into();
        }
    }

    /// Whether to go around the page cache; `None` for memory and null.
    pub const fn direct(&self) -> Option<Direct> {
        match self {
            Self::File { direct, .. } | Self::Block { direct, .. } => Some(*direct),
            Self::Memory { .. } | Self::Null { .. } => None,
        }
    }

    /// Whether the backend can work on the pages of a request in the kernel.
    pub const fn has_zero_copy(&self) -> bool {
        !matches!(self, Self::Null { .. })
    }

    /// The size, if the configuration gives it.
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
    /// If the file system supports it, in blocks not larger than those of the device.
    #[default]
    Auto,
    /// Always; a backend without `O_DIRECT` cannot serve the device.
    On,
    /// Never: through the page cache.
    Off,
}

impl Direct {
    /// The word of the configuration.
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

/// Whether requests in flight wait or fail when the daemon dies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCrash {
    /// Requests in flight and new requests wait, and the next daemon serves them: a pause, not an
    /// error.
    #[default]
    Requeue,
    /// Requests end with an I/O error, and the device ends. A memory device always has this
    /// setting: its bytes die with the daemon.
    Fail,
}

impl OnCrash {
    /// The word of the configuration.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Requeue => "requeue",
            Self::Fail => "fail",
        }
    }
}

/// Whether SIGTERM removes or keeps a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnStop {
    /// The device is removed.
    #[default]
    Remove,
    /// The disk stays, requests wait, and the next daemon serves them. Only with
    /// [`OnCrash::Requeue`].
    Keep,
}

impl OnStop {
    /// The word of the configuration.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Remove => "remove",
            Self::Keep => "keep",
        }
    }
}

/// Whether the backend works on the pages of a request in the kernel, or on a copy of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroCopy {
    /// If kernel and backend support it and it is the faster way.
    #[default]
    Auto,
    /// Always; a kernel without zero copy cannot serve the device.
    On,
    /// Never. A null device always has this setting: it stores no data, so no consumer takes the
    /// pages.
    Off,
}

impl ZeroCopy {
    /// All values, the default first.
    pub const ALL: [Self; 3] = [Self::Auto, Self::On, Self::Off];

    /// The word of the configuration.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        }
    }
}
