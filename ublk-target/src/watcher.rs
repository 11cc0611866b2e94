//! A process that finds out whether a foreign ublk client is stopping a device whose requests the
//! daemon holds.
//!
//! ```text
//!   daemon                              __watch, one for all devices
//!     ├─ "3" ──────────────────────────► GET_PARAMS of device 3 on a thread ──► takes the lock of the device
//!     │ ◄──────────────────── "free 3" ┤ the command has completed
//!     │ ◄─────────────────── "stuck 3" ┘ its worker sleeps in the driver: a STOP keeps the lock
//! ```
//!
//! STOP of a recoverable disk (one that outlives its daemon) first waits, with that lock held,
//! until no request is in flight. No abort comes before, the disk does not change, and the driver
//! reports it as live. Requests held at one a minute would delay the STOP for minutes, and a DEL
//! that waits like that keeps every ublk device of the host from being added or deleted.
//!
//! The watcher is a process of its own, because nothing interrupts that wait: a daemon killed in it
//! would wait for its own requests and never die. A slow command is not stuck: a worker without a
//! CPU is not asleep. The watcher reports "stuck" only after it has seen the workers of all
//! outstanding commands asleep in the driver, twice in a row.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::error::{Class, OrFail, Outcome};
use crate::ublk::control::Control;
use crate::{helper, log};

/// The command line of the process.
pub const WORD: &str = "__watch";

const FREE: &str = "free ";
const STUCK: &str = "stuck ";

/// How long a command may be outstanding before its worker is examined. With the lock free, it takes
/// microseconds.
const SUSPICION: Duration = Duration::from_millis(20);
const LOOK: Duration = Duration::from_millis(10);
/// Consecutive examinations that must find the workers asleep.
const LOOKS: u32 = 2;
/// A watcher that has not answered a question for so long is replaced.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// The daemon's end of the watcher process.
#[derive(Default)]
pub struct Watcher {
    /// Protects all of [`Desk`]: the process and the open questions.
    desk: Arc<Mutex<Desk>>,
}

#[derive(Default)]
struct Desk {
    running: Option<Running>,
    /// The open questions, by device id.
    asked: BTreeMap<u32, Asked>,
    /// Incremented for each process, so that `hear` recognises lines of an earlier one.
    generation: u64,
    /// The log already has the warning that no watcher can be started.
    is_lack_told: bool,
}

struct Running {
    child: Child,
    input: ChildStdin,
}

struct Asked {
    since: Instant,
    tell: Box<dyn Fn() + Send>,
}

impl Watcher {
    /// Asks the watcher about device `id`; `tell` is called if a STOP is under way. No-op while a
    /// question about the device is open.
    pub fn ask(&self, id: u32, tell: Box<dyn Fn() + Send>) {
        let mut desk = lock(&self.desk);
        match desk.asked.get(&id) {
            Some(asked) if asked.since.elapsed() < ANSWER_LIMIT => return,
            Some(_) => desk.give_up(),
            None => {}
        }
        if desk.running.is_none() {
            match self.spawn(&mut desk) {
                Ok(running) => {
                    desk.running = Some(running);
                    desk.is_lack_told = false;
                }
                // The device thread asks again at its next interval.
                Err(failure) => {
                    if !std::mem::replace(&mut desk.is_lack_told, true) {
                        log::warn("W-WATCHER", failure.message);
                    }
                    return;
                }
            }
        }
        let line = format!("{id}\n");
        if desk.running.as_mut().is_some_and(|running| running.input.write_all(line.as_bytes()).is_err()) {
            return desk.give_up();
        }
        desk.asked.insert(id, Asked { since: Instant::now(), tell });
    }

    fn spawn(&self, desk: &mut Desk) -> Outcome<Running> {
        let mut child = helper::spawn([WORD.to_owned()])?;
        let input = child.stdin.take().expect("asked for a pipe");
        let output = child.stdout.take().expect("asked for a pipe");
        // The daemon must not block on a watcher that does not read.
        let _ = fcntl(input.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
        desk.generation += 1;
        let (own, generation) = (Arc::clone(&self.desk), desk.generation);
        let heard = std::thread::Builder::new()
            .name("watcher".to_owned())
            .spawn(move || hear(&own, generation, output))
            .or_fail(Class::Resource, "cannot start a thread");
        if let Err(failure) = heard {
            // Without this thread the output would go unread. The next `ask` spawns a new process.
            let _ = child.kill();
            helper::leave_to_its_end(child, "watcher's end");
            return Err(failure);
        }
        Ok(Running { child, input })
    }
}

fn lock(desk: &Mutex<Desk>) -> MutexGuard<'_, Desk> {
    desk.lock().expect("nothing panics while it holds this lock")
}

/// Applies the lines of a watcher until it ends.
fn hear(desk: &Mutex<Desk>, generation: u64, output: impl Read) {
    for line in BufReader::new(output).lines() {
        let Ok(line) = line else { break };
        let mut desk = lock(desk);
        if desk.generation != generation {
            return;
        }
        let id = |word: &str| line.strip_prefix(word).and_then(|id| id.parse::<u32>().ok());
        if let Some(id) = id(FREE) {
            desk.asked.remove(&id);
        } else if let Some(asked) = id(STUCK).and_then(|id| desk.asked.remove(&id)) {
            (asked.tell)();
        }
    }
    let mut desk = lock(desk);
    if desk.generation == generation {
        desk.give_up();
    }
}

impl Desk {
    /// Drops the process and all open questions; the device threads ask again.
    fn give_up(&mut self) {
        self.asked.clear();
        if let Some(Running { mut child, input }) = self.running.take() {
            drop(input);
            let _ = child.kill();
            // The process may end only with the very STOP that it has found.
            helper::leave_to_its_end(child, "watcher's end");
        }
    }
}

/// The body of the watcher process.
pub fn run() -> u8 {
    let (sender, events) = channel();
    let questions = sender.clone();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Some(id) = line.ok().and_then(|line| line.trim().parse().ok()) else { break };
            if questions.send(Event::Asked(id)).is_err() {
                return;
            }
        }
        let _ = questions.send(Event::End);
    });
    watch(&sender, &events);
    // Not by returning: threads may be waiting in the driver for long.
    std::process::exit(0)
}

enum Event {
    Asked(u32),
    /// The worker of that number has completed its command, and is idle.
    Answered(usize, u32),
    End,
}

/// A command that has not completed.
struct Out {
    id: u32,
    worker: usize,
    since: Instant,
    is_told: bool,
}

fn watch(sender: &Sender<Event>, events: &Receiver<Event>) {
    let (mut workers, mut idle, mut out): (Vec<Sender<u32>>, Vec<usize>, Vec<Out>) = Default::default();
    let mut asleep = 0;
    loop {
        let is_suspicious = |out: &Out| !out.is_told;
        let event = if out.iter().any(is_suspicious) {
            events.recv_timeout(LOOK)
        } else {
            events.recv().map_err(|_| RecvTimeoutError::Disconnected)
        };
        match event {
            Ok(Event::Asked(id)) => {
                let worker = idle.pop().unwrap_or_else(|| {
                    workers.push(work(workers.len(), sender.clone()));
                    workers.len() - 1
                });
                if workers[worker].send(id).is_err() {
                    // The thread could not be made. The daemon starts a new watcher.
                    std::process::exit(1);
                }
                out.push(Out { id, worker, since: Instant::now(), is_told: false });
                continue;
            }
            Ok(Event::Answered(worker, id)) => {
                out.retain(|out| out.worker != worker);
                idle.push(worker);
                say(FREE, id);
                continue;
            }
            Ok(Event::End) | Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if !out.iter().any(|out| !out.is_told && out.since.elapsed() >= SUSPICION) {
            asleep = 0;
            continue;
        }
        // Compare with the number of all outstanding commands: which of them sleeps is not known.
        asleep = if sleeping() >= out.len() { asleep + 1 } else { 0 };
        if asleep >= LOOKS {
            asleep = 0;
            for out in out.iter_mut().filter(|out| !out.is_told && out.since.elapsed() >= SUSPICION) {
                out.is_told = true;
                say(STUCK, out.id);
            }
        }
    }
}

/// Starts a thread that sends one GET_PARAMS after the other.
fn work(number: usize, events: Sender<Event>) -> Sender<u32> {
    let (questions, asked) = channel();
    let body = move || {
        // As in `watch`: the daemon starts a new watcher.
        let Ok(mut control) = Control::open() else { std::process::exit(1) };
        for id in asked {
            // Any result counts: the command has completed, so the lock was free.
            let _ = control.params(id);
            if events.send(Event::Answered(number, id)).is_err() {
                return;
            }
        }
    };
    let _ = std::thread::Builder::new().name(format!("watch-{number}")).spawn(body);
    questions
}

fn say(word: &str, id: u32) {
    let mut output = std::io::stdout().lock();
    let _ = writeln!(output, "{word}{id}");
    let _ = output.flush();
}

/// The number of this process's io_uring workers that sleep uninterruptibly (state D) in the
/// driver.
fn sleeping() -> usize {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return 0 };
    let sleeps = |task: &fs::DirEntry| {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        is_asleep(&read("stat")) && is_in_driver(&read("wchan"))
    };
    tasks.filter_map(Result::ok).filter(sleeps).count()
}

/// `stat` is a line such as `1234 (iou-wrk-1230) D 1 …`.
fn is_asleep(stat: &str) -> bool {
    let Some((name, rest)) = stat.rsplit_once(')') else { return false };
    name.contains("(iou-wrk") && rest.trim_start().starts_with('D')
}

/// `wchan` names the function in which the task sleeps; some kernels leave it empty or 0.
fn is_in_driver(wchan: &str) -> bool {
    matches!(wchan.trim(), "" | "0") || wchan.starts_with("ublk")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_worker_asleep_in_the_driver_counts() {
        // A worker that waits for a CPU (R), for work (S), or for a page of memory is slow, not
        // stuck.
        assert!(is_asleep("12 (iou-wrk-10) D 1 1 1"));
        assert!(!is_asleep("12 (iou-wrk-10) R 1 1 1") && !is_asleep("12 (iou-wrk-10) S 1 1 1"));
        assert!(!is_asleep("12 (watch-0) D 1 1 1") && !is_asleep(""));
        assert!(is_in_driver("ublk_ctrl_uring_cmd") && is_in_driver("0"));
        assert!(!is_in_driver("folio_wait_bit_common"));
    }
}
