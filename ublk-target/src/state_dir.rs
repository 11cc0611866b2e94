//! The directory of a daemon: its lock, its socket, a file for each of its devices and one for its groups.
//!
//! ```text
//!   /run/ublk-throttle/        0750, ours
//!     lock                     flock held as long as the daemon lives; holds its pid
//!     control.sock             0600, or 0660 for who may look (`control.group`)
//!     NAME.device.json         what `list` shows when the daemon does not answer, and what the next one needs to serve on
//!     groups.json              the groups as they are in force
//!     levels.json              how full the limits were a moment ago; stays when the daemon ends
//! ```
//!
//! No link is followed, nothing is removed that is not ours. A file is written beside its place, made durable, and renamed: so
//! one that is not whole, of another version or of another user was not written by us. Its content is never guessed at: the
//! daemon that starts renames it to `FILE.aside`, and serves the devices of the readable files.

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

/// Of the files. A daemon reads its own version and no other.
pub const VERSION: u64 = 1;

/// A file that is longer was not written by us: the longest path takes 24 KiB in JSON.
const BYTES_MAX: u64 = 16 << 20;

/// Keys and values, as `add` takes them.
pub type Settings = Vec<(String, String)>;

/// What is written down of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    version: u64,
    /// What `list` shows.
    #[serde(flatten)]
    pub status: Status,
    /// The device as it is in force.
    pub device: Settings,
    /// As the file of the configuration has it; none if a command made it.
    pub entry: Option<Settings>,
    /// Device and inode number of the file behind it.
    pub identity: Option<(u64, u64)>,
}

impl Record {
    /// Of this version.
    pub fn new(status: Status, device: Settings, entry: Option<Settings>, identity: Option<(u64, u64)>) -> Self {
        Self { version: VERSION, status, device, entry, identity }
    }
}

/// What is written down of all groups, each list as a configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupsRecord {
    version: u64,
    /// Told from every other start of the machine: the groups of an earlier one have ended with it.
    pub boot: String,
    /// As they are in force.
    pub groups: String,
    /// As the file of the configuration had them.
    pub entries: String,
}

impl GroupsRecord {
    /// Of this version and this start of the machine.
    pub fn new(groups: String, entries: String) -> Self {
        Self { version: VERSION, boot: boot(), groups, entries }
    }
}

/// What tells this start of the machine from every other.
pub fn boot() -> String {
    // Asked each second, and never another one.
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
    /// A file of a device that was read, and whose content is refused.
    pub fn of_device(name: &str, failure: Failure) -> Self {
        Self { file: format!("{name}{SUFFIX}").into(), failure }
    }

    /// The file of the groups, which was read, and whose content is refused.
    pub fn of_groups(failure: Failure) -> Self {
        Self { file: GROUPS.into(), failure }
    }

    /// The file of the levels, which was read, and whose content is refused.
    pub fn of_levels(failure: Failure) -> Self {
        Self { file: LEVELS.into(), failure }
    }

    /// The device that the file is named after.
    pub fn device(&self) -> Option<&str> {
        self.file.to_str()?.strip_suffix(SUFFIX)
    }

    /// What is lost with the file.
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
    /// Makes the directory if need be, and locks it.
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

    /// What an earlier daemon wrote down of its levels.
    pub fn levels<T: DeserializeOwned>(&self) -> Result<Option<T>, Unread> {
        self.read_one(LEVELS)
    }

    fn replace(&self, name: &str, content: &impl Serialize) -> Outcome<()> {
        let (at, fresh) = (self.path.join(name), self.path.join(format!(".{name}.new")));
        let write = || -> io::Result<()> {
            // In one piece: a writer without a buffer is given each word and each comma by itself.
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

    /// What an earlier daemon wrote down of its devices, by name, and the files that cannot be read.
    pub fn records(&self) -> Outcome<(Vec<Record>, Vec<Unread>)> {
        Ok(records(&self.path)?.unwrap_or_default())
    }

    /// What an earlier daemon wrote down of its groups.
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

    /// Renames a file that cannot be read to `FILE.aside`, or the first free one of `FILE.aside-2` and so on. The line tells path,
    /// reason, new name and what is lost.
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

    /// Removes the file of the groups: they have ended with the daemon.
    pub fn forget_groups(&self) {
        let _ = fs::remove_file(self.path.join(GROUPS));
    }

    /// Removes the state file of a device that has gone.
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

/// What the state files say, for a reader that found no daemon, and the files that cannot be read. `None` if there is no such
/// directory.
pub fn read(path: &Path) -> Outcome<Option<(Vec<Status>, Vec<Unread>)>> {
    let unserved = |record: Record| {
        // Whoever wrote it does not answer, so what it said about its work no longer holds.
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

/// Reads a file of ours, if it is one.
fn parse<T: DeserializeOwned>(path: &Path) -> Outcome<T> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path)
        .map_err(|cause| unsafe_or(path, cause, "; look who made it"))?;
    // Its directory is safely the daemon's; a reader may be somebody else.
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

/// Makes room for a socket at `path`: a stale one of ours goes, anything else is left and refused. Only to be called with the
/// lock held, so that a stale one of this directory is really stale.
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
    // A daemon with another state directory may be behind it.
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
        // The flock decides, not the file: it goes with the process, however that ends.
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

    /// A state directory with a sound file of `e` and, for each broken one of `d`, what its making does to the path of the file.
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
        symlink(path.join("lock"), &file).unwrap();
        check(&state_dir, &file);
        fs::create_dir(&file).unwrap();
        check(&state_dir, &file);
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn f83_one_file_that_cannot_be_read_hides_no_other() {
        // Half of a file, a newer version, a device under another's name, a link, a directory: told with the path and put aside under
        // a name that is free, with what is in it.
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
        assert_eq!(asides.get(), 8);
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
