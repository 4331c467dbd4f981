# SPDX-License-Identifier: MIT
"""Result files: names, schemas, atomic writes, DONE, rows over attempts."""

import json
import os
import re
from copy import deepcopy
from pathlib import Path

import pytest
from sample import START, campaign, digest, finish, manifest, metric_rows, plan, record, status, summary

from ablab import journal, rundir
from ablab.metrics import MetricError
from ablab.rundir import Campaign, Rows, RunError, campaigns, find, publish, read_json, rows, write_json

BAD_NAMES = [
    "",
    "..",
    ".hidden",
    "-x",
    "A",
    "a/b",
    "a\\b",
    "a b",
    "a..b",
    "a\n",
    "x" * 101,
    '../../x"><script>',
    "\u00e9",
]


def claimed(tmp_path):
    trial = campaign(tmp_path).trials()[0]
    return trial, journal.Journal.of(trial.campaign).claim(trial)


# ---- names


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused_and_nothing_is_created(tmp_path, name):
    with pytest.raises(RunError, match="lower-case letters"):
        campaign(tmp_path / "results", name=name)
    with pytest.raises(RunError):
        campaign(tmp_path / "results", trials=[record(0, id=name or "..")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "0", "ra-20250101-3fa2c1.2", "x" * 100, "a_b-c.d"])
def test_a_good_name_is_taken(tmp_path, name):
    assert campaign(tmp_path, name=name).path == tmp_path / name


def test_the_layout_is_the_documented_one(tmp_path):
    trial = campaign(tmp_path, 1).trials()[0]
    finish(trial)
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    folder = f"demo/trials/r0-s1337-{digest('trial 0')[:8]}"
    assert found == {
        *(f"demo/{n}" for n in ("campaign.json", "journal.jsonl", "journal.lock", "reserve.bin")),
        *(f"{folder}/{n}" for n in ("config", "lease.json", "manifest.json", "built.json", "status.json")),
        *(f"{folder}/{n}" for n in ("summary.json", "DONE")),
        *(f"{folder}/attempts/1/{n}" for n in ("manifest.json", "exit.json", "metrics.jsonl")),
        *(f"{folder}/checkpoints/step-00000010-a1/{n}" for n in ("manifest.json", "model.safetensors")),
    }


def test_a_taken_name_is_an_error_or_gets_a_number(tmp_path):
    assert campaign(tmp_path).name == "demo"
    with pytest.raises(RunError, match="exists; choose another NAME="):
        campaign(tmp_path)
    made = [Campaign.create(tmp_path, "demo", plan(), numbered=True) for _ in range(2)]
    assert [c.content["name"] for c in made] == ["demo.2", "demo.3"]


def test_the_reserve_takes_real_space(tmp_path):
    reserve = campaign(tmp_path).reserve.stat()
    assert reserve.st_size == 4 << 20 and reserve.st_blocks * 512 >= 4 << 20


@pytest.mark.parametrize("part", ["campaign", "trials", "report", "trial", "file", "checkpoint", "attempts"])
def test_a_link_below_the_root_is_not_followed(tmp_path, part):
    made = campaign(tmp_path / "results")
    trial = made.trials()[0]
    finish(trial)
    assert trial.done()
    path = {
        "campaign": made.path,
        "trials": made.path / "trials",
        "report": made.report,
        "trial": trial.path,
        "file": trial.file("summary"),
        "checkpoint": trial.saved()[0].path,
        "attempts": trial.path / "attempts",
    }[part]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="links below the results folder are not followed"):
        again = Campaign.open(tmp_path / "results" / "demo").trial(trial.name)
        again.attempts()[0].read("exit")
        again.saved()[0].read("checkpoint")
        again.summary()
    assert part in ("campaign", "trials", "report", "trial") or not trial.done()


def test_a_results_root_that_is_itself_a_link_is_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert Campaign.open(campaign(tmp_path / "link").path).path == tmp_path / "real" / "demo"


def test_find_knows_names_starts_paths_and_the_latest(tmp_path):
    for number, name in enumerate(["ra-1", "ra-2", "kv-1"]):
        campaign(tmp_path, name=name, created=f"2026-01-0{3 - number}")
    (tmp_path / "stray").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "ra-1")
    assert [c.name for c in campaigns(tmp_path)] == ["kv-1", "ra-2", "ra-1"]
    chosen = [find(tmp_path, s).name for s in ("ra-1", "kv", str(tmp_path / "ra-2"), "latest")]
    assert chosen == ["ra-1", "kv-1", "ra-2", "ra-1"]
    with pytest.raises(RunError, match=r"ra: several campaigns; known: ra-. ra-."):
        find(tmp_path, "ra")
    with pytest.raises(RunError, match=r"xy: no such campaign; known: .*kv-1"):
        find(tmp_path, "xy")
    assert campaigns(tmp_path / "none") == []


def test_an_unknown_trial_is_an_error_that_names_the_known_ones(tmp_path):
    made = campaign(tmp_path)
    with pytest.raises(RunError, match=rf"no trial r9; trials: .*{made.trials()[1].name}"):
        made.trial("r9")


# ---- schemas


def test_every_kind_of_the_sample_fits_its_schema_and_survives(tmp_path):
    trial = campaign(tmp_path).trials()[0]
    lease = finish(trial)
    assert trial.manifest() == {"schema": "ablab.manifest/1", **manifest(trial, lease)}
    assert trial.summary() == {"schema": "ablab.summary/1", **summary(trial, lease)}
    assert trial.status()["state"] == "done" and trial.lease()["attempt"] == 1
    assert next(iter(json.loads(trial.file("summary").read_bytes()))) == "schema"
    assert Campaign.open(trial.campaign.path).content == {"schema": "ablab.campaign/1", **plan()}


def keys(payload, at=""):
    """Paths of all values in a payload."""
    for key, value in payload.items() if isinstance(payload, dict) else enumerate(payload):
        yield at, key, value
        if isinstance(value, dict | list):
            yield from keys(value, f"{at}.{key}" if isinstance(key, str) else f"{at}[{key}]")


def dig(payload, at):
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", at):
        payload = payload[name or int(index)]
    return payload


OPTIONAL = {
    "commit",
    "patch",
    "step",
    "forecast",
    "study",
    "tokens",
    "sha256",
    "mfu",
    "value",
    "expected",
    "measured",
}
OPTIONAL |= {
    "tf32",
    "cudnn_benchmark",
    "tokenizer",
    "cuda",
    "hip",
    "driver",
    "resume",
    "job",
    "eta_s",
    "loss",
}
# entries of maps: taking one away leaves a map
OPTIONAL |= {"OPT_LR", "val_loss", "SEEDS", "OPT", "preempted", "dead", "metric"}


@pytest.mark.parametrize("kind", ["campaign", "manifest", "summary", "status", "lease"])
def test_each_key_is_required_and_each_type_checked(tmp_path, kind):
    trial, lease = claimed(tmp_path)
    samples = {"manifest": manifest, "summary": summary, "status": status}
    sample = samples[kind](trial, lease) if kind in samples else {"campaign": plan(), "lease": lease}[kind]
    path, seen = tmp_path / "file.json", 0
    write_json(path, kind, sample)
    for at, key, _ in keys(sample):
        if key not in OPTIONAL and isinstance(key, str):
            payload = deepcopy(sample)
            del dig(payload, at)[key]
            with pytest.raises(RunError, match=re.escape(f"{kind}{at}.{key} is missing")):
                write_json(path, kind, payload)
        payload = deepcopy(sample)
        dig(payload, at)[key] = object()
        if key not in {"value", "expected", "measured", "tf32", "cudnn_benchmark", "metric"}:
            with pytest.raises(RunError, match="not "):
                write_json(path, kind, payload)
            seen += 1
    assert seen >= 10
    assert read_json(path, kind)["schema"] == f"ablab.{kind}/1"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"attempt": True}, "summary.attempt is True, not an int"),
        ({"attempt": 1.0}, "summary.attempt is 1.0, not an int"),
        ({"final": {"val_loss": float("nan")}}, "summary.final.val_loss is nan, not a finite number"),
        ({"final": {"val_loss": "3"}}, "summary.final.val_loss is '3', not a finite number"),
        ({"best": {"val_loss": {"value": 1}}}, "summary.best.val_loss.step is missing"),
        ({"contracts": {}}, "summary.contracts is {}, not a list"),
        ({"used": []}, r"summary.used is \[\], not an object"),
        ({"model": {"params": 1, "trainable": 1, "fingerprint": "ab"}}, "fingerprint is 'ab', not a SHA-256"),
    ],
)
def test_a_wrong_type_is_named_when_written_and_when_read(tmp_path, change, text):
    trial, lease = claimed(tmp_path)
    payload = {**summary(trial, lease), **change}
    with pytest.raises(RunError, match=text):
        trial.write("summary", payload)
    assert trial.summary() is None
    trial.file("summary").write_text(json.dumps({"schema": "ablab.summary/1", **payload}))
    with pytest.raises(RunError, match=text + ".*; the file was edited, damaged or written by another program"):
        trial.summary()


@pytest.mark.parametrize("body", ["", "{", "[]", "null", "7", '{"a": 1}', '{"schema": "ablab.summary/2"}', "\x00"])
def test_damaged_and_foreign_files_are_named(tmp_path, body):
    path = tmp_path / "summary.json"
    path.write_text(body)
    with pytest.raises(RunError, match=re.escape(str(path))):
        read_json(path, "summary")


def test_unknown_keys_are_kept_and_nan_anywhere_is_refused(tmp_path):
    path = tmp_path / "built.json"
    write_json(path, "built", {"modules": [1], "note": None})
    assert read_json(path, "built")["modules"] == [1]
    with pytest.raises(RunError, match="null stands for"):
        write_json(path, "built", {"x": float("inf")})


def test_every_schema_of_the_table_can_be_parsed():
    for kind in rundir.SCHEMAS:
        with pytest.raises(RunError, match=f"{kind} is 7, not an object"):
            rundir.check(kind, 7, Path("f"))


# ---- atomic writes


def test_a_file_is_replaced_whole_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "x.json"
    for number in range(3):
        write_json(path, "built", {"number": number})
        assert read_json(path, "built")["number"] == number
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_guard_that_raises_keeps_the_old_file(tmp_path):
    trial, lease = claimed(tmp_path)
    trial.write("status", status(trial, lease, beat=1), guard=trial.guard(1))
    with pytest.raises(rundir.SupersededError, match="lease 9 was taken over"):
        trial.write("status", status(trial, lease, beat=2), guard=trial.guard(9))
    assert trial.status()["beat"] == 1
    assert not list(trial.path.glob("*.tmp-*"))


# ---- done


def test_done_needs_the_marker_and_every_hash(tmp_path):
    trial = campaign(tmp_path).trials()[0]
    assert not trial.done() and trial.flaw().endswith("not finished")
    finish(trial)
    assert trial.done() and trial.flaw() is None


def test_done_vouches_for_config_manifest_built_summary_rows_and_checkpoints(tmp_path):
    trial = campaign(tmp_path).trials()[0]
    finish(trial)
    vouched = set(trial.read("done")["files"])
    assert vouched == {
        "config",
        "manifest.json",
        "built.json",
        "summary.json",
        "attempts/1/metrics.jsonl",
        "checkpoints/step-00000010-a1/manifest.json",
    }
    for name in vouched:
        path = trial.path / name
        before = path.read_bytes()
        path.write_bytes(before.replace(b"1", b"2", 1) if b"1" in before else before + b" ")
        assert not trial.done(), name
        path.unlink()
        assert not trial.done(), name
        path.write_bytes(before)
        assert trial.done()


def test_publishing_without_a_required_file_is_an_error(tmp_path):
    trial, _ = claimed(tmp_path)
    with pytest.raises(RunError, match=r"manifest\.json: missing"):
        publish(trial, 1, 1)
    assert not trial.file("done").exists()


def test_a_done_that_leaves_out_a_file_or_points_outside_does_not_count(tmp_path):
    trial = campaign(tmp_path).trials()[0]
    finish(trial)
    done = trial.read("done")
    (tmp_path / "outside").write_bytes(b"x")
    for change in (
        {"files": {k: v for k, v in done["files"].items() if k != "summary.json"}},
        {"files": {**done["files"], "../../../outside": rundir.stamp(tmp_path / "outside")}},
        {"files": {**done["files"], str(tmp_path / "outside"): rundir.stamp(tmp_path / "outside")}},
        {"trial": digest("another")},
        {"lease": 7},
    ):
        trial.write("done", {**done, **change})
        assert not trial.done(), change
    trial.write("done", done)
    assert trial.done()


def test_a_rerun_moves_the_old_attempt_aside_done_first(tmp_path, monkeypatch):
    trial = campaign(tmp_path).trials()[0]
    finish(trial, loss=3.0)
    log = journal.Journal.of(trial.campaign)
    assert log.append(trial.name, journal.TrialState.QUEUED, reason=journal.RERUN)
    lease = log.claim(trial)
    assert not trial.done()
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(a).name), replace(a, b)))
    (trial.checkpoints / "step-00000011-a1.tmp-0a0a0a0a").mkdir()
    trial.supersede(lease["lease"])
    assert moved[0] == "DONE"
    assert {p.name for p in trial.path.iterdir()} == {"config", "lease.json", "attempts", "checkpoints"}
    old = {p.name for p in trial.attempt(1).path.iterdir()}
    assert {"DONE", "summary.json", "status.json", "built.json", "manifest.json"} <= old
    assert [c.name for c in trial.saved()] == ["step-00000010-a1"]
    with pytest.raises(rundir.SupersededError):
        trial.supersede(1)


def test_files_go_back_to_the_attempt_that_wrote_them(tmp_path):
    trial = campaign(tmp_path).trials()[0]
    finish(trial)
    log = journal.Journal.of(trial.campaign)
    log.append(trial.name, journal.TrialState.QUEUED, reason=journal.RERUN)
    log.claim(trial)  # this attempt ends before it can do anything
    log.append(trial.name, journal.TrialState.DEAD, reason="killed")
    log.append(trial.name, journal.TrialState.QUEUED, reason="continue")
    trial.supersede(log.claim(trial)["lease"])
    assert (trial.attempt(1).path / "summary.json").exists()
    assert list(trial.attempt(2).path.iterdir()) == list(trial.attempt(3).path.iterdir()) == []


def test_a_second_finish_is_done_again_and_says_what_is_new(tmp_path):
    trial = campaign(tmp_path).trials()[0]
    finish(trial, loss=3.0)
    journal.Journal.of(trial.campaign).append(trial.name, journal.TrialState.QUEUED, reason=journal.RERUN)
    finish(trial, loss=2.0)
    assert trial.done() and trial.summary()["primary"]["value"] == 2.0
    assert [a.number for a in trial.attempts()] == [1, 2]


# ---- checkpoints


def save(trial, step, attempt, data=b"w"):
    made = trial.checkpoint(step, attempt)
    draft = made.begin()
    draft.model.write_bytes(data)
    draft.write("state", {"step": step})
    draft.rank(0).write_bytes(b"r")
    draft.seal()
    made.commit(draft)
    return made


def test_checkpoints_come_newest_first_and_only_from_allowed_attempts(tmp_path):
    trial = campaign(tmp_path).trials()[0]
    for step, attempt in [(1000, 1), (200, 1), (300, 2), (1000, 3)]:
        save(trial, step, attempt)
    trial.checkpoint(5, 1).begin()
    assert [(c.step, c.attempt) for c in trial.saved()] == [(1000, 3), (1000, 1), (300, 2), (200, 1)]
    assert [(c.step, c.attempt) for c in trial.saved(first=2)] == [(1000, 3), (300, 2)]
    assert trial.saved()[0].read("state")["step"] == 1000


def test_a_damaged_checkpoint_is_seen_and_can_be_put_aside(tmp_path):
    made = save(campaign(tmp_path).trials()[0], 7, 1)
    assert made.flaw() is None
    made.model.write_bytes(b"v")
    assert "model.safetensors: is not what was vouched for" in made.flaw()
    made.file("checkpoint").unlink()
    assert made.flaw().endswith("has no manifest")
    assert re.fullmatch("bad-step-00000007-a1-[0-9a-f]{4}", made.reject().name)
    assert campaign(tmp_path, name="two").trials()[0].saved() == [] and not made.path.exists()


def test_a_checkpoint_of_a_lost_lease_is_not_published(tmp_path):
    trial, _ = claimed(tmp_path)
    draft = trial.checkpoint(7, 1).begin()
    draft.model.write_bytes(b"w")
    draft.seal()
    with pytest.raises(rundir.SupersededError):
        trial.checkpoint(7, 1).commit(draft, trial.guard(9))
    assert trial.saved() == []
    trial.checkpoint(7, 1).commit(draft, trial.guard(1))
    assert trial.saved()[0].flaw() is None


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path):
    trial = campaign(tmp_path).trials()[0]
    save(trial, 7, 1, b"one")
    assert save(trial, 7, 1, b"two").model.read_bytes() == b"two"
    assert trial.saved()[0].flaw() is None


# ---- rows


def test_rows_are_typed_ordered_and_carry_their_attempt(tmp_path):
    trial, _ = claimed(tmp_path)
    out = Rows(
        trial.attempt(1).metrics,
        "metrics",
        {"trial": "t", "attempt": 1, "resumed_at_step": 0},
        clock=lambda: 5.0,
    )
    out.row(0, {"val_loss": 3.5}, tokens=0, train_s=0.0, wall_s=1.5, flops=0.0)
    out.row(10, {"train_loss": float("nan"), "grad_norm": float("inf"), "learning_rate": 1e-3}, **START)
    out.close()
    first, second = rows(trial)
    axes = {"tokens": 0, "train_s": 0.0, "wall_s": 1.5, "flops": 0.0}
    assert first == {"q": 0, "t": 5.0, "step": 0, **axes, "m": {"val_loss": 3.5}, "bad": [], "attempt": 1}
    assert second["m"] == {"train_loss": None, "grad_norm": None, "learning_rate": 1e-3}
    assert second["bad"] == ["train_loss", "grad_norm"] and second["q"] == 1


def test_an_unregistered_metric_is_an_error_and_writes_nothing(tmp_path):
    trial, _ = claimed(tmp_path)
    header = {"trial": trial.name, "attempt": 1, "resumed_at_step": 0}
    out = Rows(trial.attempt(1).metrics, "metrics", header)
    with pytest.raises(MetricError, match="'val_los': no such metric; nearest: val_loss"):
        out.row(1, {"train_loss": 1.0, "val_los": 2.0}, **START)
    out.close()
    assert list(rows(trial)) == []


def attempts(tmp_path, *resumed):
    """A trial whose attempts resumed at these steps and each wrote ten steps from there on."""
    trial = campaign(tmp_path, 1).trials()[0]
    for number, start in enumerate(resumed, 1):
        trial.new_attempt(number)
        metric_rows(trial, {"attempt": number}, start, range(start + 1, start + 11))
    return trial


@pytest.mark.parametrize(
    ("resumed", "owners"),
    [
        ([0], {1: range(1, 11)}),
        ([0, 5], {1: range(1, 6), 2: range(6, 16)}),
        ([0, 10], {1: range(1, 11), 2: range(11, 21)}),
        ([0, 8, 5], {1: range(1, 6), 3: range(6, 16)}),  # the newer checkpoint was bad, an older one was used
        ([0, 0], {2: range(1, 11)}),  # a rerun
        ([0, 5, 0], {3: range(1, 11)}),
        ([0, 0, 5], {2: range(1, 6), 3: range(6, 16)}),
    ],
)
def test_an_attempt_counts_up_to_where_the_next_one_resumed(tmp_path, resumed, owners):
    trial = attempts(tmp_path, *resumed)
    found = [(r["step"], r["m"]["train_loss"], r["attempt"]) for r in rows(trial)]
    assert found == [(s, a * 1000.0 + s, a) for a, steps in owners.items() for s in steps]
    assert len({s for s, _, _ in found}) == len(found)


def test_a_rerun_replaces_the_row_before_the_first_step_too(tmp_path):
    trial = attempts(tmp_path, 0, 0)
    for number in (1, 2):
        metric_rows(trial, {"attempt": number}, 0, [0], "val_loss", float(number))
    assert [(r["m"], r["attempt"]) for r in rows(trial, ["val_loss"])] == [({"val_loss": 2.0}, 2)]


def test_at_the_step_of_a_resume_each_name_counts_once(tmp_path):
    trial = attempts(tmp_path, 0)
    trial.new_attempt(2)
    metric_rows(trial, {"attempt": 2}, 10, [10], "val_loss", 1.0)
    metric_rows(trial, {"attempt": 2}, 10, [10], "train_loss", 2.0)
    last = [r for r in rows(trial) if r["step"] == 10]
    assert [(r["m"], r["attempt"]) for r in last] == [({"train_loss": 1010.0}, 1), ({"val_loss": 1.0}, 2)]


def test_chosen_names_are_the_only_ones_and_lose_nothing(tmp_path):
    trial, _ = claimed(tmp_path)
    header = {"trial": trial.name, "attempt": 1, "resumed_at_step": 0}
    out = Rows(trial.attempt(1).metrics, "metrics", header)
    for step in range(100):
        more = {"val_loss": 9.0 - step} if step % 10 == 0 else {}
        out.row(step, {"train_loss": 1.0, "lr/decay": 2.0, **more}, **START)
    out.close()
    everything = list(rows(trial))
    for names in (["val_loss"], ["val_loss", "lr/decay"], ["lr/plain"], []):
        kept = [{**r, "m": {n: v for n, v in r["m"].items() if n in names}} for r in everything]
        assert list(rows(trial, names)) == [r for r in kept if r["m"]]


def test_bad_lines_are_skipped_and_reported(tmp_path):
    trial, lease = claimed(tmp_path)
    metric_rows(trial, lease)
    path = trial.attempt(1).metrics
    good = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*good[:3], b'{"q": 2, "st\n', b"7\n", b'{"step": 3}\n', *good[3:], b'{"q": 11']))
    damage = []
    assert [r["step"] for r in rows(trial, None, damage)] == list(range(1, 11))
    assert len(damage) == 3 and damage[0] == f"{path}:4: not a row; skipped"


def test_a_foreign_header_is_an_error(tmp_path):
    trial, _ = claimed(tmp_path)
    trial.attempt(1).metrics.write_text('{"schema": "ablab.metrics/2"}\n')
    with pytest.raises(RunError, match=r"ablab\.metrics/2"):
        list(rows(trial))


def test_rows_are_synced_by_the_clock_and_on_request(tmp_path, monkeypatch):
    now, synced = [0.0], []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(now[0]))
    out = Rows(tmp_path / "c.jsonl", "contracts", {"trial": "t", "attempt": 1}, clock=lambda: now[0])
    for second in range(25):
        now[0] = float(second)
        out.line({"ok": True})
    assert synced == [10.0, 20.0]
    out.sync()
    assert synced == [10.0, 20.0, 24.0]
    out.close()


# ---- amendments


def test_an_amendment_only_adds_trials(tmp_path):
    made = campaign(tmp_path)
    before = made.file("campaign").read_bytes()
    names = [t.name for t in made.trials()]
    more = record(7)
    path = made.amend(
        {"created": "2026", "reason": "more seeds", "trials": [more]},
        {rundir.folder_of(more): "CONFIG_Y=y\n"},
    )
    assert path.name == "amend-001.json" and made.file("campaign").read_bytes() == before
    for seen in (made, Campaign.open(made.path)):
        assert [t.name for t in seen.trials()] == [*names, rundir.folder_of(more)]
        assert seen.trial(rundir.folder_of(more)).config.read_text() == "CONFIG_Y=y\n"


def test_a_child_finds_its_trial_from_the_attempt_folder(tmp_path):
    trial, _ = claimed(tmp_path)
    attempt = rundir.AttemptDir.open(trial.attempt(1).path)
    assert (attempt.number, attempt.trial.name, attempt.trial.record) == (1, trial.name, trial.record)
