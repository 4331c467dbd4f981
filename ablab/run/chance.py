# SPDX-License-Identifier: MIT
"""Random valid configurations for the dry run."""

from pathlib import Path

from ablab import configure, kconf
from ablab import plan as planning
from ablab.kconf import Layer
from ablab.machine import Machine
from ablab.plan import Plan


def plans(count: int, seed: int, machine: Machine, data: Path) -> tuple[list[Plan], dict[int, str]]:
    """A plan for each of `count` seeds from `seed` on, or why it is refused.  Prepared data lies in `data`."""
    made, refused, tree = [], {}, kconf.load()
    for number in range(seed, seed + count):
        settled = configure.fill(tree, "randconfig", str(number))
        layers = [kconf.lex(Path(".config"), settled.config(), ".config"), _rules(settled.values, data)]
        try:
            made.append(planning.expand(layers, {}, machine, name=f"random-{number}"))
        except ValueError as error:
            refused[number] = str(error)
    return made, refused


def _rules(values: dict, data: Path) -> Layer:
    """The same few tokens for all, and what rules across symbols want, which chance rarely meets."""
    heads = values["MODEL_GPT_HEADS"]
    lines = ["DATA_SYNTH=y", "DATA_SYNTH_TOKENS=40000", f'DATA_DIR="{data}"', 'OPT_LR="6e-4"']
    lines += [f"MODEL_GPT_EMBED={-(-16 // heads) * heads}", "MODEL_GPT_VOCAB=50304", "MODEL_GPT_BLOCK=512"]
    steady = {"EPS": "1e-8", "BETA2": "0.95"}  # at 1 and at 0 Adam does not move and does not hold
    lines += [
        f'{n}="{steady[end]}"' for n in values if n.startswith("OPT_") and (end := n.rpartition("_")[2]) in steady
    ]
    lines += ["TRAIN_BATCH_MICRO=0", "SCHED_WARMUP=0", "EVAL_INTERVAL=1"]
    early = {"SCHED_COUPLING_START": 0, "SCHED_COUPLING_WINDOW": 8}
    lines += [f"{n}={v}" for n, v in early.items() if n in values]
    return kconf.lex(Path("random"), "".join(f"CONFIG_{line}\n" for line in lines), "random")
