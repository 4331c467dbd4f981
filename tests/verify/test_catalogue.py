# SPDX-License-Identifier: MIT
"""Every field of a certificate: a pair that differs there, or a record that lacks it, is refused by its name.

The campaigns are files; each case changes one recorded value, and DONE vouches for the change, so that the rule of
the field alone can notice.
"""

import json
from functools import partial

import pytest

from ablab.report import load
from ablab.verify import _trackers, issue
from ablab.verify._fields import FIELDS
from tests.report.campaign import sha
from tests.verify import fair

NAMES = {f.full: f for f in FIELDS}
OTHER = sha("another")
symbol = lambda name, text: lambda t: fair.set_symbol(t, name, text)
put = lambda where, value: lambda t: fair.put(t, where, value)
device = lambda key, value: put("manifest.devices", [{**fair.GPU, key: value}])


def weights(text):
    def act(trial):
        place = trial.saved()[0]
        place.model.write_bytes(text)
        place.file("checkpoint").unlink()
        place.seal()

    return act


def no_val_loss(trial):
    fair.rows(trial, lambda row: row["m"].pop("val_loss"), lambda row: row["step"] == 100)


# how the record of each field is made another one
CHANGES = {
    "budget.stop_rule": put("manifest.budget.kind", "tokens"),
    "budget.limit": put("manifest.budget.limit", 300.0),
    "budget.reason": put("summary.stop", "early"),
    "budget.steps": put("summary.used.steps", 199),
    "batch.effective": put("manifest.batch.effective", 24),
    "batch.sequence": put("manifest.batch.seq_len", 128),
    "batch.micro": put("manifest.batch.micro", 6),
    "batch.accumulation": put("manifest.batch.accum", 2),
    "batch.world": put("manifest.batch.world", 2),
    "optimizer.values": symbol("OPT_LR", '"3e-3"'),
    "optimizer.groups": put("built.optimizer.0.weight_decay", 0.2),
    "optimizer.clipping": put("built.clip", 0.5),
    "schedule.values": symbol("SCHED_COSINE", "n"),
    "schedule.warmup": symbol("SCHED_WARMUP", "20"),
    "schedule.minimum": put("summary.rates.4.2", 0.5),
    "schedule.rates": put("summary.rates.2.2", 0.5),
    "model.built": put("built.fingerprint", OTHER),
    "model.parameters": put("built.params", 7),
    "model.init": put("built.modules.0.tensors.weight.sha256", OTHER),
    "model.ties": put("built.ties", {}),
    "model.dtypes": put("built.modules.0.tensors.weight.dtype", "bfloat16"),
    "pruning.values": symbol("PRUNE_NONE", "n"),
    "pruning.realised": lambda t: fair.rows(t, lambda row: row["m"].update(sparsity=0.5)),
    "data.id": put("manifest.data.name", "other"),
    "data.files": put("manifest.data.sha256", OTHER),
    "data.tokenizer": put("manifest.data.tokenizer", OTHER),
    "data.preprocessing": put("manifest.data.preprocessing", OTHER),
    "data.split": put("manifest.data.split", OTHER),
    "data.order_seed": put("manifest.data.order_seed", 99),
    "data.start": lambda t: fair.header(t, resumed_at_step=20),
    "data.end": put("summary.used.samples", 1200),
    "evaluation.set": put("built.evaluation.sha256", OTHER),
    "evaluation.tokens": put("built.evaluation.tokens", 1024),
    "evaluation.interval": symbol("EVAL_INTERVAL", "10"),
    "evaluation.count": no_val_loss,
    "evaluation.checkpoint": put("summary.primary.step", 100),
    "evaluation.code": put("manifest.code.modules", {**fair.MODULES, "ablab.evaluate": OTHER}),
    "execution.compile": put("summary.compile", {"graphs": 2, "breaks": 0}),
    "execution.graph_breaks": put("summary.compile", {"graphs": 0, "breaks": 3}),
    "execution.kernel": put("manifest.resolved.attention_kernel", "flash"),
    "execution.lse_kernel": put("manifest.resolved.lse_kernel", "triton"),
    "execution.precision": put("manifest.resolved.amp", "bf16"),
    "execution.tf32": put("manifest.resolved.tf32", False),
    "execution.cudnn": put("manifest.resolved.cudnn_benchmark", True),
    "execution.determinism": put("manifest.resolved.deterministic", True),
    "execution.threads": put("manifest.resolved.threads", 2),
    "execution.ranks": put("manifest.batch.world", 2),
    "execution.allocator": put("manifest.resolved.allocator", "cudaMallocAsync"),
    "software.python": put("manifest.software.python", "3.12"),
    "software.torch": put("manifest.software.torch", "2.14"),
    "software.toolkit": put("manifest.software.cuda", "13.0"),
    "software.driver": put("manifest.software.driver", "580.0"),
    "software.lock": put("manifest.software.lock", OTHER),
    "hardware.model": device("name", "NVIDIA H100"),
    "hardware.count": put("manifest.devices", [fair.GPU, fair.GPU]),
    "hardware.memory": device("memory_bytes", 80 << 30),
    "hardware.power_cap": device("power_cap_w", 150.0),
    "hardware.cpu": put("manifest.cpu.model", "Other CPU"),
    "code.modules": put("manifest.code.modules", {**fair.MODULES, "ablab.train": OTHER}),
}
# further fields that read the same record
ALSO = {
    "budget.steps": {"evaluation.checkpoint", "integrity.steps"},
    "batch.effective": {"batch.product"},
    "batch.sequence": {"batch.product"},
    "batch.micro": {"batch.product"},
    "batch.accumulation": {"batch.product"},
    "batch.world": {"batch.product", "execution.ranks"},
    "execution.ranks": {"batch.product", "batch.world"},
    "optimizer.values": {"treatment.R1 - R0"},
    "schedule.values": {"treatment.R1 - R0"},
    "schedule.warmup": {"treatment.R1 - R0", "schedule.values"},
    "schedule.minimum": {"schedule.rates"},
    "pruning.values": {"treatment.R1 - R0"},
    "evaluation.interval": {"treatment.R1 - R0"},
    "evaluation.code": {"code.modules"},
    "data.start": {"integrity.steps"},
    "hardware.count": {"hardware.model", "hardware.memory", "hardware.power_cap"},
    "hardware.cpu": {"hardware.model"},
}
GPU_ONLY = ("tf32", "cudnn", "allocator", "toolkit", "driver", "model", "count", "memory", "power_cap", "uuids")


@pytest.fixture(scope="module")
def fairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fair")
    return {name: fair.write(folder / name, name) for name in fair.TREATMENTS}


def source(field):
    """A fair campaign whose treatment may not change this field."""
    if field.name in GPU_ONLY and field.group in ("execution", "software", "hardware"):
        return "gpu"
    return next(n for n, s in fair.TREATMENTS.items() if not any(x.startswith(field.by or ("-",)) for x in s))


def refused(found, **asked):
    body = issue.judged(load.read(found), asked.get("claim", ()), asked.get("kind", "quality"))
    assert body["verdict"] == ("refused" if body["findings"] else "issued")
    return {f["field"]: f["why"] for f in body["findings"]}


@pytest.mark.parametrize("name", fair.TREATMENTS)
def test_the_fair_twin_has_no_finding(fairs, name):
    assert refused(fairs[name]) == {}


def test_the_catalogue_has_every_field_with_a_rule_that_compares():
    free = {"budget.tokens", "budget.train_s", "budget.flops"}  # registered budgets of their own, below
    assert {f.full for f in FIELDS if f.rule != "R"} | {"budget.steps"} == set(CHANGES) - free


@pytest.mark.parametrize("name", CHANGES)
def test_a_pair_that_differs_there_is_refused_by_name(fairs, tmp_path, name):
    found = fair.copy(fairs[source(NAMES[name])], tmp_path)
    fair.change(found, CHANGES[name], "R1")
    why = refused(found)
    assert name in why and set(why) <= {name} | ALSO.get(name, set()), why


@pytest.mark.parametrize("name", [n for n, f in NAMES.items() if n in CHANGES and not f.per_seed])
def test_one_seed_that_differs_is_refused_by_name(fairs, tmp_path, name):
    found = fair.copy(fairs[source(NAMES[name])], tmp_path)
    fair.change(found, CHANGES[name], "R0", "R1", seeds=(3,))
    assert "differs between the seeds of" in refused(found)[name]


@pytest.mark.parametrize(
    ("registered", "field", "factor", "fits"),
    [
        ("tokens", "tokens", 1.005, False),
        ("time", "train_s", 1.005, True),
        ("time", "train_s", 1.05, False),
        ("time", "tokens", 1.5, True),
        ("steps", "train_s", 1.5, True),
        ("steps", "flops", 1.5, True),
    ],
)
def test_the_registered_budget_must_be_equal(tmp_path, registered, field, factor, fits):
    made = fair.write(tmp_path, budget=registered)
    fair.change(made, put(f"summary.used.{field}", lambda v: type(v)(v * factor)), "R1")
    assert set(refused(made)) == (set() if fits else {f"budget.{field}"})


LACKING = {
    "optimizer.values": symbol("OPT_LR", None),
    "schedule.values": lambda t: [fair.set_symbol(t, n, None) for n in ("SCHED_COSINE", "SCHED_WARMUP")],
    "schedule.warmup": symbol("SCHED_WARMUP", None),
    "schedule.minimum": put("summary.rates", ...),
    "model.init": put("built.modules", ...),
    "model.dtypes": put("built.modules", ...),
    "model.weights": lambda t: t.saved()[0].write("checkpoint", {"step": 200, "attempt": 1, "files": {}}),
    "pruning.values": symbol("PRUNE_NONE", None),
    "pruning.realised": lambda t: fair.rows(t, lambda row: row["m"].pop("sparsity")),
    "data.start": lambda t: fair.rows(t, lambda row: row["m"].pop("val_loss")),
    "evaluation.interval": symbol("EVAL_INTERVAL", None),
    "evaluation.count": lambda t: fair.rows(t, lambda row: row["m"].pop("val_loss")),
    "evaluation.checkpoint": put("summary.primary", ...),
    "evaluation.code": put("manifest.code.modules", {"ablab.train": fair.MODULES["ablab.train"]}),
    "execution.kernel": put("manifest.resolved.attention_kernel", ...),
    "execution.compile": put("manifest.resolved.compile", ...),
    "execution.graph_breaks": put("summary.compile", ...),
    "software.toolkit": put("manifest.software.cuda", ...),
    "data.tokenizer": put("manifest.data.tokenizer", ...),
    "hardware.model": put("manifest.devices", [{**fair.GPU, "name": None}]),
    "hardware.count": put("manifest.devices", ...),
    "hardware.memory": put("manifest.devices", [{**fair.GPU, "memory_bytes": None}]),
    "hardware.power_cap": device("power_cap_w", None),
    "hardware.uuids": put("manifest.devices", [{**fair.GPU, "uuid": None}]),
}


@pytest.mark.parametrize("name", [n for n in NAMES if n != "batch.resolved_by"])
def test_a_record_that_lacks_it_is_refused_by_name(fairs, tmp_path, name):
    found = fair.copy(fairs[source(NAMES[name])], tmp_path)
    where = NAMES[name].where.removeprefix("?")
    fair.change(found, LACKING.get(name) or put(where, ...), "R1", seeds=(2,))
    why = refused(found)
    assert name in why and "r1-s2" in why[name], why


def test_a_value_that_a_gpu_must_report_is_refused_when_null(fairs, tmp_path):
    found = fair.copy(fairs["gpu"], tmp_path)
    fair.change(found, put("manifest.software.driver", None))
    assert "software.driver" in refused(found)


# checks


def contract(name, **facts):
    def act(trial):
        fair.put(trial, "summary.contracts", lambda old: [x | (facts if x["name"] == name else {}) for x in old])

    return act


CHECKS = {
    "batch.product": contract("batch/product", ok=False),
    "pruning.contract": contract("prune/dense", ok=False),
    "effects.contracts": contract("schedule/rate", ok=False),
    "code.clean": put("manifest.code.dirty", True),
    "treatment.config": lambda t: fair.set_symbol(t, "SCHED_WARMUP", "11", planned=False),
    "integrity.steps": lambda t: fair.header(t, attempt=1) or _drop_rows(t),
    "integrity.drift": put("manifest.resume", {"step": 100, "checkpoint": "x", "sha256": OTHER, "drift": ["devices"]}),
    "statistics.seeds": put("manifest.seeds.train", 1),
}


def _drop_rows(trial):
    path = trial.attempt(1).metrics
    path.write_text(
        "\n".join(
            line for line in path.read_text().splitlines() if '"step": 100' not in line and '"step":100,' not in line
        )
        + "\n"
    )


def _replaced(trial):
    """As if a first result had been run again until another one came."""
    final = json.loads(trial.file("summary").read_text())
    final["final"]["val_loss"] += 0.1
    (trial.attempt(1).path / "summary.json").write_text(json.dumps(final))


CHECKS |= {
    "integrity.value": lambda t: [fair.put(t, f"summary.{n}", 1.0) for n in ("final.val_loss", "primary.value")],
    "integrity.reruns": _replaced,
}


def test_attempts_that_are_gone_are_refused(fairs, tmp_path):
    found = fair.copy(fairs["attention"], tmp_path)

    def renumber(trial):
        trial.attempt(1).path.rename(trial.attempt(2).path)
        fair.put(trial, "done.attempt", 2)
        fair.put(trial, "done.files", lambda old: {n.replace("attempts/1", "attempts/2"): v for n, v in old.items()})

    fair.change(found, renumber, "R1", seeds=(2,))
    assert "attempts [2] of 2 are there" in refused(found)["integrity.reruns"]


def test_one_measurement_under_two_seeds_is_refused(fairs, tmp_path):
    found = fair.copy(fairs["attention"], tmp_path)
    fair.change(found, weights(b"copied"), "R1", seeds=(2, 5))
    why = refused(found)
    assert set(why) == {"statistics.seeds"} and "r1-s2 and r1-s5 ended with the same weights" in why["statistics.seeds"]


@pytest.mark.parametrize(("looks", "fits"), [([], False), ([5, 6], True)])
def test_seeds_that_were_added_once_results_were_known_are_refused(tmp_path, looks, fits):
    found = fair.write(tmp_path, looks=looks)
    content = json.loads(found.file("campaign").read_text())
    content["registration"]["seeds"] = 5
    found.file("campaign").write_text(json.dumps(content))
    found = fair.Campaign.open(found.path)
    for trial in found.trials():
        fair.stamp(trial)
    why = refused(found)
    assert ("6 seeds, 5 were registered" in why.get("statistics.n", "")) != fits


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"alpha": 0.5}, "alpha is 0.5, the study says 0.05"),
        ({"margin": 5.0}, "margin is 5.0, the study says None"),
        ({"looks": [8, 12]}, "looks is [8, 12], the study says []"),
        ({"metric": {"key": "train_loss", "mode": "min"}}, "metric is ('train_loss', 'min')"),
    ],
)
def test_a_plan_that_registers_otherwise_than_its_study_is_refused(tmp_path, change, why):
    assert why in refused(fair.write(tmp_path, **change))["statistics.registration"]


def test_a_trial_that_the_journal_does_not_know_as_done_is_refused(fairs, tmp_path):
    found = fair.copy(fairs["attention"], tmp_path)
    lines = found.journal.read_text().splitlines(keepends=True)
    found.journal.write_text("".join(line for line in lines if "r1-s3" not in line))
    assert "r1-s3 is done, and queued in the journal" in refused(found)["integrity.journal"]


@pytest.mark.parametrize("name", CHECKS)
def test_a_failing_check_is_refused_by_name(fairs, tmp_path, name):
    found = fair.copy(fairs["attention"], tmp_path)
    fair.change(found, CHECKS[name], "R1", seeds=(2,))
    assert name in refused(found)


@pytest.mark.parametrize("name", ["pruning.contract", "effects.contracts"])
def test_a_trial_without_contracts_is_refused(fairs, tmp_path, name):
    found = fair.copy(fairs["attention"], tmp_path)
    fair.change(found, put("summary.contracts", []), "R1", seeds=(2,))
    assert name in refused(found)


@pytest.mark.parametrize(
    ("key", "value", "fits"), [("torch", "1.0", False), ("cores", [3], True), ("cores", [0, 1], False)]
)
def test_attempts_of_a_trial_must_have_run_alike(fairs, tmp_path, key, value, fits):
    found = fair.copy(fairs["attention"], tmp_path)
    trial = fair.trials(found, "R1")[0]
    manifest = trial.manifest()
    manifest["software" if key == "torch" else "cpu"][key] = value
    trial.attempt(1).write("manifest", manifest)
    assert set(refused(found)) == (set() if fits else {"integrity.drift"})


def test_weights_that_are_not_those_of_the_checkpoint_are_refused(fairs, tmp_path):
    found = fair.copy(fairs["attention"], tmp_path)
    fair.trials(found, "R1")[0].saved()[0].model.write_bytes(b"other weights")
    assert set(refused(found)) == {"integrity.done"}


def test_a_file_that_done_does_not_vouch_for_is_refused(fairs, tmp_path):
    found = fair.copy(fairs["attention"], tmp_path)
    fair.put(fair.trials(found, "R1")[0], "summary.final.val_loss", 1.0)
    why = refused(found)
    assert {"integrity.trials", "statistics.seeds"} & set(why) and "integrity.trials" in why


def test_a_damaged_journal_is_refused(fairs, tmp_path):
    found = fair.copy(fairs["attention"], tmp_path)
    with open(found.journal, "a") as file:
        file.write("{torn\n")
    assert "integrity.journal" in refused(found)


def test_another_device_beside_matters_for_speed_only(fairs, tmp_path):
    found = fair.copy(fairs["gpu"], tmp_path)
    fair.change(found, put("manifest.neighbours", ["r9-s1"]))
    assert refused(found) == {}
    assert "hardware.shared" in refused(found, kind="speed")


@pytest.mark.parametrize(
    ("reading", "times", "field"),
    [
        ({"throttle": ["sw_thermal"]}, range(25), "throttling"),
        ({"shared": True}, range(25), "shared"),
        ({}, range(6, 25), "coverage"),  # a sampler that came late
        ({}, [t for t in range(25) if not 10 <= t <= 14], "coverage"),
        ({}, (), "coverage"),
    ],
)
def test_telemetry_matters_for_speed_only(fairs, tmp_path, reading, times, field):
    found = fair.copy(fairs["gpu"], tmp_path)
    assert not any(name.startswith("hardware") for name in refused(found, kind="speed"))
    fair.change(found, lambda t: fair.telemetry(t, times, **reading), "R1", seeds=(2,))
    assert refused(found) == {}
    why = refused(found, kind="speed")
    assert "r1-s2: " in why[f"hardware.{field}"]
    assert ("absent" in why.get("hardware.throttling", "")) == (times == ())


# treatments


def test_a_difference_in_compile_alone_is_named(fairs, tmp_path):
    found = fair.copy(fairs["attention"], tmp_path)
    for name, text in (("SYS_COMPILE_ON", "y"), ("SYS_COMPILE_OFF", "n")):
        fair.change(found, partial(fair.set_symbol, name=name, text=text), "R1")
    fair.change(found, put("manifest.resolved.compile", "on"), "R1")
    fair.change(found, put("summary.compile", {"graphs": 2, "breaks": 0}), "R1")
    why = refused(found)
    assert set(why) == {"execution.compile", "treatment.R1 - R0"}
    assert "SYS_COMPILE" in why["treatment.R1 - R0"] and "confounder" in why["treatment.R1 - R0"]


def test_compile_as_the_treatment_passes_and_one_that_compiled_nothing_is_a_no_op(fairs, tmp_path):
    assert refused(fairs["compile"]) == {}
    found = fair.copy(fairs["compile"], tmp_path)
    fair.change(found, put("summary.compile", None), "R1")
    fair.change(found, put("manifest.resolved.compile", "off"), "R1")
    assert "no-op: SYS_COMPILE_ON left execution.compile" in refused(found)["treatment.R1 - R0"]


def test_a_treatment_that_did_not_reach_the_trial_is_a_no_op(fairs, tmp_path):
    found = fair.copy(fairs["attention"], tmp_path)
    fair.change(found, symbol("ATTN_RECIPROCAL", "n"), "R1")
    assert "no-op: ATTN_RECIPROCAL" in refused(found)["treatment.R1 - R0"]


def test_a_treatment_that_left_the_model_alone_is_a_no_op(fairs, tmp_path):
    found = fair.copy(fairs["attention"], tmp_path)
    for trial in fair.trials(found, "R1"):
        fair.put(trial, "built.fingerprint", sha(f"model {trial.record['seed']} False"))
        fair.stamp(trial)
    assert "left model.built as it was" in refused(found)["treatment.R1 - R0"]


def test_an_optimizer_treatment_that_left_the_weights_alone_is_a_no_op(fairs, tmp_path):
    found = fair.copy(fairs["optimizer"], tmp_path)
    for trial in fair.trials(found):
        weights(f"seed {trial.record['seed']}".encode())(trial)
        fair.stamp(trial)
    assert "OPT_LR left model.weights as it was" in refused(found)["treatment.R1 - R0"]


def test_arms_without_a_treatment_make_no_claim(tmp_path):
    found = fair.write(tmp_path)
    content = json.loads(found.file("campaign").read_text())
    for record in content["trials"]:
        record["overrides"] = []
    found.file("campaign").write_text(json.dumps(content))
    found = fair.Campaign.open(found.path)
    for trial in found.trials():
        fair.stamp(trial)
    assert "treatment.R1 - R0" in refused(found)


# trackers


def test_a_tracker_that_was_sent_nothing_is_refused(fairs, tmp_path):
    found = fair.copy(fairs["attention"], tmp_path)
    fair.change(found, symbol("TRACK_TENSORBOARD", "y"))
    assert set(refused(found)) == {"mirror.values"}


def test_what_a_tracker_holds_is_compared_with_the_files(fairs, tmp_path, monkeypatch):
    found = fair.copy(fairs["attention"], tmp_path)
    fair.change(found, symbol("TRACK_WANDB", "y"))
    told = {"project": "me/ra", "runs": ["a", "b"]}
    monkeypatch.setattr(_trackers, "read", lambda c, name, trials: (told, []))
    body = issue.judged(load.read(found), (), "quality")
    assert body["findings"] == [] and body["published"]["tracker"]["project"] == "me/ra"
    monkeypatch.setattr(_trackers, "read", lambda c, name, trials: (told, ["r1-s1: learning_rate 1e-3, not 2e-3"]))
    assert set(refused(found)) == {"mirror.values"}
    monkeypatch.setattr(_trackers, "read", lambda c, name, trials: ({}, ["wandb: nobody is logged in"]))
    assert set(refused(found)) == {"mirror.project", "mirror.runs", "mirror.values"}
