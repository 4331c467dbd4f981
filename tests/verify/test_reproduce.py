# SPDX-License-Identifier: MIT
"""A study that is really trained, published, certified, bundled, and run again by a stranger; then with a fault."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ablab.report.certificate import CertificateError
from ablab.verify import issue, reproduce
from tests import project, trial
from tests.verify import fair

FILE = ("file",)
STUDY = """# Two learning rates, seconds on a CPU
base     cert
seeds    6 paired
metric   val_loss final
[R0] Baseline
[R1] Faster
CONFIG_OPT_LR="5e-3"
"""


def ablab(folder: Path, *words: str) -> subprocess.CompletedProcess:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("ABLAB_", "CONFIG_", "MAKE", "PYTEST"))}
    command = [sys.executable, "-m", "ablab", *words]
    env = {**keep, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(project, campaign) of a study whose commit is public, trained."""
    folder = project.copy(tmp_path_factory.mktemp("project"))
    lines = [line for line in trial.TINY.format(data="data").split() if "WARMUP" not in line]
    (folder / "defconfigs/cert").write_text(
        "\n".join(["# Two seconds", *lines, "CONFIG_SCHED_WARMUP=2", f'CONFIG_SYS_PUBLIC_REMOTE="file://{folder}"', ""])
    )
    (folder / "studies/pair.study").write_text(STUDY)
    (folder / ".gitignore").write_text("/.venv\n/results\n/data\n/.config*\n/config.py\n__pycache__\n")
    fair.git(folder.parent, "init", "-q", "-b", "main", str(folder))
    fair.git(folder, "add", ".")
    fair.git(folder, "commit", "-q", "-m", "first")
    assert ablab(folder, "defconfig", "pair").returncode == 0
    done = ablab(folder, "run", "YES=1", "NAME=cert", "CHECK=0", "JOBS=1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, fair.Campaign.open(folder / "results/cert")


@pytest.mark.slow
def test_a_trained_study_is_certified_and_a_stranger_reproduces_it(ran, tmp_path, capsys):
    folder, campaign = ran
    body = issue.certify(campaign, schemes=FILE)
    assert body["findings"] == [], issue.listing(body)
    assert body["claims"][0]["word"].startswith(("better", "worse"))
    bundle = issue.bundle(campaign, tmp_path / "cert.tar")
    assert issue.recheck(bundle)[1] == []
    with pytest.raises(CertificateError, match="YES=1"):
        reproduce.reproduce(bundle, "r1-s1337", False, FILE)
    assert reproduce.reproduce(bundle, "r1-s1337", True, FILE) == 0
    text = capsys.readouterr().out
    assert "reproduced: the final weights are equal, bit for bit" in text
    assert fair.git(folder, "rev-parse", "HEAD") in text

    # other weights and a value that is far off
    original = reproduce.Original(campaign.certificate, body, "r1-s1337")
    other = next(t for t in original.c.trials if t.id == "r0-s1337")
    record = {**other.record, "hash": original.trial.record["hash"]}
    assert reproduce.compare(original, replace(other, record=record)) == 1
    near = next(t for t in original.c.trials if t.id == "r1-s1338")
    assert reproduce.compare(original, replace(near, record=record)) in (0, 1)
    assert reproduce.compare(original, other) == 3  # another configuration
    with pytest.raises(CertificateError, match="not in the certificate"):
        reproduce.reproduce(bundle, "r7-s1", True, FILE)


@pytest.mark.slow
def test_a_dirty_tree_gets_no_certificate(ran, tmp_path):
    folder, _ = ran
    (folder / "studies/extra.study").write_text(STUDY)  # not committed
    words = ("run", "YES=1", "NAME=dirty", "CHECK=0", "JOBS=1", "SEEDS=1", "STEPS=R0")
    done = ablab(folder, *words)
    (folder / "studies/extra.study").unlink()
    assert done.returncode == 0, done.stdout[-2000:]
    manifest = fair.Campaign.open(folder / "results/dirty").trials()[0].manifest()
    assert manifest["code"]["dirty"] and manifest["code"]["patch"]


def test_another_environment_is_named():
    now = {
        "software": {**reproduce.provenance.software()},
        "cpu": {"model": reproduce.machine.inventory().cpu},
        "devices": [],
    }
    assert list(reproduce.environment(now)) == []
    other = json.loads(json.dumps(now))
    other["software"]["torch"], other["devices"] = "1.0", [{"name": "NVIDIA H100"}]
    found = list(reproduce.environment(other))
    assert [line.partition(":")[0] for line in found] == ["torch", "device"]


def test_a_certificate_without_its_files_says_what_is_missing(tmp_path):
    public = fair.repository(tmp_path / "public")
    made = fair.write(tmp_path, "attention", *public)
    issue.certify(made, schemes=FILE)
    alone = tmp_path / "elsewhere" / "report" / "certificate.json"
    alone.parent.mkdir(parents=True)
    alone.write_bytes(made.certificate.read_bytes())
    with pytest.raises(CertificateError, match="give the whole bundle"):
        reproduce.reproduce(alone, None, True, FILE)


def test_a_refused_certificate_is_not_run(tmp_path):
    made = fair.write(tmp_path)
    issue.certify(made)
    with pytest.raises(CertificateError, match="was refused"):
        reproduce.reproduce(made.certificate, None, True, FILE)
