//! Tests of the whole core in virtual time (several queues, one throttle, no thread and no clock),
//! and its models under the threads of a model checker.

#[cfg(not(any(loom, shuttle)))]
mod calm;
#[cfg(not(any(loom, shuttle)))]
mod chaos;
#[cfg(not(any(loom, shuttle)))]
mod differential;
#[cfg(not(any(loom, shuttle)))]
mod explore;
#[cfg(not(any(loom, shuttle)))]
mod fairness;
#[cfg(not(any(loom, shuttle)))]
mod leases;
#[cfg(not(any(loom, shuttle)))]
mod live_change;
#[cfg(any(loom, shuttle))]
mod models;
#[cfg(not(any(loom, shuttle)))]
mod properties;
#[cfg(not(any(loom, shuttle)))]
mod resume;
#[cfg(not(any(loom, shuttle)))]
mod scenarios;
#[cfg(not(any(loom, shuttle)))]
mod shares;
#[cfg(not(any(loom, shuttle)))]
mod short_cuts;
#[cfg(not(any(loom, shuttle)))]
mod siblings;
#[cfg(not(any(loom, shuttle)))]
mod slack;
#[cfg(not(any(loom, shuttle)))]
mod worked_examples;
#[cfg_attr(any(loom, shuttle), allow(dead_code, reason = "models have queue threads of their own"))]
mod world;
