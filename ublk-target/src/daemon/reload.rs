//! `reload`: puts the settings of a configuration file in force, in one transaction or not at all.
//!
//! ```text
//!   read (a thread) ─► differences ─► check ─┬─► new groups ─► new devices ─► ONE Throttle::apply ─► sizes ─► removals
//!                                            │    └──── any failure: undone ────────┘  in force from here on
//!                                            └─► refused: nothing was changed
//! ```
//!
//! The plan is the difference between the settings in force and the file, not between two versions of the file. Devices
//! and groups that a command made and that the file does not name stay. A device that the plan does not name is
//! unaffected.
//!
//! The users of the devices to be removed are searched before the first change. After `Throttle::apply`, a removal may
//! still fail because a program has opened the disk since the search, and the kernel may refuse a size. The rest of the
//! plan is then in force, and the answer names each failure. Devices that wait for their backends are remade last
//! (`waiting.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use serde_json::{Value, json};
use throttle_core::group::GroupOptions;
use throttle_core::ids::GroupId;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};
use ublk_throttle_config::{Config, Device, Group, Plan, difference};

use super::claims::Name;
use super::control::Daemon;
use super::follow::Behind;
use super::table::{Origin, Placed, Table};
use super::{del, notify, set, socket, waiting};
use crate::command::{odd, read};
use crate::cpus;
use crate::crash_point::{self, Point};
use crate::device::{PATIENCE, Removed};
use crate::error::{Class, Failure, OrFail, Outcome};
use crate::ublk::control::Control;
use crate::ublk::features::UPDATE_SIZE;
use crate::{clock, in_use, log};

/// Default limit of a reload for the starts and the changes of size of all devices.
pub const LIMIT: Duration = Duration::from_secs(10);
/// Limit of [`blocking`]: reading the file, or searching the users of the devices to be removed.
const LOOK_LIMIT: Duration = Duration::from_secs(4);
/// Limit for the removal of the devices that a failed reload has started.
const UNDO_LIMIT: Duration = Duration::from_secs(4);
/// Interval between searches for users, of which there are [`LOOKS`]: udev opens every disk that changes, for a moment.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);
const LOOKS: u32 = 3;

/// Puts the settings of the file in force. Returns the differences, in words, and warnings.
pub async fn reload(
    daemon: &Rc<Daemon>,
    path: Option<PathBuf>,
    is_dry: bool,
    may_shrink: bool,
    limit: Duration,
) -> Outcome<Value> {
    let path = path.unwrap_or_else(|| daemon.config.clone());
    let File { config: to, readers, odd } = blocking("reload", "the file", move || load(&path)).await?;
    let behind = Behind::look(daemon).await?;
    daemon.expect_serving()?;
    let (plan, kept) = {
        let table = daemon.table.borrow();
        let mut plan = difference(&table.in_force(&to), &to);
        for entry in table.devices.values().filter(|entry| entry.device.is_waiting()) {
            if let Some(wanted) = to.device(entry.device.name()) {
                plan.remake(&entry.in_force(), wanted);
            }
        }
        let kept = behind.follow(&mut plan, &table, &to, may_shrink);
        check(&table, &to, &plan)?;
        if !may_shrink {
            expect_no_loss(&to, &plan)?;
        }
        (plan, kept)
    };
    // An empty plan still has one line, for readers; a program gets an empty list.
    let changes = if plan.is_empty() { Vec::new() } else { plan.lines() };
    // Claim before the next `await`: the plan is valid only while the devices and groups that it names do not change.
    let _claim = if is_dry { None } else { Some(daemon.claims.claim(touched(&plan))?) };
    let odd: Vec<log::Warning> = odd.into_iter().chain(behind.replaced(&plan)).chain(kept).collect();
    let told: Vec<String> = odd.iter().map(ToString::to_string).collect();
    look(daemon, &plan).await?;
    if is_dry {
        return Ok(json!({ "changes": changes, "warnings": told, "dry-run": true }));
    }
    daemon.expect_serving()?;
    notify::reloading();
    let outcome = carry_out(daemon, &to, &plan, readers, limit).await;
    daemon.tell_ready();
    let left = outcome?;
    odd.iter().for_each(log::Warning::log);
    log::info(format_args!("state=reloaded {}", plan.lines().join("; ")));
    let Left { failures, notes } = left;
    let warnings: Vec<String> = told.into_iter().chain(notes).collect();
    match failures
        .into_iter()
        .reduce(|one, other| Failure { message: format!("{}; {}", one.message, other.message), ..one })
    {
        None => Ok(json!({ "changes": changes, "warnings": warnings, "dry-run": false })),
        Some(failure) => Err(failure.context("the rest is in force, but")),
    }
}

/// The contents of a configuration file.
struct File {
    config: Config,
    readers: Option<u32>,
    odd: Vec<log::Warning>,
}

fn load(path: &Path) -> Outcome<File> {
    let (config, warnings) = read(path)?;
    let readers = socket::resolve(config.readers.as_deref())?;
    Ok(File { config, readers, odd: odd(&warnings) })
}

/// Runs work that may wait for a disk on a separate thread. After 4 s (`LOOK_LIMIT`) the thread is abandoned, and
/// the outcome is `E-TIMEOUT`.
pub async fn blocking<T: Send + 'static>(
    name: &str,
    what: &str,
    work: impl FnOnce() -> Outcome<T> + Send + 'static,
) -> Outcome<T> {
    let (answer, outcome) = oneshot::channel();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || drop(answer.send(work())))
        .or_fail(Class::Resource, "cannot start a thread")?;
    match timeout(LOOK_LIMIT, outcome).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => Err(Failure::new(Class::Failed, format!("{what} was not looked at"))),
        Err(_) => {
            let what = format!("{what} has not been read within {LOOK_LIMIT:?}; nothing was changed");
            Err(Failure::new(Class::Timeout, what))
        }
    }
}

/// The checks that need neither the driver nor a search for users.
fn check(table: &Table, to: &Config, plan: &Plan) -> Outcome<()> {
    if !plan.refusals.is_empty() {
        let refusals: Vec<String> = plan.refusals.iter().map(ToString::to_string).collect();
        return Err(Failure::new(Class::Config, refusals.join("\n")));
    }
    let leaving: BTreeSet<String> = plan.device_removals.iter().cloned().collect();
    let remade = || plan.device_remakes.iter().map(|remake| &remake.device);
    cpus::expect_present(plan.device_additions.iter().chain(remade()))?;
    remade().try_for_each(|device| table.check_id(device))?;
    for new in &plan.device_additions {
        if let Some(old) = plan.device_removals.iter().find(|old| takes_over(table, old, new)) {
            let what = format!(
                "device {:?} (line {}) takes the id or the path of {old:?}, which goes; `ublk-throttle del {old}` first, then `reload`",
                new.name, new.line
            );
            return Err(Failure::new(Class::Config, what));
        }
        table.check_new(new)?;
    }
    let others = table.devices.iter().filter(|(name, _)| to.device(name).is_none() && !leaving.contains(*name));
    let bytes = others.map(|(_, entry)| entry.described.memory_bytes()).fold(to.memory_bytes(), u64::saturating_add);
    if let Some(max) = to.memory_max.filter(|max| bytes > *max) {
        let what = format!("limits.memory: {max} is below {bytes}, what all devices take with those that `add` made");
        return Err(Failure::new(Class::Config, what));
    }
    for name in &plan.group_removals {
        // A member that the file names is no obstacle: the plan moves or removes it.
        let stays = |member: &String| match member.split_once(' ') {
            Some(("device", name)) => to.device(name).is_none() && !leaving.contains(name),
            Some((_, name)) => to.group(name).is_none() && !plan.group_removals.iter().any(|gone| gone == name),
            None => true,
        };
        let members: Vec<String> = table.members(name).into_iter().filter(stays).collect();
        del::in_use(name, &members)?;
    }
    for device in to.devices.iter().filter(|device| table.devices.contains_key(&device.name)) {
        set::expect_staying(table, &device.name)?;
    }
    Ok(())
}

/// Refuses to make a disk smaller, because its users lose the data behind the new end. `set device NAME size=` may have
/// made the disk larger than its size in the file.
fn expect_no_loss(to: &Config, plan: &Plan) -> Outcome<()> {
    let words = plan.shrinking().map(|(name, size)| {
        let line = to.device(name).map_or(0, |device| device.line);
        let (from, to) = (size.from.unwrap_or_default(), size.to);
        format!("device {name:?} (line {line}) has {from} bytes and would be cut to {to}")
    });
    let words: Vec<String> = words.collect();
    if words.is_empty() {
        return Ok(());
    }
    let what = format!(
        "{}; what is behind that would be lost: write the size that it has, or say `reload --allow-shrink`; nothing was changed",
        words.join("; ")
    );
    Err(Failure::new(Class::Config, what))
}

/// Whether a new device needs the id or the path of a device to be removed: the new device starts before that removal.
/// A path may have two devices if both are `shared` or both are read-only.
fn takes_over(table: &Table, old: &str, new: &Device) -> bool {
    table.devices.get(old).map(super::table::Entry::in_force).is_some_and(|old| {
        (new.id.is_some() && old.id == new.id)
            || (new.backend.path().is_some()
                && old.backend.path() == new.backend.path()
                && !(new.backend.is_shared() && old.backend.is_shared())
                && !(new.read_only && old.read_only))
    })
}

/// The names to be claimed: all devices and groups in the plan, and the groups that will contain them.
fn touched(plan: &Plan) -> Vec<Name> {
    let mut names = BTreeSet::new();
    let group = |name: &Option<String>| name.as_deref().map(Name::group);
    for added in &plan.group_additions {
        names.insert(Name::group(&added.name));
        names.extend(group(&added.parent));
    }
    for changed in &plan.group_changes {
        names.insert(Name::group(&changed.name));
        names.extend(changed.parent.as_ref().and_then(|parent| group(&parent.to)));
    }
    names.extend(plan.group_removals.iter().map(|name| Name::group(name)));
    for changed in &plan.device_changes {
        names.insert(Name::device(&changed.name));
        names.extend(changed.group.as_ref().and_then(|to| group(&to.to)));
    }
    for made in plan.device_additions.iter().chain(plan.device_remakes.iter().map(|remake| &remake.device)) {
        names.insert(Name::device(&made.name));
        names.extend(group(&made.group));
    }
    names.extend(plan.device_removals.iter().map(|name| Name::device(name)));
    names.into_iter().collect()
}

/// The checks that need the kernel: UPDATE_SIZE for a change of size, and no users of the devices to be removed.
async fn look(daemon: &Daemon, plan: &Plan) -> Outcome<()> {
    let resized = plan.device_changes.iter().find(|change| change.size.is_some()).map(|change| change.name.clone());
    let going: Vec<(String, u32)> = {
        let table = daemon.table.borrow();
        let id = |name: &String| Some((name.clone(), table.devices.get(name)?.device.id()?));
        plan.device_removals.iter().filter_map(id).collect()
    };
    if resized.is_none() && going.is_empty() {
        return Ok(());
    }
    blocking("reload", "who uses the devices that are to go", move || {
        if let Some(name) = resized
            && !can_resize()?
        {
            let what = format!(
                "device {name:?}: this kernel cannot resize a live ublk device (Linux 6.16 or newer can); \
                 remove the device and add it again"
            );
            return Err(Failure::new(Class::Unsupported, what));
        }
        expect_unused(&going)
    })
    .await
}

/// Whether the driver can change the size of a live device.
pub fn can_resize() -> Outcome<bool> {
    // A driver that does not report its features counts as able: UPDATE_SIZE itself then fails.
    Ok(Control::open()?.features().map_or(true, |features| features & (1 << UPDATE_SIZE) != 0))
}

fn expect_unused(going: &[(String, u32)]) -> Outcome<()> {
    let mut found = Vec::new();
    for look in 0..LOOKS {
        if look > 0 {
            std::thread::sleep(BETWEEN_LOOKS);
        }
        let users = going.iter().map(|(name, id)| (name, in_use::Disk::find(*id).users()));
        found = users.filter(|(_, users)| !users.is_empty()).collect();
        if found.is_empty() {
            return Ok(());
        }
    }
    let words = found.into_iter().map(|(name, users)| format!("device {name:?} is in use: {}", users.join("; ")));
    let words = words.collect::<Vec<_>>().join("; ");
    Err(Failure::new(
        Class::Busy,
        format!("{words}; unmount or close it first, or keep it in the file; nothing was changed"),
    ))
}

/// The failures after `Throttle::apply`, with the rest of the plan in force, and notes for the answer.
#[derive(Default)]
pub struct Left {
    pub failures: Vec<Failure>,
    notes: Vec<String>,
}

/// How long a reload waits for the removal of devices: [`PATIENCE`] (4.5 s), as `del` does. The `limit` of the client
/// counts instead if it is shorter than 4.5 s or longer than [`LIMIT`].
fn patience(limit: Duration) -> Duration {
    if limit > LIMIT { limit } else { limit.min(PATIENCE) }
}

async fn carry_out(
    daemon: &Rc<Daemon>,
    to: &Config,
    plan: &Plan,
    readers: Option<u32>,
    limit: Duration,
) -> Outcome<Left> {
    let deadline = Instant::now() + limit;
    let made = make_groups(daemon, &plan.group_additions)?;
    let began = start_devices(daemon, plan, deadline).await;
    let applied = began.and_then(|()| daemon.expect_serving()).and_then(|()| apply(daemon, to, plan));
    if let Err(failure) = applied {
        undo(daemon, plan, &made).await;
        return Err(failure);
    }
    crash_point::at(Point::ReloadApplied);
    let mut left = Left::default();
    if plan.readers.is_some()
        && let Err(failure) = daemon.socket.open_to(readers)
    {
        left.failures.push(failure);
    }
    for change in &plan.device_changes {
        let Some(size) = change.size else { continue };
        let limit = deadline.saturating_duration_since(Instant::now());
        match set::resize_claimed(daemon, &change.name, size.to, limit).await {
            Ok(bytes) if bytes == size.to => {}
            Ok(bytes) => left.notes.push(format!("device {}: size {bytes}, whole blocks of {}", change.name, size.to)),
            Err(failure) => left.failures.push(failure),
        }
    }
    remove_devices(daemon, &plan.device_removals, patience(limit), &mut left).await;
    waiting::remake(daemon, plan, patience(limit), &mut left).await;
    remove_groups(daemon, plan, &mut left);
    daemon.keep_groups(&daemon.table.borrow());
    Ok(left)
}

/// Makes the new groups, without parents: [`apply`] sets their parents together with all changes of the plan.
fn make_groups(daemon: &Daemon, groups: &[Group]) -> Outcome<Vec<GroupId>> {
    let mut table = daemon.table.borrow_mut();
    let mut made = Vec::new();
    for group in groups {
        let options = GroupOptions { limits: group.limits, parent: None, weight: group.weight, charges: group.charges };
        let id =
            daemon.throttle.add_group(&options, clock::now()).map_err(|cause| set::misplaced(&group.name, cause))?;
        let group = Group { parent: None, ..group.clone() };
        table.groups.push(Placed { group, id, origin: Origin::File, entry: None });
        made.push(id);
    }
    Ok(made)
}

async fn start_devices(daemon: &Rc<Daemon>, plan: &Plan, deadline: Instant) -> Outcome<()> {
    // A device with an `id` starts before the devices that get a free id: no free id is then one of the named ids.
    let mut additions: Vec<&Device> = plan.device_additions.iter().collect();
    additions.sort_by_key(|new| new.id.is_none());
    let mut started = Vec::new();
    for new in additions {
        started.push((new, daemon.start(new.clone(), Origin::File, false)?));
    }
    let mut failures = Vec::new();
    for (new, outcome) in started {
        failures.extend(expect_started(new, outcome, deadline).await.err());
    }
    let Some(first) = failures.first() else { return Ok(()) };
    let words: Vec<&str> = failures.iter().map(|failure| failure.message.as_str()).collect();
    Err(Failure::new(first.class, format!("{}; nothing was changed", words.join("; "))))
}

/// Waits for the outcome of a start. A failed start or a timeout names the line of the device. If the device is removed
/// during the wait, the failure names the device only.
pub async fn expect_started(new: &Device, outcome: oneshot::Receiver<Outcome<()>>, deadline: Instant) -> Outcome<()> {
    let at = format!("line {}", new.line);
    match timeout_at(deadline, outcome).await {
        Ok(Ok(outcome)) => outcome.map_err(|failure| failure.context(at)),
        Ok(Err(_)) => Err(Failure::new(Class::Conflict, format!("device {:?} was removed", new.name))),
        Err(_) => Err(Failure::new(Class::Timeout, format!("{at}: device {:?} is not there yet", new.name))),
    }
}

/// Removes the devices and groups that this reload has made.
async fn undo(daemon: &Rc<Daemon>, plan: &Plan, made: &[GroupId]) {
    let mut going = Vec::new();
    {
        let table = daemon.table.borrow();
        for new in &plan.device_additions {
            if let Some(entry) = table.devices.get(&new.name) {
                going.push((new.name.clone(), del::ask(&entry.device, true, UNDO_LIMIT)));
            }
        }
    }
    let deadline = Instant::now() + UNDO_LIMIT;
    for (name, outcome) in going {
        if timeout_at(deadline, outcome).await.is_ok() {
            daemon.forgotten(&name).await;
        }
    }
    let mut table = daemon.table.borrow_mut();
    for id in made {
        // A device that is not removed in time keeps its group. `del --group` can remove that group later.
        if daemon.throttle.remove_group(*id, clock::now()).is_ok() {
            table.groups.retain(|placed| placed.id != *id);
        } else if let Some(placed) = table.groups.iter_mut().find(|placed| placed.id == *id) {
            placed.origin = Origin::Command;
        }
    }
}

/// The one `Throttle::apply`: before it, no existing device is affected by the plan; after it, all groups, weights and
/// limits of the plan are in force.
fn apply(daemon: &Daemon, to: &Config, plan: &Plan) -> Outcome<()> {
    let mut table = daemon.table.borrow_mut();
    let mut changes = Vec::new();
    let added = plan.group_additions.iter().map(|group| &group.name);
    for name in plan.group_changes.iter().map(|change| &change.name).chain(added) {
        let (placed, after) = (table.group(name)?, to.group(name).expect("the plan leads there"));
        let parent = table.place(after.parent.as_deref())?;
        changes.extend(set::group_changes(placed.id, &placed.group, after, parent));
    }
    {
        // Lock order: the standings in the order of the names of their devices, as in all code that locks several.
        let names: BTreeSet<&String> = plan.device_changes.iter().map(|change| &change.name).collect();
        let mut standings = Vec::new();
        for name in names {
            let Some(entry) = table.devices.get(name) else { continue };
            let (before, after) = (entry.in_force(), to.device(name).expect("the plan leads there"));
            let standing = entry.device.standing();
            // A device that has left the throttle since the check is being removed: no setting can change.
            let Some(member) = standing.member else { continue };
            let group = table.place(after.group.as_deref())?;
            changes.extend(set::member_changes(member, &before, after, group));
            standings.push((entry, standing, after));
        }
        daemon
            .throttle
            .apply(&changes, clock::now())
            .map_err(|cause| Failure::new(Class::Config, format!("groups: {cause}; nothing was changed")))?;
        for (entry, mut standing, after) in standings {
            standing.group.clone_from(&after.group);
            (standing.weight, standing.limits) = (after.weight, after.limits);
            drop(standing);
            entry.device.note_change();
        }
    }
    write_down(&mut table, to);
    daemon.keep_groups(&table);
    Ok(())
}

/// Stores the file's settings in the table, with the origin `File` for the devices and groups that the file names.
fn write_down(table: &mut Table, to: &Config) {
    let groups: BTreeMap<&str, &Group> = to.groups.iter().map(|group| (group.name.as_str(), group)).collect();
    for placed in &mut table.groups {
        if let Some(group) = groups.get(placed.group.name.as_str()) {
            placed.group = (*group).clone();
            placed.origin = Origin::File;
            placed.entry = Some((*group).clone());
        }
    }
    for device in &to.devices {
        if let Some(entry) = table.devices.get_mut(&device.name) {
            entry.described.line = device.line;
            entry.origin = Origin::File;
            let before = entry.device.standing().entry.replace(device.clone());
            if before.as_ref().is_none_or(|before| before.settings() != device.settings()) {
                entry.device.note_change();
            }
        }
    }
    table.memory_max = to.memory_max;
    table.readers.clone_from(&to.readers);
}

/// Removes devices that are not in use. Adds a failure to `left` for each device that stays.
pub async fn remove_devices(daemon: &Rc<Daemon>, names: &[String], patience: Duration, left: &mut Left) {
    let deadline = Instant::now() + patience + del::ANSWER_GRACE;
    let mut going = Vec::new();
    {
        let table = daemon.table.borrow();
        for name in names {
            if let Some(entry) = table.devices.get(name) {
                going.push((name.clone(), del::ask(&entry.device, false, patience)));
            }
        }
    }
    for (name, outcome) in going {
        let note = match timeout_at(deadline, outcome).await {
            Ok(Ok(Ok(Removed { note }))) => note,
            Ok(Ok(Err(failure))) => {
                left.failures.push(failure);
                continue;
            }
            Ok(Err(_)) => None,
            Err(_) => {
                let what = format!("device {name:?} is not gone yet; its removal goes on, `list` tells");
                left.failures.push(Failure::new(Class::Timeout, what));
                continue;
            }
        };
        left.notes.extend(note.map(|note| format!("device {name}: {note}")));
        daemon.forgotten(&name).await;
    }
}

fn remove_groups(daemon: &Daemon, plan: &Plan, left: &mut Left) {
    let mut table = daemon.table.borrow_mut();
    for name in &plan.group_removals {
        let Ok(id) = table.group(name).map(|placed| placed.id) else { continue };
        match daemon.throttle.remove_group(id, clock::now()) {
            Ok(()) => table.groups.retain(|placed| placed.id != id),
            // A device that was not removed keeps its group. `left` has that failure; the next reload tries again.
            Err(_) if !left.failures.is_empty() => {}
            Err(cause) => {
                left.failures.push(Failure::new(Class::GroupInUse, format!("group {name:?}: {cause}")));
            }
        }
    }
}
