# SPDX-License-Identifier: MIT
"""Commands in the documents run, links lead somewhere, and pages stay short."""

import re
import shlex
from pathlib import Path

import pytest

from tests import project

ROOT = project.ROOT
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return project.copy(tmp_path_factory.mktemp("project"))


def consoles(page: Path) -> list[list[str]]:
    """Commands of each console block, one list a block."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(), re.S)
    return [[line[2:] for line in block.splitlines() if line.startswith("$ ")] for block in blocks]


@pytest.mark.parametrize("page", [p for p in PAGES if consoles(p)], ids=lambda p: p.name)
def test_commands_run(page, copy):
    for command in [c for block in consoles(page) for c in block]:
        program, *words = shlex.split(command)
        assert program == "make", command
        done = project.make(copy, *words)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert done.stdout.strip(), command


def test_a_command_that_fails_is_seen(copy):
    assert project.make(copy, "plan", "BATCH=4").returncode != 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_are_short_and_their_links_exist(page):
    text = page.read_text()
    assert text.isascii()
    if page.name not in ("metrics.md", "log.md"):  # a table of all names, and what only grows
        assert len(text.splitlines()) <= 120
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target


def test_named_files_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:ablab|docs|tests|scripts|defconfigs|studies)/[\w./-]+\.\w+)`", page.read_text()):
            if "gain" not in name and "NAME" not in name:
                assert (ROOT / name).exists(), f"{page.name}: {name}"
