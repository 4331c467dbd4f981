# SPDX-License-Identifier: MIT
"""Page rows of `make bench`: size of report.html, time to interactive and to sort in a headless Chromium."""

import statistics
import time
from pathlib import Path

from benchmarks import Figure, Load
from tests import browser
from tests.report import campaign

STEPS, SEEDS, ROWS = 19, 3, 5000
DIRTY_CORES = 0.3


def page(folder: Path, rounds: int) -> list[Figure]:
    """A study of 57 trials, and a table of 5,000; browser rows are left out where there is no Chromium."""
    from ablab import report
    from ablab.report import blocks

    arms = [("R0", {}), *(("R1", {"OPT_LR": f"{i}e-4"}) for i in range(1, STEPS))]
    made = campaign.write(folder, lambda arm, seed: 2.4 + 0.01 * seed, arms=arms, seeds=range(SEEDS), contrasts=[])
    load, start = Load(), time.process_time()
    report.build(made)
    figures = [Figure("report of 57 trials", time.process_time() - start, "s CPU", "<= 20")]
    figures.append(Figure("report.html of 57 trials", (made.report / "report.html").stat().st_size / 1e6, "MB", "<= 3"))
    if browser.CHROMIUM is None:
        return figures
    rows = [[f"t{i}", (i * 7919) % ROWS, f"arm {i % 7}"] for i in range(ROWS)]
    columns = [{"name": n} for n in ("trial", "value", "arm")]
    block = {"type": "table", "columns": columns, "rows": rows, "filter": True, "group": ["arm"]}
    model = {"title": "x", "banners": [], "lead": "", "facts": [], "sections": [{"title": "rows", "blocks": [block]}]}
    (folder / "long.html").write_text(blocks.document("x", model))
    tab = browser.Browser(folder / "profile")
    try:
        ready, sort = [], []
        for _ in range(rounds):
            tab.open((made.report / "report.html").as_uri())
            ready.append(tab.run("+document.documentElement.dataset.ready") / 1e3)
            tab.open((folder / "long.html").as_uri())
            click = "document.querySelectorAll('th button')[1].click()"
            sort.append(tab.run(f"(t => {{ {click}; return performance.now() - t; }})(performance.now())"))
    finally:
        tab.close()
    dirty = load.others() > DIRTY_CORES
    found = [("report.html interactive", ready, "s", "<= 1"), ("sort of 5,000 rows", sort, "ms", "<= 150")]
    kept = [Figure(n, statistics.median(v), unit, goal, "", dirty, {"chromium": v}) for n, v, unit, goal in found]
    return figures + kept
