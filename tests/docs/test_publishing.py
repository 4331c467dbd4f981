# SPDX-License-Identifier: MIT
"""Every line of the publishing checklist is held by fields that a certificate really has."""

import re

import pytest

from ablab.report import load
from ablab.verify import issue
from tests import project
from tests.verify import fair

PAGE = project.ROOT / "docs/publishing.md"


def unheld(text: str, body: dict) -> list[str]:
    """Checklist lines without a field, or with one that no certificate has."""
    known = {*body["groups"], *(f"published.{name}" for name in body["published"])}
    known |= {f"{group}.{f['name']}" for group, fields in body["groups"].items() for f in fields} | {"code.public"}
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    lines = [row for row in rows if row[0] != "checklist line"]
    assert lines
    return [line for line, fields in lines if not fields or set(re.split(r",\s*", fields)) - known]


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    return issue.judged(load.read(fair.write(tmp_path_factory.mktemp("fair"))), (), "quality")


def test_each_line_of_the_checklist_maps_to_a_field(body):
    assert unheld(PAGE.read_text(), body) == []


def test_all_groups_and_published_fields_are_on_the_checklist(body):
    table = "\n".join(line for line in PAGE.read_text().splitlines() if line.startswith("| "))
    assert [g for g in body["groups"] if not re.search(rf"\b{g}\b", table)] == []
    assert [n for n in body["published"] if f"published.{n}" not in table] == []


@pytest.mark.parametrize("field", ["", "luck", "batch.luck"])
def test_a_line_without_a_field_is_seen(body, field):
    assert unheld(f"| checklist line | field |\n| wish hard | {field} |\n", body) == ["wish hard"]
