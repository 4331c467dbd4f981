# SPDX-License-Identifier: MIT
"""Runs of W&B and Trackio by the verbs of local trials: the real client against a service on 127.0.0.1, real files."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ablab.report import compare, query, source
from ablab.report.query import NothingError, QueryError
from tests.report import service

ROOT = Path(__file__).parents[2]
ROWS = 2500  # more than a page of the client, and than the 500 that it samples


def history(loss, rows=ROWS):
    return [
        {
            **{"_step": i, "_runtime": 2.0 * i, "_timestamp": 1e9 + i, "step": 10 * i, "tokens": 7680 * i},
            **{"train_s": 1.0 * i, "wall_s": 2.0 * i, "flops": 1e6 * i, "val_loss": loss - i / rows},
            **({"train/tok_per_sec": 100.0} if i % 2 else {}),
        }
        for i in range(rows)
    ]


def events():
    parts = {"gpu": 90.0, "memory": 15.0, "memoryAllocatedBytes": 3e9, "powerWatts": 300.0, "temp": 60.0}
    one = {f"system.gpu.1.{k}": v for k, v in parts.items()}
    return [{"_runtime": 100.0 * i, **one, "system.gpu.10.powerWatts": 50.0, "system.cpu": 5} for i in range(40)]


class Fixed:
    """A source of runs that are written down."""

    def __init__(self, *runs):
        self.runs = {r.id: r for r in runs}

    def heads(self):
        return [
            source.Head(r.id, r.name, "proj", r.state, r.step or None, r.config, {"val_loss": r.rows[-1]["val_loss"]})
            for r in self.runs.values()
        ]

    def rows(self, head):
        return self.runs[head.id].rows, self.runs[head.id].events


def config(seed, **changes):
    return {"seed": seed, "run_name": f"s{seed}", "batch_size": 8, "optimizer": {"lr": 6e-4}, **changes}


def runs():
    return [
        service.Run("aaaa1111", "r0-s1", config(1), history(3.0), events(), step="R0"),
        service.Run("bbbb2222", "r0-s2", config(2), history(3.2), step="R0"),
        service.Run("cccc3333", "r1-s1", config(1, batch_size=16), history(2.5), step="R1"),
        service.Run("dddd4444", "twice", config(1), history(3.0, 3)),
        service.Run("eeee5555", "twice", config(1), history(3.0, 3)),
        service.Run("ffff6666", "crashed", config(1), history(3.0, 3), state="crashed"),
    ]


@pytest.fixture
def known(monkeypatch):
    fixed = Fixed(*runs())
    monkeypatch.setitem(source.SOURCES, "wandb", lambda entity, project: fixed)
    return lambda *words, **v: source.find({"SOURCE": "wandb", "PROJECT": "proj", **v}, words)


def test_names_globs_and_ids_find_runs(known):
    assert [r.hash[:1] for r in known("r0-s1")] == ["a"]
    assert [r.id for r in known("r0-*", "cccc3333", "r0-s1")] == ["r0-s1", "r0-s2", "r1-s1"]
    assert [r.hash for r in known(RUN_ID="eeee5555")] == ["eeee5555"]
    assert [r.hash for r in known(RUN_NAME="r1-s1")] == ["cccc3333"]


def test_an_ambiguous_name_lists_its_ids(known):
    with pytest.raises(QueryError, match="2 runs have this name; RUN_ID=dddd4444 or eeee5555"):
        known("twice")
    with pytest.raises(NothingError, match="no such run in proj; runs: r0-s1"):
        known("nope")
    with pytest.raises(NothingError):
        known(RUN_ID="r0-s1")
    with pytest.raises(QueryError, match="which runs"):
        known()


def test_every_row_counts_and_gpu_1_is_not_gpu_10(known):
    table = query.keys(known("r0-s1"))
    found = {row[0]: row[2:5] for row in table.rows}
    assert found["val_loss"] == (ROWS, 0, 10 * (ROWS - 1)) and found["train/tok_per_sec"][0] == ROWS // 2
    assert found["gpu/1/power_w"][0] == found["gpu/10/power_w"][0] == 40
    assert {n for n in found if n.startswith("gpu/10/")} == {"gpu/10/power_w"}
    (run,) = known("r0-s1")
    assert (run.over("gpu/1/power_w", "mean"), run.over("gpu/10/power_w", "mean")) == (300.0, 50.0)
    assert run.over("gpu/1/memory_used_avg_gb", "max") == pytest.approx(3.0)


def test_gpu_figures_are_per_device_and_weighted_by_time(known, monkeypatch):
    table = source.gpu(known("r0-s1"))
    assert [r[2:4] for r in table.rows] == [("1", q) for q in sorted(source.BRIEF)]
    assert {r[2] for r in source.gpu(known("r0-s1"), True).rows} == {"1", "10"}
    # 10 W for 1 s, which is taken as typical of the first, then 30 W for 1 s and 20 W for 8 s
    rows = [
        {"_step": i, "_runtime": t, "gpu/power_w": w} for i, (t, w) in enumerate([(1, 10.0), (2, 30.0), (10, 20.0)])
    ]
    fixed = Fixed(service.Run("a", "a", {}, [{**r, "val_loss": 1.0} for r in rows]))
    monkeypatch.setitem(source.SOURCES, "wandb", lambda entity, project: fixed)
    ((*place, mean, median, p5, p95, most),) = source.gpu(known("a"), True).rows
    assert place[:4] == ["proj", "a", "all", "power_w"]
    weights = (4.5, 1.0, 8.0)  # 4.5 s is the median of 1 and 8
    assert mean == pytest.approx((10 * 4.5 + 30 + 160) / sum(weights))
    assert (median, p5, p95, most) == (20.0, 10.0, 30.0, 30.0)


def test_events_stand_at_the_step_before_them(known):
    table = query.series(known("r0-s1"), ["gpu/1/power_w"])
    # event i at 100 i seconds; row k at 2 k seconds is step 10 k
    assert [row[2] for row in table.rows] == [500 * i for i in range(40)]


def test_series_and_ls_take_runs(known):
    table = query.series(known("r0-s1", "r1-s1"), ["val_loss"], "tokens", 3)
    assert [row[2] for row in table.rows] == [0, 7680 * 1249, 7680 * 2499] * 2 or len(table.rows) == 6
    rows = query.ls(known("*"), "state=finished and val_loss<2 and batch_size=16").rows
    assert [r[1] for r in rows] == ["r1-s1"]


def test_a_foreign_name_has_no_unit_and_is_still_shown(monkeypatch):
    rows = [{"_step": 0, "my/loss": 1.0, "val_loss": 2.0, "text": "x", "bad": "NaN"}]
    fixed = Fixed(service.Run("a", "a", {}, rows))
    monkeypatch.setitem(source.SOURCES, "wandb", lambda entity, project: fixed)
    table = query.keys(source.find({"SOURCE": "wandb", "PROJECT": "p"}, ["a"]))
    assert [row[:3] for row in table.rows] == [("bad", None, 1), ("val_loss", "nats/token", 1), ("my/loss", None, 1)]


def test_runs_with_equal_settings_are_compared_and_others_are_not(known):
    (same,) = compare.compare(known("r0-s1"), [known("r0-s2")], keys=["val_loss"])
    assert same.code == 0 and same.values.rows[0][4] == pytest.approx(0.2)
    (other,) = compare.compare(known("r0-*"), [known("r1-s1")])
    assert other.code == 3 and other.values is None and "batch_size: 8 | 16" in other.text()
    (lost,) = compare.compare(known("r0-s1"), [known("crashed")])
    assert lost.code == 1 and lost.missing == ("crashed of proj (crashed)",)


def test_diff_takes_runs(known):
    assert query.diff(known("r0-s1")[0], known("r1-s1")[0]).rows == (("batch_size", "8", "16", None, None),)


# Trackio: the tables of 0.43


@pytest.fixture
def trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    with sqlite3.connect(tmp_path / "myproj.db") as file:
        file.execute(
            "CREATE TABLE metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, timestamp TEXT NOT NULL,"
            " run_name TEXT NOT NULL, step INTEGER NOT NULL, metrics TEXT NOT NULL)"
        )
        file.execute(
            "CREATE TABLE system_metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL,"
            " timestamp TEXT NOT NULL, run_name TEXT NOT NULL, metrics TEXT NOT NULL)"
        )
        file.execute(
            "CREATE TABLE configs (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, run_name TEXT NOT NULL,"
            " config TEXT NOT NULL, created_at TEXT NOT NULL, UNIQUE(run_id))"
        )
        for run_id, name, shift in (("id1", "r0-s1", 0.0), ("id2", "r1-s1", 0.5)):
            made = {"batch_size": 8, "seed": 1, "_Username": "me"}
            file.execute("INSERT INTO configs VALUES (NULL, ?, ?, ?, 'now')", (run_id, name, json.dumps(made)))
            for i in range(30):
                m = {"val_loss": "NaN" if i == 3 else 3.0 - shift - i / 100, "step": i * 10, "train_s": float(i)}
                stamp = f"2026-01-01T00:00:{i:02}"
                row = (run_id, stamp, name, i, json.dumps(m))
                file.execute("INSERT INTO metrics VALUES (NULL, ?, ?, ?, ?, ?)", row)
    return tmp_path


def ablab(*words, **environment):
    command = [sys.executable, "-m", "ablab", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["keys", "r0-s1"], 0, "val_loss  nats/token      30           0        290"),
        (["keys", "--run-name", "r0-s1"], 0, "val_loss"),
        (["keys", "--run-id", "id2"], 0, "val_loss"),
        (["series", "r0-s1", "KEY=val_loss", "X=train_s"], 0, "2.71"),
        (["ls", "--sort", "value"], 0, "r1-s1"),
        (["compare", "r0-s1", "r1-s1", "--key", "val_loss"], 0, "-0.5"),
        (["diff", "r0-s1", "r1-s1"], 0, "what"),
        (["keys", "nope"], 1, "nope: no such run in my.proj; runs: r0-s1 r1-s1"),
        (["keys", "r0-s1", "ENTITY=me"], 2, "Trackio has projects only"),
        (["keys", "r0-s1", "PROJECT=other"], 1, "no such project; projects: myproj"),
    ],
)
def test_verbs_read_trackio(trackio, words, code, text):
    project = [] if any(w.startswith("PROJECT=") for w in words) else ["--project", "my.proj"]
    done = ablab(*words, "SOURCE=trackio", *project)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stdout + done.stderr
    assert text in done.stdout + done.stderr


def test_a_file_that_is_no_project_is_an_error(trackio):
    (trackio / "torn.db").write_bytes(b"SQLite format 3\x00" + bytes(100))
    with pytest.raises(source.SourceError, match=r"torn\.db: .*; not a project"):
        source.find({"SOURCE": "trackio", "PROJECT": "torn"}, ["*"])


@pytest.mark.slow
def test_what_trackio_itself_wrote_is_read_back(tmp_path):
    pytest.importorskip("trackio")
    code = (
        "import trackio\n"
        "run = trackio.init(project='real', name='r0', config={'seed': 3}, auto_log_gpu=False)\n"
        "for i in range(50): trackio.log({'val_loss': 3.0 - i / 100, 'step': i}, step=i)\n"
        "trackio.finish()"
    )
    environment = {"TRACKIO_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **environment}, capture_output=True)
    done = ablab("series", "r0", "KEY=val_loss", "SOURCE=trackio", "PROJECT=real", "FORMAT=json", **environment)
    assert [r["val_loss"] for r in json.loads(done.stdout)] == [3.0 - i / 100 for i in range(50)], done.stderr


# W&B: its own client


def environment(url, home):
    quiet = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40, "HOME": str(home), **quiet}


@pytest.mark.slow
def test_without_a_package_or_a_service_it_is_one_line(tmp_path):
    done = ablab("keys", "x", "SOURCE=wandb", "PROJECT=p", **environment("http://127.0.0.1:9", tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("wandb: p: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_client_of_wandb_reads_every_row(tmp_path):
    pytest.importorskip("wandb")
    with service.serve(runs()) as wandb:
        where = ["SOURCE=wandb", "ENTITY=team", "PROJECT=proj", "FORMAT=json"]
        done = ablab("series", "r0-s1", "KEY=val_loss", *where, **environment(wandb.url, tmp_path))
        assert done.returncode == 0, done.stderr
        points = [(r["step"], r["val_loss"]) for r in json.loads(done.stdout)]
        assert points == [(r["step"], pytest.approx(r["val_loss"], abs=0)) for r in history(3.0)]
        done = ablab("keys", "--run-name", "twice", *where, **environment(wandb.url, tmp_path))
        assert done.returncode == 2 and "RUN_ID=dddd4444 or eeee5555" in done.stderr
        done = ablab("keys", "r0-s1", "PREFIX=gpu/", *where, **environment(wandb.url, tmp_path))
        assert len(json.loads(done.stdout)) == 6
        assert wandb.unknown == []


@pytest.mark.slow
def test_snippets_of_the_guide_run_unmodified(tmp_path):
    pytest.importorskip("wandb")
    pytest.importorskip("pandas")
    text = (ROOT / "docs/query.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippets) == 2
    gpu = {"gpu/memory_util_avg": 18.25, "gpu/compute_util_avg": 91.5}
    settings = {"gradient_accumulation": 8, "learning_rate": 6e-4, "max_time": 7200, "compile_model": True}
    two = [
        service.Run(id, name, {"run_name": name, "batch_size": 8, "git_commit": "c" * 40, **settings}, rows)
        for id, name in (("aaaa", "baseline"), ("bbbb", "reciprocal"))
        for rows in [[{**row, **gpu} for row in history(3.0, 20)]]
    ]
    with service.serve(two) as wandb:
        outputs = []
        for snippet in snippets:
            done = subprocess.run(
                [sys.executable, "-c", snippet],
                capture_output=True,
                text=True,
                env={**os.environ, **environment(wandb.url, tmp_path)},
            )
            assert done.returncode == 0, done.stderr
            outputs.append(done.stdout)
        assert wandb.unknown == []
    assert "baseline: memory active 18.25 %, busy 91.50 %" in outputs[0] and "reciprocal" in outputs[0]
    assert "batch_size: 8" in outputs[1] and "learning_rate: 0.0006" in outputs[1] and "2 runs" in outputs[1]
