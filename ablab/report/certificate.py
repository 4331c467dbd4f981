# SPDX-License-Identifier: MIT
"""The form of a certificate: its schema, its identity, what it vouches for, and whether it still holds."""

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ablab import rundir
from ablab.rundir import Campaign

SCHEMA = Path(__file__).with_name("certificate.schema.json")
_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "null": type(None),
}


class CertificateError(ValueError):
    """A certificate that cannot be read, or is not what it says; the text tells which part."""


def inputs(c: Campaign) -> list[dict[str, str]]:
    """Path and SHA-256 of every file that a judgement of the campaign rests on: plan, amendments, journal, and of each
    trial DONE, the lease, all that DONE names, and telemetry.  Raises FileNotFoundError when one is gone."""
    paths = [c.file("campaign"), *sorted(c.path.glob("amend-[0-9]*.json")), c.journal]
    for t in c.trials():
        done = t.read("done")
        names = [*done["files"], *(t.file(kind).name for kind in ("done", "lease"))] if done else ()
        paths += [t.path / name for name in names]
        paths += [a.telemetry for a in t.attempts() if done and a.telemetry.exists()]
    return [{"path": p.relative_to(c.path).as_posix(), "sha256": rundir.stamp(p)["sha256"]} for p in paths]


def bundle_hash(files: Iterable[Mapping[str, str]]) -> str:
    """SHA-256 over what a bundle holds."""
    return hashlib.sha256(_canonical(sorted((f["path"], f["sha256"]) for f in files))).hexdigest()


def identity(body: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON without `id` and `signature`."""
    return hashlib.sha256(_canonical({k: v for k, v in body.items() if k not in ("id", "signature")})).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write(path: Path, body: dict[str, Any], key: Path | None = None) -> dict[str, Any]:
    """Give a certificate its identity, sign it if there is a key, check it against the schema and write it.

    `key` is a private key that ssh-keygen -Y takes.  Raises CertificateError when it cannot sign.
    """
    body = {**body, "id": identity(body)}
    body.pop("signature", None)
    if key:
        done = _keygen("sign", "-q", "-f", str(key), data=body["id"])
        if done.returncode or not done.stdout:
            raise CertificateError(f"SIGN={key}: cannot sign: {done.stderr.decode(errors='replace').strip()}")
        body["signature"] = done.stdout.decode()
    if flaw := next(flaws(body), None):
        raise AssertionError(flaw)
    rundir.write_bytes(path, (json.dumps(body, indent=1, allow_nan=False) + "\n").encode())
    return body


def _keygen(action: str, *words: str, data: str) -> subprocess.CompletedProcess:
    command = ["ssh-keygen", "-Y", action, "-n", "ablab.certificate", *words]
    try:
        return subprocess.run(command, input=data.encode(), capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CertificateError(f"ssh-keygen: {error}") from error


def read(path: Path) -> dict[str, Any]:
    """A certificate whose form, identity and signature hold.  Raises CertificateError."""
    try:
        with rundir.plain(path) as file:
            body = json.loads(file.read())
    except (OSError, ValueError) as error:
        raise CertificateError(f"{path}: cannot be read as a certificate: {error}; make verify writes one") from error
    if flaw := next(flaws(body), None):
        raise CertificateError(f"{path}: {flaw}; it was edited, or written by another version")
    if body["id"] != identity(body):
        raise CertificateError(f"{path}: id: is not that of its content; it was edited, make verify writes a new one")
    if "signature" in body:
        with tempfile.TemporaryDirectory() as folder:
            signature = Path(folder, "signature")
            signature.write_text(body["signature"])
            done = _keygen("check-novalidate", "-s", str(signature), data=body["id"])
        if done.returncode:
            raise CertificateError(f"{path}: signature: is not of this content; it was edited")
    return body


def stale(body: Mapping[str, Any], folder: Path) -> list[str]:
    """Inputs of a certificate that are not below `folder` as they were."""
    gone = []
    for entry in body["inputs"]:
        path = folder
        try:
            for part in entry["path"].split("/"):
                path = path / part
                if part in ("", "..") or path.is_symlink():
                    raise rundir.RunError(f"{path}: leads elsewhere")
            fits = path.is_file() and rundir.stamp(path)["sha256"] == entry["sha256"]
        except (OSError, rundir.RunError):
            fits = False
        gone += [] if fits else [entry["path"]]
    return gone


def valid(c: Campaign) -> str | None:
    """Identity of the campaign's certificate if one was issued and still holds, else None: then nothing that rests on
    the campaign is certified."""
    try:
        body = read(c.certificate)
        return body["id"] if body["verdict"] == "issued" and body["inputs"] == inputs(c) else None
    except (CertificateError, rundir.RunError, OSError):
        return None


def flaws(body: Any) -> Iterator[str]:
    """Where a certificate departs from the schema, or from what the schema cannot say."""
    schema = json.loads(SCHEMA.read_text())
    yield from _flaws(body, schema, schema["$defs"], "certificate")
    if isinstance(body, dict) and body.get("verdict") == "issued":
        if body.get("findings"):
            yield "certificate: issued, with findings"
        if None in (body.get("published") or {}).values():
            yield "certificate.published: issued, and not all seven fields are there"


def _flaws(value: Any, node: Mapping[str, Any], defs: Mapping[str, Any], at: str) -> Iterator[str]:
    """The part of JSON Schema 2020-12 that the certificate uses."""
    if "$ref" in node:
        node = defs[node["$ref"].removeprefix("#/$defs/")]
    kinds = [node["type"]] if isinstance(node.get("type"), str) else node.get("type", [])
    if kinds and (not any(isinstance(value, _TYPES[k]) for k in kinds) or isinstance(value, bool)):
        yield f"{at}: {value!r:.40} is no {' or '.join(kinds)}"
        return
    if value not in node.get("enum", [value]) or value != node.get("const", value):
        yield f"{at}: {value!r:.40} is not allowed"
    if "pattern" in node and not re.search(node["pattern"], value):
        yield f"{at}: {value!r:.40} has another form"
    if isinstance(value, dict):
        yield from (f"{at}.{name}: missing" for name in node.get("required", ()) if name not in value)
        known = node.get("properties", {})
        for name, item in value.items():
            if name in known:
                yield from _flaws(item, known[name], defs, f"{at}.{name}")
            elif node.get("additionalProperties", True) is False:
                yield f"{at}.{name}: unknown key"
    if isinstance(value, list):
        if not node.get("minItems", 0) <= len(value) <= node.get("maxItems", len(value)):
            yield f"{at}: {len(value)} items"
        for i, item in enumerate(value):
            yield from _flaws(item, node.get("items", {}), defs, f"{at}[{i}]")
