//! The commands ADD and START, END_RECOVERY, STOP and DEL, UPDATE_SIZE: each in a short-lived
//! process of its own: this binary, executed again.
//!
//! ```text
//!   daemon                                  helper of a removal
//!     ├─ spawn __stop ID NONCE ────────────► opens the driver, makes threads; opens the disk O_EXCL, searches for users
//!     │ ◄──────────────── "claimed" or "busy mounted at /srv" ┘
//!     ├─ dispatches the held requests
//!     ├─ "go" ─────────────────────────────► writes back ("hurry": no longer than it has to)
//!     │ ◄──────────────────────── "written", or "unwritten" ┤
//!     │ ◄───────────── "stopped", or "busy open by fio" ┘ STOP, or TRY_STOP of a removal that is not forced
//!     ├─ its queues end, the character device closes
//!     ├─ "delete" ─────────────────────────► DEL; also without this word, if the daemon has died
//!     │ ◄──────────────────────────────── "deleted" ┤ waits until the id is free, at most 500 ms
//!     │ ◄─────────────────── exit 0, or "reserved open by fio (pid 12)" and exit 0
//! ```
//!
//! The helper of a start sends ADD and reports "added ID", or "refused ERRNO". START follows after
//! "go"; DEL follows after "delete", and at the end of the pipe: a device that is added after its
//! daemon has died, or has given ADD up, is deleted again.
//!
//! Why a process: these commands can wait, uninterruptibly, for requests that the daemon holds. A
//! daemon killed during its own STOP can never die: its exit waits for the command, the command for
//! the requests, the requests for the exit to close the ring. With the command in a second process
//! the kill ends everything within a second, and the helper, which lives on, deletes the device.
//! ADD never returns on Linux 6.18.4, which oopses there, and no signal ends its process.
//!
//! TRY_STOP (SAFE_STOP_DEV) has the last word about users: the kernel counts the openers of the disk
//! and refuses to stop an open one. A look at /proc misses a later open, and a descriptor that is
//! under way in a socket.
//!
//! A helper acquires everything that can be lacking (the driver, io_uring, threads) before it
//! reports "claimed". Until then the device is unchanged.
//!
//! Every helper compares the nonce that ADD stored with the device: the id may have been freed and
//! given to a foreign device in between.

use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::getppid;

use crate::crash_point::{self, Point};
use crate::error::{Class, Failure, OrFail, Outcome};
use crate::in_use::Disk;
use crate::ublk::control::{Control, NewDevice};
use crate::ublk::{DeviceInfo, Owner, features};

/// The control command, or sequence of commands, of a helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// ADD, then START or DEL, as the daemon says.
    Add {
        /// The server: the process that opens the character device.
        server: u32,
        /// The parameters, without id and nonce, which are those of the target.
        device: NewDevice,
    },
    /// END_RECOVERY, for the server process given.
    Recover {
        /// The process that has the character device open and has offered every tag.
        server: u32,
    },
    /// A removal, step by step: the in-use check, write-back and STOP, DEL.
    Stop {
        /// Go on although the disk is in use.
        is_forced: bool,
    },
    /// STOP and DEL, without any word from the daemon.
    Delete,
    /// UPDATE_SIZE.
    Resize {
        /// Bytes, whole blocks.
        size: u64,
        /// A smaller disk must have no users: they would lose the data behind the new end.
        is_shrinking: bool,
    },
}

impl Errand {
    /// The command line of a helper, without the program.
    fn words(self, target: Target) -> Vec<String> {
        let (name, number, flag) = match self {
            Self::Add { server, device } => {
                let words = [ADD.to_owned(), target.id.to_string(), target.nonce.to_string(), server.to_string()];
                return words.into_iter().chain(device.words()).collect();
            }
            Self::Recover { server } => (RECOVER, Some(server.to_string()), None),
            Self::Stop { is_forced } => (STOP, None, is_forced.then_some(FORCE)),
            Self::Delete => (DELETE, None, None),
            Self::Resize { size, is_shrinking } => (RESIZE, Some(size.to_string()), is_shrinking.then_some(SHRINK)),
        };
        let device = [name.to_owned(), target.id.to_string(), target.nonce.to_string()];
        device.into_iter().chain(number).chain(flag.map(str::to_owned)).collect()
    }

    /// Parses the command line of a helper; `None` for any different command line.
    pub fn of_words(words: &[&str]) -> Option<(Target, Self)> {
        let [name, id, nonce, more @ ..] = words else { return None };
        let errand = match (*name, more) {
            (ADD, [server, device @ ..]) => {
                Self::Add { server: server.parse().ok()?, device: NewDevice::of_words(device)? }
            }
            (RECOVER, [server]) => Self::Recover { server: server.parse().ok()? },
            (STOP, []) => Self::Stop { is_forced: false },
            (STOP, [FORCE]) => Self::Stop { is_forced: true },
            (DELETE, []) => Self::Delete,
            (RESIZE, [size]) => Self::Resize { size: size.parse().ok()?, is_shrinking: false },
            (RESIZE, [size, SHRINK]) => Self::Resize { size: size.parse().ok()?, is_shrinking: true },
            _ => return None,
        };
        Some((Target { id: id.parse().ok()?, nonce: nonce.parse().ok()? }, errand))
    }
}

/// A device by id, with the nonce that identifies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The N of `/dev/ublkbN`; [`ANY_ID`] before an ADD that takes any free id.
    pub id: u32,
    /// The number that ADD stores with the device.
    pub nonce: u32,
}

/// The driver's sign for any free id.
pub const ANY_ID: u32 = u32::MAX;

const ADD: &str = "__add";
const RECOVER: &str = "__recover";
const STOP: &str = "__stop";
const DELETE: &str = "__del";
const RESIZE: &str = "__resize";
const FORCE: &str = "--force";
const SHRINK: &str = "--shrink";

const ADDED: &str = "added ";
const REFUSED: &str = "refused ";
const SENT: &str = "sent";
const CLAIMED: &str = "claimed";
const WRITTEN: &str = "written";
const UNWRITTEN: &str = "unwritten ";
const STOPPED: &str = "stopped";
const DELETED: &str = "deleted";
const RESERVED: &str = "reserved ";
const BUSY: &str = "busy ";
const FAILED: &str = "failed ";

/// Interval at which the driver is asked whether the id of a deleted device is free.
const FREE_LOOK: Duration = Duration::from_millis(5);
/// How long a helper waits for the id of a device without known users: udev opens a disk that
/// changes.
const FREE_LIMIT: Duration = Duration::from_millis(500);
/// The wait after a forced removal: the users that it ignored have the disk open still, so the
/// report comes sooner.
const FREE_LIMIT_FORCED: Duration = Duration::from_millis(50);
/// The time for which TRY_STOP is repeated: udev opens a disk that its last writer has closed, for
/// some milliseconds.
const OPEN_LIMIT: Duration = Duration::from_secs(1);
/// The pause between two TRY_STOP.
const OPEN_LOOK: Duration = Duration::from_millis(20);
/// How long a forced removal writes back before STOP. STOP writes back once more, as far as the
/// backend answers.
pub const WRITE_LIMIT_FORCED: Duration = Duration::from_secs(3);
/// The limit of such a write-back for a recoverable device whose disk makes progress: STOP does not
/// write back there, but fails the dirty pages.
const WRITE_LIMIT_PROGRESS: Duration = Duration::from_secs(60);
/// Interval at which the progress of such a write-back is read.
const WRITE_LOOK: Duration = Duration::from_millis(250);

/// A word from the daemon to a helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Write back and STOP; after ADD, START.
    Go,
    /// The removal is forced from now on, which limits the rest of the write-back.
    Hurry,
    /// DEL.
    Delete,
}

impl Word {
    const ALL: [Self; 3] = [Self::Go, Self::Hurry, Self::Delete];

    const fn line(self) -> &'static str {
        match self {
            Self::Go => "go\n",
            Self::Hurry => "hurry\n",
            Self::Delete => "delete\n",
        }
    }

    /// The word on a line of the pipe, without its line end.
    fn of(line: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|word| word.line().trim_end() == line)
    }
}

/// A line from a helper to the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// ADD has made the device with this id; [`Word::Go`] or [`Word::Delete`] may follow.
    Added(u32),
    /// The driver has refused ADD.
    Refused(Errno),
    /// START follows. A helper that ends without this line has not sent START.
    Sent,
    /// The helper has the disk exclusively, or the removal is forced: [`Word::Go`] may follow.
    Claimed,
    /// All dirty data is with the backend; STOP follows.
    Written,
    /// Data of the users is not with the backend, in words; STOP follows nevertheless.
    Unwritten(String),
    /// The kernel has removed the disk; [`Word::Delete`] may follow. With [`Answer::Busy`] instead,
    /// the disk is open, and unchanged.
    Stopped,
    /// The device is deleted. The helper stays for a moment to see whether the id becomes free.
    Deleted,
    /// The id is not free yet; the text names the users that keep it.
    Reserved(String),
    /// The disk is in use; the text names its users.
    Busy(String),
    /// The errand failed, for the reason in the text.
    Failed(String),
}

/// Executes this binary again with `words`, which [`crate::command::main`] parses.
pub fn spawn(words: impl IntoIterator<Item = String>) -> Outcome<Child> {
    look_after_orphans();
    // The file that this process runs, even if the file on disk has been replaced since.
    Command::new("/proc/self/exe")
        .arg0("ublk-throttle")
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // Control-C on a terminal goes to the whole process group; a helper must finish its errand.
        .process_group(0)
        .current_dir("/")
        .spawn()
        .or_fail(Class::Resource, "cannot start a helper process (/proc/self/exe)")
}

/// Children for which no waiting thread could be made. [`spawn`] reaps them.
static ORPHANS: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// Reaps `child` in a thread, as the child may hang in an open or a write. If no thread can be
/// made, the next [`spawn`] reaps it: unreaped, it would take up a process where processes are
/// short already.
pub fn leave_to_its_end(child: Child, name: &str) {
    let child = Arc::new(Mutex::new(Some(child)));
    let taken = Arc::clone(&child);
    let take = |child: &Mutex<Option<Child>>| child.lock().expect("nothing panics with it locked").take();
    let thread = std::thread::Builder::new().name(name.to_owned());
    if thread.spawn(move || take(&taken).map(|mut child| child.wait())).is_err() {
        ORPHANS.lock().expect("nothing panics with it locked").extend(take(&child));
    }
}

fn look_after_orphans() {
    ORPHANS.lock().expect("nothing panics with it locked").retain_mut(|child| matches!(child.try_wait(), Ok(None)));
}

/// The daemon's end of a helper process.
pub struct Helper {
    child: Child,
    input: Option<ChildStdin>,
    output: ChildStdout,
    heard: Vec<u8>,
}

impl Helper {
    /// Starts a helper.
    pub fn spawn(target: Target, errand: Errand) -> Outcome<Self> {
        let mut child = spawn(errand.words(target))?;
        let input = child.stdin.take();
        let output = child.stdout.take().expect("asked for a pipe");
        Ok(Self { child, input, output, heard: Vec::new() })
    }

    /// Sends `word` to the helper.
    pub fn tell(&mut self, word: Word) {
        if let Some(input) = &mut self.input {
            // A write fails if the helper has died, which its exit status shows.
            let _ = input.write_all(word.line().as_bytes());
        }
    }

    /// The next line from the helper, if it has come; does not wait.
    pub fn heard(&mut self) -> Option<Answer> {
        let mut ready = [PollFd::new(self.output.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PollTimeout::ZERO) == Ok(1) {
            let mut chunk = [0; 4096];
            let count = self.output.read(&mut chunk).unwrap_or(0);
            self.heard.extend_from_slice(&chunk[..count]);
        }
        let end = self.heard.iter().position(|byte| *byte == b'\n')?;
        let line: Vec<u8> = self.heard.drain(..=end).collect();
        Some(Answer::parse(&String::from_utf8_lossy(&line[..end])))
    }

    /// The exit status, once the process has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        // An error means that the process is no child of the daemon any more: it has ended, with
        // unknown status.
        self.child.try_wait().unwrap_or(Some(ExitStatus::default()))
    }

    /// Kills the helper. Only before [`Word::Go`] is sent, or after the errand is done.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        self.leave();
    }

    /// Leaves the helper to its last word. Its further answers are lost.
    pub fn leave(self) {
        leave_to_its_end(self.child, "helper's end");
    }
}

impl Answer {
    fn parse(line: &str) -> Self {
        let rest = |head: &str| line.strip_prefix(head).map(str::to_owned);
        match line {
            SENT => Self::Sent,
            CLAIMED => Self::Claimed,
            WRITTEN => Self::Written,
            STOPPED => Self::Stopped,
            DELETED => Self::Deleted,
            _ => (rest(ADDED).and_then(|id| Some(Self::Added(id.parse().ok()?))))
                .or_else(|| rest(REFUSED).and_then(|errno| Some(Self::Refused(Errno::from_raw(errno.parse().ok()?)))))
                .or_else(|| rest(RESERVED).map(Self::Reserved))
                .or_else(|| rest(UNWRITTEN).map(Self::Unwritten))
                .or_else(|| rest(BUSY).map(Self::Busy))
                .unwrap_or_else(|| Self::Failed(rest(FAILED).unwrap_or_else(|| line.to_owned()))),
        }
    }
}

/// The body of a helper process, whose output goes to the daemon; the result is the exit code.
pub fn run(target: Target, errand: Errand) -> u8 {
    // A helper that is stopped when its daemon ends gets SIGHUP from the kernel, and has to finish.
    let _ = SigSet::from(Signal::SIGHUP).thread_block();
    let result = match errand {
        Errand::Add { server, device } => add(target, server, &device),
        Errand::Recover { server } => recover(target, server),
        Errand::Stop { is_forced } => stop(target, is_forced),
        Errand::Delete => delete(target),
        Errand::Resize { size, is_shrinking } => resize(target, size, is_shrinking),
    };
    match result {
        Ok(()) => 0,
        Err(line) => {
            say(&line);
            1
        }
    }
}

/// Has the kernel kill this process when the daemon dies: START and END_RECOVERY make requests
/// reach a server, and without the daemon they would make a disk live that has no server.
fn end_with_daemon() -> Result<(), String> {
    set_pdeathsig(Signal::SIGKILL).map_err(|errno| told("PR_SET_PDEATHSIG", errno))
}

/// The last check before the command: the daemon may have died before `end_with_daemon` took
/// effect.
fn expect_alive(server: u32) -> Result<(), String> {
    let is_alive = u32::try_from(getppid().as_raw()) == Ok(server);
    is_alive.then_some(()).ok_or_else(|| format!("{FAILED}the daemon is gone"))
}

fn add(target: Target, server: u32, device: &NewDevice) -> Result<(), String> {
    let mut control = Control::open().map_err(|failure| failed(&failure))?;
    control.have_worker().map_err(no_worker)?;
    crash_point::at(Point::HelperAdding);
    let id = (target.id != ANY_ID).then_some(target.id);
    let added = control.add(id, Owner::ours(target.nonce), server, device);
    let info = added.map_err(|errno| format!("{REFUSED}{}", errno as i32))?;
    crash_point::at(Point::HelperAdded);
    say(&format!("{ADDED}{}", info.id));
    let target = Target { id: info.id, ..target };
    let mut words = std::io::stdin().lock().lines().map_while(Result::ok);
    match words.find_map(|line| Word::of(&line)) {
        Some(Word::Go) => start(&mut control, target, server),
        // The start has failed, or the daemon has given ADD up, or has died. Beside the helper, the
        // next daemon may delete the device: it finds the id in the state file.
        _ => known(&mut control, target)?.map_or(Ok(()), |_| stop_and_delete(&mut control, target)),
    }
}

fn start(control: &mut Control, target: Target, server: u32) -> Result<(), String> {
    end_with_daemon()?;
    known(control, target)?.ok_or_else(|| format!("{FAILED}the device is gone"))?;
    expect_alive(server)?;
    say(SENT);
    crash_point::at(Point::HelperStarting);
    control.start(target.id, server).map_err(|errno| told("START", errno))?;
    crash_point::at(Point::HelperStarted);
    Ok(())
}

fn recover(target: Target, server: u32) -> Result<(), String> {
    end_with_daemon()?;
    let mut control = open(target)?.ok_or_else(|| format!("{FAILED}the device is gone"))?;
    expect_alive(server)?;
    crash_point::at(Point::HelperRecovering);
    control.end_recovery(target.id, server).map_err(|errno| told("END_RECOVERY", errno))?;
    crash_point::at(Point::HelperRecovered);
    Ok(())
}

fn stop(target: Target, is_forced: bool) -> Result<(), String> {
    crash_point::at(Point::HelperClaiming);
    // Before STOP: the device numbers cannot be read once the disk is gone.
    let disk = Disk::find(target.id);
    // Acquire everything that can be lacking before the daemon dispatches the held requests: the
    // driver, a ring, the io_uring worker that STOP needs, two threads.
    let mut control = open(target)?;
    let mut orders = Orders::listen().map_err(no_thread)?;
    let writer = Writer::start(orders.sender.clone()).map_err(no_thread)?;
    let claim = match disk.claim(is_forced) {
        Ok(claim) => Some(claim),
        Err(_) if is_forced => None,
        Err(users) => return Err(format!("{BUSY}{users}")),
    };
    say(CLAIMED);
    if orders.next(None) != Some(Heard::Word(Word::Go)) {
        // The daemon has called the removal off, or has died. Then its devices end with it or wait
        // for the next daemon.
        return Ok(());
    }
    let Some(control) = &mut control else { return Ok(()) };
    let Some(info) = known(control, target)? else { return Ok(()) };
    let mut claim = claim.map(Arc::new);
    let urgency = Urgency { is_forced, is_recoverable: info.is_recoverable };
    crash_point::at(Point::HelperWriting);
    let lost = match write_back(&disk, claim.clone(), urgency, &writer, &mut orders) {
        Written::All => lost(true, disk.swap_in_use()),
        Written::Part => lost(false, disk.swap_in_use()),
        // The next daemon recovers the device, with its dirty pages.
        Written::Orphaned => return Ok(()),
    };
    say(&lost.map_or_else(|| WRITTEN.to_owned(), |lost| format!("{UNWRITTEN}{lost}")));
    crash_point::at(Point::HelperStopping);
    let can_refuse = control.features().is_ok_and(|bits| bits & (1 << features::SAFE_STOP_DEV) != 0);
    if can_refuse && !is_forced {
        // The claim is an opener as well.
        claim = None;
        stop_unless_open(control, target, &disk, &mut orders)?;
    } else {
        gone_is_fine(control.stop(target.id)).map_err(|errno| told("STOP", errno))?;
    }
    crash_point::at(Point::HelperStopped);
    say(STOPPED);
    while !orders.are_over && orders.next(None) != Some(Heard::Word(Word::Delete)) {}
    // Close the claim before DEL: an open disk keeps the id from being free.
    drop(claim);
    free(control, target, &disk, if is_forced { FREE_LIMIT_FORCED } else { FREE_LIMIT })
}

/// The data that goes with the disk, in words. `swap` is the path of a swap with pages in use.
fn lost(is_written: bool, swap: Option<String>) -> Option<String> {
    let unwritten = (!is_written).then(|| "what was not written back is lost".to_owned());
    let swapped = swap.map(|path| format!("the pages that are swapped out to {path} are lost"));
    let lost: Vec<String> = unwritten.into_iter().chain(swapped).collect();
    (!lost.is_empty()).then(|| lost.join("; "))
}

/// TRY_STOP, until the disk is not open; STOP once the removal is a forced one.
fn stop_unless_open(control: &mut Control, target: Target, disk: &Disk, orders: &mut Orders) -> Result<(), String> {
    let began = Instant::now();
    loop {
        if orders.is_hurried {
            return gone_is_fine(control.stop(target.id)).map_err(|errno| told("STOP", errno));
        }
        match control.try_stop(target.id) {
            Err(Errno::EBUSY) if began.elapsed() >= OPEN_LIMIT => {
                let users = disk.users();
                let unseen = || "open, by no process that /proc shows".to_owned();
                return Err(format!("{BUSY}{}", if users.is_empty() { unseen() } else { users.join("; ") }));
            }
            Err(Errno::EBUSY) => drop(orders.next(Some(OPEN_LOOK))),
            result => return gone_is_fine(result).map_err(|errno| told("TRY_STOP", errno)),
        }
    }
}

fn no_thread(cause: std::io::Error) -> String {
    failed(&Err::<(), _>(cause).or_fail(Class::Resource, "cannot start a thread").unwrap_err())
}

/// An event for the main thread of a helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Word(Word),
    /// The pipe is closed: the daemon has died.
    End,
    Written,
}

/// The words of the daemon and the end of the write-back, in order of arrival.
struct Orders {
    sender: Sender<Heard>,
    heard: Receiver<Heard>,
    /// The pipe is closed: no further word can come.
    are_over: bool,
    /// [`Word::Hurry`] has come.
    is_hurried: bool,
}

impl Orders {
    /// Starts a thread that reads words until the end of the pipe.
    fn listen() -> std::io::Result<Self> {
        let (sender, heard) = channel();
        let words = sender.clone();
        std::thread::Builder::new().spawn(move || {
            for line in std::io::stdin().lock().lines() {
                let Ok(line) = line else { break };
                if Word::of(&line).is_some_and(|word| words.send(Heard::Word(word)).is_err()) {
                    return;
                }
            }
            let _ = words.send(Heard::End);
        })?;
        Ok(Self { sender, heard, are_over: false, is_hurried: false })
    }

    /// The next event; `None` if it takes longer than `limit`.
    fn next(&mut self, limit: Option<Duration>) -> Option<Heard> {
        let heard = match limit {
            Some(limit) => self.heard.recv_timeout(limit).ok(),
            None => self.heard.recv().ok(),
        };
        self.are_over |= heard == Some(Heard::End);
        self.is_hurried |= heard == Some(Heard::Word(Word::Hurry));
        heard
    }
}

/// The kind of removal, which limits its write-back.
#[derive(Clone, Copy)]
struct Urgency {
    is_forced: bool,
    /// The disk outlives its daemon: STOP fails dirty pages, and the death of the daemon does not.
    is_recoverable: bool,
}

enum Written {
    All,
    Part,
    /// Part of the data is dirty, and no server is left: the device is kept for the next daemon.
    Orphaned,
}

/// The thread that writes back, which no signal or event can interrupt.
struct Writer(Sender<Work>);

/// A write-back: the file systems and devices above the disk, then the page cache of the disk itself.
struct Work {
    disk: Disk,
    claim: Option<Arc<File>>,
    is_recoverable: bool,
}

impl Writer {
    /// Starts the thread, which waits for its work.
    fn start(done: Sender<Heard>) -> std::io::Result<Self> {
        let (sender, work) = channel();
        std::thread::Builder::new().spawn(move || {
            if let Ok(work) = work.recv() {
                Work::carry_out(work);
                // The main thread has gone on if it gave the write-back up.
                let _ = done.send(Heard::Written);
            }
        })?;
        Ok(Self(sender))
    }
}

impl Work {
    fn carry_out(self) {
        // A loop device opens its disk without a claim, so the helper's claim succeeds beside it.
        if self.claim.is_none() || self.disk.is_below_another() {
            self.disk.sync_above();
            // A second pass for the few pages that were dirtied during the first.
            if self.is_recoverable {
                self.disk.sync_above();
            }
        }
        match self.claim {
            // A failure is that of the disk, and has been reported to its users.
            Some(claim) => drop(claim.sync_all()),
            None => self.disk.sync(),
        }
    }
}

/// Writes back dirty data, with the limits that `urgency` implies.
fn write_back(
    disk: &Disk,
    claim: Option<Arc<File>>,
    urgency: Urgency,
    writer: &Writer,
    orders: &mut Orders,
) -> Written {
    let Urgency { is_forced, is_recoverable } = urgency;
    let _ = writer.0.send(Work { disk: disk.clone(), claim, is_recoverable });
    let mut is_limited = is_forced;
    let (began, mut changed, mut progress) = (Instant::now(), Instant::now(), disk.progress());
    loop {
        let limit = is_limited.then(|| WRITE_LIMIT_FORCED.saturating_sub(changed.elapsed()));
        let look = if is_recoverable { limit.map(|limit| limit.min(WRITE_LOOK)) } else { limit };
        match orders.next(look) {
            Some(Heard::Written) => return Written::All,
            // The limit counts from the beginning or the last progress, as if the removal had been
            // forced from the start.
            Some(Heard::Word(Word::Hurry)) => is_limited = true,
            // The daemon has died. A forced removal goes on to STOP; otherwise dirty data counts
            // for more than the removal.
            Some(Heard::End) if is_recoverable => {
                return if is_limited { Written::Part } else { Written::Orphaned };
            }
            // Also after the daemon's death: without recovery the kernel fails the requests of a
            // dead server, so the write-back ends.
            Some(Heard::Word(_) | Heard::End) => {}
            None => {
                let now = disk.progress();
                if is_recoverable && now != progress && began.elapsed() < WRITE_LIMIT_PROGRESS {
                    (progress, changed) = (now, Instant::now());
                } else if limit.is_some_and(|limit| limit <= look.unwrap_or_default()) {
                    return Written::Part;
                }
            }
        }
    }
}

fn delete(target: Target) -> Result<(), String> {
    open(target)?.map_or(Ok(()), |mut control| stop_and_delete(&mut control, target))
}

fn stop_and_delete(control: &mut Control, target: Target) -> Result<(), String> {
    let disk = Disk::find(target.id);
    // Without STOP, DEL would do its work under a lock that all ublk devices of the host share.
    gone_is_fine(control.stop(target.id)).map_err(|errno| told("STOP", errno))?;
    free(control, target, &disk, FREE_LIMIT)
}

/// DEL of a stopped device. If its id does not become free within `limit`, reports the users that
/// keep it.
fn free(control: &mut Control, target: Target, disk: &Disk, limit: Duration) -> Result<(), String> {
    crash_point::at(Point::HelperDeleting);
    gone_is_fine(control.delete(target.id)).map_err(|errno| told("DEL", errno))?;
    crash_point::at(Point::HelperDeleted);
    say(DELETED);
    let began = Instant::now();
    // While the disk or the character device is open, GET_INFO still finds the device.
    while control.info(target.id).is_ok_and(|info| info.owner == Owner::ours(target.nonce)) {
        if began.elapsed() > limit {
            let users = disk.users();
            let users = if users.is_empty() { "in use by the kernel".to_owned() } else { users.join("; ") };
            say(&format!("{RESERVED}{users}"));
            return Ok(());
        }
        std::thread::sleep(FREE_LOOK);
    }
    Ok(())
}

fn resize(target: Target, size: u64, is_shrinking: bool) -> Result<(), String> {
    let claim = is_shrinking.then(|| Disk::find(target.id).claim(false)).transpose();
    // Kept until the size has changed, so that no process mounts the disk in between.
    let _claim = claim.map_err(|users| format!("{BUSY}{users}"))?;
    let mut control = open(target)?.ok_or_else(|| format!("{FAILED}the device is gone"))?;
    crash_point::at(Point::HelperResizing);
    control.update_size(target.id, size).map_err(|errno| told("UPDATE_SIZE", errno))?;
    crash_point::at(Point::HelperResized);
    Ok(())
}

/// The driver and the io_uring worker that a command needs; `None` if the device is not the target
/// any more.
fn open(target: Target) -> Result<Option<Control>, String> {
    let mut control = Control::open().map_err(|failure| failed(&failure))?;
    control.have_worker().map_err(no_worker)?;
    Ok(known(&mut control, target)?.map(|_| control))
}

fn no_worker(errno: Errno) -> String {
    told("cannot make a worker of io_uring", errno)
}

/// GET_INFO of the device; `None` if it is not the target any more.
fn known(control: &mut Control, target: Target) -> Result<Option<DeviceInfo>, String> {
    match control.info(target.id) {
        Ok(info) if info.owner == Owner::ours(target.nonce) => Ok(Some(info)),
        Ok(_) | Err(Errno::ENODEV) => Ok(None),
        Err(errno) => Err(told("GET_INFO", errno)),
    }
}

/// A second client may have deleted the device in between.
fn gone_is_fine(result: Result<(), Errno>) -> Result<(), Errno> {
    if result == Err(Errno::ENODEV) { Ok(()) } else { result }
}

fn told(command: &str, errno: Errno) -> String {
    failed(&Err::<(), _>(errno).or_fail(Class::Failed, command).unwrap_err())
}

/// A failure with its class, as a line for the daemon.
fn failed(failure: &Failure) -> String {
    format!("{FAILED}{} {}", failure.class.name(), failure.message)
}

fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    let _ = writeln!(output, "{}", line.replace('\n', " "));
    let _ = output.flush();
}

/// The failure of a helper that ended without success, from its last line and its exit status.
pub fn failure(what: &str, said: Option<Answer>, status: ExitStatus) -> Failure {
    let cause = match said {
        Some(Answer::Failed(text) | Answer::Busy(text)) => text,
        _ => format!("the helper process ended with {status}"),
    };
    let classed = cause.split_once(' ').and_then(|(name, text)| {
        let class = Class::ALL.into_iter().find(|class| class.name() == name)?;
        Some(Failure::new(class, format!("{what}: {text}")))
    });
    classed.unwrap_or_else(|| Failure::new(Class::Failed, format!("{what}: {cause}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ublk::Transfer;

    #[test]
    fn a_helper_understands_its_command_line_and_no_other() {
        let target = Target { id: 7, nonce: u32::MAX };
        let device = NewDevice {
            queues: 2,
            depth: 4096,
            request_bytes_max: 1 << 20,
            is_recoverable: true,
            transfer: Transfer::Registered,
        };
        let plain = NewDevice { is_recoverable: false, transfer: Transfer::Copied, ..device };
        for errand in [
            Errand::Add { server: 12, device },
            Errand::Add { server: 12, device: plain },
            Errand::Recover { server: 12 },
            Errand::Stop { is_forced: false },
            Errand::Stop { is_forced: true },
            Errand::Delete,
            Errand::Resize { size: 1 << 40, is_shrinking: false },
            Errand::Resize { size: 4096, is_shrinking: true },
        ] {
            let words = errand.words(target);
            let words: Vec<_> = words.iter().map(String::as_str).collect();
            assert_eq!(Errand::of_words(&words), Some((target, errand)), "{words:?}");
            // No word may be missing, added or guessed.
            assert_eq!(Errand::of_words(&words[..2]), None);
            assert_eq!(Errand::of_words(&[words.as_slice(), &["x"]].concat()), None, "{words:?}");
        }
        let others =
            [&["__stop", "-1", "2"][..], &["__add", "1", "2", "3"], &["del", "1", "2"], &["__resize", "1", "2", "3k"]];
        others.iter().for_each(|words| assert_eq!(Errand::of_words(words), None, "{words:?}"));
    }

    #[test]
    fn everything_that_is_lost_is_said() {
        let swap = || Some("/dev/ublkb0p1".to_owned());
        assert_eq!(lost(true, None), None);
        assert_eq!(lost(true, swap()).unwrap(), "the pages that are swapped out to /dev/ublkb0p1 are lost");
        assert_eq!(lost(false, None).unwrap(), "what was not written back is lost");
        // A partition each: a write-back that was cut short says nothing of the swap beside it.
        let both = lost(false, swap()).unwrap();
        assert!(both.contains("not written back is lost") && both.contains("/dev/ublkb0p1"), "{both}");
    }

    #[test]
    fn what_a_helper_says_is_understood() {
        // Daemon and helper are the same binary, so only both ends of the pipe have to agree.
        for (line, answer) in [
            ("added 12", Answer::Added(12)),
            ("refused 17", Answer::Refused(Errno::EEXIST)),
            ("sent", Answer::Sent),
            ("claimed", Answer::Claimed),
            ("written", Answer::Written),
            ("unwritten swap on x is lost", Answer::Unwritten("swap on x is lost".to_owned())),
            ("stopped", Answer::Stopped),
            ("deleted", Answer::Deleted),
        ] {
            assert_eq!(Answer::parse(line), answer);
        }
        assert_eq!(Answer::parse("reserved open by fio (pid 12)"), Answer::Reserved("open by fio (pid 12)".into()));
        assert_eq!(Answer::parse("busy mounted at /srv"), Answer::Busy("mounted at /srv".into()));
        assert_eq!(Answer::parse("failed STOP: no"), Answer::Failed("STOP: no".into()));
        assert_eq!(Answer::parse("Segmentation fault"), Answer::Failed("Segmentation fault".into()));
        let lacking = failed(&Failure::new(Class::Resource, "no process"));
        let told = |line: &str| failure("STOP", Some(Answer::parse(line)), ExitStatus::default());
        assert_eq!(told(&lacking), Failure::new(Class::Resource, "STOP: no process"));
        assert_eq!(told("Segmentation fault"), Failure::new(Class::Failed, "STOP: Segmentation fault"));
    }
}
