# SPDX-License-Identifier: MIT
"""The doctor's findings, good and bad."""

import json

import pytest

from ablab.run import doctor


def test_a_sound_folder_passes_and_stays_empty(tmp_path):
    rows = doctor._folder(tmp_path / "results")
    assert [what for what, ok, _ in rows if ok] == ["POSIX locks", "exclusive create", "atomic rename", "disk"]
    assert list((tmp_path / "results").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_bad(tmp_path):
    (tmp_path / "file").touch()
    ((what, ok, text),) = doctor._folder(tmp_path / "file")
    assert (what, ok) == ("results", False) and "choose another folder with O=" in text


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setattr(doctor.plugin, "_extras", lambda: {"x": ["no-such-package-at-all>=2", "pytest"]})
    assert doctor._missing() == {"x": ["no-such-package-at-all"]}


@pytest.mark.parametrize(
    ("probe", "bad"),
    [
        ("import json; print(json.dumps(dict(torch='2', threads=2, devices=0, compile=True, native=True)))", []),
        (
            "import json; print(json.dumps(dict(torch='2', threads=2, devices=0, compile='no gcc', native='no g++')))",
            [],
        ),
        ("import no_such_torch", ["torch"]),
    ],
)
def test_what_the_torch_process_says_is_judged(monkeypatch, probe, bad):
    monkeypatch.setattr(doctor, "PROBE", probe)
    assert [what for what, ok, _ in doctor._torch(0) if ok is False] == bad


def test_a_bad_finding_is_exit_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "examine", lambda results: iter([("a", True, "x"), ("b", False, "y")]))
    assert doctor.main(tmp_path) == 1
    assert capsys.readouterr().out.splitlines() == ["ok  a                  x", "BAD b                  y"]
    assert doctor.main(tmp_path, "json") == 1
    assert [row["ok"] for row in json.loads(capsys.readouterr().out)] == [True, False]
