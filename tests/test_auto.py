# SPDX-License-Identifier: MIT
"""What a device decides: by steps that were taken, on the CPU through the same code as on a GPU."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from ablab import auto, check
from tests import trial as tiny

CPU = torch.device("cpu")
METER = auto.Meter(CPU, 1 << 40)
LARGE = """CONFIG_MODEL_GPT_BLOCK=256
CONFIG_MODEL_GPT_EMBED=64
CONFIG_MLP_GELU_WIDTH=256
CONFIG_TRAIN_BATCH_EFFECTIVE=64
CONFIG_EVAL_TOKENS=8192
"""
PRUNED = "CONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_WARMUP=4\n"


def arm(extra="", open_=(auto.MICRO,), name="a"):
    values = tiny.settled(Path("unused"), extra).values
    return auto.Arm(name, {**values, **({auto.MICRO: 0} if auto.MICRO in open_ else {})}, frozenset(open_))


# memory


@pytest.fixture(scope="module")
def peaks():
    """Bytes that two steps of a pruned arm take, by micro batch: each in a process of its own."""
    a = arm(LARGE + PRUNED)
    return {n: auto.apart(lambda n=n: auto.take_steps(a, n, False, 2, METER))["peak"] for n in (8, 64)}


def test_a_larger_micro_batch_takes_more_memory(peaks):
    assert peaks[64] > 2 * peaks[8] > 0


def test_the_largest_micro_batch_whose_peak_fits_wins(peaks):
    room = (peaks[8] + peaks[64]) // 2
    found = auto.choose([arm(LARGE + PRUNED)], auto.Meter(CPU, int(room / 0.9)))
    symbol, value, why = found["chosen"]["TRAIN_BATCH_MICRO"]
    assert symbol == "TRAIN_BATCH_MICRO" and int(value) in (8, 16, 32) and why.startswith("largest divisor of 64")
    tries = found["measured"]["micro"]
    assert {t["micro"] for t in tries if t["fits"]} >= {int(value)}
    assert all(t["peak"] > 0.9 * t["free"] for t in tries if t["micro"] > int(value))
    assert 2 * int(value) in {t["micro"] for t in tries}  # the next one was tried, and did not
    assert all(len(t["step_s"]) == 2 for t in tries)


def test_more_memory_takes_the_whole_batch_and_less_takes_none(peaks):
    assert auto.choose([arm(LARGE)], METER)["chosen"]["TRAIN_BATCH_MICRO"][1] == "64"
    with pytest.raises(auto.NothingFitsError, match="a: no micro batch fits into 0.9 of 1 MiB: peak"):
        auto.choose([arm(LARGE)], auto.Meter(CPU, 1 << 20))


@pytest.mark.parametrize("first", range(7))
@pytest.mark.parametrize("limits", [(64, 64), (16, 64), (64, 16), (4, 1), (1, 4), (0, 64), (64, 0)])
def test_every_arm_fits_with_what_wins_wherever_the_search_begins(first, limits):
    tries = []

    def fits(a, n):
        tries.append((a, n))
        return n <= limits[a]

    sizes = [1, 2, 4, 8, 16, 32, 64]
    found = auto.largest([0, 1], sizes, first, fits)
    assert found == (max((n for n in sizes if n <= min(limits)), default=None))
    assert len(tries) == len(set(tries))  # nothing is tried twice


def test_arms_with_other_batches_get_a_divisor_of_all():
    few = LARGE.replace("EFFECTIVE=64", "EFFECTIVE=48")
    assert auto.choose([arm(LARGE), arm(few, name="b")], METER)["chosen"]["TRAIN_BATCH_MICRO"][1] == "16"


def test_a_try_includes_an_update_of_the_masks(monkeypatch):
    from ablab.prune._masked import Masked

    real, zeros = Masked.update, []
    monkeypatch.setattr(Masked, "update", lambda self, *now: (real(self, *now), zeros.append(self.sparsity())))
    auto.take_steps(arm(PRUNED), 2, False, 2, METER)
    assert zeros == [0.0, 0.5]


def test_what_kills_a_try_is_an_answer():
    assert auto.apart(lambda: os.kill(os.getpid(), signal.SIGKILL))["error"].endswith(f"status {signal.SIGKILL}")
    assert auto.apart(lambda: torch.empty(1 << 60))["error"].startswith("RuntimeError")
    assert auto.apart(lambda: {"a": 1}) == {"a": 1}


# compilation


def decide(monkeypatch, *ratios, gap=0.0, error=None):
    """What is decided where compiled steps take so many eager ones, arm by arm."""

    def take(a, micro, on, steps, meter):
        if on and error:
            raise ValueError(error)
        ratio = ratios[int(a.id)] if on else 1.0
        return {"losses": [2.0 * (1 + gap * on)] * steps, "step_s": [9.0] * auto.WARM + [ratio] * auto.TIMED}

    monkeypatch.setattr(auto, "take_steps", take)
    return auto.compiles([arm(name=str(n)) for n in range(len(ratios))], lambda a: 2, METER)


def test_compiling_must_pay_in_every_arm(monkeypatch):
    on, why, rows = decide(monkeypatch, 0.8, 0.97)
    assert on and "0.97" in why and [r["compiled_s"] for r in rows] == [0.8, 0.97]
    on, why, rows = decide(monkeypatch, 0.8, 0.98, 0.5)
    assert not on and why.startswith("1: compiled steps take 0.98") and len(rows) == 2


def test_compiling_must_not_change_losses_nor_fail(monkeypatch):
    assert decide(monkeypatch, 0.5, gap=0.009)[0]
    on, why, _ = decide(monkeypatch, 0.5, gap=0.011)
    assert not on and "losses differ by 0.011" in why
    assert not decide(monkeypatch, 0.5, gap=float("nan"))[0]
    on, why, rows = decide(monkeypatch, 0.5, error="no kernel")
    assert not on and why == "0: ValueError: no kernel" and rows[0]["error"] == "ValueError: no kernel"


def test_compiled_steps_are_taken_by_a_compiled_model(monkeypatch):
    """Real steps of both kinds; the compiler is replaced by one that is quick and says that it was asked."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda m: asked.append(m) or m)
    a = arm(PRUNED, (auto.COMPILE,))
    eager, compiled = (auto.take_steps(a, 2, on, 3, METER) for on in (False, True))
    assert len(asked) == 1 and eager["losses"] == compiled["losses"] and len(set(eager["losses"])) == 3


# through the child that a start uses


def plan_of(folder, limit, extra=LARGE):
    s = tiny.settled(folder / "data", extra)
    listed = {"id": "r0-s1", "hash": "0" * 64, "group": "g", "title": "t", "config": s.config()}
    content = {"mode": "measure", "trials": [listed], "open": {"g": [auto.MICRO]}, "limit": limit}
    (folder / "plan.json").write_text(json.dumps(content))


def test_the_child_writes_what_was_decided(tmp_path, capsys):
    plan_of(tmp_path, 1 << 40)
    assert check.main(str(tmp_path)) == 0
    found = json.loads((tmp_path / "verdict.json").read_text())
    assert found["chosen"][auto.MICRO][1] == "64" and found["measured"]["fraction"] == 0.9
    assert "auto     r0-s1: micro batch 64 fits: peak" in capsys.readouterr().out


def test_a_model_that_fits_nowhere_is_exit_4(tmp_path, capsys):
    plan_of(tmp_path, 1 << 20)
    assert check.main(str(tmp_path)) == 4
    assert "no micro batch fits into 0.9 of 1 MiB" in capsys.readouterr().out
