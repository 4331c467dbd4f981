# SPDX-License-Identifier: MIT
"""`python -m ablab.report._wandb ENTITY/PROJECT heads | rows ID`: runs of W&B as JSON lines.

A process of its own, started by `source.py`, the only place here that imports the package.
"""

import json
import sys
from typing import Any

EVENTS = 1_000_000  # events are only served as a sample; this is more than a run of a month has


def main(path: str, what: str, id: str = "") -> int:
    """Print the runs of a project, or the rows of one run."""
    try:
        import wandb
    except ModuleNotFoundError:
        print("needs wandb: pip install 'ablab[wandb]'", file=sys.stderr)
        return 2
    api = wandb.Api()
    if what == "heads":
        for run in api.runs(path, order="+created_at", lazy=False):
            head = {"id": run.id, "name": run.name, "project": run.project, "state": run.state, "step": run.job_type}
            out({**head, "config": dict(run.config), "summary": dict(run.summary)})
        return 0
    run = api.run(f"{path}/{id}")
    for row in run.scan_history():
        out({"row": row})
    for event in run.history(samples=EVENTS, stream="system", pandas=False):
        out({"event": event})
    return 0


def out(line: Any) -> None:
    print(json.dumps(line, default=str))


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except Exception as error:  # of a tracker: whatever it raises, the reader gets one line
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
