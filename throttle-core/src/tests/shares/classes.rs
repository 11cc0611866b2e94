//! Random trees under seven kinds of load, each judged window by window.
//!
//! | class       | load                                                                   |
//! | ----------- | ---------------------------------------------------------------------- |
//! | steady      | every flow always has requests waiting                                 |
//! | both ways   | the same; each device reads and writes                                 |
//! | bursts      | the same; half of the limits have a burst                              |
//! | come & go   | some flows pause, some come back, three times                          |
//! | changes     | limits, weights and places change under load, three times              |
//! | one kind    | steady; all limits are bps-total, or all are iops-total                |
//! | one limit   | steady; the root alone has a limit                                     |
//!
//! Besides the judge's verdict, each window is checked for:
//! * pauses: a backlogged flow pauses no longer than its limits explain ([`Judge::pause_ns`]) and
//!   250 ms for clients that come back. A pause across an event may be as long as either window
//!   explains;
//! * twins: devices that differ in nothing get the same, within 2 % and two requests. The 2 % cover
//!   the 100 ms that one of them may be ahead in a window of at least 4 s;
//! * meters: no limit passes more than its rate, its capacity and one request in any window.
//!
//! A failure prints the seed and the tree. `SHARES_CLASS=3 SHARES_SEED=17 cargo test -p throttle-core
//! --lib one_tree -- --ignored` replays one.

use std::fmt::Write as _;
use std::ops::Range;

use super::drive::Run;
use super::judge::{Judge, Reason, Window};
use super::meter::Regime;
use super::plan::{NANO, Plan};
use super::random::Random;
use super::trees::{Shape, changed, plan};
use crate::limits::LimitKind;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Steady,
    BothWays,
    Bursts,
    ComeAndGo,
    Changes,
    OneKind,
    OneLimit,
}

const CLASSES: [Class; 7] =
    [Class::Steady, Class::BothWays, Class::Bursts, Class::ComeAndGo, Class::Changes, Class::OneKind, Class::OneLimit];

/// A kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Unfair,
    Idle,
    Pause,
    Twins,
    Meter,
}

const FAULTS: [Fault; 5] = [Fault::Unfair, Fault::Idle, Fault::Pause, Fault::Twins, Fault::Meter];

/// The shortest window. A plain rate may start a window 100 ms ahead, 2.5 % of this.
const WINDOW_NS: u64 = 4_000_000_000;

/// The requests of the slowest flow that a window waits for: two requests are 1 % of them.
const REQUESTS: u64 = 200;

/// The pause that a client is allowed for the return of its neighbours.
const RETURN_NS: f64 = 250e6;

/// The time from an event to the next window: more than the 100 ms that a rate may run ahead and the
/// 250 ms for clients that come back.
const SETTLE_NS: u64 = 500_000_000;

/// The warm-up, besides [`SETTLE_NS`]: ten times the headroom of a rate.
const WARM_UP_NS: u64 = 1_000_000_000;

/// The judgement of one tree.
struct Trial {
    class: Class,
    run: Run,
    /// The pause that the previous window explains to each flow; 0 for a flow that was off.
    explained_ns: Vec<f64>,
    windows: usize,
    faults: Vec<Fault>,
    text: String,
}

impl Trial {
    fn new(class: Class, random: &mut Random) -> Self {
        let total = if random.chance(50) { LimitKind::BpsTotal } else { LimitKind::IopsTotal };
        let shape = Shape {
            both: class == Class::BothWays,
            bursts: class == Class::Bursts,
            only: matches!(class, Class::OneKind | Class::OneLimit).then_some(total),
            root_only: class == Class::OneLimit,
        };
        let plan = plan(random, shape);
        let run = Run::new(&plan, if class == Class::ComeAndGo { 8 } else { 16 });
        let explained_ns = vec![0.0; plan.flows.len()];
        Self { class, run, explained_ns, windows: 0, faults: Vec::new(), text: String::new() }
    }

    fn found(&mut self, fault: Fault, text: &str) {
        if !self.faults.contains(&fault) {
            self.faults.push(fault);
        }
        writeln!(self.text, "  window {} until {:.3} s, {text}", self.windows, self.run.now_ns as f64 / 1e9)
            .expect("a string takes all");
    }

    /// Runs past the transients of an event. Returns whether the flows that are off have no request
    /// left.
    fn settle(&mut self) -> bool {
        // The slowest limit earns the debt of its largest request, before the event and after it.
        let run = &mut self.run;
        let earns_ns = |plan: &Plan| {
            let limits = plan.limits();
            let times = limits.iter().flat_map(|&at| {
                let takers = plan.flows.iter().filter(move |flow| plan.counts(at, **flow));
                takers.map(move |flow| plan.cost(at, flow.bytes) / u128::from(plan.limit(at).avg))
            });
            times.max().unwrap_or(0)
        };
        let slowest_ns = earns_ns(&run.plan).min(60 * NANO) as u64;
        run.run_at_most(run.now_ns + SETTLE_NS + 2 * slowest_ns, 6_000);
        let mut grants = 3_000;
        while !run.is_drained() && grants > 0 {
            let before = run.granted;
            run.run_at_most(run.now_ns + SETTLE_NS, grants);
            grants = grants.saturating_sub(run.granted - before).min(grants - 1);
        }
        run.is_drained()
    }

    /// Runs one window of at most `grants` requests, but at least [`WINDOW_NS`] long, and judges it.
    fn window(&mut self, grants: u64, requests: u64) {
        let run = &mut self.run;
        run.begin();
        let (from_ns, before, first) = (run.now_ns, run.grants(), run.granted);
        loop {
            run.run_at_most(run.now_ns + WINDOW_NS, 5 * grants);
            let granted = run.counts.iter().zip(&before).map(|(count, before)| (count.is_on, count.granted - before));
            let least = granted.filter(|&(is_on, _)| is_on).map(|(_, granted)| granted).min();
            if run.granted - first >= grants || least.is_none_or(|least| least >= requests) {
                break;
            }
        }
        let regimes = run.regimes();
        if regimes.contains(&Regime::Mixed) {
            return;
        }
        self.windows += 1;
        let rates: Vec<Option<u64>> = std::iter::zip(&run.limits, &regimes)
            .map(|(&at, regime)| match regime {
                Regime::Average => Some(run.plan.limit(at).avg),
                Regime::Burst => Some(run.plan.limit(at).max),
                Regime::Pool | Regime::Mixed => None,
            })
            .collect();
        let granted: Vec<u64> = run.grants().iter().zip(&before).map(|(now, before)| now - before).collect();
        let backlogged = run.is_on();
        let plan = run.plan.clone();
        let window =
            Window { plan: &plan, ns: run.now_ns - from_ns, granted: &granted, backlogged: &backlogged, rates: &rates };
        self.judge(&window);
        self.compare_twins(&window);
    }

    fn judge(&mut self, window: &Window<'_>) {
        let judge = Judge::new(window);
        let complaints = judge.complaints();
        for complaint in &complaints {
            let fault = if complaint.reason == Reason::Idle { Fault::Idle } else { Fault::Unfair };
            self.found(fault, &complaint.to_string());
        }
        for flow in 0..window.granted.len() {
            // The pauses of a flow with a complaint have the same cause.
            let is_judged = window.backlogged[flow] && complaints.iter().all(|complaint| complaint.flow != flow);
            let explained_ns = if window.backlogged[flow] { judge.pause_ns(flow) } else { 0.0 };
            let longest_ns = explained_ns.max(self.explained_ns[flow]) + RETURN_NS;
            self.explained_ns[flow] = explained_ns;
            let pause_ns = self.run.pause_ns(flow) as f64;
            if is_judged && pause_ns > longest_ns {
                let until_s = self.run.counts[flow].paused_until_ns as f64 / 1e9;
                let text = format!(
                    "Pause: flow {flow} ({}) paused {:.3} s until {until_s:.3} s, explained {:.3} s",
                    window.plan.name(flow),
                    pause_ns / 1e9,
                    longest_ns / 1e9
                );
                self.found(Fault::Pause, &text);
            }
        }
    }

    fn compare_twins(&mut self, window: &Window<'_>) {
        let Window { plan, granted, backlogged, .. } = *window;
        let flows = |device: usize| {
            let flows = (0..plan.flows.len()).filter(move |&flow| plan.flows[flow].device == device);
            flows.map(|flow| (plan.flows[flow].direction, plan.flows[flow].bytes, flow, backlogged[flow]))
        };
        for (first, one) in plan.nodes.iter().enumerate() {
            for (second, two) in plan.nodes.iter().enumerate().skip(first + 1) {
                let is_alike = one.is_device
                    && two.is_device
                    && (one.parent, one.weight) == (two.parent, two.weight)
                    && one.limits.is_unlimited()
                    && two.limits.is_unlimited()
                    && flows(first).count() == flows(second).count()
                    && flows(first).zip(flows(second)).all(|(a, b)| (a.0, a.1) == (b.0, b.1) && a.3 && b.3);
                if !is_alike {
                    continue;
                }
                for (a, b) in flows(first).zip(flows(second)) {
                    let (a, b) = (granted[a.2], granted[b.2]);
                    if a.abs_diff(b) as f64 > a.max(b) as f64 * 0.02 + 2.0 {
                        let text = format!("Twins: devices {first} and {second} were granted {a} and {b} requests");
                        self.found(Fault::Twins, &text);
                    }
                }
            }
        }
    }
}

fn trial(class: Class, seed: u64) -> Trial {
    let mut random = Random::new(seed * CLASSES.len() as u64 + class as u64);
    let mut trial = Trial::new(class, &mut random);
    trial.run.switch_all_on();
    trial.run.run_at_most(WARM_UP_NS, 3_000);
    trial.settle();
    trial.run.forget_warm_up();
    match class {
        Class::Steady | Class::BothWays | Class::OneKind | Class::OneLimit => trial.window(10_000, REQUESTS),
        Class::Bursts => {
            for _ in 0..5 {
                trial.window(2_500, 50);
                trial.run.forget_pauses();
            }
        }
        Class::ComeAndGo | Class::Changes => {
            trial.window(3_000, REQUESTS);
            for _ in 0..3 {
                trial.run.forget_pauses();
                if class == Class::Changes {
                    let to = changed(&mut random, &trial.run.plan);
                    trial.run.change(&to);
                } else {
                    switch_some(&mut random, &mut trial.run);
                }
                if trial.settle() {
                    trial.window(3_000, REQUESTS);
                }
            }
        }
    }
    if let Some((at, excess)) = trial.run.worst_meter() {
        trial.found(Fault::Meter, &format!("Meter: {} of {}: {excess} units too many", at.kind.name(), at.node));
    }
    trial
}

/// Switches one flow to half of all flows on or off; one at least stays on.
fn switch_some(random: &mut Random, run: &mut Run) {
    for _ in 0..random.between(1, run.counts.len().div_ceil(2) as u64) {
        let flow = random.below(run.counts.len());
        let is_on = run.counts[flow].is_on;
        if !is_on || run.counts.iter().filter(|count| count.is_on).count() > 1 {
            run.switch(flow, !is_on);
        }
    }
}

/// Judges the trees of a class. Panics with the number of trees for each fault, and the first three
/// trees in full.
fn judge_all(class: Class, seeds: Range<u64>) {
    let (mut failed, mut windows, mut text) = (Vec::new(), 0, String::new());
    let mut by_fault = [0; FAULTS.len()];
    for seed in seeds.clone() {
        let trial = trial(class, seed);
        windows += trial.windows;
        FAULTS.iter().zip(&mut by_fault).for_each(|(fault, count)| *count += u32::from(trial.faults.contains(fault)));
        if !trial.faults.is_empty() {
            failed.push(seed);
            if failed.len() <= 3 {
                write!(text, "{:?}, seed {seed}\n{}{}", trial.class, trial.run.plan, trial.text)
                    .expect("a string takes all");
            }
        }
    }
    let trees = seeds.count();
    // Most trees have a window without a change of regime; a generator without any would pass.
    assert!(windows * 2 >= trees, "{windows} windows of {trees} trees");
    assert!(
        failed.is_empty(),
        "{} of {trees} trees of class {class:?}, {windows} windows; {FAULTS:?}: {by_fault:?}; seeds {:?}\n{text}",
        failed.len(),
        &failed[..failed.len().min(20)],
    );
}

const FEW: Range<u64> = 0..300;
const MANY: Range<u64> = 0..10_000;

#[test]
fn every_flow_gets_its_due_of_a_single_limit() {
    // Weights alone rule: the judge has nothing to complain of at any fair scheduler.
    judge_all(Class::OneLimit, FEW);
}

#[test]
fn every_flow_gets_its_due_of_limits_of_one_kind() {
    judge_all(Class::OneKind, FEW);
}

/// The aim for these classes is 0, which the rule does not reach: where requests are coarse beside
/// the limits (`tree/turn.rs`, "What it gives up"), a line can lose part of
/// its due. These tests hold what is reached: at most `known` unfair trees, and none in which a limit
/// is exceeded. `the_limits_of_the_rule` prints the trees.
fn judge_up_to(known: usize, class: Class) {
    let trials: Vec<Trial> = FEW.map(|seed| trial(class, seed)).filter(|trial| !trial.faults.is_empty()).collect();
    let exceeded = trials.iter().find(|trial| trial.faults.contains(&Fault::Meter));
    assert!(exceeded.is_none(), "{}", exceeded.map_or("", |trial| &trial.text));
    assert!(trials.len() <= known, "{} of 300 trees of class {class:?}, {known} were known", trials.len());
}

#[test]
fn few_steady_trees_are_unfair() {
    judge_up_to(39, Class::Steady);
}

#[test]
fn few_trees_that_read_and_write_are_unfair() {
    judge_up_to(45, Class::BothWays);
}

#[test]
fn few_trees_are_unfair_during_bursts_and_after_them() {
    judge_up_to(17, Class::Bursts);
}

#[test]
fn few_trees_are_unfair_while_flows_come_and_go() {
    judge_up_to(39, Class::ComeAndGo);
}

#[test]
fn few_trees_are_unfair_between_changes() {
    judge_up_to(48, Class::Changes);
}

#[test]
#[ignore = "the rule does not reach this: see `judge_up_to`"]
fn the_limits_of_the_rule() {
    for class in [Class::Steady, Class::BothWays, Class::Bursts, Class::ComeAndGo, Class::Changes] {
        judge_all(class, FEW);
    }
}

#[test]
#[ignore = "takes minutes"]
fn ten_thousand_trees_with_limits_of_one_kind() {
    judge_all(Class::OneKind, MANY);
}

#[test]
#[ignore = "takes minutes"]
fn ten_thousand_trees_with_a_single_limit() {
    judge_all(Class::OneLimit, MANY);
}

#[test]
#[ignore = "takes minutes"]
fn ten_thousand_steady_trees() {
    judge_all(Class::Steady, MANY);
}

#[test]
#[ignore = "takes minutes"]
fn ten_thousand_trees_that_read_and_write() {
    judge_all(Class::BothWays, MANY);
}

#[test]
#[ignore = "takes minutes"]
fn ten_thousand_trees_with_bursts() {
    judge_all(Class::Bursts, MANY);
}

#[test]
#[ignore = "takes minutes"]
fn ten_thousand_trees_with_flows_that_come_and_go() {
    judge_all(Class::ComeAndGo, MANY);
}

#[test]
#[ignore = "takes minutes"]
fn ten_thousand_trees_with_changes() {
    judge_all(Class::Changes, MANY);
}

#[test]
#[ignore = "replays the tree of SHARES_CLASS and SHARES_SEED"]
fn one_tree() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    let seed = number("SHARES_SEED");
    judge_all(CLASSES[number("SHARES_CLASS") as usize], seed..seed + 1);
}
