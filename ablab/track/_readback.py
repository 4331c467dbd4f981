# SPDX-License-Identifier: MIT
"""What a tracker holds of a campaign, point by point against metrics.jsonl: one line of JSON for `make verify`."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ablab import rundir
from ablab.rundir import Campaign, TrialDir
from ablab.track import _feed, _mirror, _probe

Point = tuple[int, str]


def main(campaign: Campaign, name: str) -> int:
    """Print {project, runs, wrong: {trial: [text]}} of a tracker; 2 if it cannot be used."""
    files, values = _mirror.files_of(campaign, name), _mirror.values_of([name], campaign.content["base"]["config"])
    member, runs, wrong = _mirror.made(name, values), {}, {}
    try:
        member.installed()
    except ValueError as error:
        print(error)
        return 2
    copy = 1 if member.rebuilds else _feed.Cursor(files).copy
    for trial in campaign.trials():
        if trial.read("done") is None:
            continue
        run, record = _feed.run_of(trial, files, copy, "open"), trial.record["id"]
        runs[record] = f"{run.name} {run.id}"
        try:
            config, rows = member.fetch(member.address(run))
        except Exception as error:  # of a package: whatever it is, nothing was read back
            wrong[record] = [f"{type(error).__name__}: {error}".splitlines()[0][:300]]
            continue
        if found := [*_settings(run.config, config), *_points(trial, rows)]:
            wrong[record] = found
    print(json.dumps({"project": member.section.project, "runs": runs, "wrong": wrong}))
    return 0


def _settings(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Names whose value is not what ran; services keep numbers or text."""
    odd = [n for n, v in wanted.items() if n not in found or (found[n] != v and str(found[n]) != str(v))]
    if odd:
        yield "; ".join(f"{n} is {found.get(n, 'absent')} there, {wanted[n]} here" for n in odd[:4])


def _points(trial: TrialDir, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What is missing, different, or there twice."""
    wanted = {
        (row["step"], name): math.nan if value is None else value
        for row in rundir.rows(trial)
        for name, value in row["m"].items()
    }
    names = {name for _, name in wanted}
    held = [((int(row["step"]), n), v) for row in rows for n, v in row.items() if n in names and "step" in row]
    times, found = Counter(point for point, _ in held), dict(held)
    missing = [p for p in wanted if p not in found]
    twice, extra = [p for p, n in times.items() if n > 1], [p for p in found if p not in wanted]
    other = [p for p, v in wanted.items() if p in found and not _probe.alike({p[1]: v}, {p[1]: found[p]})]
    for points, what in (
        (missing, "not delivered"),
        (other, "differ"),
        (twice, "there twice"),
        (extra, "of no row here"),
    ):
        if points:
            step, name = points[0]
            values = f", {found[points[0]]} there, {wanted[points[0]]} here" if what == "differ" else ""
            yield f"{len(points)} of {len(wanted)} points {what}, the first {name} at step {step}{values}"
