# SPDX-License-Identifier: MIT
"""What a trial really leaves holds a record of every field of a certificate."""

import hashlib
import os
from pathlib import Path

import ablab.train
from ablab import kconf, provenance
from ablab.report import load
from ablab.verify._fields import FIELDS, GROUPS, Facts
from tests import trial as tiny


def test_a_trained_trial_has_a_record_of_every_field(tmp_path):
    made = tiny.campaign(tmp_path, 'CONFIG_SYS_PUBLIC_REMOTE="https://example.org/x"')
    assert os.waitstatus_to_exitcode(tiny.forked(tiny.claim(made))) == 0
    c = load.read(made.campaign)
    facts = Facts(c.trials[0], "val_loss", "final", {})
    found = {f.full: facts.read(f) for f in FIELDS}  # AbsentError names what is missing
    manifest = made.manifest()
    assert manifest["code"]["remote"] == "https://example.org/x"
    source = hashlib.sha256(Path(ablab.train.__file__).read_bytes()).hexdigest()
    assert manifest["code"]["modules"]["ablab.train"] == source == provenance.modules()["ablab.train"]
    assert (found["data.start"], found["data.end"]) == (0, 20 * 4)
    assert (found["evaluation.count"], found["evaluation.checkpoint"]) == (6, "val_loss final")
    assert (found["execution.compile"], found["execution.graph_breaks"]) == ("off", 0)
    assert found["budget.flops"] == 20 * 4 * 32 * made.built()["flops_per_token"]
    rates = found["schedule.rates"]
    assert len(rates) == 5 and rates[-1][:2] == [20, 1.0] and found["schedule.minimum"] == rates[-1][2]
    assert [g["weight_decay"] for g in found["optimizer.groups"]] == [0.1, 0.0]
    assert found["model.weights"] == tiny.outcome(made)["hashes"]["model.safetensors"]
    assert found["pruning.realised"] == 0.0 and found["model.dtypes"] == ["float32"]


def test_every_group_but_those_of_checks_alone_has_fields():
    assert {f.group for f in FIELDS} == set(GROUPS) - {"treatment", "effects", "statistics", "integrity", "mirror"}


def test_the_public_address_is_no_part_of_the_identity():
    plain, public, other = (
        kconf.identity(tiny.settled(Path("data"), line).values)
        for line in ("", 'CONFIG_SYS_PUBLIC_REMOTE="https://example.org/x"', "CONFIG_SYS_THREADS=2")
    )
    assert plain == public != other
