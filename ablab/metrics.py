# SPDX-License-Identifier: MIT
"""The registry of metric names: unit, direction, aggregation and meaning of everything a row may hold."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

AXES = ("step", "tokens", "train_s", "wall_s", "flops")
"""Columns of every row, the x axes: optimizer steps done, tokens of all ranks (images where those are trained on),
seconds of training, seconds of the trial over all attempts, FLOPs of the model."""
FIXED = (
    *("tokens_seen", "total_training_flops"),
    *(f"memory/{kind}_gib" for kind in ("weights", "grads", "optimizer", "masks")),
)
"""Metrics that no seed changes."""
AGGREGATIONS = {
    "w": "token-weighted mean over the window",
    "l": "last value",
    "s": "sum",
    "m": "maximum",
    "t": "time-weighted mean",
}
# name | unit | v lower is better, ^ higher, - neither | aggregation | meaning.  {a,b} are alternatives,
# <x> is a part without '/', <gauge> and <contract> may have several parts.  `!` behind the aggregation: every trial
# writes it, or its contract metrics/written breaks.
_ROWS = """
train_loss | nats/token | v | w! | mean cross entropy of the training batches
train_perplexity | 1 | v | w | exp of train_loss, uncapped
val_loss | nats/token | v | w! | cross entropy on the fixed validation set
val_perplexity | 1 | v | w | exp of val_loss, uncapped
val_bpb | bits/byte | v | w | val_loss x tokens / (ln 2 x bytes), comparable between tokenizers
learning_rate | 1 | - | l! | rate that the optimizer applied
lr/<group> | 1 | - | l | the same for one parameter group
grad_norm | 1 | - | w! | global L2 norm of the gradients before clipping
grad_norm_max | 1 | - | m! | largest grad_norm of the window
grad_clip_frac | 0..1 | - | w | share of steps whose gradients were clipped
sparsity | 0..1 | - | l! | zeros in the prunable weights
sparsity/target | 0..1 | - | l | what the pruning schedule asks for
sparsity/mask | 0..1 | - | l | zeros in the masks
sparsity/total | 0..1 | - | l | zeros in the prunable weights over all parameters
sparsity/<layer> | 0..1 | - | l | zeros in one prunable weight
train_accuracy | % | ^ | w | training images that were classified right, before the step
val_accuracy | % | ^ | w | validation images that are classified right
test_loss | nats | v | w | cross entropy on the test split; a monitor, nothing is chosen by it
test_accuracy | % | ^ | w | test images that are classified right; a monitor, nothing is chosen by it
tokens_seen | tokens | - | l! | training tokens consumed, all ranks
total_training_flops | FLOP | - | l! | FLOPs of the model over the whole trial
total_training_time | s | - | l! | seconds of training over the whole trial
train/tok_per_sec | 1/s | ^ | t! | tokens per second of training
train/samples_per_sec | 1/s | ^ | t! | sequences or images per second of training
train/step_s | s | v | t! | seconds of one optimizer step
train/mfu | 0..1 | ^ | t | FLOPs of the model over the peak of the device and precision
time/{startup,compile,warmup,data,fwd_bwd}_s | s | v | s | clock of one activity
time/{optimizer,prune,eval,checkpoint,other}_s | s | v | s | clock of one activity
time/data_pct | % | v | t! | share of training seconds spent waiting for data
time/epoch_s | s | v | t | seconds of one pass over the training split
time/epoch_mean_s | s | v | l | the same, mean over the whole trial
memory/allocated_peak_gib | GiB | v | m | device memory in use, peak since the last row
memory/reserved_peak_gib | GiB | v | m | device memory held by the allocator, peak since the last row
memory/host_rss_gib | GiB | v | m! | resident memory of the process, peak since the last row
memory/num_ooms | count | v | s | allocations of device memory that failed
memory/{weights,grads,optimizer,masks}_gib | GiB | v | l! | tensors of one kind, walked after step 2
gpu/{compute_util_avg,memory_util_avg} | % | - | t | time a kernel runs, time the memory controller is active
gpu/{sm_util_avg,tensor_util_avg,dram_util_avg} | % | - | t | counters: SMs, tensor cores, DRAM bandwidth
gpu/memory_used_avg_gb | GB | - | t | memory in use, mean over our devices
gpu/{memory_used_total_gb,memory_total_gb,memory_own_gb} | GB | - | t | sum over devices: in use, there, of the trial
gpu/{power_w,power_limit_w} | W | v | t | sum over our devices
gpu/energy_j | J | v | s | by the counters of our devices, else integrated power
gpu/temp_max_c | C | v | m | of the hottest of our devices
gpu/throttle_pct | % | v | t | samples with a throttle reason, mean over our devices
gpu/{sm_mhz,mem_mhz} | MHz | - | t | clocks, mean over our devices
gpu/load_cv | % | v | t | deviation of the busy time between our devices over its mean
gpu/shared | 0/1 | v | m | 1 if a foreign process used one of our devices
gpu/coverage | 0..1 | ^ | t | share of the window that was sampled
gpu/<i>/{compute_util_avg,memory_util_avg,sm_util_avg,tensor_util_avg,dram_util_avg} | % | - | t | of one device
gpu/<i>/{memory_used_avg_gb,memory_total_gb,memory_own_gb} | GB | - | t | of one device, in the order of the manifest
gpu/<i>/{power_w,power_limit_w} | W | v | t | of one device
gpu/<i>/energy_j | J | v | s | of one device
gpu/<i>/temp_max_c | C | v | m | of one device
gpu/<i>/throttle_pct | % | v | t | of one device
gpu/<i>/{sm_mhz,mem_mhz} | MHz | - | t | of one device
gpu/<i>/shared | 0/1 | v | m | of one device
host/{cpu_pct,loader_cpu_pct} | % | - | t | CPU time of the processes of the trial, of its children; 100 is one core
host/ram_used_gib | GiB | - | t | resident memory of the processes of the trial
host/coverage | 0..1 | ^ | t | share of the window that was sampled
final/val_loss | nats/token | v | l! | val_loss at the end of the budget
final/best_val_loss | nats/token | v | l! | val_loss of the best evaluation, with pruning of the last sparsity
final/best_val_perplexity | 1 | v | l | exp of final/best_val_loss
final/best_val_accuracy | % | ^ | l | highest val_accuracy, with pruning that of the last sparsity
final/test_accuracy | % | ^ | l | test_accuracy at the end of the budget
final/best_test_accuracy | % | ^ | l | test_accuracy where val_accuracy was highest
sched/lam | 0..1 | - | l! | strength of the couplings
opt/{spike_frac,soft_reset_frac} | 0..1 | - | w | SPAM: gradient coordinates that were clipped, steps of a soft reset
opt/rewarm | 0..1 | - | w | SPAM: factor on the rate after moments were forgotten
effect/<contract> | 0/1 | ^ | l | 1 if a contract of a member holds
model/<gauge> | 1 | - | l | gauge of a model
attn/<layer>/<gauge> | 1 | - | l | gauge of an attention member in one layer
mlp/<layer>/<gauge> | 1 | - | l | gauge of an MLP member in one layer
opt/<gauge> | 1 | - | w | gauge of an optimizer
prune/<gauge> | 1 | - | l | gauge of a pruner
sched/<gauge> | 1 | - | l | gauge of a schedule
"""


@dataclass(frozen=True, slots=True)
class Metric:
    """What one name, or a pattern of names, stands for."""

    name: str
    unit: str
    better: str | None
    """`lower`, `higher`, or None where neither is better."""
    agg: str
    """A key of AGGREGATIONS."""
    text: str
    required: bool = False
    """True if every trial writes it."""


class MetricError(ValueError):
    """A name that is not registered."""


def _table() -> dict[str, Metric]:
    found = {}
    for line in _ROWS.strip().splitlines():
        names, unit, better, agg, text = (part.strip() for part in line.split(" | "))
        required, agg = agg.endswith("!"), agg.removesuffix("!")
        for name in _names(names):
            found[name] = Metric(name, unit, {"v": "lower", "^": "higher", "-": None}[better], agg, text, required)
    return found


def _names(text: str) -> list[str]:
    """All names that the alternatives of a row make."""
    head, _, rest = text.partition("{")
    options, _, tail = rest.partition("}")
    return [f"{head}{option}{end}" for option in options.split(",") for end in _names(tail)] if rest else [text]


TABLE = _table()
_PARTS = dict.fromkeys(("<gauge>", "<contract>"), r"[\w.-]+(?:/[\w.-]+)*")
_PATTERNS = [
    (re.compile(re.sub("<[a-z]+>", lambda m: _PARTS.get(m[0], r"[\w.-]+"), name), re.ASCII), metric)
    for name, metric in TABLE.items()
    if "<" in name
]


@cache
def get(name: str) -> Metric:
    """The metric of a name; a pattern such as `attn/<layer>/<gauge>` serves all names that fit.

    Raises MetricError for a name that is not registered.
    """
    if name in TABLE and "<" not in name:
        return TABLE[name]
    found = next((m for pattern, m in _PATTERNS if pattern.fullmatch(name)), None)
    if found is None:
        near = " ".join(get_close_matches(name, TABLE, 3, 0.0))
        raise MetricError(f"{name!r:.120}: no such metric; nearest: {near}; register it in ablab/metrics.py")
    return found


def markdown() -> str:
    """The text of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Written by `ablab metrics`; the table is `ablab/metrics.py`. Every row also has " + ", ".join(AXES) + ".",
        "A name that is not here is an error; `<..>` stands for a name, `<gauge>` for a gauge of a member.",
        "What is marked `always` every trial writes, or it fails.",
        "",
        "| name | unit | better | in a window | meaning |",
        "|---|---|---|---|---|",
    ]
    for m in TABLE.values():
        lines.append(
            f"| `{m.name}` | {m.unit} | {m.better or '-'} | {AGGREGATIONS[m.agg]} | {m.text}{'; always' * m.required} |"
        )
    return "\n".join(lines) + "\n"
