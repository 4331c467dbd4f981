# SPDX-License-Identifier: MIT
"""Clocks that add up, and a window that keeps device scalars apart by step."""

import math

import pytest
import torch

from ablab import window
from ablab.window import CLOCKS, Clocks, Window, Work

WORK = Work(samples=4, tokens=64, flops=6400.0, peak=1e6, epoch=10, clip=1.0)


def scalars(*values):
    return [torch.tensor(v) for v in values]


def clocks(**spent):
    c = Clocks()
    c.spent = {**dict.fromkeys(CLOCKS, 0.0), **spent}
    return c


def test_exactly_one_clock_runs():
    c = Clocks()
    for name in ("data", "fwd_bwd", "data", "other"):
        before = sum(c.spent.values())
        c.to(name)
        assert sum(c.spent.values()) >= before and c.running == name
    start = c.since
    assert c.total() == sum(c.spent.values()) and c.since >= start


def test_micro_losses_are_averaged_by_step():
    w = Window(accum=2)
    w.add(scalars(1.0, 3.0), torch.tensor(0.5))
    w.add(scalars(5.0, 7.0), torch.tensor(2.0))
    assert w.read() is None
    assert (w.losses, w.norms, w.raw) == ([2.0, 6.0], [0.5, 2.0], [])
    m = w.measures(2, clocks(fwd_bwd=3.0, optimizer=1.0, data=1.0), WORK)
    assert m["train_loss"] == 4.0 and m["train_perplexity"] == pytest.approx(math.exp(4))
    assert (m["grad_norm"], m["grad_norm_max"], m["grad_clip_frac"]) == (1.25, 2.0, 0.5)
    assert (m["train/tok_per_sec"], m["train/samples_per_sec"], m["train/step_s"]) == (32.0, 2.0, 2.0)
    assert m["train/mfu"] == pytest.approx(2 * 6400 / 4 / 1e6) and m["time/data_pct"] == 20.0


def test_hits_give_the_accuracy_of_the_window_and_survive_a_checkpoint():
    w, work = Window(accum=2), WORK._replace(tokens=4)
    for hits in (1, 4):
        w.add(scalars(1.0, 3.0), torch.tensor(0.5), torch.tensor(hits))
    assert w.read() is None
    other = Window(accum=2)
    other.restore(w.state())
    other.add(scalars(2.0, 2.0), torch.tensor(0.5), torch.tensor(1))
    assert other.read() is None and other.losses == [2.0] * 3
    m = other.measures(3, clocks(fwd_bwd=1.0), work)
    assert m["train_accuracy"] == pytest.approx(100 * (1 + 4 + 1) / 12) and "train_perplexity" not in m


@pytest.mark.parametrize(("at", "loss", "norm"), [(3, math.nan, 1.0), (2, 1.0, math.inf)])
def test_the_first_bad_step_is_found(at, loss, norm):
    w = Window(accum=1)
    w.step = 10
    for n in range(1, 5):
        w.add(scalars(loss if n == at else 1.0), torch.tensor(norm if n == at else 1.0))
    assert w.read() == 10 + at


def test_what_is_held_on_the_device_is_bounded(monkeypatch):
    monkeypatch.setattr(window, "FOLD", 6)
    w = Window(accum=1)
    for n in range(20):
        w.add(scalars(float(n)), torch.tensor(1.0))
        assert len(w.raw) <= 6
    w.read()
    assert w.losses == [float(n) for n in range(20)]


def test_rows_cut_the_clocks_without_a_gap():
    c, w, total = clocks(startup=2.0, fwd_bwd=1.0), Window(1), 0.0
    for step in (1, 2, 3):
        w.add(scalars(1.0), torch.tensor(1.0))
        w.read()
        m = w.measures(step, c, WORK)
        total += sum(v for k, v in m.items() if k.startswith("time/") and k.endswith("_s") and "epoch" not in k)
        w = w.next(step, c, WORK)
        c.spent["fwd_bwd"] += 0.5
    assert total == pytest.approx(sum(c.spent.values()) - 0.5)


def test_an_epoch_is_timed_when_it_ends():
    c, w = clocks(fwd_bwd=6.0, data=2.0), Window(1)
    assert "time/epoch_s" not in _row(w, 2, c)  # 8 of 10 samples
    m = _row(w, 3, c)
    assert m["time/epoch_s"] == 8.0 and w.next(3, c, WORK).epoch == 1


def _row(w, step, c):
    w.add(scalars(1.0), torch.tensor(1.0))
    w.read()
    return w.measures(step, c, WORK)


def test_state_restores_the_window():
    w = Window(2)
    w.add(scalars(1.0, 2.0), torch.tensor(3.0))
    w.read()
    other = Window(2)
    other.restore(w.state())
    assert other.state() == w.state() and other.losses == [1.5]
