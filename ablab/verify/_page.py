# SPDX-License-Identifier: MIT
"""certificate.html: one static page without script; every text in it is escaped."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;width:100%;margin:.5rem 0 1.5rem}
td,th{border:1px solid #bbb;padding:.3rem .5rem;text-align:left;vertical-align:top;overflow-wrap:anywhere}
.issued{color:#06653a}.refused{color:#9c1c1c}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}.issued{color:#5fd49a}.refused{color:#ff9a9a}}
"""


def html(body: Mapping[str, Any]) -> str:
    """The page of a certificate."""
    claims = [
        (c["contrast"], c["metric"], c["effect"], c["interval"], c["level"], c["n"], c["p_family"], c["word"])
        for c in body["claims"]
    ]
    fields = [
        (f"{group}.{f['name']}", f["rule"], f["status"], f["values"])
        for group, fs in body["groups"].items()
        for f in fs
    ]
    findings = [(f["field"], f["rule"], f["why"], f["fix"], f["values"]) for f in body["findings"]]
    style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name=viewport content="width=device-width"><title>Certificate</title>',
        f"<style>{_STYLE}</style>",
        f"<h1>{_cell(body['campaign'])}: <span class={body['verdict']}>{body['verdict']}</span></h1>",
        f"<p>Certificate {body['id']}, {body['kind']}, {_cell(body['issued'])}</p>",
        _table(("contrast", "metric", "effect", "interval", "level", "n", "p family", "verdict"), claims),
        "<h2>Findings</h2>" + _table(("field", "rule", "why", "fix", "values"), findings) if findings else "",
        "<h2>Published fields</h2>" + _table(("field", "value"), body["published"].items()),
        "<h2>Fields</h2>" + _table(("field", "rule", "status", "values"), fields),
        "<h2>Inputs</h2>" + _table(("file", "SHA-256"), [(i["path"], i["sha256"]) for i in body["inputs"]]),
    ]
    return "\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["".join(f"<th>{_cell(h)}" for h in head), *("".join(f"<td>{_cell(v)}" for v in row) for row in rows)]
    return "<table>" + "".join(f"<tr>{line}" for line in lines) + "</table>"


def _cell(value: Any) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value))
