# SPDX-License-Identifier: MIT
"""Trials on images through the one loop: epochs, accuracies, a test split that decides nothing, exact resume."""

import os
import signal

import numpy as np
import pytest

from ablab import rundir
from ablab.data._image import Images
from ablab.report import load, page
from ablab.train import Loop
from tests import trial as tiny
from tests.test_resume import disturbed

SLOW = pytest.mark.slow
IMAGES = """
CONFIG_DATA_SYNTHIMAGE=y
CONFIG_DATA_SYNTHIMAGE_SAMPLES=300
CONFIG_DATA_AUGMENT_CROP=2
CONFIG_MODEL_LENET5=y
CONFIG_TRAIN_EPOCHS=3
CONFIG_TRAIN_BATCH_EFFECTIVE=32
CONFIG_TRAIN_BATCH_MICRO=16
CONFIG_TRAIN_LOG_STEPS=0
CONFIG_EVAL_INTERVAL=0
"""  # 225 training images: 7.03 steps an epoch


def finished(path, extra="", before=lambda: None):
    trial = tiny.campaign(path, IMAGES + extra)
    attempt = tiny.claim(trial)
    assert tiny.forked(attempt, before) == 0, attempt.log.read_text()
    return trial


def evaluated(trial):
    """Its rows but for the last, of contracts."""
    *rows, contracts = rundir.rows(trial)
    assert all(name.startswith("effect/") for name in contracts["m"])
    return rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def undisturbed(whole):
    return tiny.outcome(whole)


def test_each_epoch_has_its_row_at_the_step_that_completes_it(whole):
    rows = evaluated(whole)
    assert [(r["step"], r["tokens"]) for r in rows] == [(0, 0), (8, 256), (15, 480), (22, 704)]
    for row in rows[1:]:
        accuracies = {f"{split}_accuracy" for split in ("train", "val", "test")}
        assert row["m"].keys() >= {"train_loss", "val_loss", "test_loss", "time/epoch_s"} | accuracies
        assert not [n for n in row["m"] if "perplexity" in n or "bpb" in n]
        assert 0 <= row["m"]["train_accuracy"] <= 100 and row["flops"] == row["tokens"] * 2_499_120
    last = rows[-1]["m"]
    assert last["time/epoch_mean_s"] > 0 and last["total_training_time"] > 0
    assert last["final/test_accuracy"] == last["test_accuracy"]


def test_the_best_is_the_first_of_the_highest_accuracy_and_reported_beside_the_last(whole):
    rows = evaluated(whole)
    first = max(rows, key=lambda r: (r["m"]["val_accuracy"], -r["step"]))
    last, best = rows[-1]["m"], whole.summary()["best"]
    for name in ("val_loss", "val_accuracy", "test_accuracy"):
        assert last[f"final/best_{name}"] == first["m"][name]
        assert best[name] == {"value": first["m"][name], "step": first["step"]}
    assert whole.summary()["final"]["test_accuracy"] == last["test_accuracy"]


def test_the_report_has_the_last_and_the_best_side_by_side(whole):
    table = page.arm_table(load.read(whole.campaign)).csv().splitlines()
    row = dict(zip(table[0].split(","), table[1].split(","), strict=True))
    summary = whole.summary()
    assert float(row["test %"]) == pytest.approx(summary["final"]["test_accuracy"])
    assert float(row["test % at the best"]) == pytest.approx(summary["best"]["test_accuracy"]["value"])
    assert "best.test_accuracy" in page.trial_table(load.read(whole.campaign)).csv().splitlines()[0]


def test_the_record_says_images_and_keeps_the_contracts(whole):
    manifest, built = whole.manifest(), whole.built()
    assert manifest["batch"]["seq_len"] == 1 and manifest["data"]["tokenizer"] is None
    assert manifest["resolved"]["attention_kernel"] == "none" and manifest["resolved"]["lse_kernel"] is None
    assert built["evaluation"]["tokens"] == 25 and built["params"] == 61_750
    found = {c["name"]: c for c in whole.summary()["contracts"]}
    assert all(c["ok"] for c in found.values()) and found["eval/count"]["measured"] == 4
    assert abs(found["loss/first"]["expected"] - np.log(10)) < 1e-9


@pytest.mark.parametrize("point", [20, 41, *(pytest.param(p, marks=SLOW) for p in range(5, 150, 7))])
def test_a_stop_is_resumed_bitwise_equal(tmp_path, undisturbed, point):
    trial = tiny.campaign(tmp_path, IMAGES)
    states = disturbed(trial, [point], signal.SIGTERM)
    assert states[0] in ("preempted", "interrupted") and states[1:] == ["done"]
    assert tiny.outcome(trial) == undisturbed


@pytest.mark.parametrize("point", [60, *(pytest.param(p, marks=SLOW) for p in range(8, 150, 7))])
def test_a_kill_inside_an_epoch_is_resumed_bitwise_equal(tmp_path, undisturbed, point):
    trial = tiny.campaign(tmp_path, IMAGES)
    assert disturbed(trial, [point], signal.SIGKILL)[0] == "dead"
    assert tiny.outcome(trial) == undisturbed


def test_a_step_taken_back_leaves_the_running_statistics_alone(tmp_path, undisturbed):
    def stopped(restores):
        def before():
            real, feed, made = Loop._buffers, Loop.feed, []

            def stop_after_a_micro_batch(self):
                for number, pair in enumerate(feed(self)):
                    if len(made) == 1 and self.step == 9 and number % 2 == 0:
                        self.attempt.stop = signal.SIGTERM
                    yield pair

            def kept(self, values=None):
                return real(self, values if restores else None)

            made.append(1)
            Loop.feed, Loop._buffers = stop_after_a_micro_batch, kept

        return before

    for restores in (True, False):
        trial = tiny.campaign(tmp_path / str(restores), IMAGES + "CONFIG_SYS_WARMUP_STEPS=0\n")
        attempt = tiny.claim(trial)
        code = os.waitstatus_to_exitcode(tiny.forked(attempt, stopped(restores)))
        assert code == 75, attempt.log.read_text()
        assert tiny.ended(trial, attempt) == "preempted"
        assert trial.saved()[0].step == 9
        assert tiny.forked(tiny.claim(trial)) == 0
        assert (tiny.outcome(trial)["hashes"] == undisturbed["hashes"]) == restores


def test_warming_up_changes_no_bit_and_one_that_does_is_caught(tmp_path, undisturbed):
    cold = finished(tmp_path / "cold", "CONFIG_SYS_WARMUP_STEPS=0\n")
    assert tiny.outcome(cold)["hashes"] == undisturbed["hashes"]

    def forgets():
        real = Loop._buffers
        Loop._buffers = lambda self, values=None: real(self)

    trial = tiny.campaign(tmp_path / "warm", IMAGES)
    attempt = tiny.claim(trial)
    assert tiny.forked(attempt, forgets) != 0
    assert "the warm-up changed weights" in attempt.log.read_text()


def test_shuffled_test_labels_change_neither_the_best_nor_a_weight(tmp_path, undisturbed):
    def shuffled():
        real = Images.arrays

        def arrays(self, manifest, split):
            x, y = real(self, manifest, split)
            return x, (y[::-1] + 3) % 10 if split == "test" else y

        Images.arrays = arrays

    trial = finished(tmp_path, before=shuffled)
    other = tiny.outcome(trial)
    assert other["hashes"] == undisturbed["hashes"]
    mine, theirs = other["summary"]["best"], undisturbed["summary"]["best"]
    assert {n: mine[n] for n in ("val_loss", "val_accuracy")} == {n: theirs[n] for n in ("val_loss", "val_accuracy")}
    assert mine["test_accuracy"]["step"] == theirs["test_accuracy"]["step"]
    assert other["summary"]["final"]["test_loss"] != undisturbed["summary"]["final"]["test_loss"]


def test_without_the_monitor_the_test_split_is_measured_at_the_end_alone(tmp_path, undisturbed):
    trial = finished(tmp_path, "CONFIG_EVAL_TEST_EACH_EPOCH=n\n")
    rows = evaluated(trial)
    assert [("test_accuracy" in r["m"]) for r in rows] == [False, False, False, True]
    last = rows[-1]["m"]
    assert last["final/test_accuracy"] == undisturbed["summary"]["final"]["test_accuracy"]
    assert tiny.outcome(trial)["hashes"] == undisturbed["hashes"]


def test_convolutions_are_pruned(tmp_path):
    lines = "CONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_WARMUP=4\nCONFIG_PRUNE_INTERVAL=3\n"
    trial = finished(tmp_path, lines)
    last = evaluated(trial)[-1]["m"]
    assert last["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert {n for n in last if n.startswith("sparsity/conv")} == {"sparsity/conv1.weight", "sparsity/conv2.weight"}


def test_a_classifier_that_is_sure_at_the_start_fails_the_trial(tmp_path, monkeypatch):
    from ablab.model import _image, lenet5

    trial = tiny.campaign(tmp_path, IMAGES)
    attempt = tiny.claim(trial)
    sure = lambda n_in, k: _image.Linear(n_in, k, True, 2.0)
    assert tiny.forked(attempt, lambda: setattr(lenet5, "classifier", sure)) != 0
    assert attempt.read("exit")["class"] == "effect" and "loss/first" in attempt.log.read_text()


def test_a_set_that_is_not_there_is_an_error_before_training(tmp_path):
    lines = IMAGES.replace("CONFIG_DATA_SYNTHIMAGE=y\nCONFIG_DATA_SYNTHIMAGE_SAMPLES=300", "CONFIG_DATA_MNIST=y")
    trial = tiny.campaign(tmp_path, lines)
    attempt = tiny.claim(trial)
    assert tiny.forked(attempt) != 0
    assert "no prepared set of DATA_MNIST; run 'make data'" in attempt.log.read_text()
