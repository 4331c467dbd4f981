# SPDX-License-Identifier: MIT
"""A table is the same table in every form, and text from users stays text."""

import csv
import io
import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.report.table import Table, escape, line, merge

quick = settings(max_examples=100, deadline=None, derandomize=True)
HOSTILE = [
    "=cmd|'/C calc'!A0",
    "+1",
    "-1",
    "@x",
    "\tx",
    "\rx",
    "<img src=x onerror=alert(1)>",
    "a|b",
    "![x](http://y)",
]


def test_numbers_keep_their_value_and_people_see_the_format():
    table = merge(("name", "x"), [("a", 0.1 + 0.2), ("b", -1e-7), ("c", None)], {"x": ".2f"})
    assert [row[1] for row in csv.reader(io.StringIO(table.csv()))] == [
        "x",
        "0.30000000000000004",
        "-1e-07",
        "",
    ]
    assert json.loads(table.json())[0] == {"name": "a", "x": 0.1 + 0.2}
    assert table.text().splitlines() == ["name      x", "a      0.30", "b     -0.00", "c         -"]


@quick
@given(st.one_of(st.text(), st.sampled_from(HOSTILE)))
def test_no_csv_text_starts_a_formula(text):
    cell = list(csv.reader(io.StringIO(merge(("a",), [(text,)]).csv(), newline="")))[1:]
    got = cell[0][0] if cell and cell[0] else ""
    assert not got.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert got.removeprefix("'") == line(text).removeprefix("'")


@quick
@given(st.one_of(st.text(), st.sampled_from(HOSTILE)))
def test_markdown_cells_cannot_leave_their_cell(text):
    table = merge(("a", "b"), [(text, 1)]).markdown().splitlines()
    assert len(table) == 3 and len(re.findall(r"(?<!\\)\|", table[2].replace(r"\\", ""))) == 3
    assert "<" not in table[2] and not re.search(r"(?<!\\)[\[\]`*!]", table[2].replace(r"\\", ""))


@quick
@given(st.text())
def test_a_line_has_no_control_characters(text):
    assert line(text).isprintable() and "\n" not in line(text)
    assert all(c.isprintable() for c in merge(("a",), [(text,)]).text() if c != "\n")


def test_escaped_text_reads_the_same():
    assert escape("R1 - R0: val_loss") == "R1 - R0: val_loss"
    assert escape("a<b & *c*") == r"a&lt;b &amp; \*c\*"


def test_an_empty_table_is_its_header():
    assert Table(("a", "b"), ()).text() == "a  b"
    assert Table(("a", "b"), ()).markdown().splitlines() == ["| a | b |", "| --- | --- |"]
