//! The time of a decision: alone and contended, below and at the limit, with many members and
//! levels; beside `governor`.
//!
//! `cargo bench -p throttle-core` prints times; compare ratios within one run only.

use std::hint::black_box;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use governor::{Quota, RateLimiter};
use throttle_core::cost::Operation;
use throttle_core::gate::Gate;
use throttle_core::group::{Change, GroupOptions, MemberOptions};
use throttle_core::ids::{GroupId, MemberId};
use throttle_core::limits::{Limit, LimitKind, Limits};
use throttle_core::throttle::{Doorbell, Throttle};
use throttle_core::time::Time;

struct Silent;

impl Doorbell for Silent {
    fn ring(&self) {}
}

/// All six limits, with bursts, each far above the rate of the benchmark.
fn six_limits(avg: u64) -> Limits {
    let mut limits = Limits::UNLIMITED;
    for kind in LimitKind::ALL {
        let scale = if kind.is_iops() { 1 } else { 4096 };
        limits.set(kind, Limit { avg: avg * scale, max: 2 * avg * scale, burst_length_ns: 1_000_000_000 });
    }
    limits
}

fn group(throttle: &Throttle, limits: Limits, parent: Option<GroupId>) -> GroupId {
    throttle.add_group(&GroupOptions { limits, parent, ..GroupOptions::default() }, Time::ZERO).expect("it fits")
}

fn member(throttle: &Throttle, group: GroupId) -> MemberId {
    let member = throttle.join(&MemberOptions { group: Some(group), ..MemberOptions::default() }, Time::ZERO);
    throttle.go_live(member);
    member
}

fn gate(throttle: &Arc<Throttle>, group: GroupId) -> Gate {
    Gate::new(Arc::clone(throttle), member(throttle, group), 128, Arc::new(Silent))
}

/// A request per microsecond, below the limit.
fn decide(gate: &mut Gate, now: &mut Time) {
    *now = now.plus_nanos(1_000);
    black_box(gate.request(0, Operation::Read, 4096, *now));
}

fn alone(criterion: &mut Criterion) {
    let mut benches = criterion.benchmark_group("decision, one thread, six limits");
    benches.bench_function("ours", |bencher| {
        let throttle = Throttle::new();
        let group = group(&throttle, six_limits(10_000_000), None);
        let mut gate = gate(&throttle, group);
        let mut now = Time::ZERO;
        bencher.iter(|| decide(&mut gate, &mut now));
    });
    benches.bench_function("ours, each asked for", |bencher| {
        let throttle = Throttle::new();
        let group = group(&throttle, six_limits(10_000_000), None);
        let mut gate = gate(&throttle, group).without_leases();
        let mut now = Time::ZERO;
        bencher.iter(|| decide(&mut gate, &mut now));
    });
    benches.bench_function("ours, at the limit", |bencher| {
        // A request per 100 us at 10,000/s with the headroom used up: every decision is made at
        // the brim.
        let throttle = Throttle::new();
        let group = group(&throttle, Limits::UNLIMITED.with(LimitKind::IopsTotal, Limit::average(10_000)), None);
        let mut gate = gate(&throttle, group);
        let mut now = Time::ZERO;
        let mut let_go = Vec::with_capacity(128);
        while gate.deadline().is_none() {
            gate.request(0, Operation::Read, 4096, now);
            gate.poll(now, false, &mut let_go);
        }
        bencher.iter(|| {
            // A whole cycle: the held request is dispatched, and the next one is held.
            now = gate.deadline().unwrap_or(now);
            let_go.clear();
            gate.request(0, Operation::Read, 4096, now);
            gate.poll(now, false, &mut let_go);
            black_box(&let_go);
        });
        now = now.plus_nanos(3_600_000_000_000);
        while gate.retire().is_err() {
            gate.poll(now, true, &mut let_go);
        }
    });
    benches.bench_function("ours, eight of 32 that wait", |bencher| {
        // Every 800 us eight requests are dispatched and eight arrive: a queue at depth 32 under
        // 10,000/s.
        let throttle = Throttle::in_company();
        let group = group(&throttle, Limits::UNLIMITED.with(LimitKind::IopsTotal, Limit::average(10_000)), None);
        let mut gate = gate(&throttle, group);
        let mut now = Time::ZERO;
        let mut let_go = Vec::with_capacity(128);
        for _ in 0..1_001 + 32 {
            gate.request(0, Operation::Read, 4096, now);
        }
        gate.poll(now, false, &mut let_go);
        bencher.iter(|| {
            now = now.plus_nanos(800_000);
            let_go.clear();
            gate.poll(now, true, &mut let_go);
            for _ in 0..let_go.len() {
                gate.request(0, Operation::Read, 4096, now);
            }
            gate.poll(now, false, &mut let_go);
        });
        now = now.plus_nanos(3_600_000_000_000);
        while gate.retire().is_err() {
            gate.poll(now, true, &mut let_go);
        }
    });
    benches.bench_function("governor, its own clock's arithmetic only", |bencher| {
        let clock = governor::clock::FakeRelativeClock::default();
        let quota = Quota::per_second(NonZeroU32::new(10_000_000).expect("positive"));
        let limiter = RateLimiter::direct_with_clock(quota, clock.clone());
        bencher.iter(|| {
            clock.advance(Duration::from_nanos(1_000));
            black_box(limiter.check().is_ok())
        });
    });
    benches.finish();
}

fn idle_members(criterion: &mut Criterion) {
    let mut benches = criterion.benchmark_group("decision beside idle members");
    for idle in [1, 10, 100, 1_000, 3_000] {
        benches.bench_with_input(BenchmarkId::from_parameter(idle), &idle, |bencher, &idle| {
            let throttle = Throttle::new();
            let group = group(&throttle, six_limits(10_000_000), None);
            for _ in 0..idle {
                member(&throttle, group);
            }
            let mut gate = gate(&throttle, group).without_leases();
            let mut now = Time::ZERO;
            bencher.iter(|| decide(&mut gate, &mut now));
        });
    }
    benches.finish();
}

fn levels(criterion: &mut Criterion) {
    let mut benches = criterion.benchmark_group("decision below groups with six limits each");
    for levels in 1..=4 {
        benches.bench_with_input(BenchmarkId::from_parameter(levels), &levels, |bencher, &levels| {
            let throttle = Throttle::new();
            let mut parent = None;
            for _ in 0..levels {
                parent = Some(group(&throttle, six_limits(10_000_000), parent));
            }
            let mut gate = gate(&throttle, parent.expect("at least one")).without_leases();
            let mut now = Time::ZERO;
            bencher.iter(|| decide(&mut gate, &mut now));
        });
    }
    benches.finish();
}

/// The time for `count` decisions on one gate while a second thread decides on the second gate all
/// along.
fn beside(mut own: Gate, mut other: Gate, count: u64) -> Duration {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let rival = scope.spawn(|| {
            let mut now = Time::ZERO;
            while !is_over.load(Ordering::Relaxed) {
                decide(&mut other, &mut now);
            }
        });
        let mut now = Time::ZERO;
        let start = Instant::now();
        for _ in 0..count {
            decide(&mut own, &mut now);
        }
        let elapsed = start.elapsed();
        is_over.store(true, Ordering::Relaxed);
        rival.join().expect("the rival only decides");
        elapsed
    })
}

fn contended(criterion: &mut Criterion) {
    let mut benches = criterion.benchmark_group("decision, two threads");
    benches.bench_function("one group", |bencher| {
        bencher.iter_custom(|count| {
            let throttle = Throttle::new();
            let group = group(&throttle, six_limits(100_000_000), None);
            beside(gate(&throttle, group), gate(&throttle, group), count)
        });
    });
    benches.bench_function("two groups", |bencher| {
        bencher.iter_custom(|count| {
            // Separate throttles, as in two daemons: no state is shared.
            let [one, other] = [(); 2].map(|()| {
                let throttle = Throttle::new();
                let group = group(&throttle, six_limits(100_000_000), None);
                gate(&throttle, group)
            });
            beside(one, other, count)
        });
    });
    benches.finish();
}

/// A device without a request of its own in the tree, and one that waits for its own limit beside
/// it, below a root without limits.
fn beside_a_stranger(criterion: &mut Criterion) {
    let mut benches = criterion.benchmark_group("decision below a root without limits");
    for strangers in [0_u32, 1] {
        benches.bench_with_input(
            BenchmarkId::new("strangers that wait", strangers),
            &strangers,
            |bencher, &strangers| {
                let throttle = Throttle::new();
                let root = group(&throttle, Limits::UNLIMITED, None);
                let mut own = gate(&throttle, group(&throttle, six_limits(10_000_000), Some(root)));
                let slow = Limits::UNLIMITED.with(LimitKind::IopsTotal, Limit::average(1));
                let mut stranger = gate(&throttle, group(&throttle, slow, Some(root)));
                let mut now = Time::ZERO;
                for _ in 0..3 * strangers {
                    stranger.request(0, Operation::Read, 4096, now);
                }
                bencher.iter(|| decide(&mut own, &mut now));
                while stranger.retire().is_err() {
                    now = now.plus_nanos(1_000_000_000);
                    stranger.poll(now, true, &mut Vec::new());
                }
            },
        );
    }
    benches.finish();
}

/// A reload of 3000 devices in one group: all their limits change, or none does.
fn changes(criterion: &mut Criterion) {
    const DEVICES: usize = 3_000;
    let mut benches = criterion.benchmark_group("change of 3000 devices");
    let throttle = Throttle::new();
    let group = group(&throttle, six_limits(10_000_000), None);
    let members: Vec<MemberId> = (0..DEVICES).map(|_| member(&throttle, group)).collect();
    let to = |avg: u64| -> Vec<Change> {
        members.iter().map(|&member| Change::MemberLimits(member, six_limits(avg))).collect()
    };
    let (one, other) = (to(1_000), to(2_000));
    let mut now = Time::ZERO;
    let mut apply = |changes: &[Change]| {
        now = now.plus_nanos(1_000);
        throttle.apply(changes, now).expect("no place changes");
    };
    let mut turn = 0;
    benches.bench_function("other limits", |bencher| {
        bencher.iter(|| {
            turn += 1;
            apply(if turn % 2 == 0 { &one } else { &other });
        });
    });
    benches.bench_function("the same limits", |bencher| bencher.iter(|| apply(&one)));
    benches.finish();
}

criterion_group!(benches, alone, idle_members, levels, contended, beside_a_stranger, changes);
criterion_main!(benches);
