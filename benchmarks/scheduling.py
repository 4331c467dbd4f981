# SPDX-License-Identifier: MIT
"""Scheduling rows of `make bench`: queued to first step, a matrix against runs one after another, the dry run.

`benchmarks.scheduling FOLDER SHAPE STEPS SEEDS JOBS` is a campaign, `.. peer SHAPE STEPS` a peer run, `.. check FOLDER
DDP` a dry run.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import Figure, Load

EVALS, EVAL_BATCHES = 5, 4
VOCAB = 256  # bytes
DIRTY_CORES = 0.3  # more than in-process: the server of the trials outlives its campaign and is not accounted for


def matrix(folder: Path, cores: int, steps: int, trials: int) -> list[Figure]:
    """mac trials, one core each, against the plain peer's runs, which get all cores one after another."""
    load, walls = Load(), {}
    start = time.perf_counter()
    _python(str(folder / "mac"), "mac", str(steps), str(trials), str(cores))
    walls["ablab"] = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(trials):
        _python("peer", "mac", str(steps))
    walls["peer"] = time.perf_counter() - start
    dirty = load.others() > DIRTY_CORES
    text = f"{trials} trials of {steps} steps: {walls['ablab']:.1f} s, one after another {walls['peer']:.1f} s"
    kept = {name: [s] for name, s in walls.items()}
    return [Figure("matrix of mac trials", walls["peer"] / walls["ablab"], "x", ">= 1.35", text, dirty, kept)]


def first_step(folder: Path, trials: int) -> list[Figure]:
    """Seconds from the lease to the end of the first step, of tiny trials after the first."""
    from ablab import rundir

    load = Load()
    _python(str(folder / "tiny"), "tiny", "5", str(trials), "1")
    dirty = load.others() > DIRTY_CORES
    (campaign,) = rundir.campaigns(folder / "tiny")
    to_monotonic = time.monotonic() - time.time()
    waits = []
    for line in (campaign.path / "journal.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry.get("to") == "running":
            rows = list(rundir.rows(campaign.trial(entry["trial"])))
            first = next(row["t"] for row in rows if row["step"] >= 1)
            waits.append(first - (entry["wall"] + to_monotonic))
    text = f"median of {len(waits) - 1}, the first took {waits[0]:.2f} s"
    value = statistics.median(waits[1:])
    return [Figure("queued to first step, tiny", value, "s", "<= 0.3", text, dirty, samples={"ablab": waits})]


def dry_run(folder: Path, rounds: int) -> list[Figure]:
    """Wall seconds of `make check` on 19 steps in a fresh process, alone and with a step in two processes."""
    figures = []
    for name, ddp, target in (("check of 19 steps, cold", "0", "<= 6"), ("the same with DDP=1", "1", "<= 15")):
        load, walls = Load(), []
        for _ in range(rounds):
            start = time.perf_counter()
            _python("check", str(folder / "check"), ddp)
            walls.append(time.perf_counter() - start)
        dirty = load.others() > DIRTY_CORES
        verdict = json.loads((folder / "check" / "check.json").read_text())
        warm = statistics.median(t["seconds"] for t in verdict["trials"])
        text = f"median of {rounds}; {len(verdict['trials'])} steps, one more takes {warm:.2f} s"
        figures.append(Figure(name, statistics.median(walls), "s", target, text, dirty, samples={"ablab": walls}))
    return figures


def check(folder: str, ddp: str) -> int:
    """The study `ratio` where it is shipped, else 19 widths of the 124M model."""
    from ablab import configure, kconf, machine, plan, run

    shipped = (kconf.ROOT / "studies/ratio.study").exists()
    if shipped:
        layers, asked = configure.layers(kconf.ROOT, "ratio"), {}
    else:
        text = f'CONFIG_DATA_SYNTH=y\nCONFIG_DATA_DIR="{folder}/data"\n'
        layers = [*configure.layers(kconf.ROOT, "gpt2-124m"), kconf.lex(Path("bench"), text, "bench")]
        asked = {"SWEEP": "MLP_GELU_WIDTH=768..3072/128"}
    todo = plan.expand(layers, asked, machine.inventory(), name="ratio" if shipped else "widths")
    return run.check([todo], run.Options(results=Path(folder)), ddp=ddp == "1")[0]


def _python(*argv: str) -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.scheduling", *argv], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}"


def campaign(folder: str, name: str, steps: str, seeds: str, jobs: str) -> int:
    """What `make run` does, without the dry run."""
    from ablab import kconf, machine, plan, run
    from benchmarks.peers import SHAPES, configuration

    shape = replace(SHAPES[name], vocab=VOCAB)
    text = configuration(
        shape,
        f'CONFIG_DATA_DIR="{folder}/data"',
        f"CONFIG_TRAIN_STEPS={steps}",
        f"CONFIG_TRAIN_LOG_STEPS={1 if name == 'tiny' else 10}",
        f"CONFIG_EVAL_INTERVAL={int(steps) // EVALS}",
        f"CONFIG_EVAL_TOKENS={EVAL_BATCHES * shape.batch * shape.block}",
        "CONFIG_TRAIN_CKPT_INTERVAL=0",
        "CONFIG_SYS_THREADS=1",
    )
    layer = kconf.lex(kconf.ROOT / "benchmark", text=text, name="benchmark")
    todo = plan.expand([layer], {"SEEDS": seeds, "JOBS": jobs}, machine.inventory(), name="benchmark")
    return run.start(todo, run.Options(results=Path(folder), check=False, yes=True, new=True))


def peer(name: str, steps: str) -> int:
    """A plain run of the same length, with as many evaluations."""
    import numpy as np
    import torch

    from benchmarks import peers

    shape = replace(peers.SHAPES[name], vocab=VOCAB)
    tokens = np.random.default_rng(0).integers(0, shape.vocab, 1 << 18).astype(np.uint16)
    torch.manual_seed(0)
    model = peers.Gpt(shape)
    run = peers.train(model, model, peers.adamw(model), tokens, shape)
    for step in range(int(steps)):
        if step % (int(steps) // EVALS) == 0:
            with torch.no_grad():
                losses = [model(*peers.get_batch(tokens, shape, "cpu")) for _ in range(EVAL_BATCHES)]
            print(step, torch.stack(losses).mean().item())
        next(run)
    return 0


if __name__ == "__main__":
    words: Any = sys.argv[1:]
    call = {"peer": peer, "check": check}.get(words[0])
    sys.exit(call(*words[1:]) if call else campaign(*words))
