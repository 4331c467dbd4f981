# SPDX-License-Identifier: MIT
"""Campaigns with rows that no training wrote: attempts that end and go on as a test says."""

import math

from ablab import rundir
from ablab.journal import Journal, TrialState
from ablab.rundir import Rows, TrialDir
from tests import trial as tiny

PAIRS = (("train_loss", "learning_rate"), ("val_loss",))


campaign = tiny.campaign


def attempt(trial: TrialDir, resumed: int, steps: int, state: TrialState | None = None, every: int = 1) -> None:
    """One more attempt, with rows of the steps up to `steps`; the second row of every fourth step is an evaluation."""
    here = tiny.claim(trial)
    rows = Rows(here.metrics, "metrics", {"trial": trial.name, "attempt": here.number, "resumed_at_step": resumed})
    for step in range(resumed + every, steps + 1, every):
        for names in PAIRS if step % 4 == 0 else PAIRS[:1]:
            values = {n: math.nan if step == 3 else 1 / (step + i + 1) for i, n in enumerate(names)}
            rows.row(step, values, tokens=10 * step, train_s=0.5 * step, wall_s=0.7 * step, flops=1e3 * step)
    rows.close()
    if state:
        end(trial, state)


def more(trial: TrialDir, first: int, last: int) -> None:
    """Further rows of the attempt that runs."""
    (attempt,) = trial.attempts()
    rows = Rows(attempt.metrics, "metrics", {"trial": trial.name, "attempt": 1, "resumed_at_step": 0})
    q = sum(1 for _ in rundir.rows(trial))
    for step in range(first, last + 1):
        axes = {"tokens": 10 * step, "train_s": 0.5 * step, "wall_s": 0.7 * step, "flops": 1e3 * step}
        rows.line({"q": q + step - first, "step": step, **axes, "m": {"train_loss": 1 / step}, "bad": []})
    rows.close()


def end(trial: TrialDir, state: TrialState) -> None:
    journal = Journal.of(trial.campaign)
    assert journal.append(trial.name, state, reason="test")
    if state.is_resumable():
        assert journal.append(trial.name, TrialState.QUEUED, reason="continue")


def truth(trial: TrialDir) -> list[tuple]:
    """(step, metrics) of every row, as the report reads them; None for what was not finite."""
    return [(r["step"], r["m"]) for r in rundir.rows(trial)]


def points(rows: list[dict]) -> list[tuple]:
    """The same of what a tracker has."""
    names = {n for pair in PAIRS for n in pair}
    finite = lambda v: None if v in (None, "NaN") or math.isnan(v) else v
    return [(int(r["step"]), {n: finite(v) for n, v in r.items() if n in names}) for r in rows]
