//! Walks a path part by part, so that a link placed on it in between cannot redirect it.
//!
//! ```text
//!   /srv/images/vol0      /  ──► srv ──────────► images ────────────────────► vol0
//!                         O_PATH  a directory     a link of root or the         End: opened by the caller,
//!                                                 daemon's user: the parts      below the directory checked
//!                                                 of its target follow
//! ```
//!
//! Each part is opened below the one before it, without following links, and the opened file is
//! checked. A path that is checked first and then opened by its name could be exchanged in between
//! by a user that may write to a directory on it.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::Mode;

use crate::error::{Class, Failure, Outcome};

/// The most links that are followed, the same number as in the kernel.
const LINKS_MAX: usize = 40;
const LOOK: OFlag = OFlag::O_PATH.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// The end of a path: a name in an open directory, which is not a link.
#[derive(Debug)]
pub struct End {
    /// The directory; its descriptor may be an `O_PATH` one.
    pub folder: File,
    name: OsString,
    /// Whether the name exists in the directory.
    pub is_there: bool,
}

impl End {
    /// Opens the file at the end. `ELOOP` if the name has become a link.
    pub fn open(&self, how: OFlag, mode: Mode) -> io::Result<File> {
        let opened = openat(&self.folder, &*self.name, how | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, mode)?;
        Ok(opened.into())
    }
}

/// Walks `path` from the root. A link that belongs to neither root nor this process's user is a
/// failure; `failed` makes the error of an I/O error.
pub fn walk<E: From<Failure>>(path: &Path, failed: impl Fn(&io::Error) -> E) -> Result<End, E> {
    let step = |folder: &File, name: &OsStr, how: OFlag| -> io::Result<File> {
        Ok(openat(folder, name, how | LOOK, Mode::empty())?.into())
    };
    let root = || File::open("/").map_err(|cause| failed(&cause));
    let own = nix::unistd::geteuid().as_raw();
    let full = std::path::absolute(path).map_err(|cause| failed(&cause))?;
    let (mut folder, mut at) = (root()?, PathBuf::from("/"));
    let mut ahead = parts(&full);
    let mut followed = 0;
    while let Some(name) = ahead.pop() {
        let is_last = ahead.is_empty();
        if !is_last {
            // Try a directory first: only opening it as a directory triggers an automount.
            match step(&folder, &name, OFlag::O_DIRECTORY) {
                Ok(next) => {
                    at.push(&name);
                    folder = next;
                    continue;
                }
                Err(cause) if matches!(cause.raw_os_error(), Some(libc::ENOTDIR | libc::ELOOP)) => {}
                Err(cause) => return Err(failed(&cause)),
            }
        }
        let found = match step(&folder, &name, OFlag::empty()) {
            Ok(found) => found,
            Err(cause) if is_last && cause.kind() == io::ErrorKind::NotFound => {
                return Ok(End { folder, name, is_there: false });
            }
            Err(cause) => return Err(failed(&cause)),
        };
        let metadata = found.metadata().map_err(|cause| failed(&cause))?;
        if !metadata.is_symlink() {
            if is_last {
                return Ok(End { folder, name, is_there: true });
            }
            return Err(failed(&io::Error::from_raw_os_error(libc::ENOTDIR)));
        }
        expect_trusted(&at.join(&name), &metadata, own)?;
        followed += 1;
        if followed > LINKS_MAX {
            return Err(Failure::new(Class::Backing, format!("{}: too many links", path.display())).into());
        }
        let target = PathBuf::from(readlinkat(&found, c"").map_err(|errno| failed(&errno.into()))?);
        if target.is_absolute() {
            (folder, at) = (root()?, PathBuf::from("/"));
        }
        ahead.extend(parts(&target));
    }
    // The path is the root, or ends with a link to `.` or `/`.
    Ok(End { folder, name: ".".into(), is_there: true })
}

/// The parts of a path without the root, the last one first.
fn parts(path: &Path) -> Vec<OsString> {
    let named = |part: &Component<'_>| matches!(part, Component::Normal(_) | Component::ParentDir);
    path.components().rev().filter(named).map(|part| part.as_os_str().to_owned()).collect()
}

fn expect_trusted(link: &Path, metadata: &Metadata, own: u32) -> Outcome<()> {
    let owner = metadata.uid();
    if owner == 0 || owner == own {
        return Ok(());
    }
    let what = format!("{} is a link that belongs to user {owner}, not to root", link.display());
    Err(Failure::new(Class::Backing, what))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::symlink;

    use super::*;

    fn failure(cause: &io::Error) -> Failure {
        Failure::new(Class::Backing, cause)
    }

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("ublk-throttle-way-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(path.join("images")).unwrap();
        fs::write(path.join("images/vol"), "ours").unwrap();
        fs::create_dir(path.join("elsewhere")).unwrap();
        fs::write(path.join("elsewhere/vol"), "precious").unwrap();
        path
    }

    fn read(end: &End) -> io::Result<String> {
        let mut text = String::new();
        end.open(OFlag::O_RDONLY, Mode::empty())?.read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn links_of_ours_are_followed_wherever_they_stand() {
        let path = scratch("links");
        symlink("images", path.join("relative")).unwrap();
        symlink(path.join("images"), path.join("absolute")).unwrap();
        symlink("../relative/vol", path.join("images/last")).unwrap();
        symlink("/", path.join("root")).unwrap();
        for way in ["images/vol", "relative/vol", "absolute/vol", "absolute/last", "images/../relative/./vol"] {
            assert_eq!(read(&walk(&path.join(way), failure).unwrap()).unwrap(), "ours", "{way}");
        }
        let way = path.join("root").join(path.strip_prefix("/").unwrap()).join("images/vol");
        assert_eq!(read(&walk(&way, failure).unwrap()).unwrap(), "ours");
        for way in ["/", "/..", "root"] {
            let end = walk(&path.join(way), failure).unwrap();
            assert!(end.open(OFlag::O_RDONLY, Mode::empty()).unwrap().metadata().unwrap().is_dir(), "{way}");
        }
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn a_way_that_ends_before_its_path_is_told() {
        let path = scratch("missing");
        symlink("round", path.join("round")).unwrap();
        assert!(!walk(&path.join("images/none"), failure).unwrap().is_there);
        for (way, told) in
            [("none/vol", "No such file"), ("images/vol/x", "Not a directory"), ("round", "too many links")]
        {
            let failure = walk(&path.join(way), failure).unwrap_err();
            assert!(failure.message.contains(told), "{way}: {}", failure.message);
        }
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn f85_what_is_exchanged_after_the_look_is_not_opened() {
        // A user that may write to the directory puts a link in the place of the checked file, then
        // in the place of its directory.
        let path = scratch("exchanged");
        let end = walk(&path.join("images/vol"), failure).unwrap();
        fs::rename(path.join("images/vol"), path.join("images/away")).unwrap();
        symlink(path.join("elsewhere/vol"), path.join("images/vol")).unwrap();
        assert_eq!(read(&end).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        fs::rename(path.join("images/away"), path.join("images/vol")).unwrap();
        let end = walk(&path.join("images/vol"), failure).unwrap();
        fs::rename(path.join("images"), path.join("moved")).unwrap();
        symlink("elsewhere", path.join("images")).unwrap();
        assert_eq!(read(&end).unwrap(), "ours");
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn f85_a_link_of_another_user_is_refused() {
        let path = scratch("foreign");
        let link = path.join("images").join("link");
        symlink("vol", &link).unwrap();
        let metadata = fs::symlink_metadata(&link).unwrap();
        assert_eq!(expect_trusted(&link, &metadata, metadata.uid()), Ok(()));
        if metadata.uid() != 0 {
            return fs::remove_dir_all(&path).unwrap();
        }
        std::os::unix::fs::lchown(&link, Some(65534), None).unwrap();
        let refused = walk(&link, failure).unwrap_err();
        assert!(refused.message.contains("link is a link that belongs to user 65534"), "{}", refused.message);
        fs::remove_dir_all(&path).unwrap();
    }
}
