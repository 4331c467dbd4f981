# SPDX-License-Identifier: MIT
"""`make bench`: measure this machine against the targets; `--check` exits 1 when one is missed."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks import record


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure falls short of its target")
    parser.add_argument("--quick", action="store_true", help="under a minute: one thread, small shapes, few samples")
    parser.add_argument("--threads", type=int, help="1 counts process CPU time; default: all cores, in wall time")
    names = "tiny mac small gpt2 attention rowstat optimizer pruning large whole decode first matrix check page"
    names += " telemetry"
    parser.add_argument("--only", default="", help=f"rows: {names}")
    parser.add_argument("--out", type=Path, help="where the JSON goes; default: benchmarks/results/")
    args = parser.parse_args(argv)

    import torch

    from ablab import machine
    from benchmarks import attention, decode, optimizers, page, rowstat, sampling, scheduling, steps

    cores = machine.cores()
    os.sched_setaffinity(0, cores)
    threads = args.threads or (1 if args.quick else len(cores))
    torch.set_num_threads(threads)
    rounds, limit_s = (3, 8.0) if args.quick else (9, 90.0)
    rows = {name: lambda f, name=name: steps.steps(name, f, threads, rounds, limit_s) for name in steps.SHAPES} | {
        "attention": lambda _: attention.reciprocal(threads, rounds, limit_s),
        "optimizer": lambda f: optimizers.optimizer(threads, rounds),
        "pruning": lambda f: optimizers.pruning(threads, rounds),
        "large": lambda _: optimizers.large(threads, rounds),
        "whole": lambda f: optimizers.whole(f, threads, rounds),
        "decode": lambda f: decode.step(threads, rounds, quick=args.quick),
        "rowstat": lambda f: rowstat.statistics(threads, rounds, limit_s),
        "first": lambda f: scheduling.first_step(f, 3 if args.quick else 9),
        "check": lambda f: scheduling.dry_run(f, 1 if args.quick else 3),
        "page": lambda f: page.page(f, rounds),
        "matrix": lambda f: scheduling.matrix(f, len(cores), *((60, 2) if args.quick else (400, 6))),
        "telemetry": lambda f: sampling.sampler(f, 5.0 if args.quick else 30.0),
    }
    wanted = args.only.split() or [r for r in rows if not args.quick or r not in ("small", "gpt2", "large", "whole")]
    if unknown := [r for r in wanted if r not in rows]:
        print(f"benchmarks: no row {unknown[0]}; there are: {' '.join(rows)}", file=sys.stderr)
        return 2
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            for figure in rows[name](Path(folder)):
                figures.append(figure)
                print(figure.line(), flush=True)
    settings = {"threads": threads, "rounds": rounds, "quick": args.quick, "rows": wanted}
    print(f"\nresults: {record(figures, settings, 'cpu', args.out)}")
    bad = {word: [f.row for f in figures if f.verdict == word] for word in ("short", "dirty")}
    for word, text in (("short", "targets missed"), ("dirty", "disturbed by other processes, run again")):
        if bad[word]:
            print(f"{len(bad[word])} of {sum(bool(f.target) for f in figures)} {text}: {', '.join(bad[word])}")
    return 1 if args.check and any(bad.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
