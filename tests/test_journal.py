# SPDX-License-Identifier: MIT
"""States, transitions, leases, retries, and who counts as dead."""

import json
import os
import subprocess
import sys
from itertools import product

import pytest
from sample import campaign, status

from ablab import journal, machine
from ablab.journal import RERUN, Journal, TrialState, Watch

S = TrialState
ENDS = {S.DONE, S.FAILED, S.DIVERGED, S.OOM, S.REFUSED, S.PREEMPTED, S.INTERRUPTED, S.DEAD}


@pytest.fixture
def made(tmp_path):
    return campaign(tmp_path)


def end(log, trial, state, **facts):
    """Run a trial to a state."""
    lease = log.claim(trial)
    assert log.append(trial.name, state, reason="test", lease=lease["lease"], **facts)
    return lease


def lines(campaign):
    return [json.loads(line) for line in campaign.journal.read_text().splitlines()]


def test_the_states_are_the_ten_of_the_manual():
    assert {s for s in S if s.is_finished()} == ENDS and len(S) == 10
    assert {s for s in S if s.is_resumable()} == {S.PREEMPTED, S.INTERRUPTED, S.DEAD}


def test_only_the_documented_transitions_are_allowed():
    allowed = {(S.QUEUED, S.RUNNING), (S.QUEUED, S.REFUSED), (S.DEAD, S.FAILED)}
    allowed |= {(S.RUNNING, end) for end in ENDS} | {(end, S.QUEUED) for end in ENDS - {S.DONE}}
    found = {(a, b) for a, b in product(S, S) if b.follows(a, "continue")}
    assert found == allowed
    assert {(a, b) for a, b in product(S, S) if b.follows(a, RERUN)} == allowed | {(S.DONE, S.QUEUED)}


def test_a_trial_without_a_line_is_queued_and_none_is_written(made):
    state = Journal.of(made).replay()
    assert state.entry(made.trials()[0].name).state is S.QUEUED and not made.journal.exists()


def test_a_claim_writes_the_lease_then_the_line(made):
    trial = made.trials()[0]
    lease = Journal.of(made).claim(trial, executor="local", job="7:8")
    assert trial.lease() == {"schema": "ablab.lease/1", **lease}
    assert (lease["lease"], lease["attempt"], lease["fresh"], lease["job"]) == (1, 1, True, "7:8")
    assert (lease["pid"], lease["proc_start"]) == (os.getpid(), machine.proc_start(os.getpid()))
    assert [a.number for a in trial.attempts()] == [1]
    header, line = lines(made)
    assert header == {"schema": "ablab.journal/1"}
    assert {k: v for k, v in line.items() if k not in ("wall", "host", "pid")} == {
        "seq": 1,
        "trial": trial.name,
        "attempt": 1,
        "lease": 1,
        "from": "queued",
        "to": "running",
        "reason": "start",
    }


def test_a_trial_is_claimed_once_and_numbers_only_grow(made):
    log, (one, two) = Journal.of(made), made.trials()
    assert log.claim(one)["lease"] == 1 and log.claim(one) is None and Journal.of(made).claim(one) is None
    assert log.claim(two)["lease"] == 2
    log.append(one.name, S.PREEMPTED, reason="signal")
    log.append(one.name, S.QUEUED, reason="continue")
    lease = log.claim(one)
    assert (lease["lease"], lease["attempt"], lease["first"], lease["fresh"]) == (3, 2, 1, False)
    assert log.replay().lease == 3


def test_a_claim_skips_numbers_that_a_crash_left_on_disk(made):
    log, trial = Journal.of(made), made.trials()[0]
    lease = log.claim(trial)
    made.journal.unlink()  # as if the runner had died between lease.json and the line
    again = Journal.of(made).claim(trial)
    assert (again["lease"], again["attempt"]) == (lease["lease"] + 1, 2)


def test_a_rerun_starts_over_and_moves_the_floor_for_checkpoints(made):
    log, trial = Journal.of(made), made.trials()[0]
    end(log, trial, S.DONE)
    assert not log.append(trial.name, S.QUEUED, reason="continue")
    assert log.append(trial.name, S.QUEUED, reason=RERUN)
    first = end(log, trial, S.PREEMPTED)
    assert (first["attempt"], first["first"], first["fresh"]) == (2, 2, True)
    log.append(trial.name, S.QUEUED, reason="continue")
    second = log.claim(trial)
    assert (second["attempt"], second["first"], second["fresh"]) == (3, 2, False)


def test_a_line_of_somebody_too_late_is_not_written(made):
    log, trial = Journal.of(made), made.trials()[0]
    end(log, trial, S.DEAD)
    log.append(trial.name, S.QUEUED, reason="continue")
    assert log.claim(trial)["lease"] == 2
    size = made.journal.stat().st_size
    assert not Journal.of(made).append(trial.name, S.DONE, lease=1, reason="woke up")
    assert not log.append(trial.name, S.QUEUED, reason="continue")
    assert made.journal.stat().st_size == size


def test_lines_of_an_old_lease_or_out_of_order_are_ignored_and_reported(made):
    log, trial = Journal.of(made), made.trials()[0]
    end(log, trial, S.DEAD)
    log.append(trial.name, S.QUEUED, reason="continue")
    log.claim(trial)
    late = {
        "seq": 99,
        "wall": 0.0,
        "trial": trial.name,
        "attempt": 1,
        "reason": "woke",
        "host": "h",
        "pid": 1,
    }
    with made.journal.open("a") as file:
        for change in (
            {"lease": 1, "to": "done"},
            {"lease": 2, "to": "queued"},
            {"lease": 2, "to": "flying"},
        ):
            file.write(json.dumps({**late, "from": "running", **change}) + "\n")
        file.write("[1]\n\n")
    state = Journal.of(made).replay()
    assert state.entry(trial.name).state is S.RUNNING and state.entry(trial.name).lease == 2
    assert len(state.problems) == 5
    assert state.problems[0] == f"{made.journal}:6: {trial.name} running -> done, lease 1: too late, not counted"
    assert "damaged" in state.problems[2]


def test_what_an_entry_says_is_what_was_written(made):
    log, trial = Journal.of(made), made.trials()[0]
    end(log, trial, S.OOM, cls="oom", evidence="attempts/1/exit.json")
    entry = Journal.of(made).replay()[trial.name]
    assert (entry.state, entry.attempt, entry.lease, entry.reason) == (S.OOM, 1, 1, "test")
    assert (entry.cls, entry.evidence, dict(entry.ends)) == ("oom", "attempts/1/exit.json", {"oom": 1})


@pytest.mark.parametrize(("state", "budget", "runs"), [(S.DEAD, 1, 2), (S.PREEMPTED, 3, 4), (S.FAILED, 0, 1)])
def test_retry_budgets_are_counted_by_state_and_a_rerun_gives_them_back(made, state, budget, runs):
    log, trial = Journal.of(made), made.trials()[0]
    budgets = {state: budget}

    def until_used_up():
        count = 0
        while True:
            end(log, trial, state)
            count += 1
            if not log.replay()[trial.name].may_retry(budgets):
                return count
            log.append(trial.name, S.QUEUED, reason="continue")

    assert until_used_up() == runs
    log.append(trial.name, S.QUEUED, reason=RERUN)
    assert until_used_up() == runs


def test_replay_reads_only_what_is_new_and_sees_other_writers(made):
    mine, other, trial = Journal.of(made), Journal.of(made), made.trials()[0]
    mine.claim(trial)
    assert other.replay()[trial.name].state is S.RUNNING
    other.append(trial.name, S.FAILED, reason="raised")
    assert mine.replay()[trial.name].state is S.FAILED
    whole = made.journal.read_bytes()
    made.journal.write_bytes(whole[: whole.rfind(b"\n", 0, -1) + 1])  # somebody restored an older copy
    assert mine.replay()[trial.name].state is S.RUNNING


def test_notes_are_kept_apart_from_states(made):
    log = Journal.of(made)
    log.note("stop", "make stop", by="runner")
    log.note("amend", "two seeds more", file="amend-001.json")
    notes = Journal.of(made).replay().notes
    assert [(n["kind"], n["seq"]) for n in notes] == [("stop", 1), ("amend", 2)]
    assert notes[1]["file"] == "amend-001.json" and Journal.of(made).replay() == {}


def test_a_lease_is_handed_to_the_child_unless_it_was_lost(made):
    log, trial = Journal.of(made), made.trials()[0]
    lease = log.claim(trial, job="7:8")
    assert log.assign(trial, lease["lease"], os.getppid())
    assert (trial.lease()["pid"], trial.lease()["job"]) == (os.getppid(), "7:8")
    assert trial.lease()["proc_start"] == machine.proc_start(os.getppid())
    assert not log.assign(trial, lease["lease"] + 1, os.getpid())
    assert trial.lease()["pid"] == os.getppid()


# ---- who is dead


def gone():
    """(pid, start) of a process that ran and ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = machine.proc_start(child.pid)
    child.communicate(b"\n")
    return {"pid": child.pid, "proc_start": start}


@pytest.fixture
def watched(made):
    trial, now = made.trials()[0], [0.0]
    lease = Journal.of(made).claim(trial)
    return trial, lease, Watch(120.0, clock=lambda: now[0]), now


def test_a_living_process_of_this_host_is_not_dead(watched):
    trial, lease, watch, _ = watched
    assert not watch.is_dead(trial)
    trial.write("status", status(trial, lease))
    assert not watch.is_dead(trial)


def test_a_process_that_is_gone_is_dead_at_once(watched):
    trial, lease, watch, _ = watched
    trial.write("lease", {**lease, **gone()})
    assert watch.is_dead(trial)
    trial.write("status", status(trial, lease))
    assert not watch.is_dead(trial)  # the child that the runner left behind lives
    trial.write("status", status(trial, lease, **gone()))
    assert watch.is_dead(trial)


def test_a_pid_that_was_given_to_another_process_is_dead_at_once(watched):
    trial, lease, watch, _ = watched
    trial.write("status", status(trial, lease, proc_start=lease["proc_start"] - 1))
    assert watch.is_dead(trial)


def test_the_status_of_an_earlier_lease_says_nothing(watched):
    trial, lease, watch, _ = watched
    trial.write("status", status(trial, {**lease, "lease": 0}, **gone()))
    assert not watch.is_dead(trial)


@pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"boot_id": "another"}, {}])
def test_a_beat_that_stands_still_for_the_grace_time_is_dead(watched, elsewhere):
    trial, lease, watch, now = watched
    lease = {**lease, **elsewhere, **({} if not elsewhere else gone())}
    trial.write("lease", lease)
    for now[0], beat, dead in [
        (0, 1, False),
        (119, 1, False),
        (125, 2, False),
        (244, 2, False),
        (245, 2, True),
    ]:
        trial.write("status", status(trial, lease, beat=beat))
        assert watch.is_dead(trial) is dead, now[0]


def test_a_new_lease_restarts_the_grace_time(watched):
    trial, lease, watch, now = watched
    trial.write("lease", {**lease, "host": "elsewhere"})
    assert not watch.is_dead(trial)
    now[0] = 200.0
    trial.write("lease", {**lease, "host": "elsewhere", "lease": 2})
    assert not watch.is_dead(trial)
    now[0] = 320.0
    assert watch.is_dead(trial)


def test_the_owner_is_told_apart_by_host_boot_pid_and_start():
    assert journal.owner(os.getpid()) == {
        "host": machine.host(),
        "pid": os.getpid(),
        "proc_start": machine.proc_start(os.getpid()),
        "boot_id": machine.boot_id(),
    }
