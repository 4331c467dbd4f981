# SPDX-License-Identifier: MIT
"""`make watch`: the running campaign in a terminal, once a second; elsewhere a line every 30 s.  It only looks."""

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ablab.report import live
from ablab.report.live import Live
from ablab.report.table import line, shown
from ablab.rundir import Campaign

PERIOD_S, PLAIN_S = 1.0, 30.0
SHOWN = {"trial": 17, "state": 8, "share": 6, "step": 7, "loss": 7, "vs parent": 8, "tok/s": 7, "time left": 5}
"""Columns that fit 80, with their widths."""
HEADS = {"vs parent": "parent", "time left": "left"}
COLORS = {"running": "cyan", "done": "green", "queued": "dim"}
ALERTS = 5  # lines at most


def main(campaign: Campaign) -> int:
    """Watch until the campaign is over, q, or Ctrl-C; nothing of this reaches the campaign."""
    reader = Live(campaign)
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return plain(reader, print, time.sleep)
    from rich.console import Console
    from rich.live import Live as Screen

    console = Console(highlight=False)  # it knows NO_COLOR by itself
    with keys() as pressed, Screen(console=console, screen=True, auto_refresh=False) as screen:
        while True:
            found = reader.state()
            screen.update(render(found, console.width, console.height), refresh=True)
            if is_over(found) or pressed(PERIOD_S) in ("q", "Q"):
                break
    print(text(found))
    return 0


def plain(reader: Live, say: Callable[[str], Any], wait: Callable[[float], Any]) -> int:
    """A line now and every PLAIN_S until the campaign is over."""
    while True:
        found = reader.state()
        say(text(found))
        if is_over(found):
            return 0
        wait(PLAIN_S)


def is_over(found: dict[str, Any]) -> bool:
    """Whether nothing runs and nothing is about to."""
    return not found["counts"].get("running") and not found["counts"].get("queued")


def text(found: dict[str, Any]) -> str:
    """A state as one line."""
    counts = " ".join(f"{n} {state}" for state, n in found["counts"].items())
    names = list(live.COLUMNS)
    now = [r for r in found["rows"] if r[names.index("time left")] is not None][:3]
    running = ", ".join(
        f"{r[0]} step {shown(r[names.index('step')])} loss {shown(r[names.index('loss')], '.4g')}" for r in now
    )
    alerts = "; ".join(f"{a['kind']} {a['trial']}".strip() for a in found["alerts"][:ALERTS])
    parts = [
        f"{found['name']}: {counts} of {found['total']}, {found['eta']}",
        running,
        f"alerts: {alerts}" if alerts else "",
    ]
    return line(" | ".join(p for p in parts if p))


def render(found: dict[str, Any], width: int, height: int) -> Any:
    """A state as a rich renderable that fits the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    cut = lambda value, size: value if len(value) <= size else value[: size - 2] + ".."
    counts = "  ".join(f"{n} {state}" for state, n in found["counts"].items())
    share = found["done"] / max(1, found["total"])
    room = max(10, width - 32)
    head = [
        Text(cut(f"{found['name']}  {found['at']}", width), style="bold"),
        Text(f"[{'#' * round(share * room):{room}}] {found['done']}/{found['total']} done"),
        Text(cut(f"{counts}  {found['eta']}", width)),
        Text(cut(found["basis"], width), style="dim"),
    ]
    alerts = [Text(cut(f"! {a['kind']} {a['trial']}: {a['text']}", width), style="bold red") for a in found["alerts"]]
    if len(alerts) > ALERTS:
        alerts = [*alerts[: ALERTS - 1], Text(f"! and {len(alerts) - ALERTS + 1} more alerts", style="bold red")]
    table = Table(box=None, padding=(0, 1, 0, 0), expand=False, header_style="bold")
    names, spare = list(live.COLUMNS), max(0, width - 80)
    for name, size in SHOWN.items():
        wide = size + spare if name == "trial" else size
        table.add_column(
            HEADS.get(name, name),
            width=wide,
            no_wrap=True,
            justify="left" if size > 7 and name != "vs parent" else "right",
        )
    rows = max(1, height - len(head) - len(alerts) - 3)
    for row in found["rows"][:rows]:
        cells = []
        for name, size in SHOWN.items():
            value, form = row[names.index(name)], live.COLUMNS[name]
            words = f"{value:.0%}" if name == "share" and value is not None else shown(value, form)
            cells.append(Text(cut(line(words), size + spare if name == "trial" else size), style=COLORS.get(words, "")))
        table.add_row(*cells)
    rest = len(found["rows"]) - rows
    foot = Text("q leaves the view, the campaign goes on" + (f"; {rest} more trials" if rest > 0 else ""), style="dim")
    return Group(*head, *alerts, table, foot)


@contextmanager
def keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key, and returns it or an empty text."""
    if not sys.stdin.isatty():
        yield lambda wait: time.sleep(wait) or ""
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield lambda wait: (
            os.read(sys.stdin.fileno(), 1).decode(errors="replace")
            if select.select([sys.stdin], [], [], wait)[0]
            else ""
        )
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
