# SPDX-License-Identifier: MIT
"""Files survive what happens to them: torn tails, a full disk, SIGKILL, SIGSTOP, races, hands."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sample import START, campaign, digest, finish, manifest, metric_rows, status, summary

from ablab import journal, rundir
from ablab.journal import Journal, TrialState, Watch
from ablab.rundir import Campaign, Rows, TrialDir, publish, read_json, rows, write_json

ROOT = Path(__file__).parents[2]
HEADER = {"trial": "t", "attempt": 1, "resumed_at_step": 0}


def python(code, *argv, **options):
    """A child that sees ablab and this folder's sample."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], env=env, **options)


def budget(size):
    """A `write` for a disk with room for `size` bytes."""
    left = [size]

    def write(descriptor, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, "no space left on device")
        written = os.write(descriptor, data[: left[0]])
        left[0] -= written
        return written

    write.left = left
    return write


# ---- torn tails


def test_a_journal_torn_at_any_byte_replays_its_whole_lines_and_goes_on(tmp_path):
    made = campaign(tmp_path, 1)
    trial, log = made.trials()[0], Journal.of(made)
    states = [TrialState.QUEUED, TrialState.QUEUED, TrialState.RUNNING]  # by the number of whole lines
    log.claim(trial)
    for state in (TrialState.PREEMPTED, TrialState.QUEUED):
        log.append(trial.name, state, reason="test")
        states.append(state)
    whole = made.journal.read_bytes()
    for size in range(len(whole) + 1):
        made.journal.write_bytes(whole[:size])
        state = Journal.of(made).replay()
        assert state.entry(trial.name).state is states[whole[:size].count(b"\n")], size
        assert state.problems == []
    last = whole.rfind(b"\n", 0, -1) + 1
    for size in range(last, len(whole) + 1, 9):
        made.journal.write_bytes(whole[:size])
        log = Journal.of(made)
        log.note("note", "after the tear")
        assert (len(log.replay().notes), len(log.replay().problems)) == (1, last < size < len(whole)), size
        assert Journal.of(made).replay() == log.replay()


def test_rows_torn_at_any_byte_lose_at_most_the_last_one(tmp_path):
    trial = campaign(tmp_path).trials()[0]
    trial.new_attempt(1)
    metric_rows(trial, {"attempt": 1}, steps=range(1, 4))
    path = trial.attempt(1).metrics
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        damage = []
        found = [r["step"] for r in rows(trial, None, damage)]
        assert found == list(range(1, whole[:size].count(b"\n"))) and damage == [], size
    path.write_bytes(whole[:-5])
    metric_rows(trial, {"attempt": 1}, steps=[9])
    damage = []
    assert [r["step"] for r in rows(trial, None, damage)] == [1, 2, 9] and len(damage) == 1


def test_a_json_write_that_fails_at_any_byte_leaves_the_old_file(tmp_path):
    path = tmp_path / "built.json"
    write_json(path, "built", {"n": 1})
    size = path.stat().st_size
    for room in range(size):
        with pytest.raises(OSError, match="no space"):
            write_json(path, "built", {"n": 2}, write=budget(room))
        assert read_json(path, "built")["n"] == 1 and [p.name for p in tmp_path.iterdir()] == ["built.json"]
    write_json(path, "built", {"n": 2}, write=budget(size))
    assert read_json(path, "built")["n"] == 2


# ---- a full disk


def test_a_row_without_room_leaves_nothing_and_can_be_written_again(tmp_path):
    trial = campaign(tmp_path).trials()[0]
    trial.new_attempt(1)
    path = trial.attempt(1).metrics
    write = budget(10_000)
    out = Rows(path, "metrics", HEADER, write=write)
    out.row(1, {"train_loss": 1.0}, **START)
    whole = path.read_bytes()
    for room in range(0, 40, 7):
        write.left[0] = room
        with pytest.raises(OSError, match="no space"):
            out.row(2, {"train_loss": 2.0}, **START)
        assert path.read_bytes() == whole
    write.left[0] = 10_000
    out.row(2, {"train_loss": 2.0}, **START)
    out.close()
    assert [(r["q"], r["step"]) for r in rows(trial)] == [(0, 1), (1, 2)]


@pytest.mark.parametrize("where", ["lease", "middle of the lease", "header", "line", "middle of the line"])
def test_a_claim_without_room_leaves_the_trial_queued(tmp_path, where):
    made, twin = campaign(tmp_path), campaign(tmp_path, name="twin")
    Journal.of(twin).claim(twin.trials()[0])
    lease, lines = twin.trials()[0].file("lease").stat().st_size, twin.journal.read_bytes()
    header = lines.index(b"\n") + 1
    room = {"lease": 0, "header": lease, "line": lease + header}
    room |= {"middle of the lease": lease // 2, "middle of the line": lease + header + 50}
    room, trial = room[where], made.trials()[0]
    with pytest.raises(OSError, match="no space"):
        Journal(made.journal, made.lock, write=budget(room)).claim(trial)
    log = Journal.of(made)
    assert log.replay().entry(trial.name).state is TrialState.QUEUED and log.replay().problems == []
    lease = log.claim(trial)
    assert lease["attempt"] == 2 and lease["fresh"] and trial.lease()["lease"] == lease["lease"]


def test_a_full_disk_frees_the_reserve_then_waits_then_gives_up(tmp_path):
    made = campaign(tmp_path)
    now, tries = [0.0], []

    def wait(seconds):
        now[0] += seconds

    def action():
        tries.append((now[0], made.reserve.exists()))
        if len(tries) < 4 or made.name == "never":
            raise OSError(errno.ENOSPC, "no space left on device")
        return "written"

    assert rundir.patiently(made, action, wait=wait, clock=lambda: now[0]) == "written"
    assert tries == [(0.0, True), (0.0, False), (5.0, False), (10.0, False)]
    made.name = "never"
    with pytest.raises(rundir.DiskFullError, match="the disk is full; free space, then make continue"):
        rundir.patiently(made, action, wait=wait, clock=lambda: now[0])
    assert now[0] == 10.0 + 600.0


def test_other_errors_are_not_waited_for(tmp_path):
    def action():
        raise PermissionError(errno.EACCES, "no")

    made = campaign(tmp_path)
    with pytest.raises(PermissionError):
        rundir.patiently(made, action, wait=lambda s: pytest.fail("waited"))
    assert made.reserve.exists()


def test_done_is_not_published_without_room(tmp_path):
    trial = campaign(tmp_path).trials()[0]
    lease = finish(trial)
    trial.file("done").unlink()
    with pytest.raises(OSError, match="no space"):
        publish(trial, 1, lease["lease"], write=budget(50))
    assert not trial.done() and not list(trial.path.glob("*.tmp-*"))
    publish(trial, 1, lease["lease"])
    assert trial.done()


# ---- SIGKILL

WRITER = """
import sys
from pathlib import Path
from sample import START
from ablab.journal import Journal
from ablab.rundir import Campaign, Rows
made = Campaign.open(Path(sys.argv[1]))
trial = made.trials()[0]
log = Journal.of(made)
out = Rows(trial.attempt(1).metrics, "metrics", {"trial": trial.name, "attempt": 1, "resumed_at_step": 0})
for step in range(1, 10**9):
    out.row(step, {"train_loss": float(step), "grad_norm": 1 / step}, **START)
    trial.write("built", {"step": step, "filler": "x" * 5000})
    log.note("note", "n", step=step)
    print(step, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 7, 23])
def test_kill_9_of_a_writer_loses_nothing_it_had_acknowledged(tmp_path, acknowledged):
    made = campaign(tmp_path)
    trial = made.trials()[0]
    trial.new_attempt(1)
    child = python(WRITER, made.path)
    for _ in range(acknowledged):
        child.stdout.readline()
    child.kill()
    rest = child.communicate()[0].split()
    last = int(rest[-1]) if rest else acknowledged
    damage = []
    steps = [r["step"] for r in rows(trial, None, damage)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) in (last, last + 1) and damage == []
    assert trial.built()["step"] in (last, last + 1)
    log = Journal.of(made)
    assert len(log.replay().notes) in (last, last + 1)
    assert log.claim(trial)["lease"] == 1  # the kernel gave the dead writer's lock back
    assert Journal.of(made).replay().problems == []
    trial.supersede(1)
    assert not [p for p in trial.path.iterdir() if ".tmp-" in p.name]


# ---- races

CLAIMER = """
import sys
from pathlib import Path
from ablab.journal import Journal
from ablab.rundir import Campaign
made = Campaign.open(Path(sys.argv[1]))
log = Journal.of(made)
print("ready", flush=True)
sys.stdin.readline()
for trial in made.trials():
    lease = log.claim(trial)
    if lease:
        print(trial.name, lease["lease"], lease["attempt"], flush=True)
"""


def test_processes_that_claim_at_once_share_no_trial(tmp_path):
    made = campaign(tmp_path, 24)
    children = [python(CLAIMER, made.path) for _ in range(4)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    claims = [line.split() for child in children for line in child.communicate()[0].splitlines()]
    assert sorted(name for name, _, _ in claims) == sorted(t.name for t in made.trials())
    assert sorted(int(lease) for _, lease, _ in claims) == list(range(1, 25))
    assert {attempt for _, _, attempt in claims} == {"1"}
    state = Journal.of(made).replay()
    assert state.problems == [] and {e.state for e in state.values()} == {TrialState.RUNNING}
    assert [json.loads(x).get("seq", 0) for x in made.journal.read_text().splitlines()] == list(range(25))


# a child that stops itself in the middle of a publication: the bytes are written, the name is not
OWNER = """
import os, signal, sys
from pathlib import Path
from sample import manifest, metric_rows, status, summary
from ablab.rundir import AttemptDir, SupersededError, publish
attempt = AttemptDir.open(Path(sys.argv[1]))
trial, what = attempt.trial, sys.argv[2]
lease = trial.lease()
def stop(descriptor, data):
    written = os.write(descriptor, data)
    os.kill(os.getpid(), signal.SIGSTOP)
    return written
mine = {"guard": trial.guard(lease["lease"])}
def save(options):
    made = trial.checkpoint(10, 1)
    draft = made.begin()
    draft.model.write_bytes(b"weights")
    draft.seal()
    if options:
        os.kill(os.getpid(), signal.SIGSTOP)
    made.commit(draft, trial.guard(lease["lease"]))
try:
    trial.supersede(lease["lease"])
    trial.write("manifest", manifest(trial, lease))
    trial.write("built", {"attempt": 1})
    metric_rows(trial, lease)
    trial.write("status", status(trial, {**lease, "pid": os.getpid()}))
    late = {"write": stop}
    save(late if what == "checkpoint" else {})
    trial.write("summary", summary(trial, lease, 9.0), **mine, **(late if what == "summary" else {}))
    publish(trial, 1, lease["lease"], **(late if what == "done" else {}))
except SupersededError as error:
    print(error)
    sys.exit(75)
"""


@pytest.mark.parametrize("what", ["checkpoint", "summary", "done"])
def test_an_owner_that_sleeps_through_a_takeover_publishes_nothing(tmp_path, what):
    made = campaign(tmp_path)
    trial, log = made.trials()[0], Journal.of(made)
    lease = log.claim(trial)
    child = python(OWNER, trial.attempt(1).path, what)
    assert log.assign(trial, lease["lease"], child.pid)
    assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])

    now = [0.0]
    watch = Watch(120.0, clock=lambda: now[0])
    assert not watch.is_dead(trial)
    now[0] = 120.0
    assert watch.is_dead(trial)
    log.append(trial.name, TrialState.DEAD, reason="no beat", lease=lease["lease"])
    log.append(trial.name, TrialState.QUEUED, reason="continue")
    finish(trial, loss=2.0)
    before = {p: p.read_bytes() for p in trial.path.rglob("*") if p.is_file() and "a1" not in str(p)}

    os.kill(child.pid, signal.SIGCONT)
    assert "lease 1 was taken over" in child.communicate()[0] and child.returncode == 75
    assert trial.done() and trial.summary()["primary"]["value"] == 2.0 and trial.read("done")["lease"] == 2
    assert {p: p.read_bytes() for p in before} == before
    assert not list(trial.path.rglob("*.tmp-*")) or what == "checkpoint"
    assert (10, 1) not in [(c.step, c.attempt) for c in trial.saved()] or what != "checkpoint"
    assert not log.append(trial.name, TrialState.DONE, reason="woke", lease=1)


def test_a_done_of_an_old_lease_does_not_count_even_if_it_was_written(tmp_path):
    trial = campaign(tmp_path).trials()[0]
    finish(trial)
    log = Journal.of(trial.campaign)
    assert trial.done()
    log.append(trial.name, TrialState.QUEUED, reason=journal.RERUN)
    log.claim(trial)
    assert not trial.done() and "not of the newest lease" in trial.flaw()


# ---- hands


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_hand_edited_plan_is_found_by_the_trials_that_vouch_for_it(tmp_path):
    made = campaign(tmp_path)
    trial = made.trials()[0]
    finish(trial)
    assert trial.done()
    edit(made.file("campaign"), "val_loss", "train_loss")
    again = Campaign.open(made.path).trial(trial.name)
    assert not again.done()
    assert again.flaw() == f"{made.file('campaign')}: is not what DONE of {trial.name} vouches for"


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [("summary", "3.0", "2.0"), ("manifest", '"micro": 4', '"micro": 8'), ("built", "[]", "[1]")],
)
def test_a_hand_edited_file_is_found_by_its_hash(tmp_path, kind, old, new):
    made = campaign(tmp_path)
    trial, other = made.trials()
    finish(trial)
    finish(other)
    edit(trial.file(kind), old, new)
    assert trial.flaw() == f"{trial.file(kind)}: is not what was vouched for; run the trial again"
    assert other.done()


def test_a_plan_edited_while_a_trial_runs_is_found_too(tmp_path):
    made = campaign(tmp_path)
    trial = Campaign.open(made.path).trials()[0]
    edit(made.file("campaign"), "val_loss", "train_loss")
    finish(trial)
    assert not Campaign.open(made.path).trial(trial.name).done()


def test_a_trial_folder_copied_over_another_is_not_done(tmp_path):
    made = campaign(tmp_path)
    one, two = made.trials()
    finish(one)
    for path in (two.path / "config", *one.path.glob("*.json"), one.file("done")):
        (two.path / path.name).write_bytes((one.path / path.name).read_bytes())
    assert one.done() and not TrialDir(made, two.name).done()
    assert digest("trial 0") != digest("trial 1")


def test_the_sample_is_what_the_store_calls_done(tmp_path):
    trial = campaign(tmp_path).trials()[0]
    lease = finish(trial)
    assert trial.done() and summary(trial, lease) and manifest(trial, lease) and status(trial, lease)
