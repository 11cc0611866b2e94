//! Two promises of limits, on random trees and loads: never more than allowed in any window, never
//! less while requests wait.

use std::sync::Arc;

use proptest::prelude::*;

use super::chaos::assert_windows;
use super::slack::Silent;
use super::world::World;
use crate::cost::Operation;
use crate::gate::Gate;
use crate::group::Verdict;
use crate::request::Request;
use crate::time::Time;

proptest! {
    #[test]
    fn every_limit_of_a_tree_holds_in_every_window(
        rack_bps in 100_000_u64..5_000_000,
        tenant_iops in 10_u64..500,
        own_bps in 50_000_u64..2_000_000,
        steps in prop::collection::vec((0..3_usize, 1_u64..150_000, any::<bool>(), 0_u64..30_000_000), 1..150),
    ) {
        // rack (bytes) over tenant (operations) over A (bytes written) and B; C in the rack. Each
        // limit on its own: served <= rate · T + capacity + the request at the brim.
        let mut world = World::new();
        let rack = world.group(&format!("bps-total={rack_bps}"));
        let tenant = world.group_below(Some(rack), &format!("iops-total={tenant_iops}"), 200);
        for (group, own) in [(tenant, format!("bps-write={own_bps}")), (tenant, String::new()), (rack, String::new())] {
            let member = world.device(Some(group), &own);
            world.queue(member);
        }
        for (queue, bytes, is_read, ns) in steps {
            world.request(queue, if is_read { Operation::Read } else { Operation::Write }, bytes);
            world.run_until(world.now.plus_nanos(ns));
        }
        world.run_until(world.now.plus_nanos(3_600_000_000_000));
        let went = &world.went;
        let all: Vec<_> = went.iter().map(|went| (went.at, went.bytes)).collect();
        assert_windows(&all, rack_bps, 0);
        let of_tenant: Vec<_> = went.iter().filter(|went| went.queue < 2).map(|went| (went.at, 1)).collect();
        assert_windows(&of_tenant, tenant_iops, 0);
        let written_by_a: Vec<_> = went
            .iter()
            .filter(|went| went.queue == 0 && went.operation == Operation::Write)
            .map(|went| (went.at, went.bytes))
            .collect();
        assert_windows(&written_by_a, own_bps, 0);
    }

    #[test]
    fn group_with_work_waiting_is_never_under_served(
        bps in 10_000_u64..10_000_000,
        sizes in prop::collection::vec(512_u64..65_536, 1..20),
        gaps_ns in prop::collection::vec(1_u64..50_000_000, 1..100),
    ) {
        // Two queues that always have 16 requests waiting. A bucket with requests always waiting
        // never runs empty, so the bytes served are those drained, rate · T, and the level, which
        // is above the capacity.
        let mut world = World::new();
        let group = world.group(&format!("bps-total={bps}"));
        let queues = [world.simple(group).1, world.simple(group).1];
        let mut sent = 0;
        let mut next = sizes.iter().cycle();
        for gap_ns in gaps_ns {
            loop {
                while sent < world.went.len() + 32 {
                    world.request(queues[sent % 2], Operation::Read, *next.next().unwrap());
                    sent += 1;
                }
                world.run_until(world.now);
                if sent == world.went.len() + 32 {
                    break;
                }
            }
            let end = world.now.plus_nanos(gap_ns);
            while let Some(at) = world.next_deadline().filter(|&at| at <= end) {
                world.run_until(at);
                while sent < world.went.len() + 32 {
                    world.request(queues[sent % 2], Operation::Read, *next.next().unwrap());
                    sent += 1;
                }
            }
            world.run_until(end);
            let served: u128 = world.went.iter().map(|went| u128::from(went.bytes)).sum();
            let drained = u128::from(bps) * u128::from(world.now.as_nanos()) / 1_000_000_000;
            prop_assert!(served >= drained + u128::from(bps) / 10, "{served} B, {drained} B drained");
        }
    }

    #[test]
    fn requests_asked_for_together_fare_as_one_by_one(
        iops in 100_u64..200_000,
        bps in 1_000_000_u64..1_000_000_000,
        turns in prop::collection::vec((prop::collection::vec((any::<bool>(), 1_u64..150_000), 0..40), 1_u64..20_000_000), 1..40),
    ) {
        // Asked together, the requests of a turn take the lock once, and prepaid ones not at all;
        // decisions are the same.
        let sides = [(); 2].map(|()| {
            let world = World::as_in_daemon();
            let group = world.group(&format!("iops-total={iops} bps-read={bps}"));
            let member = world.device(Some(group), "");
            let gate = Gate::new(world.throttle.clone(), member, 64, Arc::new(Silent));
            (world.throttle.clone(), member, gate, Vec::new())
        });
        let members = sides.each_ref().map(|(throttle, member, ..)| (throttle.clone(), *member));
        let [(.., mut singly, mut went_singly), (.., mut together, mut went_together)] = sides;
        let (mut now, mut tag) = (Time::ZERO, 0);
        for (requests, gap_ns) in turns {
            now = now.plus_nanos(gap_ns);
            let mut asked = Vec::new();
            for (is_read, bytes) in requests {
                let operation = if is_read { Operation::Read } else { Operation::Write };
                if singly.request(tag, operation, bytes, now) == Verdict::Go {
                    went_singly.push(tag);
                }
                if asked.is_empty() && together.passes(operation, bytes, now) {
                    went_together.push(tag);
                } else {
                    asked.push(Request { tag, operation, bytes, since: now });
                }
                tag += 1;
            }
            together.request_all(&asked, now, &mut went_together);
            singly.poll(now, false, &mut went_singly);
            together.poll(now, false, &mut went_together);
            prop_assert_eq!(&went_singly, &went_together);
            prop_assert_eq!(singly.deadline(), together.deadline());
        }
        members.into_iter().for_each(|(throttle, member)| throttle.drain(member, now));
        singly.poll(now, true, &mut went_singly);
        together.poll(now, true, &mut went_together);
        prop_assert_eq!(went_singly.len(), tag as usize);
        prop_assert_eq!(went_singly, went_together);
    }
}
