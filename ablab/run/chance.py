# SPDX-License-Identifier: MIT
"""Random valid configurations for the dry run."""

from pathlib import Path

from ablab import configure, kconf
from ablab import plan as planning
from ablab.kconf import Layer, Tree
from ablab.machine import Machine
from ablab.plan import Plan


def plans(count: int, seed: int, machine: Machine, data: Path) -> tuple[list[Plan], dict[int, str]]:
    """A plan for each of `count` seeds from `seed` on, or why it is refused.  Prepared data lies in `data`."""
    made, refused, tree = [], {}, kconf.load()
    for number in range(seed, seed + count):
        settled = configure.fill(tree, "randconfig", str(number))
        layers = [kconf.lex(Path(".config"), settled.config(), ".config"), _rules(settled.values, tree, data)]
        try:
            made.append(planning.expand(layers, {}, machine, name=f"random-{number}"))
        except ValueError as error:
            refused[number] = str(error)
    return made, refused


def _rules(values: dict, tree: Tree, data: Path) -> Layer:
    """The same few tokens or images for all, and what rules across symbols want, which chance rarely meets."""
    heads = values.get("MODEL_GPT_HEADS")
    lines = [f'DATA_DIR="{data}"', 'OPT_LR="6e-4"']
    if heads:
        lines += ["DATA_SYNTH=y", "DATA_SYNTH_TOKENS=40000", "MODEL_GPT_VOCAB=50304", "MODEL_GPT_BLOCK=512"]
        lines.append(f"MODEL_GPT_EMBED={-(-16 // heads) * heads}")
    else:
        lines += ["DATA_SYNTHIMAGE=y", "DATA_SYNTHIMAGE_SAMPLES=600"]
    steady = {"EPS": "1e-8", "BETA2": "0.95"}  # at 1 and at 0 Adam does not move and does not hold
    lines += [
        f'{n}="{steady[end]}"' for n in values if n.startswith("OPT_") and (end := n.rpartition("_")[2]) in steady
    ]
    lines += ["TRAIN_BATCH_MICRO=0", "SCHED_WARMUP=0", "EVAL_INTERVAL=1"]
    if values.get("MLP_HEADGATE") or values.get("MLP_CROSS"):
        lines.append(f"MODEL_GPT_LAYERS={max(2, values['MODEL_GPT_LAYERS'])}")
    fit = {"SCHED_COUPLING_START": 0, "SCHED_COUPLING_WINDOW": 8, "OPT_SGD_MOMENTUM": '"0.9"'}
    fit |= {"PRUNE_WARMUP": 1, "PRUNE_RAMP_STEP": 2, "PRUNE_RAMP_FRACTION": '"1.0"', "PRUNE_SPARSITY": '"0.5"'}
    fit |= {"PRUNE_INITIAL": '"0.0"', "PRUNE_ALLOC_CAP": '"0.95"', "TRAIN_BATCH_EFFECTIVE": 8}
    fit |= {"DATA_AUGMENT_RESIZE": 64 if values.get("DATA_AUGMENT_RESIZE") else 0}
    fit |= {n: max(values.get(n, 0), least) for n, least in (("TRAIN_STEPS", 20), ("TRAIN_TOKENS", 20 * 8 * 512))}
    fit["OPT_ADAMWSPAM_GRACE"] = max(2, values.get("OPT_ADAMWSPAM_GRACE", 2))
    fit["OPT_ADAMWSPAM_INTERVAL"] = max(2, values.get("OPT_ADAMWSPAM_INTERVAL", 2))
    if not values.get("ATTN_RECIPROCAL_LEARN", True):
        fit["ATTN_RECIPROCAL_ALPHA"] = f'"{values["ATTN_RECIPROCAL_ALPHA"] or 0.3}"'
    for name in {"MLP_CROSS_RANK", "ATTN_MLA_LATENT", "MLP_GELU_WIDTH"} & values.keys():
        low, high = tree.span(name)
        fit[name] = min(max(values[name] // heads, -(-low // heads)), high // heads) * heads
    for name, most in (
        ("MLP_RECIPROCAL_WIDTH", fit.get("MLP_GELU_WIDTH", 0)),
        ("EVAL_KVPRUNE_RECENT", values.get("EVAL_KVPRUNE_KEEP", 0) - 2),
        ("OPT_ADAMWSPAM_REWARM", fit["OPT_ADAMWSPAM_INTERVAL"] // 2),
    ):
        fit[name] = min(values.get(name, 0), most)
    lines += [f"{name}={value}" for name, value in fit.items() if name in values]
    return kconf.lex(Path("random"), "".join(f"CONFIG_{line}\n" for line in lines), "random")
