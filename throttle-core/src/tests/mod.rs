//! Tests of the whole core in virtual time: several queues, one throttle, no thread and no clock.

mod chaos;
mod differential;
mod fairness;
mod live_change;
mod scenarios;
mod worked_examples;
mod world;
