//! `backend`: exactly one of file, block, memory and null, with the options of that kind.

use std::path::{Path, PathBuf};

use crate::fault::shown;
use crate::fields::{Fields, Item, Leftovers, Notes};
use crate::model::{Backend, Direct, SECTOR};
use crate::quantity::{self, Unit};
use crate::source::Place;

pub(crate) const KEYS: [&str; 8] = ["file", "block", "memory", "null", "size", "create", "direct", "shared"];
pub(crate) const KINDS: [&str; 4] = ["file", "block", "memory", "null"];
pub(crate) const ONE_KIND: &str = "a backend is one of file, block, memory and null";

/// Linux's `PATH_MAX`, without the closing NUL.
const PATH_BYTES_MAX: usize = 4095;

/// A backend as read, with the places for later checks.
pub(super) struct Description<'n> {
    pub(super) backend: Backend,
    /// The place of its path or size.
    pub(super) place: Place,
    /// Its size and the item that gives it; `None` if no size is given.
    pub(super) size: Option<(u64, Item<'n>)>,
}

/// Reads a backend. Relative paths start at `base`; without `base` they are refused.
pub(super) fn read<'n>(
    item: &Item<'n>,
    base: Option<&Path>,
    read_only: bool,
    notes: &mut Notes,
) -> Option<Description<'n>> {
    let mut fields = Fields::of(item, notes)?;
    let mut kinds: Vec<(&str, Item<'_>)> = KINDS.iter().filter_map(|kind| Some((*kind, fields.take(kind)?))).collect();
    kinds.sort_by_key(|(_, item)| item.key_place);
    let size = fields.take("size");
    let create = fields.take("create");
    let direct = fields.take("direct");
    let shared = fields.take("shared");
    let leftovers = fields.finish(notes, &KEYS, &[]);

    if let [(first, _), (_, second), ..] = &kinds[..] {
        let line = match kinds[0].1.key_place {
            Place::NOWHERE => String::new(),
            place => format!(" on line {}", place.line),
        };
        notes.fault(second.key_place, &second.path, format!("a second backend, besides `{first}`{line}"), ONE_KIND);
        return None;
    }
    let Some((kind, main)) = kinds.pop() else {
        if leftovers == Leftovers::None {
            notes.fault(item.key_place, &item.path, "says neither file, block, memory nor null", ONE_KIND);
        }
        return None;
    };
    let is_file = kind == "file";
    let has_path = is_file || kind == "block";
    for (option, fits, whose) in [
        (&size, is_file, "a file"),
        (&create, is_file, "a file"),
        (&direct, has_path, "a file or block"),
        (&shared, has_path, "a file or block"),
    ] {
        if let Some(option) = option
            && !fits
        {
            let cure = match kind {
                "memory" | "null" if option.path.ends_with("size") => {
                    format!("remove it; the size stands behind `{kind}:`")
                }
                "memory" | "null" => format!("remove it; it belongs to {whose} backend"),
                _ => "remove it; a block device exists and is served in its whole size".to_owned(),
            };
            notes.fault(option.key_place, &option.path, format!("means nothing to a {kind} backend"), cure);
        }
    }
    let place = main.place();
    let backend = match kind {
        "memory" => Backend::Memory { size: read_size(&main, notes)? },
        "null" => Backend::Null { size: read_size(&main, notes)? },
        _ => {
            let path = read_path(&main, base, notes);
            let direct = direct.and_then(|item| read_direct(&item, notes));
            let shared = shared.and_then(|item| item.bool(notes)).unwrap_or(false);
            if is_file {
                let size_given = size.is_some();
                let size = size.as_ref().and_then(|item| read_size(item, notes));
                let wants_creation = create.as_ref().and_then(|item| item.bool(notes)).unwrap_or(false);
                if let Some(create) = create.filter(|_| wants_creation) {
                    if !size_given {
                        create.fault(notes, "`create` without a size", "add `size:`, or remove `create`");
                    } else if read_only {
                        let cure = "a new file holds only zeroes; remove one of the two";
                        create.fault(notes, "`create` on a read-only device", cure);
                    }
                }
                Backend::File {
                    path: path?,
                    size,
                    create: wants_creation,
                    direct: direct.unwrap_or(Direct::Auto),
                    shared,
                }
            } else {
                Backend::Block { path: path?, direct: direct.unwrap_or(Direct::On), shared }
            }
        }
    };
    let size = backend.size().zip(if has_path { size } else { Some(main) });
    Some(Description { backend, place, size })
}

fn read_direct(item: &Item<'_>, notes: &mut Notes) -> Option<Direct> {
    if item.is_word(Direct::Auto.word()) {
        return Some(Direct::Auto);
    }
    item.bool_or(notes, &[Direct::Auto.word()]).map(Direct::from)
}

/// Refuses a size that is no multiple of the block size.
pub(crate) fn check_blocks(size: u64, item: &Item<'_>, block_size: u32, notes: &mut Notes) {
    let block = u64::from(block_size);
    if !size.is_multiple_of(block) {
        let below = size / block * block;
        let above = below.saturating_add(block);
        let found = format!("{size} is not a multiple of the block-size {block}");
        let cure = match below {
            0 => format!("write {above}"),
            _ => format!("write {below} or {above}"),
        };
        item.fault(notes, found, cure);
    }
}

pub(crate) fn read_size(item: &Item<'_>, notes: &mut Notes) -> Option<u64> {
    const ALLOWED: &str = "allowed: a size like 20GiB, a multiple of 512 above 0 and below 2^63";
    let size = item.amount(notes, ALLOWED, |text| quantity::parse(text, Unit::Bytes))?;
    if size == 0 {
        item.fault(notes, "a size of 0", ALLOWED);
    } else if size >= 1 << 63 {
        item.fault(notes, format!("{size} is not below 2^63"), ALLOWED);
    } else if !size.is_multiple_of(SECTOR) {
        let (below, above) = (size / SECTOR * SECTOR, size.div_ceil(SECTOR) * SECTOR);
        let cure = match below {
            0 => format!("a disk is counted in sectors: write {above}"),
            _ => format!("a disk is counted in sectors: write {below} or {above}"),
        };
        item.fault(notes, format!("{size} is not a multiple of 512"), cure);
    } else {
        return Some(size);
    }
    None
}

/// Reads a path. A relative path starts at the directory of the configuration, not at the daemon's.
fn read_path(item: &Item<'_>, base: Option<&Path>, notes: &mut Notes) -> Option<PathBuf> {
    let allowed = match base {
        Some(_) => "allowed: an absolute path, or one relative to the directory of this file",
        None => "allowed: an absolute path; the daemon is in another directory",
    };
    let text = item.text(notes, allowed)?;
    if let Some(c) = text.chars().find(|c| c.is_control()) {
        item.fault(notes, format!("a path with {c:?} in it"), allowed);
        return None;
    }
    if base.is_none() && !text.starts_with('/') {
        item.fault(notes, format!("{:?} is a relative path", shown(text, 100)), allowed);
        return None;
    }
    let path = base.unwrap_or(Path::new("")).join(text);
    if path.as_os_str().len() > PATH_BYTES_MAX {
        item.fault(notes, format!("a path of {} bytes", path.as_os_str().len()), "a path has at most 4095 bytes");
        return None;
    }
    // Drop `.` and doubled slashes, so that equal paths compare equal. Keep `..`: a symlink may
    // precede it.
    Some(path.components().collect())
}
