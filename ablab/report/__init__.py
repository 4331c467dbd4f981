# SPDX-License-Identifier: MIT
"""Reads campaign folders and says what they show: no torch, no tracker, numpy and matplotlib when needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ablab.rundir import Campaign

if TYPE_CHECKING:
    from ablab.report.load import Loaded


def read(campaign: Campaign | Path) -> Loaded:
    """What both of the following take, where both are wanted: reading 5,000 trials takes seconds."""
    from ablab.report import load

    return load.read(campaign)


def build(campaign: Campaign | Path | Loaded) -> Path:
    """Write the report of a campaign, finished or not, below its report/: a pure function of the folder.  Returns the
    path of report.md."""
    # numpy and matplotlib take a second to import and `make help` has no use for them
    from ablab.report import page, plots, web

    c = read(campaign) if isinstance(campaign, Campaign | Path) else campaign
    c.dir.report.mkdir(exist_ok=True)
    verdicts = page.judge(c)
    figures = plots.draw(c, verdicts, plots.REPORT, c.certified)
    page.build(c, verdicts, figures)
    web.build(c, verdicts, figures)
    return c.dir.report / "report.md"


def summary_table(campaign: Campaign | Path | Loaded) -> str:
    """The table that ends `make`: each arm's mean, spread over seeds, n, and difference to its parent."""
    from ablab.report import page

    return page.summary_table(read(campaign) if isinstance(campaign, Campaign | Path) else campaign)
