# SPDX-License-Identifier: MIT
"""Acceptance 7: trials that differ in torch.compile only are refused by name; as the declared treatment it passes."""

from ablab import __main__ as cli
from ablab.verify import issue
from tests.verify import fair


def test_verify_over_trials_that_differ_in_compile_only_exits_3_and_names_it(tmp_path, capsys):
    found = fair.write(tmp_path)
    for name, text in (("SYS_COMPILE_ON", "y"), ("SYS_COMPILE_OFF", "n")):
        fair.change(found, lambda t, n=name, x=text: fair.set_symbol(t, n, x), "R1")
    fair.change(found, lambda t: fair.put(t, "manifest.resolved.compile", "on"), "R1")
    fair.change(found, lambda t: fair.put(t, "summary.compile", {"graphs": 2, "breaks": 0}), "R1")
    assert cli.main(["verify", f"CAMPAIGN={found.path}"]) == 3
    text = capsys.readouterr().out
    assert "REFUSED execution.compile (T)" in text and "confounder: SYS_COMPILE" in text


def test_declared_as_the_treatment_it_passes(tmp_path):
    found = fair.write(tmp_path / "results", "compile", *fair.repository(tmp_path / "public"))
    body = issue.certify(found, schemes=("file",))
    assert body["verdict"] == "issued"
    (compiled,) = [f for f in body["groups"]["execution"] if f["name"] == "compile"]
    assert compiled["status"] == "treatment" and compiled["values"] == {"R0": "off", "R1": "on"}
