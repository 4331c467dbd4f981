# SPDX-License-Identifier: MIT
"""The core, the runner, the report and the verbs start without torch, so they are fast and run on a laptop."""

import subprocess
import sys

import pytest

from tests.contract.test_layers import L0, L3

TRACKERS = ("wandb", "trackio", "tensorboard")
HEAVY = ("torch", "numpy", "matplotlib", "transformers", *TRACKERS, "ray", "submitit", "datasets")


def loaded(module: str) -> str:
    code = f"import {module}, sys; print(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["__main__", *sorted(L0 | L3), "track.__main__", *(f"track.{t}" for t in TRACKERS)])
def test_import_is_light(module):
    assert loaded(f"ablab.{module}") == ""


def test_a_heavy_import_is_seen():
    assert "numpy" in loaded("numpy")
