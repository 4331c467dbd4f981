# SPDX-License-Identifier: MIT
"""Figures, a file each: CAPTION, `info`, a frozen dataclass of all numbers and texts of a campaign or None where there
is nothing to show, and `draw`, ink only.  A new figure is one more file."""

import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from ablab import rundir
from ablab.report.load import Loaded
from ablab.report.stats import Verdict

REPORT = ("loss_curves", "ablation_forest")
"""What every report has; `make plots` draws the others."""
COMPILE = "torch_compile"
"""Prefix of the figures that compare trials with and without compilation."""
SUFFIXES = ("png", "svg", "csv", "json")


class PlotError(ValueError):
    """An unknown figure."""


class NotComparableError(ValueError):
    """Trials that a figure may not compare: exit 3, with what differs."""


def known() -> tuple[str, ...]:
    """Names of all figures."""
    return tuple(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def figure(name: str) -> ModuleType:
    """The module of a figure.  Raises PlotError for an unknown one."""
    if name not in known():
        raise PlotError(f"SET={name}: no such figure; there are: all {COMPILE} {' '.join(known())}")
    return importlib.import_module(f"{__name__}.{name}")


def chosen(kind: str) -> tuple[str, ...]:
    """Figures of a set: all but those of compilation, those of compilation with the contrast, or one by name."""
    if kind == COMPILE:
        return (*(n for n in known() if n.startswith(COMPILE)), "vs_baseline")
    return tuple(n for n in known() if not n.startswith(COMPILE)) if kind == "all" else (kind,)


def draw(c: Loaded, verdicts: Sequence[Verdict], names: Iterable[str], certificate: str | None) -> list[str]:
    """Draw what there is something to draw for below report/; returns the file names without suffix."""
    from ablab.report.plots import _save

    drawn = []
    for name in names:
        module, file = figure(name), file_name(c, name)
        if (found := module.info(c, verdicts)) is not None:
            drawn.append(_save.save(c.dir.report, file, found, module.draw, origin(c, name, certificate)))
            continue
        for suffix in SUFFIXES:  # of an earlier report, now without a result behind it
            (c.dir.report / f"{file}.{suffix}").unlink(missing_ok=True)
    return drawn


def file_name(c: Loaded, name: str) -> str:
    """What the files of a figure are called: `bitter8_vs_baseline` names its study."""
    study = c.content["study"]
    return f"{study['name'] if study else c.name}_{name}" if name == "vs_baseline" else name


def origin(c: Loaded, name: str, certificate: str | None) -> dict[str, Any]:
    """Where a figure comes from; with the hash of its CSV it is what PNG, SVG and JSON carry."""
    return {
        "figure": name,
        "commit": c.content["code"]["commit"],
        "query": {"campaign": rundir.checked(c.name), "metric": c.key, "mode": c.mode},
        "trials": [t.id for t in c.trials if t.is_done],
        "inputs": c.inputs(),
        "certificate": certificate or "uncertified",
    }
