//! Clients of the socket that misbehave, all at once, and one client that does not.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde_json::json;
use ublk_throttle_tests::daemon::Daemon;
use ublk_throttle_tests::process::Holdings;
use ublk_throttle_tests::scene::Scene;
use ublk_throttle_tests::socket::Client;

use crate::measure::{expect, expect_within};

/// The abuse lasts until both are reached: a time and a number of answers.
const ABUSED: Duration = Duration::from_secs(2);
const ANSWERS: usize = 50;

pub(super) fn abuse_of_the_socket_holds_up_nobody_and_takes_no_memory(scene: &Scene) -> Result<()> {
    // Garbage, half lines, 300 idle clients, clients that never read, and a line of 1 GiB, all at
    // once. Every answer to the well-behaved client takes at most 0.5 s, and the daemon grows by at
    // most 32 MiB.
    let daemon = scene.start("version: 1\ndevices:\n  d: { backend: { memory: 1MiB } }\n")?;
    let before = Holdings::of(daemon.pid())?.rss_kib;
    let over = AtomicBool::new(false);
    let (answers, most_kib) = thread::scope(|scope| -> Result<(Vec<Duration>, u64)> {
        let somebody = scope.spawn(|| {
            let answers = be_answered(scene, &daemon);
            over.store(true, Ordering::Relaxed);
            answers
        });
        let abusers = [
            scope.spawn(|| endless_line(scene)),
            scope.spawn(|| garbage(scene, &over)),
            scope.spawn(|| deaf_readers(scene, &over)),
            scope.spawn(|| idle_and_half_lines(scene, &over)),
        ];
        for abuser in abusers {
            abuser.join().map_err(|_| anyhow!("a client panicked"))??;
        }
        somebody.join().map_err(|_| anyhow!("a client panicked"))?
    })?;
    daemon.stop()?;
    let worst = answers.iter().max().copied().unwrap_or_default();
    let grown = most_kib.saturating_sub(before);
    eprintln!("          {} answers, {grown} KiB more at most", answers.len());
    expect(grown <= 32 << 10, || format!("the daemon grew by {grown} KiB"))?;
    expect_within("the slowest answer", worst, Duration::from_millis(500))
}

/// Asks on new and on old connections; returns the time of each answer, and the largest memory of
/// the daemon.
fn be_answered(scene: &Scene, daemon: &Daemon) -> Result<(Vec<Duration>, u64)> {
    let (mut took, mut most_kib) = (Vec::new(), 0);
    let mut old = scene.connect()?;
    let begin = Instant::now();
    while begin.elapsed() < ABUSED || took.len() < ANSWERS {
        let begin = Instant::now();
        old.must(&json!({"cmd": "list"}), Duration::from_secs(10)).context("an old connection")?;
        took.push(begin.elapsed());
        let begin = Instant::now();
        scene.connect()?.must(&json!({"cmd": "ping"}), Duration::from_secs(10)).context("a new connection")?;
        took.push(begin.elapsed());
        if took.len().is_multiple_of(20) {
            // A new process of the command line is answered as well.
            scene.ask(&["list"])?.expect_code(0)?;
        }
        most_kib = most_kib.max(Holdings::of(daemon.pid())?.rss_kib);
        sleep(Duration::from_millis(20));
    }
    Ok((took, most_kib))
}

/// Sends a line of 1 GiB without its end, as far as the daemon accepts it.
fn endless_line(scene: &Scene) -> Result<()> {
    let mut client = scene.connect()?;
    let part = vec![b'x'; 1 << 20];
    for sent in 0..1024 {
        if client.send(&part, Duration::from_secs(5))? < part.len() {
            eprintln!("          of a line of 1 GiB about {sent} MiB were taken");
            return Ok(());
        }
    }
    eprintln!("          a line of 1 GiB was taken to its end");
    Ok(())
}

/// Sends lines of arbitrary bytes, with one client after another.
fn garbage(scene: &Scene, over: &AtomicBool) -> Result<()> {
    let noise: Vec<u8> = (0..65536_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    while !over.load(Ordering::Relaxed) {
        // The daemon may refuse the bytes or close the connection.
        let _ = Client::connect(&scene.socket()).and_then(|mut client| client.send(&noise, Duration::from_secs(1)));
    }
    Ok(())
}

/// Clients that send questions without a pause and never read.
fn deaf_readers(scene: &Scene, over: &AtomicBool) -> Result<()> {
    let questions = b"{\"id\":1,\"cmd\":\"list\"}\n".repeat(1000);
    let mut clients = (0..20).map(|_| scene.connect()).collect::<Result<Vec<_>>>()?;
    while !over.load(Ordering::Relaxed) {
        for client in &mut clients {
            client.send(&questions, Duration::from_millis(20))?;
        }
    }
    Ok(())
}

/// 300 clients that send nothing, and 50 that leave a line of almost 1 MiB unfinished.
fn idle_and_half_lines(scene: &Scene, over: &AtomicBool) -> Result<()> {
    let idle = (0..300).map(|_| scene.connect()).collect::<Result<Vec<_>>>()?;
    let mut halves = (0..50).map(|_| scene.connect()).collect::<Result<Vec<_>>>()?;
    let half = vec![b'{'; (1 << 20) - 100];
    for client in &mut halves {
        client.send(&half, Duration::from_millis(100))?;
    }
    while !over.load(Ordering::Relaxed) {
        sleep(Duration::from_millis(50));
    }
    drop((idle, halves));
    Ok(())
}
