//! Report for programs: every number of every round.

use serde_json::{Map, Value, json};

use super::{Came, Outcome, Report};
use crate::bench::bar::{Bound, Judged, Verdict};
use crate::bench::sample::Side;

/// The report as a JSON object.
pub fn text(report: &Report) -> String {
    let plan = report.plan;
    let value = json!({
        "kernel": report.kernel,
        "processors": report.processors,
        "clock": report.clock,
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        "seconds_of_rates": plan.seconds_of_rates,
        "queues": plan.queues,
        "cases": report.cases.iter().map(case).collect::<Vec<_>>(),
    });
    format!("{value:#}\n")
}

fn case(outcome: &Outcome) -> Value {
    let mut value = json!({
        "name": outcome.name,
        "claim": outcome.claim,
        "took_seconds": outcome.took.as_secs_f64(),
    });
    match &outcome.came {
        Came::Skipped(why) => value["skipped"] = json!(why),
        Came::Failed(why) => value["failed"] = json!(why),
        Came::Measured { sides, judged, notes } => {
            value["sides"] = sides.iter().map(side).collect();
            value["bars"] = judged.iter().map(bar).collect();
            value["notes"] = json!(notes);
        }
    }
    value
}

fn side(side: &Side) -> Value {
    let rounds = side.samples.iter().map(|sample| {
        let mut values: Map<String, Value> =
            sample.values.iter().map(|(metric, value)| (metric.key().to_owned(), json!(value))).collect();
        values.insert("pace".to_owned(), json!(sample.pace));
        values.insert("stolen".to_owned(), json!(sample.stolen));
        Value::Object(values)
    });
    json!({ "name": side.name, "rounds": rounds.collect::<Vec<_>>() })
}

fn bar(judged: &Judged) -> Value {
    let bound = match judged.bound {
        Bound::AtLeast(bar) => json!({ "at_least": bar }),
        Bound::AtMost(bar) => json!({ "at_most": bar }),
        Bound::Within(low, high) => json!({ "at_least": low, "at_most": high }),
        Bound::Shown => Value::Null,
    };
    let (verdict, why) = match &judged.verdict {
        Verdict::Met => ("met", Value::Null),
        Verdict::NotMet => ("not met", Value::Null),
        Verdict::NotTrusted(why) => ("not trusted", json!(why)),
        Verdict::Shown => ("shown", Value::Null),
    };
    let mut value = json!({ "what": judged.what, "bound": bound, "verdict": verdict, "why": why });
    if let Some(summary) = &judged.summary {
        value["median"] = json!(summary.median);
        value["min"] = json!(summary.min);
        value["max"] = json!(summary.max);
        value["rounds"] = json!(summary.rounds);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    #[test]
    fn every_round_can_be_read_back() {
        // A reader who doubts a median finds the rounds behind it.
        let value: Value = serde_json::from_str(&text(&report())).unwrap();
        assert_eq!(value["clock"], "instructions");
        let case = &value["cases"][0];
        assert_eq!(case["sides"][0]["rounds"][1]["iops"], json!(31_000.0));
        assert_eq!(case["bars"][0]["rounds"].as_array().map(Vec::len), Some(5));
        assert_eq!(case["bars"][2]["verdict"], "not met");
        assert_eq!(
            (&value["cases"][1]["skipped"], &value["cases"][2]["failed"]),
            (&json!("no such feature"), &json!("it broke"))
        );
    }
}
