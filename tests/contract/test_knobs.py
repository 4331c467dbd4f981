# SPDX-License-Identifier: MIT
"""Every knob has a reader, and turning it changes something real: weights, rows, files, or settings in force."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from ablab import config, kconf, plan, plugin
from tests import trial as tiny

ROOT = Path(__file__).parents[2]
FEW = "\nCONFIG_TRAIN_STEPS=10\nCONFIG_EVAL_INTERVAL=2\nCONFIG_TRAIN_CKPT_INTERVAL=4\nCONFIG_TRAIN_LOG_STEPS=3"
PRUNED = "\nCONFIG_EVAL_KVPRUNE=y\nCONFIG_EVAL_KVPRUNE_KEEP=8\nCONFIG_EVAL_KVPRUNE_RECENT=4"
# read where this test cannot go; each is still looked for in the source
ELSEWHERE = {
    "Sys.alloc_expandable": "acts on a GPU",
    "Sys.tf32": "acts on a GPU",
    "Sys.mem_fraction": "tests/test_auto.py",
    "Sys.price_per_hour": "read by its symbol, where a plan is estimated: tests/run/test_expected.py",
    "Sys.cudnn_benchmark": "acts on a GPU",
    "Finewebedu.Config.subset": "needs a network",
    "Finewebedu.Config.tokens": "needs a network",
    "Hub.Config.tokens": "needs a network",
    "Text.Config.path": "tests/data/test_text.py",
    **dict.fromkeys(
        ("Track.Section.project", "Track.Section.deadline_s", "Trackio.Config.space", "Wandb.Config.entity"),
        "read by the mirror process: tests/track",
    ),
    "Wandb.Config.mode": "read by the mirror process: tests/track",
    "Telemetry.Section.period_ms": "read by the sampler: tests/telemetry/test_sampler.py",
    "Files.Config.path": "tests/data/test_image.py",
}
# turning these changes nothing in ten CPU steps, for the reason given
STILL = {
    "TRAIN_CAP_TIME": "acts after the longest time a test may take",
    "SYS_ALLOC_EXPANDABLE": "acts on a GPU",
    "SYS_TF32": "acts on a GPU",
    "SYS_MEM_FRACTION": "tests/test_auto.py",
    "SYS_CUDNN_BENCHMARK": "acts on a GPU",
    "SYS_NATIVE_ON": "bits are those of torch: tests/tensor/test_native.py",
    "SYS_NATIVE_OFF": "bits are those of torch: tests/tensor/test_native.py",
    "DATA_DIR": "where equal data lies",
    "SYS_PRICE_PER_HOUR": "what an estimate multiplies hours by: tests/run/test_expected.py",
    "TRAIN_CKPT_BEST": "the last step is the best here: tests/test_train.py",
    "OPT_ADAMWPRUNE": "without a pruner it is its base, bit for bit: tests/optim/test_family.py",
    "TRAIN_STOP_PATIENCE": "acts once evaluations stop improving: tests/test_train.py",
}


def classes() -> list[type]:
    found = [config.Train, config.Eval, config.Sys]
    for family in plugin.FAMILIES:
        if (ROOT / "ablab" / plugin.FAMILIES[family]).is_dir():
            found.append(plugin.root(family).Section)
            found += [plugin.find(s).Config for s in plugin.members(family)]
    return list(dict.fromkeys(found))


def recorded(path: Path):
    """A `before` that writes the name of each field to `path` when it is first read, construction left out."""

    def before() -> None:
        out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        seen = set()
        for cls in classes():
            names = set(cls.__dataclass_fields__)

            def read(self, name, names=names, cls=cls):
                if name in names and (cls, name) not in seen:
                    code = sys._getframe(1).f_code
                    if code.co_name != "__post_init__" and code.co_filename != "<string>":
                        seen.add((cls, name))
                        os.write(out, f"{cls.__qualname__.removesuffix('.None')}.{name}\n".encode())
                return object.__getattribute__(self, name)

            cls.__getattribute__ = read

    return before


def mechanisms() -> str:
    """Lines that switch on every attention and MLP member that can be on beside the others."""
    known = {*plugin.members("ATTN"), *plugin.members("MLP")}
    symbols = kconf.load().symbols
    last = {entry.choice: name for name, entry in symbols.items() if name in known}
    on = [s for s in symbols if s in known and (symbols[s].choice is None or last[symbols[s].choice] == s)]
    return "".join(f"\nCONFIG_{s}=y" for s in on) + "\nCONFIG_MODEL_GPT_BIAS=n"


def test_every_field_is_read(tmp_path):
    log = tmp_path / "read"
    for number, lines in enumerate(
        [
            mechanisms()
            + "\nCONFIG_SCHED_COUPLING_VARIANCE=y\nCONFIG_SCHED_COUPLING_WINDOW=8"
            + "\nCONFIG_OPT_ADAMWSPAM=y\nCONFIG_OPT_ADAMWSPAM_PROFILE_LAB=y\nCONFIG_OPT_ADAMWSPAM_GRACE=2",
            "\nCONFIG_SCHED_LINEAR=y\nCONFIG_TRAIN_BUDGET_TOKENS=y\nCONFIG_TRAIN_TOKENS=1280"
            + "\nCONFIG_TRAIN_STOP_PATIENCE=1\nCONFIG_TRAIN_CKPT_BEST=y\nCONFIG_TRAIN_CKPT_EVERY=2"
            + "\nCONFIG_OPT_SINKGD=y\nCONFIG_OPT_SINKGD_FORM_TANH=y"
            + PRUNED,
            "\nCONFIG_SCHED_CONSTANT=y\nCONFIG_TRAIN_BUDGET_TIME=y\nCONFIG_TRAIN_TIME=1\nCONFIG_OPT_MUON=y",
            "\nCONFIG_SCHED_WSD=y\nCONFIG_TRAIN_BUDGET_EPOCHS=y\nCONFIG_TRAIN_EPOCHS=1"
            + "\nCONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_WARMUP=2",
            "\nCONFIG_PRUNE_MOVEMENT=y\nCONFIG_PRUNE_WARMUP=2\nCONFIG_OPT_SGD=y\nCONFIG_PRUNE_ALLOC_DEPTH=y",
            "\nCONFIG_OPT_ADAMWPRUNE=y\nCONFIG_PRUNE_STATE=y\nCONFIG_PRUNE_WARMUP=2\nCONFIG_PRUNE_STATE_SCORE_BITTER5=y",
            "\nCONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_WARMUP=2\nCONFIG_PRUNE_RAMP_BY_STEP=y\nCONFIG_PRUNE_RAMP_STEP=8",
            "\nCONFIG_MODEL_RESNET=y\nCONFIG_MODEL_RESNET_WIDTH=4\nCONFIG_DATA_SYNTHIMAGE=y\nCONFIG_DATA_AUGMENT_FLIP=y"
            + "\nCONFIG_TRAIN_BUDGET_STEPS=y",
        ]
    ):
        extra = FEW + lines
        if "BUDGET" in lines:
            extra = extra.replace("\nCONFIG_TRAIN_STEPS=10", "")
        (tmp_path / str(number)).mkdir()
        assert tiny.forked(tiny.claim(tiny.campaign(tmp_path / str(number), extra)), recorded(log)) == 0
    read = set(log.read_text().split())
    fields = {f"{c.__qualname__}.{f}" for c in classes() for f in c.__dataclass_fields__}
    unread = fields - read - set(ELSEWHERE)
    assert unread == set()
    source = "\n".join(p.read_text() for p in (ROOT / "ablab").rglob("*.py"))
    for name in ELSEWHERE:
        tail = name.rsplit(".")[-1]
        assert re.search(rf"\.{tail}\b|_{tail.upper()}\b", source), name


def test_study_fields_are_read():
    source = "".join(
        (ROOT / f"ablab/{name}.py").read_text() for name in ("plan", "run/__init__", "run/_baseline", "run/queue")
    )
    for field in plan.StudyConfig.__dataclass_fields__:
        read = field.startswith("retry_") or re.search(rf"settings\.{field}\b", source)
        assert read, field
    assert 'f"retry_{' in source


def flips() -> list[str]:
    """One changed line for each symbol that the tiny configuration shows."""
    settled = tiny.settled(Path("data"), FEW)
    tree = kconf.load()
    special = {
        "MODEL_GPT_HEADS": "4",
        "MODEL_GPT_VOCAB": "272",
        "TRAIN_BATCH_MICRO": "4",
        "TRAIN_BATCH_EFFECTIVE": "8",
        "TRAIN_STEPS": "11",
        "MODEL_GPT_BLOCK": "16",
        "OPT_CLIP_NORM": '"0.01"',
        "EVAL_TOKENS": "256",
        "DATA_SYNTH_TOKENS": "30000",
        "EVAL_INTERVAL": "1",
        "EVAL_ENTROPY": "y",
        "EVAL_KVPRUNE": PRUNED.partition("=")[2],
        "TRAIN_LOG_STEPS": "5",
        "TRAIN_CKPT_INTERVAL": "3",
        "TRAIN_CKPT_KEEP": "1",
        "TRAIN_CKPT_TOP": "3",
        "TRAIN_CKPT_EVERY": "2",
        "SCHED_COUPLING_VARIANCE": "y\nCONFIG_SCHED_COUPLING_WINDOW=8",
        "SYS_THREADS": "2",
        "SYS_WARMUP_STEPS": "0",
        "DATA_VAL_FRACTION": '"0.2"',
    }
    found = []
    for name, value in settled.values.items():
        info = tree.symbols[name]
        # the mirror process and the sampler have tests of their own
        if name.split("_")[0] in ("STUDY", "TRACK", "TELEM") or name in STILL or name in ELSEWHERE or not info.prompt:
            continue
        if name in special:
            text = special[name]
        elif info.choice:
            if value is True or name.startswith(("SYS_DEVICE", "TRAIN_BUDGET", "DATA_")) or name.endswith("_AUTO"):
                continue
            text = "y"
        elif info.kind == "bool":
            text = "n" if value else "y"
        elif info.kind == "int":
            text = str(int(value) + 1 if value < 4 else int(value) // 2)
        elif isinstance(value, float):
            text = f'"{value / 2 if value else 0.25}"'
        else:
            continue
        found.append(f"CONFIG_{name}={text}")
    return found


def effect(folder: Path, extra: str) -> str:
    """All that an outsider could tell two trials apart by, times left out, as text."""
    made = tiny.campaign(folder, extra)
    attempt = tiny.claim(made)
    status = tiny.forked(attempt)
    manifest = made.manifest() or {}
    facts = {
        "status": status,
        "outcome": tiny.outcome(made) if status == 0 else attempt.read("exit")["message"],
        "in force": [manifest.get(k) for k in ("resolved", "batch", "budget", "seeds", "data")],
        "kept": sorted(p.name for p in made.checkpoints.iterdir()) if made.checkpoints.exists() else [],
        "warm": any("time/warmup_s" in json.dumps(line) for line in tiny.rundir.rows(made)),
    }
    return json.dumps(facts, sort_keys=True, default=str)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    return effect(tmp_path_factory.mktemp("base"), FEW)


def test_the_same_configuration_has_the_same_effect(baseline, tmp_path):
    assert effect(tmp_path, FEW) == baseline


def test_turning_a_knob_of_the_pruned_cache_has_an_effect(tmp_path):
    turned = (PRUNED, PRUNED.replace("KEEP=8", "KEEP=6"), PRUNED.replace("RECENT=4", "RECENT=1"))
    said = [effect(tmp_path / str(n), FEW + lines) for n, lines in enumerate(turned)]
    assert len(set(said)) == 3
    assert len({json.loads(s)["outcome"]["hashes"]["model.safetensors"] for s in said}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("line", flips(), ids=lambda line: line.removeprefix("CONFIG_"))
def test_turning_a_knob_has_an_effect(line, baseline, tmp_path):
    others = [few for few in FEW.split() if few.partition("=")[0] != line.partition("=")[0]]
    assert effect(tmp_path, "\n".join([*others, line])) != baseline
