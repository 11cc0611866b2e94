//! The trials of a run: all, a selection, or named trials.

use std::collections::BTreeSet;
use std::env::{self, VarError};

use anyhow::{Result, bail, ensure};

use crate::Case;

/// The name of a selection. Unset: all trials.
const SELECTION: &str = "UBLK_THROTTLE_SELECTION";

/// Names of trials, separated by commas: only these trials of the selection run.
const TRIALS: &str = "UBLK_THROTTLE_TRIALS";

const SELECTIONS: [(&str, &[&str]); 3] = [("every-kernel", &EVERY_KERNEL), ("two-cpus", &TWO_CPUS), ("smoke", &SMOKE)];

/// Paths that depend on the driver's features: data with and without a copy, requests in batches, a
/// resize, the end of a queue. The rest of the suite takes the same path on every kernel.
const EVERY_KERNEL: [&str; 30] = [
    "file_data_is_kept_with_and_without_a_copy",
    "block_data_is_kept_with_and_without_a_copy",
    "memory_data_is_kept_with_and_without_a_copy",
    "null_backend_reads_zeros",
    "f30_flushes_reach_the_device_and_are_not_charged",
    "each_iops_limit_of_100_is_met",
    "f01_forced_del_under_load_leaves_the_neighbour_unhurt",
    "f01_forced_del_lets_requests_held_at_one_a_second_go_at_once",
    "f02_removal_by_another_client_under_load_leaves_the_neighbour_unhurt",
    "f02_removal_by_another_client_does_not_wait_for_requests_held_at_one_a_second",
    "f06_a_daemon_killed_while_it_recovers_is_recovered_from",
    "f26_a_stalled_backend_holds_no_tokens_of_its_group",
    "f44_any_depth_and_number_of_queues_serves_or_is_refused_with_the_bound",
    "f79_a_disk_gets_smaller_only_when_told",
    "f80_a_device_follows_a_mapped_disk_that_got_another_table",
    "f80_a_device_follows_the_size_of_the_disk_behind_it",
    "removal_of_a_zero_copy_device_waits_for_a_stalled_backend_and_says_so",
    "f61_del_is_refused_while_a_descriptor_of_the_device_is_in_a_socket",
    "f64_a_file_on_a_btrfs_above_a_device_of_ours_is_refused",
    "f71_a_removal_whose_helper_dies_leaves_the_device_limited_or_gone",
    "f72_a_daemon_that_ends_makes_another_helper_for_one_that_dies",
    "f73_an_add_whose_helpers_die_is_undone",
    "f74_without_a_process_left_a_command_names_the_limit_and_changes_nothing",
    "f78_another_watcher_is_made_for_one_that_dies_or_is_silent",
    "f93_a_backend_that_needs_stable_pages_gets_copies",
    "f96_a_write_of_a_killed_daemon_ends_before_the_next_one_serves",
    "f96_a_write_of_a_replaced_daemon_ends_before_the_next_one_serves",
    "f96_a_write_of_a_stopped_daemon_ends_before_the_next_one_serves",
    "f97_a_removal_whose_helper_is_silent_is_answered_and_goes_on_with_it",
    "f97_a_resize_whose_helper_is_silent_tells_the_size_that_the_disk_has",
];

/// Races that need two CPUs at the same instant: removals, kills and changes of limits beside
/// running queue threads, restart work between queue threads, recovery beside the kernel's late
/// work, clients beside the control thread. The selection runs with two emulated CPUs on the host's
/// clock, where correctness alone is judged, so claims about a rate alone are left out.
const TWO_CPUS: [&str; 38] = [
    "two_queues_of_a_device_share_its_limit",
    "file_backend_keeps_data",
    "queue_threads_run_on_the_cpus_of_their_queue_within_those_that_are_named",
    "f01_forced_del_under_load_leaves_the_neighbour_unhurt",
    "f01_forced_del_lets_requests_held_at_one_a_second_go_at_once",
    "f02_removal_by_another_client_under_load_leaves_the_neighbour_unhurt",
    "f02_removal_by_another_client_does_not_wait_for_requests_held_at_one_a_second",
    "f03_del_of_an_open_device_is_refused_and_names_the_process",
    "f10_sigterm_ends_a_daemon_that_holds_requests_at_one_a_second",
    "f10_sigterm_ends_a_daemon_under_full_load",
    "f34_two_dels_of_one_device_at_once_both_get_an_answer",
    "removals_under_load_one_after_the_other_take_two_seconds_each",
    "forced_removal_does_not_wait_for_a_backend_that_does_not_answer",
    "removal_by_another_client_does_not_wait_for_a_stalled_backend",
    "removals_under_load_hurt_no_neighbour",
    "del_of_32_requests_held_at_one_a_second_takes_half_a_second",
    "foreign_del_under_load_takes_a_second_and_so_does_an_add_beside_it",
    "devices_come_and_go_and_leave_nothing",
    "daemon_killed_in_the_middle_of_a_del_is_gone_in_two_seconds",
    "daemon_killed_during_a_del_with_held_requests_leaves_no_process_behind",
    "daemon_killed_while_its_helper_stops_a_device_leaves_no_process_behind",
    "f04_kills_under_verified_writes_lose_nothing_and_show_no_error",
    "f04_sixteen_devices_of_a_killed_daemon_are_back_in_two_seconds",
    "f04_on_crash_fail_ends_everything_in_five_seconds_and_lets_it_be_deleted",
    "f05_a_daemon_killed_during_a_removal_leaves_nothing_of_it",
    "f05_a_disk_started_after_its_daemon_died_is_made_anew",
    "f06_a_daemon_killed_while_it_recovers_is_recovered_from",
    "f06_a_server_that_died_between_its_queues_is_recovered_from",
    "f06_what_the_kernel_does_late_about_a_dead_server_is_waited_for",
    "f09_a_daemon_that_aborts_under_load_ends_every_request",
    "f19_takeovers_under_load_are_pauses_and_no_errors",
    "f10_sigterm_leaves_what_is_kept_to_the_next_daemon_and_removes_the_rest",
    "sets_under_load_take_50_ms_each_and_lose_nothing",
    "raised_limit_lets_held_requests_go_at_once",
    "f11_a_reload_during_a_burst_leaves_others_without_a_gap",
    "f33_garbage_gets_one_error_and_no_panic",
    "f34_commands_that_conflict_each_get_a_definite_answer",
    "abuse_of_the_socket_holds_up_nobody_and_takes_no_memory",
];

/// Every part within half a minute: start, facts, data, a limit, a removal, a kill and the
/// recovery, changes, refusals.
const SMOKE: [&str; 13] = [
    "list_tells_devices_and_groups",
    "every_device_has_a_stable_name_while_it_lives",
    "file_keeps_its_data_over_a_restart_of_the_daemon",
    "burst_goes_as_its_two_buckets_say",
    "f46_a_partition_scan_does_not_wait_for_tokens",
    "f01_forced_del_lets_requests_held_at_one_a_second_go_at_once",
    "f10_sigterm_ends_a_daemon_that_holds_requests_at_one_a_second",
    "f04_what_set_and_add_made_survives_a_daemon_that_is_killed",
    "a_takeover_without_a_daemon_is_a_start",
    "reload_tells_its_plan_and_carries_it_out",
    "set_prints_what_is_in_force_and_changes_all_or_nothing",
    "f27_run_refuses_a_backing_that_cannot_serve",
    "commands_about_unknown_devices_are_refused",
];

/// The trials of this run. An unknown name is an error, in the environment as in the lists above.
pub(crate) fn of_this_run(cases: Vec<Case>) -> Result<Vec<Case>> {
    let known: BTreeSet<&str> = cases.iter().map(|case| case.name).collect();
    let expect_known = |names: &[&str], source: &str| {
        let unknown: Vec<_> = names.iter().filter(|name| !known.contains(*name)).collect();
        ensure!(unknown.is_empty(), "{source}: no trial has the name {unknown:?}");
        Ok(())
    };
    for (selection, names) in SELECTIONS {
        expect_known(names, selection)?;
    }
    let mut wanted = known.clone();
    if let Some(name) = variable(SELECTION)? {
        let Some((_, names)) = SELECTIONS.iter().find(|(selection, _)| *selection == name) else {
            bail!("{SELECTION}={name}: expected one of {:?}, or no such variable", SELECTIONS.map(|(name, _)| name));
        };
        wanted.retain(|trial| names.contains(trial));
    }
    if let Some(names) = variable(TRIALS)? {
        let names: Vec<_> = names.split(',').collect();
        expect_known(&names, TRIALS)?;
        wanted.retain(|trial| names.contains(trial));
    }
    Ok(cases.into_iter().filter(|case| wanted.contains(case.name)).collect())
}

fn variable(name: &str) -> Result<Option<String>> {
    match env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(VarError::NotPresent) => Ok(None),
        Err(error) => bail!("{name}: {error}"),
    }
}
