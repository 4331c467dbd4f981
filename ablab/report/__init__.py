# SPDX-License-Identifier: MIT
"""Reads campaign folders and says what they show: no torch, no tracker, numpy and matplotlib when needed."""

from pathlib import Path

from ablab.rundir import Campaign


def build(campaign: Campaign | Path) -> Path:
    """Write the report of a campaign, finished or not, below its report/: a pure function of the folder.  Returns the
    path of report.md."""
    # numpy and matplotlib take a second to import and `make help` has no use for them
    from ablab.report import load, page, plots, web

    c = load.read(campaign)
    c.dir.report.mkdir(exist_ok=True)
    verdicts = page.judge(c)
    figures = plots.draw(c, verdicts, plots.REPORT, c.certified)
    page.build(c, verdicts, figures)
    web.build(c, verdicts, figures)
    return c.dir.report / "report.md"


def summary_table(campaign: Campaign | Path) -> str:
    """The table that ends `make`: each arm's mean, spread over seeds, n, and difference to its parent."""
    from ablab.report import page

    return page.summary_table(campaign)
