# SPDX-License-Identifier: MIT
"""What a runner does with a campaign: order, retries, refusals, policy, results."""

import errno
import json
from types import SimpleNamespace

import pytest

from ablab import run
from ablab.journal import Journal, TrialState
from ablab.run import _display, local
from ablab.run.queue import Runner, Stop
from ablab.rundir import Campaign, RunError
from tests.run import drive


def test_trials_run_in_plan_order_and_end_done(tmp_path, capsys):
    campaign = drive.make(tmp_path, [{}] * 5, jobs=1)
    assert run.resume(campaign, drive.options()) == 0
    lines = [json.loads(line) for line in campaign.journal.read_text().splitlines()[1:]]
    assert [r["trial"] for r in lines if r["to"] == "running"] == list(campaign.records())
    assert [t.flaw() for t in campaign.trials()] == [None] * 5
    assert capsys.readouterr().out.splitlines()[-1] == f"RESULT: exit=0 done=5 {campaign.path}"
    assert campaign.status()["exit"] == 0 and campaign.status()["counts"] == {"done": 5}


def test_the_result_is_stored_as_it_is_printed(tmp_path, capsys):
    campaign = drive.make(tmp_path, [{}, {"mode": "nan"}])
    assert run.resume(campaign, drive.options()) == 1
    assert campaign.status()["result"] == capsys.readouterr().out.splitlines()[-1]


def test_a_failure_shows_class_log_evidence_and_the_next_command(tmp_path, capsys):
    campaign = drive.make(tmp_path, [{"mode": "raise"}])
    run.resume(campaign, drive.options())
    out = capsys.readouterr().out
    assert "failed (exception): RuntimeError('planted')" in out
    assert "    | a line of the log before the end" in out
    assert "attempts/1/exit.json" in out and "next: make rerun CAMPAIGN=demo TARGET=r0-s1337" in out


@pytest.mark.parametrize(("keep_going", "left"), [(True, "done"), (False, "queued")])
def test_keep_going_decides_what_a_failure_stops(tmp_path, keep_going, left):
    campaign = drive.make(tmp_path, [{"mode": "nan"}, {}], jobs=1, keep_going=keep_going)
    assert run.resume(campaign, drive.options()) == 1
    assert drive.states(campaign) == ["diverged", left]


def test_a_vanished_child_is_tried_once_more_then_fails(tmp_path):
    campaign = drive.make(tmp_path, [{"mode": "die"}])
    assert run.resume(campaign, drive.options()) == 1
    entry = Journal.of(campaign).replay().entry(next(iter(campaign.records())))
    assert (entry.state, entry.attempt, entry.cls) == (TrialState.FAILED, 2, "signal")
    assert "SIGKILL" in entry.reason
    assert run.resume(campaign, drive.options()) == 1
    assert drive.attempts(campaign) == [2]


def test_a_retry_resumes_from_the_last_checkpoint(tmp_path):
    campaign = drive.make(tmp_path, [{"mode": "die"}])
    run.resume(campaign, drive.options())
    (trial,) = campaign.trials()
    headers = [json.loads(a.metrics.read_text().splitlines()[0]) for a in trial.attempts()]
    assert [h["resumed_at_step"] for h in headers] == [0, 2]


def test_a_rerun_starts_at_step_0_and_replaces_the_result(tmp_path):
    campaign = drive.make(tmp_path, [{}, {}])
    run.resume(campaign, drive.options())
    first, before = campaign.trials()[0], drive.weights(campaign)
    assert run.rerun(campaign, "r0-*", None, drive.options()) == 0
    assert json.loads(first.attempt(2).metrics.read_text().splitlines()[0])["resumed_at_step"] == 0
    assert drive.attempts(campaign) == [2, 1] and drive.weights(campaign) == before
    assert first.read("done")["attempt"] == 2


@pytest.mark.parametrize(
    ("target", "state", "chosen"),
    [
        ("r1-s1337", None, [1]),
        ("r[12]-*", None, [1, 2]),
        (None, "oom", [2]),
        ("HASH", None, [0]),
        ("*", "done", [0, 1]),
    ],
)
def test_rerun_chooses_by_glob_hash_and_state(tmp_path, target, state, chosen):
    campaign = drive.make(tmp_path, [{}, {}, {"mode": "oom"}])
    run.resume(campaign, drive.options())
    if target == "HASH":
        target = campaign.trials()[0].record["hash"][:12]
    run.rerun(campaign, target, state, drive.options())
    assert [i for i, n in enumerate(drive.attempts(campaign)) if n == 2] == chosen


@pytest.mark.parametrize(
    ("target", "state", "text"),
    [
        (None, None, "which trials"),
        ("x*", None, "no trial is TARGET=x"),
        (None, "nope", "no such state; states: queued"),
    ],
)
def test_a_rerun_of_nothing_is_an_error(tmp_path, target, state, text):
    campaign = drive.make(tmp_path, [{}])
    with pytest.raises(RunError, match=text):
        run.rerun(campaign, target, state, drive.options())


def test_a_damaged_result_runs_again(tmp_path, capsys):
    campaign = drive.make(tmp_path, [{}, {}])
    run.resume(campaign, drive.options())
    before = drive.weights(campaign)
    path = campaign.trials()[1].file("summary")
    path.write_text(path.read_text().replace('"final"', '"Final"'))
    assert run.resume(campaign, drive.options()) == 0
    assert drive.attempts(campaign) == [1, 2] and drive.weights(campaign) == before
    assert f"[2/2 r1-s1337] runs again: {path}" in capsys.readouterr().out


def test_changed_data_refuses_the_trial(tmp_path):
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"sha256": "b" * 64}))
    campaign = drive.make(tmp_path, [{}])
    content = {**campaign.content, "data": {"name": "x", "sha256": "a" * 64, "manifest": str(manifest)}}
    campaign.write("campaign", content)
    campaign = Campaign.open(campaign.path)
    assert run.resume(campaign, drive.options()) == 1
    entry = Journal.of(campaign).replay().entry(next(iter(campaign.records())))
    assert (entry.state, entry.cls, drive.attempts(campaign)) == (TrialState.REFUSED, "data", [0])


def test_a_gpu_trial_without_gpu_is_refused(tmp_path):
    campaign = on_gpu(drive.make(tmp_path, [{}]))
    with Stop() as stop:
        runner = Runner(campaign, drive.options(), stop, local.Server(("tests.run.child",)))
        runner.devices = ()
        runner.run()
    assert runner.conclude() == 1
    assert drive.states(campaign) == ["refused"]


def test_a_gpu_trial_waits_for_a_free_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(local, "lock_folder", lambda: tmp_path)
    device = local.machine.Device(kind="cuda", name="gpu", uuid="GPU-0", memory_bytes=1)
    campaign = on_gpu(drive.make(tmp_path, [{}, {}], jobs=2))
    held, _ = local.lease([device], tmp_path)
    with Stop() as stop:
        options = drive.options(wait_s=0.1)
        runner = Runner(campaign, options, stop, local.Server(("tests.run.child",)))
        runner.devices = (device,)
        runner.screen.once = lambda text: (print(text), held.release() if "GPU-0: being leased" in text else None)
        runner.run()
    assert runner.conclude() == 0
    out = capsys.readouterr().out
    assert "waits for a device: gpu GPU-0: being leased" in out
    assert "waits for a device: gpu GPU-0: demo r0-s1337" in out


@pytest.mark.parametrize(("mem_gib", "need_gib"), [(0.0, 0.0), (3.0, 3.0), (99.0, 7.6)])
def test_a_device_that_nobody_uses_is_never_waited_for(tmp_path, mem_gib, need_gib):
    campaign = on_gpu(drive.make(tmp_path, [{}]), mem_gib)
    with Stop() as stop:
        runner = Runner(campaign, drive.options(), stop, local.Server(("tests.run.child",)))
    runner.devices = (local.machine.Device(kind="cuda", name="gpu", uuid="GPU-0", memory_bytes=8 << 30),)
    assert runner.memory(campaign.trials()[0]) == int(need_gib * 2**30)


def on_gpu(campaign, mem_gib=0.0):
    """The campaign with trials that ask for a GPU."""
    trials = [{**t, "resources": {"gpus": 1, "cpus": 1, "mem_gib": mem_gib}} for t in campaign.content["trials"]]
    campaign.write("campaign", {**campaign.content, "trials": trials})
    return Campaign.open(campaign.path)


def test_a_full_disk_refuses_the_trial(tmp_path, monkeypatch):
    campaign = drive.make(tmp_path, [{}])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 << 20))
    assert run.resume(campaign, drive.options()) == 1
    entry = Journal.of(campaign).replay().entry(next(iter(campaign.records())))
    assert (entry.state, entry.cls) == (TrialState.REFUSED, "disk") and "4 MiB needed, 3 free" in entry.reason


def test_jobs_get_disjoint_cores(tmp_path):
    campaign = drive.make(tmp_path, [{"mode": "cores"}] * 2, jobs=2)
    run.resume(campaign, drive.options())
    seen = [t.attempt(1).log.read_text().split()[1] for t in campaign.trials()]
    cores = local.machine.cores()
    assert seen == [str(c) for c in (cores[0], cores[len(cores) // 2])] or len(cores) != 2


def test_a_full_disk_frees_the_reserve_and_goes_on(tmp_path):
    campaign = drive.make(tmp_path, [{}])
    full = [OSError(errno.ENOSPC, "no space")]
    with Stop() as stop:
        runner = Runner(campaign, drive.options(), stop, local.Server(()))

        def write() -> str:
            if full:
                raise full.pop()
            return "written"

        assert runner.safely(write) == "written"
    assert not campaign.reserve.exists()


def test_a_disk_that_stays_full_stops_the_run_resumable(tmp_path):
    campaign = drive.make(tmp_path, [{}])
    with Stop() as stop:
        runner = Runner(campaign, drive.options(), stop, local.Server(()))
        stop.signals.append(15)

        def write() -> None:
            raise OSError(errno.ENOSPC, "no space")

        assert runner.safely(write) is None and runner.halt
        runner.run()
    assert runner.conclude() == 75
    assert drive.states(campaign) == ["queued"]


def test_an_estimate_names_its_basis(tmp_path):
    campaign = drive.make(tmp_path, [{"mode": "nan"}, {}, {}], jobs=1, keep_going=False)
    assert _display.estimate(campaign, Journal.of(campaign).replay()) == {
        "left_s": None,
        "basis": "3 to run, no rate known yet",
    }
    only = frozenset(list(campaign.records())[1:2])
    with Stop() as stop:
        runner = Runner(campaign, drive.options(), stop, local.Server(("tests.run.child",)), only)
        runner.run()
    left = _display.estimate(campaign, Journal.of(campaign).replay())
    assert left["left_s"] == 2 * 1.0 and "2 to run by the mean of 1 done, 1 at once" in left["basis"]


def test_status_tells_class_and_evidence(tmp_path):
    campaign = drive.make(tmp_path, [{}, {"mode": "oom"}])
    run.resume(campaign, drive.options())
    status = run.status(campaign)
    assert status["counts"] == {"done": 1, "oom": 1} and status["exit"] == 1 and status["left_s"] == 0.0
    assert status["trials"][1]["class"] == "oom"
    assert (campaign.path / status["trials"][1]["evidence"]).exists()
