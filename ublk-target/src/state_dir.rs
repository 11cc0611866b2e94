//! The state directory of a daemon: its lock, its socket, a file for each device, one for all groups, and
//! one for the levels.
//!
//! ```text
//!   /run/ublk-throttle/        0750, owned by the user of the daemon
//!     lock                     flock(2) for the life of the daemon; contains its pid
//!     control.sock             0600, or 0660 for the readers (`control.group`)
//!     NAME.device.json         for `list` without a live daemon, and for the recovery by the next daemon
//!     groups.json              the groups in force
//!     levels.json              the levels of the buckets, stored each second; stays when the daemon ends
//! ```
//!
//! Links are not followed, and files of different users are not removed. A state file is written under a
//! temporary name, made durable, and renamed. A daemon of this version therefore leaves no file that is
//! incomplete, has a different version or belongs to a different user. Such a file is not interpreted: the
//! next daemon renames it to `FILE.aside` and serves the devices of the readable files.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use nix::fcntl::{Flock, FlockArg};

use crate::crash_point::{self, Point};
use crate::device::Status;
use crate::error::{Class, Failure, OrFail, Outcome, plain};

const SUFFIX: &str = ".device.json";
const GROUPS: &str = "groups.json";
const LEVELS: &str = "levels.json";

/// Version of the state files. A daemon reads only files of its own version.
pub const VERSION: u64 = 1;

/// The most bytes that are read of a file. A longer file was not written by a daemon: the longest path
/// takes 24 KiB in JSON.
const BYTES_MAX: u64 = 16 << 20;

/// Keys and values, as the command `add` takes them.
pub type Settings = Vec<(String, String)>;

/// The state file of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    version: u64,
    /// The status for `list`.
    #[serde(flatten)]
    pub status: Status,
    /// The settings in force.
    pub device: Settings,
    /// The settings in the configuration file; `None` if a command made the device.
    pub entry: Option<Settings>,
    /// Device and inode number of the backing file.
    pub identity: Option<(u64, u64)>,
}

impl Record {
    /// A record of this version.
    pub fn new(status: Status, device: Settings, entry: Option<Settings>, identity: Option<(u64, u64)>) -> Self {
        Self { version: VERSION, status, device, entry, identity }
    }
}

/// The state file of all groups. Each of the two lists is the text of a configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupsRecord {
    version: u64,
    /// The boot of the host. The groups of an earlier boot have ended with it.
    pub boot: String,
    /// The groups in force.
    pub groups: String,
    /// The groups as the configuration file had them.
    pub entries: String,
}

impl GroupsRecord {
    /// A record of this version and this boot.
    pub fn new(groups: String, entries: String) -> Self {
        Self { version: VERSION, boot: boot(), groups, entries }
    }
}

/// The identifier of this boot of the host, `boot_id` of the kernel.
pub fn boot() -> String {
    // Read once: the levels are stored each second, and the identifier does not change.
    static BOOT: LazyLock<String> =
        LazyLock::new(|| fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned());
    BOOT.clone()
}

/// A state file that this program cannot use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unread {
    /// The name of the file in the state directory.
    file: OsString,
    /// Path and reason, or the reason alone.
    pub failure: Failure,
}

impl Unread {
    /// The file of a device, which was read, but has settings that are refused.
    pub fn of_device(name: &str, failure: Failure) -> Self {
        Self { file: format!("{name}{SUFFIX}").into(), failure }
    }

    /// The file of the groups, which was read, but has settings that are refused.
    pub fn of_groups(failure: Failure) -> Self {
        Self { file: GROUPS.into(), failure }
    }

    /// The file of the levels, which was read, but has levels that are refused.
    pub fn of_levels(failure: Failure) -> Self {
        Self { file: LEVELS.into(), failure }
    }

    /// The device that the file is named after.
    pub fn device(&self) -> Option<&str> {
        self.file.to_str()?.strip_suffix(SUFFIX)
    }

    /// The loss that follows from setting the file aside, for the log.
    fn loss(&self) -> &'static str {
        match self.file.to_str() {
            Some(GROUPS) => "what `set` changed of groups is lost",
            Some(LEVELS) => "every limit begins with all of its credit",
            _ => "its device is not served; the program that wrote the file serves it once the file has its old name",
        }
    }
}

/// A state directory, locked by this process.
pub struct StateDir {
    path: PathBuf,
    _lock: Flock<File>,
}

impl StateDir {
    /// Locks the directory, and makes it first if it does not exist.
    pub fn lock(path: &Path) -> Outcome<Self> {
        match DirBuilder::new().mode(0o750).create(path) {
            Ok(()) => {}
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => check_directory(path)?,
            Err(cause) => return Err(cause).or_fail(Class::State, format!("cannot make {}", path.display())),
        }
        let lock_path = path.join("lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(&lock_path)
            .map_err(|cause| unsafe_or(&lock_path, cause, "; remove it"))?;
        check_file(&file, &lock_path)?;
        let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(mut file, errno)| {
            if errno != nix::errno::Errno::EWOULDBLOCK {
                return Err::<(), _>(errno)
                    .or_fail(Class::State, format!("cannot lock {}", lock_path.display()))
                    .unwrap_err();
            }
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            Failure::new(
                Class::Locked,
                format!(
                    "pid {} already serves {}; stop it, or give this one its own --state-dir",
                    pid.trim(),
                    path.display()
                ),
            )
        })?;
        lock.set_len(0)
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .or_fail(Class::State, format!("cannot write {}", lock_path.display()))?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Writes the state file of a device.
    pub fn write(&self, record: &Record) -> Outcome<()> {
        self.replace(&format!("{}{SUFFIX}", record.status.name), record)
    }

    /// Writes the file of the groups.
    pub fn write_groups(&self, record: &GroupsRecord) -> Outcome<()> {
        self.replace(GROUPS, record)
    }

    /// Writes the file of the levels.
    pub fn write_levels(&self, record: &impl Serialize) -> Outcome<()> {
        self.replace(LEVELS, record)
    }

    /// The levels that an earlier daemon stored; `None` without a file.
    pub fn levels<T: DeserializeOwned>(&self) -> Result<Option<T>, Unread> {
        self.read_one(LEVELS)
    }

    fn replace(&self, name: &str, content: &impl Serialize) -> Outcome<()> {
        let (at, fresh) = (self.path.join(name), self.path.join(format!(".{name}.new")));
        let write = || -> io::Result<()> {
            // Serialise first: serde_json would write each token to an unbuffered file by a call of its own.
            let content = serde_json::to_vec(content)?;
            let _ = fs::remove_file(&fresh);
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o640).open(&fresh)?;
            file.write_all(&content)?;
            file.sync_all()?;
            crash_point::at(Point::StateBeside);
            fs::rename(&fresh, &at)?;
            crash_point::at(Point::StateRenamed);
            File::open(&self.path)?.sync_all()
        };
        write().or_fail(Class::State, format!("cannot write {}", at.display()))
    }

    /// The records that an earlier daemon stored of its devices, sorted by name, and the unreadable files.
    pub fn records(&self) -> Outcome<(Vec<Record>, Vec<Unread>)> {
        Ok(records(&self.path)?.unwrap_or_default())
    }

    /// The groups that an earlier daemon stored; `None` without a file.
    pub fn groups(&self) -> Result<Option<GroupsRecord>, Unread> {
        self.read_one(GROUPS)
    }

    fn read_one<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, Unread> {
        let path = self.path.join(name);
        if fs::symlink_metadata(&path).is_err_and(|cause| cause.kind() == io::ErrorKind::NotFound) {
            return Ok(None);
        }
        parse(&path).map(Some).map_err(|failure| Unread { file: name.into(), failure })
    }

    /// Renames an unreadable file to `FILE.aside`, or to the first free name of `FILE.aside-2`, `FILE.aside-3`
    /// and so on. Returns a line for the log, with path, reason, new name and loss.
    pub fn put_aside(&self, unread: &Unread) -> String {
        let at = self.path.join(&unread.file);
        let aside = (1..).map(|number| aside(&at, number)).find(|aside| fs::symlink_metadata(aside).is_err());
        let aside = aside.expect("fewer files than numbers");
        let (what, loss) = (&unread.failure.message, unread.loss());
        match fs::rename(&at, &aside) {
            Ok(()) => format!("{what}; put aside as {}: {loss}", aside.display()),
            Err(cause) => format!("{what}; left there, as it cannot be renamed ({}): {loss}", plain(&cause)),
        }
    }

    /// Removes the file of the groups, which end with the daemon.
    pub fn forget_groups(&self) {
        let _ = fs::remove_file(self.path.join(GROUPS));
    }

    /// Removes the state file of a removed device.
    pub fn forget(&self, name: &str) {
        let _ = fs::remove_file(self.file(name));
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}{SUFFIX}"))
    }
}

fn aside(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(if number == 1 { ".aside".to_owned() } else { format!(".aside-{number}") });
    name.into()
}

/// The devices in the state files, for a command that found no live daemon, and the unreadable files. `None`
/// if the directory does not exist.
pub fn read(path: &Path) -> Outcome<Option<(Vec<Status>, Vec<Unread>)>> {
    let unserved = |record: Record| {
        // The daemon that wrote the record does not answer, so its state and its held requests are out of date.
        Status { state: "unserved".to_owned(), held: 0, ..record.status }
    };
    Ok(records(path)?.map(|(records, unread)| (records.into_iter().map(unserved).collect(), unread)))
}

fn records(path: &Path) -> Outcome<Option<(Vec<Record>, Vec<Unread>)>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(cause) if cause.kind() == io::ErrorKind::PermissionDenied => {
            return Err(cause).or_fail(Class::Perm, path.display());
        }
        Err(cause) => return Err(cause).or_fail(Class::State, path.display()),
    };
    let (mut found, mut unread) = (Vec::new(), Vec::new());
    for entry in entries.filter_map(Result::ok) {
        let file = entry.file_name();
        let bytes = file.as_encoded_bytes();
        if bytes.starts_with(b".") || !bytes.ends_with(SUFFIX.as_bytes()) {
            continue;
        }
        match record(&entry.path(), &file) {
            Ok(record) => found.push(record),
            Err(failure) => unread.push(Unread { file, failure }),
        }
    }
    found.sort_by(|one: &Record, other| one.status.name.cmp(&other.status.name));
    unread.sort_by(|one, other| one.file.cmp(&other.file));
    Ok(Some((found, unread)))
}

fn record(path: &Path, file: &OsStr) -> Outcome<Record> {
    let record: Record = parse(path)?;
    if *file != *format!("{}{SUFFIX}", record.status.name) {
        return Err(unreadable(path, &format!("it tells of device {:?}", record.status.name)));
    }
    Ok(record)
}

/// Reads a state file. Refuses a file that is not regular, does not belong to the owner of its directory,
/// has further hard links, or can be written by a group or by all users.
fn parse<T: DeserializeOwned>(path: &Path) -> Outcome<T> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path)
        .map_err(|cause| unsafe_or(path, cause, "; look who made it"))?;
    // Compare with the owner of the directory, who is the user of the daemon; `list` may run as a different
    // user.
    let owner = fs::metadata(path.parent().unwrap_or(Path::new("/"))).or_fail(Class::State, path.display())?.uid();
    let metadata = file.metadata().or_fail(Class::State, path.display())?;
    if !metadata.is_file() || metadata.uid() != owner || metadata.nlink() != 1 || metadata.mode() & 0o022 != 0 {
        return Err(Failure::new(
            Class::UnsafePath,
            format!("{} is not a file of ours; look who made it", path.display()),
        ));
    }
    let mut text = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut text).or_fail(Class::State, path.display())?;
    let value: serde_json::Value =
        serde_json::from_slice(&text).map_err(|cause| unreadable(path, &cause.to_string()))?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(VERSION) => serde_json::from_value(value).map_err(|cause| unreadable(path, &cause.to_string())),
        Some(version) => {
            Err(unreadable(path, &format!("it is of version {version}, and this program knows {VERSION}")))
        }
        None => Err(unreadable(path, "it says no version")),
    }
}

fn unreadable(path: &Path, why: &str) -> Failure {
    Failure::new(Class::State, format!("{} is no state file that this program can read: {why}", path.display()))
}

/// Removes a stale socket of this user at `path`. Any further kind of file there, and a socket on which a
/// daemon answers, is left and refused. The caller must hold the lock of the state directory: a socket in
/// it is then stale.
pub fn clear_socket(path: &Path) -> Outcome<()> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(cause).or_fail(Class::UnsafePath, path.display()),
    };
    if !metadata.file_type().is_socket() || metadata.uid() != nix::unistd::geteuid().as_raw() {
        return Err(Failure::new(
            Class::UnsafePath,
            format!("{} is in the way: it is not a socket of ours; choose another --socket", path.display()),
        ));
    }
    // A daemon with a different state directory may listen on it.
    if UnixStream::connect(path).is_ok() {
        return Err(Failure::new(
            Class::Locked,
            format!("another daemon answers on {}; choose another --socket", path.display()),
        ));
    }
    fs::remove_file(path).or_fail(Class::State, format!("cannot remove the stale {}", path.display()))
}

fn check_directory(path: &Path) -> Outcome<()> {
    let metadata = fs::symlink_metadata(path).or_fail(Class::State, path.display())?;
    let refuse = |why: &str| Err(Failure::new(Class::UnsafePath, format!("{} {why}", path.display())));
    if !metadata.is_dir() {
        return refuse("is not a directory; choose another --state-dir");
    }
    if metadata.uid() != nix::unistd::geteuid().as_raw() {
        return refuse("belongs to another user; choose another --state-dir");
    }
    if metadata.mode() & 0o022 != 0 {
        return refuse("may be written by others; `chmod 0750` it, or choose another --state-dir");
    }
    Ok(())
}

fn check_file(file: &File, path: &Path) -> Outcome<()> {
    let metadata = file.metadata().or_fail(Class::State, path.display())?;
    if !metadata.is_file() || metadata.uid() != nix::unistd::geteuid().as_raw() || metadata.nlink() != 1 {
        return Err(Failure::new(Class::UnsafePath, format!("{} is not a file of ours; remove it", path.display())));
    }
    Ok(())
}

fn unsafe_or(path: &Path, cause: io::Error, cure: &str) -> Failure {
    match cause.raw_os_error() {
        Some(libc::ELOOP | libc::ENXIO | libc::EISDIR) => {
            Failure::new(Class::UnsafePath, format!("{} is not a file of ours{cure}", path.display()))
        }
        _ => Err::<(), _>(cause).or_fail(Class::State, format!("cannot open {}", path.display())).unwrap_err(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("ublk-throttle-state-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn a_second_daemon_is_told_the_pid_of_the_first() {
        // The flock decides, not the existence of the file: the kernel releases it at the death of the process.
        let path = scratch("lock");
        let first = StateDir::lock(&path).unwrap();
        let refused = StateDir::lock(&path).err().unwrap();
        assert_eq!(refused.class, Class::Locked);
        assert!(refused.message.contains(&format!("pid {}", std::process::id())), "{}", refused.message);
        drop(first);
        assert!(StateDir::lock(&path).is_ok());
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn a_directory_that_others_may_write_is_refused() {
        let path = scratch("open");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(StateDir::lock(&path).err().unwrap().class, Class::UnsafePath);
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn a_link_in_place_of_the_lock_is_not_followed() {
        let path = scratch("link");
        drop(StateDir::lock(&path).unwrap());
        let victim = path.join("victim");
        fs::write(&victim, "precious").unwrap();
        fs::remove_file(path.join("lock")).unwrap();
        symlink(&victim, path.join("lock")).unwrap();
        assert_eq!(StateDir::lock(&path).err().unwrap().class, Class::UnsafePath);
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        fs::remove_dir_all(&path).unwrap();
    }

    fn record(name: &str) -> Record {
        let status = serde_json::json!({
            "name": name, "state": "live", "id": 3, "node": "/dev/ublkb3", "link": "/dev/ublk-throttle/d", "size": 512,
            "backend": "null", "path": null, "group": null, "weight": 100, "limits": {}, "read_only": false, "queues": 1,
            "depth": 128, "held": 2, "held_ms_oldest": 0, "requests": 9, "errors": 0, "pid": 1, "nonce": 7,
        });
        let device = vec![("null".to_owned(), "512".to_owned())];
        Record::new(serde_json::from_value(status).unwrap(), device.clone(), Some(device), Some((1, u64::MAX)))
    }

    #[test]
    fn what_is_written_down_is_read_again() {
        let path = scratch("records");
        let state_dir = StateDir::lock(&path).unwrap();
        assert_eq!((state_dir.records(), state_dir.groups()), (Ok((Vec::new(), Vec::new())), Ok(None)));
        let (record, groups) = (record("d"), GroupsRecord::new("{}".to_owned(), String::new()));
        state_dir.write(&record).unwrap();
        state_dir.write_groups(&groups).unwrap();
        assert_eq!((state_dir.records(), state_dir.groups()), (Ok((vec![record], Vec::new())), Ok(Some(groups))));
        assert_eq!(read(&path).unwrap().unwrap().0[0].state, "unserved");
        fs::remove_dir_all(&path).unwrap();
    }

    /// Makes a state directory with a sound file of `e`, and calls `check` with the directory and the path of
    /// the file of `d` for each of 8 broken files.
    fn with_broken(name: &str, check: impl Fn(&StateDir, &Path)) {
        let path = scratch(name);
        let state_dir = StateDir::lock(&path).unwrap();
        state_dir.write(&record("e")).unwrap();
        let file = path.join("d.device.json");
        let sound = serde_json::to_string(&record("d")).unwrap();
        let newer = sound.replace("\"version\":1", "\"version\":2");
        let other = sound.replace("\"name\":\"d\"", "\"name\":\"e\"");
        for text in ["", "\0garbage", &sound[..sound.len() / 2], "{}", &newer, &other] {
            fs::write(&file, text).unwrap();
            check(&state_dir, &file);
        }
        // A sound record, but by a link, under a second name, or writable by every user.
        let record = path.join("sound");
        fs::write(&record, &sound).unwrap();
        fs::set_permissions(&record, fs::Permissions::from_mode(0o600)).unwrap();
        symlink(&record, &file).unwrap();
        check(&state_dir, &file);
        fs::hard_link(&record, &file).unwrap();
        check(&state_dir, &file);
        fs::write(&file, &sound).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
        check(&state_dir, &file);
        fs::create_dir(&file).unwrap();
        check(&state_dir, &file);
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn f83_one_file_that_cannot_be_read_hides_no_other() {
        // Broken: empty, garbage, half of a file, no version, a newer version, a device under the name of a second
        // one, a link, a second name, mode 0666, a directory. Each is reported with its path and renamed to a free name, content included.
        let asides = std::cell::Cell::new(0);
        with_broken("broken", |state_dir, file| {
            let (records, unread) = state_dir.records().unwrap();
            assert_eq!(records, [record("e")]);
            let [unread] = &unread[..] else { panic!("{unread:?}") };
            assert_eq!(unread.device(), Some("d"));
            let told = state_dir.put_aside(unread);
            asides.set(asides.get() + 1);
            let aside = aside(file, asides.get());
            assert!(told.contains(&*file.to_string_lossy()), "{told}");
            assert!(told.contains(&format!("put aside as {}: its device is not served", aside.display())), "{told}");
            assert!(fs::symlink_metadata(file).is_err() && fs::symlink_metadata(aside).is_ok(), "{told}");
            assert_eq!(state_dir.records(), Ok((vec![record("e")], Vec::new())));
        });
        assert_eq!(asides.get(), 10);
    }

    #[test]
    fn f83_groups_and_levels_that_cannot_be_read_are_put_aside() {
        let path = scratch("broken-groups");
        let state_dir = StateDir::lock(&path).unwrap();
        for (name, loss) in [(GROUPS, "what `set` changed"), (LEVELS, "all of its credit")] {
            fs::write(path.join(name), "{\"version\":2}").unwrap();
            let unread = match name {
                GROUPS => state_dir.groups().map(drop).unwrap_err(),
                _ => state_dir.levels::<serde_json::Value>().map(drop).unwrap_err(),
            };
            assert_eq!(unread.device(), None);
            let told = state_dir.put_aside(&unread);
            assert!(told.contains("it is of version 2") && told.contains(loss), "{told}");
            assert!(path.join(format!("{name}.aside")).exists(), "{told}");
        }
        assert_eq!((state_dir.groups(), state_dir.levels::<serde_json::Value>()), (Ok(None), Ok(None)));
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn a_file_in_place_of_the_socket_is_left_alone() {
        let path = scratch("socket");
        fs::write(&path, "precious").unwrap();
        assert_eq!(clear_socket(&path).unwrap_err().class, Class::UnsafePath);
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
    }
}
