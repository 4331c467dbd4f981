# SPDX-License-Identifier: MIT
"""What a tracker is sent: the rows of `rundir.rows`, each name once at a step, wherever sending stops and starts."""

from contextlib import ExitStack

import pytest

from ablab.journal import TrialState
from ablab.rundir import Mirror
from ablab.track import NOTHING, Mark, _feed
from tests.track import rows


def told(feed, limit=1000):
    found = []
    while batch := feed.read(limit):
        found += batch
    return found


def as_points(found):
    return rows.points([{"step": row["step"], **row["m"]} for _, _, row in found])


@pytest.fixture
def feed_of():
    """Makes feeds that are closed at the end."""
    with ExitStack() as stack:

        def make(trial, sent=None):
            feed = _feed.Feed(trial, sent or {})
            stack.callback(feed.close)
            return feed

        yield make


@pytest.fixture
def resumed(tmp_path):
    """Two attempts: the first died at step 20, the second went on from its checkpoint of step 15."""
    trial = rows.campaign(tmp_path)
    rows.attempt(trial, 0, 20, TrialState.DEAD)
    rows.attempt(trial, 15, 30, TrialState.FAILED)
    return trial


def test_what_is_sent_late_is_what_the_report_reads(resumed, feed_of):
    with_feed = told(feed_of(resumed))
    assert as_points(with_feed) == rows.truth(resumed)
    assert [mark.n for mark, _, _ in with_feed] == list(range(len(with_feed)))


def test_steps_that_are_computed_again_are_counted_and_left_out(tmp_path, feed_of):
    trial = rows.campaign(tmp_path)
    rows.attempt(trial, 0, 20, TrialState.DEAD)
    feed = feed_of(trial)
    live = told(feed)
    rows.attempt(trial, 15, 30, TrialState.FAILED)
    more = told(feed)
    assert as_points(live + more) == rows.truth(trial)
    assert more[0][2]["step"] == 21
    assert feed.recomputed == 7  # steps 16 to 20, and the evaluations at 16 and 20
    assert more[-1][0] == Mark(2, more[-1][2]["q"], len(live + more) - 1)


def test_a_rerun_from_step_0_sends_only_what_is_further(tmp_path, feed_of):
    trial = rows.campaign(tmp_path)
    rows.attempt(trial, 0, 10, TrialState.DEAD)
    feed = feed_of(trial)
    told(feed)
    rows.attempt(trial, 0, 12, TrialState.FAILED)
    assert [row["step"] for _, _, row in told(feed)] == [11, 12, 12]


def test_a_name_that_the_first_attempt_did_not_reach_is_sent_by_the_second(tmp_path, feed_of):
    trial = rows.campaign(tmp_path)
    rows.attempt(trial, 0, 8, TrialState.DEAD)
    (attempt,) = trial.attempts()
    whole = attempt.metrics.read_bytes().splitlines(keepends=True)
    attempt.metrics.write_bytes(b"".join(whole[:-1]))  # it died between the two rows of step 8
    feed = feed_of(trial)
    before = told(feed)
    rows.attempt(trial, 4, 9, TrialState.FAILED)
    after = told(feed)
    assert as_points(after)[0] == (8, {"val_loss": pytest.approx(1 / 9)})
    assert as_points(before + after) == rows.truth(trial)


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_a_start_after_any_row_repeats_none_and_misses_none(resumed, limit, tmp_path, feed_of):
    whole = told(feed_of(resumed))
    for cut in range(len(whole) + 1):
        sent = {}
        for mark, _, _ in whole[:cut]:
            sent[mark.attempt] = mark
        again = told(feed_of(resumed, sent), limit)
        assert as_points(again) == as_points(whole[cut:])
        assert [mark for mark, _, _ in again] == [mark for mark, _, _ in whole[cut:]]


def test_a_batch_holds_rows_of_one_attempt(resumed, feed_of):
    feed = feed_of(resumed)
    while batch := feed.read(1000):
        assert len({mark.attempt for mark, _, _ in batch}) == 1


def test_a_torn_line_waits_and_a_damaged_one_is_skipped(tmp_path, feed_of):
    trial = rows.campaign(tmp_path)
    rows.attempt(trial, 0, 3)
    (attempt,) = trial.attempts()
    whole = attempt.metrics.read_bytes()
    attempt.metrics.write_bytes(whole[:-20])
    feed = feed_of(trial)
    assert [row["step"] for _, _, row in told(feed)] == [1, 2]
    attempt.metrics.write_bytes(whole + b"{damaged\n")
    assert [row["step"] for _, _, row in told(feed)] == [3]
    assert feed.unread() == 0


def test_unread_counts_what_is_written_and_not_read(resumed, feed_of):
    feed = feed_of(resumed)
    assert feed.unread() > len(rows.truth(resumed))  # it counts lines, those of both attempts
    told(feed)
    assert feed.unread() == 0


def test_the_cursor_survives_a_torn_line_and_forgets_for_a_copy(tmp_path):
    trial = rows.campaign(tmp_path)
    files = Mirror(trial.campaign, "x")
    cursor = _feed.Cursor(files)
    cursor.put("t", NOTHING, "opening", 0)
    assert _feed.Cursor(files).states == {"t": "opening"} and _feed.Cursor(files).last("t") == NOTHING
    cursor.put("t", Mark(1, 4, 4), "open", 0)
    cursor.put("t", Mark(2, 0, 5), "open", 3)
    with open(files.cursor, "ab") as file:
        file.write(b'{"trial":"t","attempt":2,"q":9')
    again = _feed.Cursor(files)
    assert again.marks == {"t": {1: Mark(1, 4, 4), 2: Mark(2, 0, 5)}}
    assert (again.total(), again.recomputed, again.copy) == (6, {"t": 3}, 1)
    again.fresh()
    assert (_feed.Cursor(files).total(), _feed.Cursor(files).copy) == (0, 2)


def test_a_run_is_named_by_campaign_and_trial_and_tells_no_place(tmp_path):
    trial = rows.campaign(tmp_path, '\nCONFIG_TRACK_PROJECT="other"')
    run = _feed.run_of(trial, Mirror(trial.campaign, "x"), 1, "new")
    assert len(run.id) == 24 and int(run.id, 16)
    assert _feed.run_of(trial, Mirror(trial.campaign, "x"), 2, "new").id == f"{run.id}-r2"
    other = rows.campaign(tmp_path / "other")
    assert _feed.run_of(other, Mirror(other.campaign, "x"), 1, "new").id != run.id
    known = (
        "run_name batch_size gradient_accumulation effective_batch_size learning_rate warmup_steps max_time"
        " compile_model git_commit seed dataset"
    )
    assert set(known.split()) <= set(run.config)
    assert (run.config["learning_rate"], run.config["warmup_steps"], run.config["seed"]) == (6e-4, 4, 1337)
    assert str(tmp_path) not in str(run.config) and not [n for n in run.config if n.startswith("TRACK_")]
    assert all(isinstance(v, str | int | float | bool | None) for v in run.config.values())


def test_gpus_are_those_of_the_trial_whatever_their_place(monkeypatch):
    monkeypatch.setattr(_feed.machine, "command", lambda argv: "0, GPU-a\n1, GPU-b\n10, GPU-c\n")
    assert _feed._indices(["GPU-c", "GPU-b"]) == (1, 10)
    assert _feed._indices([]) == ()
